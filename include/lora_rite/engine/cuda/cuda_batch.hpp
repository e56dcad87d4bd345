#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/engine/cuda/arguments.hpp"
#include "lora_rite/engine/cuda/launch.hpp"
#include "lora_rite/engine/device/device_batch.hpp"
#include "lora_rite/leaf.hpp"
#include "lora_rite/options.hpp"

namespace lora_rite::cuda {

/// Pairs of one shape whose tall data our own kernels move. What is remembered is what `DeviceBatch` remembers, so that
/// a step with an option that the kernels lack can be that engine's.
class CudaBatch final : public device::DeviceBatch {
 public:
  using DeviceBatch::DeviceBatch;

  /// Can the kernels step this pair? float, half or bfloat16, contiguous, the rank last in B except for dimensions of
  /// one, and at most 64.
  static bool takes(const FactorPair& pair, const Kernels& kernels) {
    bool rank_is_last = true;
    for (int64_t d = 2; d < pair.b.dim(); ++d) rank_is_last = rank_is_last && pair.b.size(d) == 1;
    const auto fits = [&](const at::Tensor& factor) {
      const at::ScalarType dtype = factor.scalar_type();
      return (dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16) && factor.is_contiguous() &&
             factor.numel() > 0;
    };
    return rank_is_last && fits(pair.a) && fits(pair.b) &&
           kernels.takes(static_cast<int>(pair.a.get_device()), pair.a.size(0));
  }

  /// The kernels' name for its dtype.
  Dtype kernel_dtype() const {
    return dtype_ == at::kHalf ? Dtype::Half : dtype_ == at::kBFloat16 ? Dtype::BFloat16 : Dtype::Float;
  }

  int64_t rows_of(Side side) const { return pairs_[0].factor(side).numel() / rank_; }

  bool can_step(Side side, size_t i) const override { return pairs_[i].factor(side).is_contiguous(); }

  /// Has a factor a gradient of another dtype, as a loss scaler leaves it (float of half factors)?
  bool has_other_gradients() const {
    for (const FactorPair& pair : pairs_)
      for (const Side side : kSides)
        if (const at::Tensor gradient = lora_rite::detail::leaf_of(pair.factor(side)).grad();
            gradient.defined() && gradient.scalar_type() != dtype_)
          return true;
    return false;
  }

  /// Appends A and B of every pair to `all`; `kept` keeps alive what the pointers point at. Returns whether anyone has
  /// a gradient.
  bool add_pointers(std::vector<Pointers>& all, std::vector<at::Tensor>& kept) const {
    lora_rite::detail::Gradients gradients;
    bool any = false;
    for (const FactorPair& pair : pairs_) {
      for (const Side side : kSides) {
        const at::Tensor& factor = pair.factor(side);
        at::Tensor gradient = gradients.of(factor);
        Pointers at = {factor.mutable_data_ptr(), nullptr};
        if (gradient.defined()) {
          if (!gradient.is_contiguous()) gradient = gradient.contiguous();
          at.gradient = gradient.const_data_ptr();
          kept.push_back(std::move(gradient));
          any = true;
        }
        all.push_back(at);
      }
    }
    return any;
  }

  /// What is remembered, with momenta and master copies for every side that has a gradient. `pointers` are this
  /// batch's.
  PairState state_for(const Pointers* pointers, bool master_weights) const {
    PairState next = state_;
    for (const Side side : kSides) {
      if (!master_weights || dtype_ == at::kFloat) next.master[side] = at::Tensor();
      bool any = false;
      for (int64_t i = 0; i < count(); ++i) any = any || pointers[2 * i + index_of(side)].gradient != nullptr;
      if (!any) continue;
      const at::TensorOptions floats = double_options().dtype(at::kFloat);
      std::vector<int64_t> shape = shapes_[side];
      shape.insert(shape.begin(), count());
      if (!next.momentum[side].defined()) next.momentum[side] = at::zeros(shape, floats);
      // NaN is no copy of anything: what is stored counts.
      if (master_weights && dtype_ != at::kFloat && !next.master[side].defined())
        next.master[side] = at::full(shape, std::numeric_limits<double>::quiet_NaN(), floats);
    }
    return next;
  }

  /// Appends A and B of every pair, as `state` remembers them.
  void add_factors(PairState& state, std::vector<Factor>& all) const {
    const auto doubles = [](const at::Tensor& tensor, int64_t index, int64_t size) {
      return tensor.data_ptr<double>() + index * size;
    };
    for (int64_t i = 0; i < count(); ++i) {
      for (const Side side : kSides) {
        const int64_t s = index_of(side), number = s * count() + i, square = rank_ * rank_;
        const auto floats = [&](const at::Tensor& tensor) {
          return tensor.defined() ? tensor.data_ptr<float>() + i * rows_of(side) * rank_ : nullptr;
        };
        Factor factor = {};
        factor.rows = rows_of(side);
        factor.rank_first = side == Side::A ? 1 : 0;
        factor.momentum = floats(state.momentum[side]);
        factor.master = floats(state.master[side]);
        factor.second_moment = doubles(state.moments.second_moment, number, square);
        factor.inverse_root = doubles(state.moments.inverse_root, number, square);
        factor.escaped_mass = doubles(state.moments.escaped_mass, number, 1);
        factor.step = doubles(state.moments.step, number, 1);
        factor.previous_scale = doubles(state.previous_scale, number, 1);
        factor.previous_rate = doubles(state.previous_rate, number, 1);
        factor.squared_sums = doubles(state.column_sums, (2 * s) * count() + i, rank_);
        factor.weighted_sums = doubles(state.column_sums, (2 * s + 1) * count() + i, rank_);
        factor.unmagnified_norm = doubles(state.unmagnified_norm, number, 1);
        factor.clip_factor = doubles(state.clip_factor, number, 1);
        all.push_back(factor);
      }
    }
  }

  /// After the launches of act 3: autograd hears of the new values, and `next` is what is remembered. `pointers` are
  /// this batch's.
  void finish(const Pointers* pointers, PairState& next) noexcept {
    for (size_t i = 0; i < pairs_.size(); ++i)
      for (const Side side : kSides)
        if (pointers[2 * i + static_cast<size_t>(index_of(side))].gradient != nullptr)
          pairs_[i].factor(side).unsafeGetTensorImpl()->bump_version();
    std::swap(state_, next);
  }

  void restore(const std::vector<PairState>& states) override {
    DeviceBatch::restore(states);
    restored_ = true;
  }
  /// Were states restored since the last call?
  bool take_restored() { return std::exchange(restored_, false); }

 private:
  bool restored_ = false;
};

}  // namespace lora_rite::cuda
