#pragma once

#include <tuple>
#include <vector>

#include "lora_rite/baselines/baseline.hpp"

namespace lora_rite::baselines {

/// Options of a param group of Lamb, whose formulas explain the symbols.
struct LambOptions : public BaselineOptions<LambOptions> {
  using betas_t = std::tuple<double, double>;          ///< (β₁, β₂)
  explicit LambOptions(double lr = 1e-3) : lr_(lr) {}  ///< all else by default

  TORCH_ARG(double, lr) = 1e-3;  ///< ≥ 0
  /// Decay rates (β₁, β₂) of the two moments, each in [0, 1).
  TORCH_ARG(betas_t, betas) = std::make_tuple(0.9, 0.999);
  TORCH_ARG(double, eps) = 1e-6;          ///< ≥ 0
  TORCH_ARG(double, weight_decay) = 0.0;  ///< λ ≥ 0, inside the trust ratio; 0.01 in timm

 public:
  /// Throws c10::Error that names an option out of its range, what it is and what was expected.
  void check() const {
    check_at_least_zero("lr", lr());
    check_decay_rate("betas[0]", std::get<0>(betas()));
    check_decay_rate("betas[1]", std::get<1>(betas()));
    check_at_least_zero("eps", eps());
    check_at_least_zero("weight_decay", weight_decay());
  }
  /// Calls function(name, value) for every option that a checkpoint keeps.
  template <class Options, class Function>
  static void for_each_saved(Options& options, const Function& function) {
    function("lr", options.lr());
    function("betas", options.betas());
    function("eps", options.eps());
    function("weight_decay", options.weight_decay());
  }
};

/// LAMB (You et al., "Large Batch Optimization for Deep Learning", ICLR 2020, Algorithm 2): Adam's direction
/// u = m̂ / (√v̂ + ε) + λx, scaled to the norm of the parameter: x ← x − η ‖x‖ / ‖u‖ u. Where either norm is 0 the ratio
/// is 1.
class Lamb : public Baseline<LambOptions> {
 public:
  /// Groups without options of their own have `defaults`. Throws c10::Error if an option is out of its range.
  explicit Lamb(const std::vector<torch::optim::OptimizerParamGroup>& groups, LambOptions defaults = LambOptions())
      : Baseline(groups, defaults) {}
  /// The same for one group of these parameters.
  explicit Lamb(std::vector<torch::Tensor> parameters, LambOptions defaults = LambOptions())
      : Lamb({torch::optim::OptimizerParamGroup(std::move(parameters))}, defaults) {}

 protected:
  void update(const LambOptions& options, Batch& batch) override {
    const auto [beta1, beta2] = options.betas();
    const at::Tensor x = batch.parameter();
    const at::Tensor u =
        adam_direction(batch, batch.gradient, beta1, beta2, options.eps()) + options.weight_decay() * x;
    const at::Tensor of_x = norms(x), of_u = norms(u);
    const at::Tensor trust = at::where(of_x.gt(0).logical_and(of_u.gt(0)), of_x / of_u, at::ones_like(of_x));
    batch.move(1, options.lr() * trust * u);
  }
};

}  // namespace lora_rite::baselines
