#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "lora_rite/baselines/baseline.hpp"

namespace lora_rite::baselines {

/// Options of a param group of Muon, whose formulas explain the symbols.
struct MuonOptions : public BaselineOptions<MuonOptions> {
  explicit MuonOptions(double lr = 1e-3) : lr_(lr) {}  ///< all else by default

  TORCH_ARG(double, lr) = 1e-3;           ///< ≥ 0
  TORCH_ARG(double, momentum) = 0.95;     ///< μ, in [0, 1)
  TORCH_ARG(bool, nesterov) = true;       ///< look ahead by one more step of the momentum
  TORCH_ARG(double, weight_decay) = 0.1;  ///< λ ≥ 0, decoupled
  TORCH_ARG(int64_t, steps) = 5;          ///< Newton–Schulz steps, ≥ 1

 public:
  /// Throws c10::Error that names an option out of its range, what it is and what was expected.
  void check() const {
    check_at_least_zero("lr", lr());
    check_decay_rate("momentum", momentum());
    check_at_least_zero("weight_decay", weight_decay());
    TORCH_CHECK(steps() >= 1, "steps is ", steps(), ", expected at least 1");
  }
  /// Calls function(name, value) for every option that a checkpoint keeps.
  template <class Options, class Function>
  static void for_each_saved(Options& options, const Function& function) {
    function("lr", options.lr());
    function("momentum", options.momentum());
    function("nesterov", options.nesterov());
    function("weight_decay", options.weight_decay());
    function("steps", options.steps());
  }
};

/// Muon (Jordan et al. 2024): the momentum M ← μM + (1−μ)G, its singular values made about 1 by a quintic Newton–Schulz
/// iteration: x ← (1−ηλ) x − η √max(1, m/n) NS(M). As in torch.optim.Muon with its defaults, the weight decay of 0.1
/// among them, but in the parameter's dtype instead of bfloat16.
class Muon : public Baseline<MuonOptions> {
 public:
  /// Groups without options of their own have `defaults`. Throws c10::Error if an option is out of its range.
  explicit Muon(const std::vector<torch::optim::OptimizerParamGroup>& groups, MuonOptions defaults = MuonOptions())
      : Baseline(groups, defaults) {}
  /// The same for one group of these parameters.
  explicit Muon(std::vector<torch::Tensor> parameters, MuonOptions defaults = MuonOptions())
      : Muon({torch::optim::OptimizerParamGroup(std::move(parameters))}, defaults) {}

  /// Each matrix [k, m, n] with its singular values moved into about [0.7, 1.2].
  static at::Tensor orthogonalized(const at::Tensor& batch, int64_t steps) {
    const spectral::Quintic steepest_at_0 = {3.4445, -4.7750, 2.0315};  // for few steps
    return spectral::polar(batch, spectral::Quintics(static_cast<size_t>(steps), steepest_at_0), /*floor=*/1e-7);
  }

 protected:
  void update(const MuonOptions& options, Batch& batch) override {
    at::Tensor momentum = batch.state("momentum");
    momentum.lerp_(batch.gradient, 1 - options.momentum());
    const at::Tensor ahead = options.nesterov() ? batch.gradient.lerp(momentum, options.momentum()) : momentum;
    const at::Tensor m = matrices(ahead);
    const double shape = std::sqrt(std::max(1.0, static_cast<double>(m.size(1)) / static_cast<double>(m.size(2))));
    const at::Tensor direction = orthogonalized(m, options.steps()).reshape(ahead.sizes());
    batch.move(1 - options.lr() * options.weight_decay(), options.lr() * shape * direction);
  }
};

}  // namespace lora_rite::baselines
