#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/engine/acts.hpp"
#include "lora_rite/engine/batch.hpp"
#include "lora_rite/engine/host/decide.hpp"
#include "lora_rite/engine/host/packing.hpp"
#include "lora_rite/engine/host/pairs.hpp"
#include "lora_rite/engine/host/torch_threads.hpp"
#include "lora_rite/leaf.hpp"

/// The host engine's front: LibTorch's tensors as plain memory for `pairs.hpp`, on LibTorch's threads.
namespace lora_rite::host {

/// Contiguous float factors on a CPU. B may also be one expert's part of a tensor: it is stepped as a packed copy.
class HostBatch : public engine::Batch {
 public:
  /// Can this engine step the pair on this processor? The rank must be last in B, except for dimensions of one.
  static bool takes(const FactorPair& pair) {
    bool rank_is_last = true;
    for (int64_t d = 2; d < pair.b.dim(); ++d) rank_is_last = rank_is_last && pair.b.size(d) == 1;
    const auto fits = [](const at::Tensor& factor) {
      return factor.is_cpu() && factor.scalar_type() == at::kFloat && factor.is_contiguous() && factor.numel() > 0;
    };
    return rank_is_last && fits(pair.a) && (fits(pair.b) || is_packed(pair.b)) && kernels::chosen() != nullptr;
  }

  HostBatch(std::vector<FactorPair> pairs, std::vector<std::string> labels)
      : Batch(std::move(pairs), std::move(labels)),
        plain_(count(), {shape_of(pairs_[0].a, Side::A), shape_of(pairs_[0].b, Side::B)}) {
    for (const Side side : kSides) seen_[side].resize(pairs_.size());
    for (const FactorPair& pair : pairs_) may_be_packed_.push_back(is_packed(pair.b));
    const auto packed = static_cast<size_t>(std::count(may_be_packed_.begin(), may_be_packed_.end(), true));
    if (packed == 0) return;
    packed_values_.resize(static_cast<size_t>(count() * size_of(Side::B)));
    packed_gradients_.resize(packed_values_.size());
    packing_.reserve(2 * packed, plain_.shape(Side::B).rows, rank_);
  }

  bool can_step(Side side, size_t i) const override {
    return is_packed(side, i) || pairs_[i].factor(side).is_contiguous();
  }

  Pairs& plain() { return plain_; }

  /// Factors and gradients in one step. `gradients` keeps alive what the views point at.
  struct Inputs {
    PerSide<std::vector<FactorView>> views;
    PerSide<std::vector<at::Tensor>> gradients;
    bool any_gradient = false;
  };
  Inputs inputs() {
    Inputs result;
    lora_rite::detail::Gradients gradients;
    for (const Side side : kSides) {
      result.views[side].reserve(pairs_.size());
      result.gradients[side].reserve(pairs_.size());
      for (size_t i = 0; i < pairs_.size(); ++i) {
        const at::Tensor& factor = pairs_[i].factor(side);
        const bool packed = is_packed(side, i);
        at::Tensor gradient = gradients.of(factor);
        const bool is_plain =
            !gradient.defined() || (gradient.scalar_type() == at::kFloat && (gradient.is_contiguous() || packed));
        if (!is_plain) gradient = gradient.to(at::kFloat).contiguous();
        result.any_gradient = result.any_gradient || gradient.defined();
        FactorView view;
        view.values = packed ? packed_values(i) : static_cast<float*>(bytes_of(factor));
        view.touched = !(seen_[side][i] == Seen::of(factor));
        if (gradient.defined() && gradient.is_contiguous()) {
          view.gradient = gradient.const_data_ptr<float>();
        } else if (gradient.defined()) {
          view.gradient = packed_gradient(i);
        }
        result.views[side].push_back(view);
        result.gradients[side].push_back(std::move(gradient));
      }
    }
    if (result.any_gradient) pack(result);
    return result;
  }

  /// What is remembered, as plain memory.
  StateView state_view() { return view_of(state_); }
  static StateView view_of(PairState& state) {
    const auto doubles = [](at::Tensor& tensor) { return tensor.data_ptr<double>(); };
    StateView view = {doubles(state.moments.second_moment), doubles(state.moments.inverse_root),
                      doubles(state.moments.escaped_mass),  doubles(state.moments.step),
                      doubles(state.column_sums),           doubles(state.previous_scale),
                      doubles(state.previous_rate)};
    for (const Side side : kSides) {
      const auto floats = [](at::Tensor& tensor) { return tensor.defined() ? tensor.data_ptr<float>() : nullptr; };
      view.momentum[side] = floats(state.momentum[side]);
      view.row_moments[side] = floats(state.row_moments[side]);
    }
    return view;
  }

