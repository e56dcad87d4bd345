#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/diagnostics.hpp"
#include "lora_rite/engine/choose.hpp"
#include "lora_rite/engine/layout.hpp"
#include "lora_rite/engine/pair_state.hpp"
#include "lora_rite/factor_pair.hpp"
#include "lora_rite/rule/side.hpp"

namespace lora_rite::engine {

/// Factors of which every process holds some rows (see `RowShardedLoraRite`): Gram matrices and norms are sums over all
/// of them.
struct RowShards {
  PerSide<bool> sharded;                 ///< a factor that is not is whole in every process
  PerSide<int64_t> begin;                ///< the first row that this process holds
  PerSide<int64_t> rows;                 ///< n over all processes
  std::function<void(at::Tensor&)> sum;  ///< adds up over the processes, in place
  bool first;                            ///< is this the process whose whole factors count?
};

/// k pairs of one param group whose factors agree in shape, dtype and device, and what is remembered of them: what all
/// engines share.
class Batch {
 public:
  Batch(std::vector<FactorPair> pairs, std::vector<std::string> labels)
      : pairs_(std::move(pairs)),
        labels_(std::move(labels)),
        shapes_{pairs_[0].a.sizes().vec(), pairs_[0].b.sizes().vec()},
        device_(pairs_[0].a.device()),
        dtype_(pairs_[0].a.scalar_type()),
        rank_(shapes_.a[0]),
        state_(PairState::zeros(count(), rank_, double_options())) {}
  virtual ~Batch() = default;
  Batch(const Batch&) = delete;
  Batch& operator=(const Batch&) = delete;

  int64_t count() const { return static_cast<int64_t>(pairs_.size()); }
  at::Device device() const { return device_; }
  at::ScalarType dtype() const { return dtype_; }
  int64_t rank() const { return rank_; }

  /// Throws c10::Error naming the pair if a factor is no longer what this batch was built for, or has a gradient that
  /// cannot be used. Changes nothing.
  void check_inputs() const {
    for (size_t i = 0; i < pairs_.size(); ++i) {
      for (const Side side : kSides) {
        const at::Tensor& factor = pairs_[i].factor(side);
        const char* which = name_of(side);
        TORCH_CHECK(factor.sizes() == at::IntArrayRef(shapes_[side]) && factor.scalar_type() == dtype_ &&
                        factor.device() == device_,
                    labels_[i], ": factor ", which, " is now ", factor.scalar_type(), factor.sizes(), " on ",
                    factor.device(), ", expected ", dtype_, at::IntArrayRef(shapes_[side]), " on ", device_,
                    " as in the first step; build the optimizer after moving or converting the module");
        lora_rite::detail::check_part(factor, labels_[i], which);
        lora_rite::detail::check_no_overlap(factor, labels_[i], which);
        TORCH_CHECK(can_step(side, i), labels_[i], ": factor ", which, " now has strides ", factor.strides(),
                    ", expected a contiguous one as in the first step; give it set_data(x.contiguous())");
        const at::Tensor leaf = lora_rite::detail::leaf_of(factor);
        const at::Tensor& gradient = leaf.grad();
        if (!gradient.defined()) continue;
        TORCH_CHECK(gradient.layout() == at::kStrided, labels_[i], ": the gradient of factor ", which, " has layout ",
                    gradient.layout(), ", expected a dense one (for an embedding: sparse(false))");
        TORCH_CHECK(gradient.sizes() == leaf.sizes() && gradient.device() == leaf.device(), labels_[i],
                    ": the gradient of factor ", which, " has shape ", gradient.sizes(), " on ", gradient.device(),
                    ", expected ", leaf.sizes(), " on ", leaf.device());
      }
    }
  }

  /// Can a step read and write pair i's factor as it lies in memory now?
  virtual bool can_step(Side /*side*/, size_t /*i*/) const { return true; }

  /// What is remembered of all pairs. From the second step on its tensors stay where they are.
  const PairState& state() const { return state_; }