  /// The state with momenta, and with row moments if they are wanted, for every side that has a gradient.
  PairState state_for(const Inputs& inputs, bool row_equilibration) const {
    PairState next = state_;
    for (const Side side : kSides) {
      bool any = false;
      for (const FactorView& view : inputs.views[side]) any = any || view.gradient != nullptr;
      if (!any) continue;
      const at::TensorOptions floats = double_options().dtype(at::kFloat);
      std::vector<int64_t> shape = shapes_[side];
      shape.insert(shape.begin(), count());
      if (!next.momentum[side].defined()) next.momentum[side] = at::zeros(shape, floats);
      if (row_equilibration && !next.row_moments[side].defined())
        next.row_moments[side] = at::ones({count(), plain_.shape(side).rows}, floats);
    }
    return next;
  }

  /// The rest of `commit`, after the rows have moved: packed copies go back, autograd hears of the new values.
  void finish(const Inputs& inputs, PairState& next) noexcept {
    for (const Side side : kSides) {
      for (size_t i = 0; i < pairs_.size(); ++i) {
        const at::Tensor& factor = pairs_[i].factor(side);
        if (inputs.views[side][i].gradient == nullptr) continue;
        factor.unsafeGetTensorImpl()->bump_version();  // as an in-place operator would
        if (is_packed(side, i)) packing_.add(matrix_of(factor), packed_values(i));
      }
    }
    packing_.write_back(torch_threads());
    for (const Side side : kSides)
      for (size_t i = 0; i < pairs_.size(); ++i) seen_[side][i] = Seen::of(pairs_[i].factor(side));
    std::swap(state_, next);
  }

  PairDiagnostics diagnose(int64_t index) const override {
    PairDiagnostics result = Batch::diagnose(index);
    const auto pair = static_cast<size_t>(index);
    result.a.in_double = plain_.double_steps({Side::A, pair});
    result.b.in_double = plain_.double_steps({Side::B, pair});
    return result;
  }

  void restore(const std::vector<PairState>& states) override {
    Batch::restore(states);
    plain_.forget();
  }

 private:
  /// Where a factor lay after the last step, and how often it had been written to.
  struct Seen {
    const void* data = nullptr;
    int64_t version = 0;

    static Seen of(const at::Tensor& factor) { return {bytes_of(factor), factor._version()}; }
    bool operator==(const Seen& other) const { return data == other.data && version == other.version; }
  };

  static void* bytes_of(const at::Tensor& tensor) { return tensor.unsafeGetTensorImpl()->mutable_data(); }

  /// A part of a leaf, float on a CPU, [n, r] and not contiguous?
  static bool is_packed(const at::Tensor& factor) {
    return !factor.is_contiguous() && lora_rite::detail::is_part(factor) && factor.is_cpu() &&
           factor.scalar_type() == at::kFloat && factor.dim() == 2 && factor.numel() > 0;
  }
  /// Of pair i, for which there is room if it was so when the batch was made.
  bool is_packed(Side side, size_t i) const { return side == Side::B && may_be_packed_[i] && is_packed(pairs_[i].b); }

  static kernels::Shape shape_of(const at::Tensor& factor, Side side) {
    const int64_t rank = factor.size(side == Side::A ? 0 : 1);
    return {factor.numel() / rank, rank, /*rank_first=*/side == Side::A};
  }
  int64_t size_of(Side side) const { return plain_.shape(side).rows * rank_; }
  float* packed_values(size_t i) { return packed_values_.data() + static_cast<int64_t>(i) * size_of(Side::B); }
  float* packed_gradient(size_t i) { return packed_gradients_.data() + static_cast<int64_t>(i) * size_of(Side::B); }

  static Packing::Matrix matrix_of(const at::Tensor& tensor) {
    return {static_cast<float*>(bytes_of(tensor)), tensor.stride(0), tensor.stride(1)};
  }

  /// Copies of what lies apart. All values, for what is written back is all of them.
  void pack(const Inputs& inputs) {
    if (packed_values_.empty()) return;
    for (size_t i = 0; i < pairs_.size(); ++i) {
      if (!is_packed(Side::B, i)) continue;
      packing_.add(matrix_of(pairs_[i].b), packed_values(i));
      const at::Tensor& gradient = inputs.gradients.b[i];
      if (gradient.defined() && !gradient.is_contiguous()) packing_.add(matrix_of(gradient), packed_gradient(i));
    }
    packing_.pack(torch_threads());
  }

  Pairs plain_;
  PerSide<std::vector<Seen>> seen_;
  std::vector<bool> may_be_packed_;                      ///< by pair: did B lie apart at first?
  Packing packing_;                                      ///< of B factors that lie apart
  std::vector<float> packed_values_, packed_gradients_;  ///< [k, n, r]
};

/// A batch by itself: on a CPU nothing is gained from deciding on several at once.
template <class Basis>
class HostGroup final : public engine::BatchGroup {
 public:
  HostGroup(HostBatch& batch, size_t place) : batch_(batch), batches_{place} {}

  at::Device device() const override { return at::kCPU; }

  void check_options(const LoraRiteOptions& options) const override {
    TORCH_CHECK(!options.capturable(),
                "LoraRite: capturable was switched on after the engine was chosen, expected before the first step or "
                "`load`");
  }

  std::unique_ptr<engine::Observation> observe(const LoraRiteOptions& options) override {
    HostBatch::Inputs inputs = batch_.inputs();
    if (!inputs.any_gradient) return nullptr;
    auto found = batch_.plain().observe(inputs.views, batch_.state_view(), hyperparameters(options), torch_threads());
    return std::make_unique<Observed>(*this, std::move(inputs), std::move(found));
  }

 private:
  class Planned final : public engine::Plan {
   public:
    Planned(HostBatch& batch, HostBatch::Inputs inputs, PairState next, host::Plan plan,
            const rule::Hyperparameters& numbers, double clip)
        : batch_(batch),
          inputs_(std::move(inputs)),
          next_(std::move(next)),
          plan_(std::move(plan)),
          numbers_(numbers),
          clip_(clip) {}

    void commit() noexcept override {
      double* norm = next_.unmagnified_norm.data_ptr<double>();
      double* clip = next_.clip_factor.data_ptr<double>();
      for (int64_t number = 0; number < 2 * batch_.count(); ++number) {
        norm[number] = std::sqrt((*plan_.work)[batch_.plain().factor_of(number)].unmagnified_squared);
        clip[number] = clip_;
      }
      batch_.plain().commit(std::move(plan_), HostBatch::view_of(next_), numbers_, torch_threads());
      batch_.finish(inputs_, next_);
    }

   private:
    HostBatch& batch_;
    HostBatch::Inputs inputs_;
    PairState next_;  ///< the state's tensors, and new ones among them
    host::Plan plan_;
    rule::Hyperparameters numbers_;
    double clip_;
  };

  /// Of a step that is skipped: nothing happens.
  class NoPlan final : public engine::Plan {
   public:
    void commit() noexcept override {}
  };

  class Observed final : public engine::Observation {
   public:
    Observed(const HostGroup& group, HostBatch::Inputs inputs, host::Observation found)
        : group_(group), inputs_(std::move(inputs)), found_(std::move(found)) {}

    at::Tensor finite() const override { return at::scalar_tensor(found_.finite(), at::kBool); }

    at::Tensor unmagnify(const at::Tensor& step_allowed) override {
      HostBatch& batch = group_.batch_;
      at::Tensor norms = at::zeros({batch.count()}, at::kDouble);
      if (!step_allowed.item<bool>()) return norms;
      host::unmagnify<Basis>(batch.plain(), found_, batch.state_view(), torch_threads());
      for (int64_t i = 0; i < batch.count(); ++i) {
        const auto pair = static_cast<size_t>(i);
        norms.data_ptr<double>()[i] =
            (*found_.work)[{Side::A, pair}].unmagnified_squared + (*found_.work)[{Side::B, pair}].unmagnified_squared;
      }
      return norms;
    }

    std::unique_ptr<engine::Plan> plan(const LoraRiteOptions& options, const at::Tensor& clip_factor,
                                       const at::Tensor& step_allowed) override {
      if (!step_allowed.item<bool>()) return std::make_unique<NoPlan>();
      HostBatch& batch = group_.batch_;
      const rule::Hyperparameters numbers = hyperparameters(options);
      const double clip = clip_factor.item<double>();
      PairState next = batch.state_for(inputs_, numbers.row_equilibration);
      host::Plan plan =
          host::plan(batch.plain(), std::move(found_), HostBatch::view_of(next), numbers, clip, torch_threads());
      return std::make_unique<Planned>(batch, std::move(inputs_), std::move(next), std::move(plan), numbers, clip);
    }

    const std::vector<size_t>& batches() const override { return group_.batches_; }

   private:
    const HostGroup& group_;
    HostBatch::Inputs inputs_;
    host::Observation found_;
  };

  HostBatch& batch_;
  std::vector<size_t> batches_;
};

}  // namespace lora_rite::host