  /// The remembered state of pair `index` (k = 1), for a checkpoint.
  PairState pick(int64_t index) const { return state_.pick(index); }

  /// Reads a pair's state that must fit this batch and be finite; see PairState::load. Without an archive: nothing
  /// remembered.
  PairState read(torch::serialize::InputArchive* archive, int64_t index) const {
    if (archive == nullptr) return PairState::zeros(1, rank_, double_options());
    return PairState::load(*archive, labels_[index], shapes_, rank_, wide_dtype(), device_)
        .check_finite(labels_[index]);
  }

  /// Takes over the states of all pairs, as `pick` gave them.
  virtual void restore(const std::vector<PairState>& states) {
    PerSide<at::Tensor> absent;
    for (const Side side : kSides) {
      std::vector<int64_t> shape = shapes_[side];
      shape.insert(shape.begin(), 1);
      absent[side] = at::zeros(shape, double_options().dtype(wide_dtype()));
    }
    state_ = PairState::join(states, absent);
  }

  /// Reads to the host; for people, not for the step. What a value that is not finite leaves unknown is NaN.
  virtual PairDiagnostics diagnose(int64_t index) const {
    PairDiagnostics result;
    result.name = pairs_[index].name;
    result.clip_factor = state_.clip_factor[0][index].item<double>();
    for (const Side side : kSides) {
      FactorDiagnostics& factor = side == Side::A ? result.a : result.b;
      const int64_t s = index_of(side);
      const at::Tensor x = wide(tall(pairs_[index].factor(side).detach().unsqueeze(0), side)).squeeze(0).cpu();
      factor.condition_number = condition_number(x);
      factor.unmagnified_gradient_norm = state_.unmagnified_norm[s][index].item<double>();
      factor.escaped_mass = state_.moments.escaped_mass[s][index].item<double>();
      const at::Tensor v = state_.moments.second_moment[s][index];
      const double total = v.trace().item<double>();
      factor.effective_rank = total > 0 ? total * total / v.square().sum().item<double>() : 0.0;
      if (state_.momentum[side].defined()) {
        // M = N Rᵀ, R being the pseudo-inverse of what is stored.
        const at::Tensor n = wide(tall(state_.momentum[side].narrow(0, index, 1), side)).squeeze(0);
        const at::Tensor inverse = state_.moments.inverse_root[s][index];
        factor.update_rms = has_only_finite(inverse)
                                ? at::matmul(n, at::linalg_pinv(inverse).mT()).square().mean().sqrt().item<double>()
                                : kUnknown;
      }
    }
    return result;
  }

 protected:
  at::TensorOptions double_options() const { return at::TensorOptions().dtype(at::kDouble).device(device_); }

  /// Momenta and master copies of the half types are float.
  at::ScalarType wide_dtype() const { return engine::wide_dtype(dtype_); }

  static constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();

  /// No singular values of what is not finite: ATen would throw.
  static bool has_only_finite(const at::Tensor& x) { return is_finite(x).all().item<bool>(); }

  /// σ_max / σ_min of a tall factor [n, r].
  double condition_number(const at::Tensor& x) const {
    if (!has_only_finite(x)) return kUnknown;
    const at::Tensor singular = at::linalg_svdvals(x);
    const double largest = singular[0].item<double>();
    // A factor with fewer rows than r has a null space by its shape.
    const double smallest = x.size(0) < rank_ ? 0.0 : singular[-1].item<double>();
    const double round_off = std::numeric_limits<double>::epsilon() * static_cast<double>(x.size(0)) * largest;
    return smallest > round_off ? largest / smallest : std::numeric_limits<double>::infinity();
  }

  std::vector<FactorPair> pairs_;
  std::vector<std::string> labels_;
  PerSide<std::vector<int64_t>> shapes_;
  at::Device device_;
  at::ScalarType dtype_;
  int64_t rank_;
  PairState state_;
};

}  // namespace lora_rite::engine
