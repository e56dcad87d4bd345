#pragma once

#include <cmath>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "lora_rite/baselines/baseline.hpp"

namespace lora_rite::baselines {

/// Options of a param group of Shampoo, whose formulas explain the symbols.
struct ShampooOptions : public BaselineOptions<ShampooOptions> {
  using betas_t = std::tuple<double, double>;             ///< (β₁, β₂)
  explicit ShampooOptions(double lr = 1e-3) : lr_(lr) {}  ///< all else by default

  TORCH_ARG(double, lr) = 1e-3;  ///< ≥ 0
  /// β₁ of the filtered gradient in [0, 1), β₂ of the statistics in [0, 1]; 1 sums them, as the first paper does.
  TORCH_ARG(betas_t, betas) = std::make_tuple(0.9, 0.999);
  TORCH_ARG(double, eps) = 1e-12;                     ///< > 0, added to the statistics
  TORCH_ARG(double, weight_decay) = 0.0;              ///< ≥ 0, decoupled
  TORCH_ARG(int64_t, max_preconditioner_dim) = 1024;  ///< a longer side goes without a preconditioner
  TORCH_ARG(int64_t, interval) = 10;                  ///< steps between two computations of the roots, ≥ 1
  /// Give Shampoo's direction the norm of Adam's step (with ε = graft_eps), parameter by parameter.
  TORCH_ARG(bool, graft_adam) = true;
  TORCH_ARG(double, graft_eps) = 1e-8;  ///< ≥ 0

 public:
  /// Throws c10::Error that names an option out of its range, what it is and what was expected.
  void check() const {
    check_at_least_zero("lr", lr());
    check_decay_rate("betas[0]", std::get<0>(betas()));
    const double beta2 = std::get<1>(betas());
    TORCH_CHECK(beta2 >= 0 && beta2 <= 1, "betas[1] is ", beta2, ", expected a number in [0, 1]");
    TORCH_CHECK(beta2 < 1 || !graft_adam(), "betas[1] is 1, expected less: grafting to Adam needs a running mean");
    TORCH_CHECK(eps() > 0 && std::isfinite(eps()), "eps is ", eps(), ", expected a finite number > 0");
    check_at_least_zero("weight_decay", weight_decay());
    check_at_least_zero("graft_eps", graft_eps());
    TORCH_CHECK(max_preconditioner_dim() >= 1, "max_preconditioner_dim is ", max_preconditioner_dim(),
                ", expected at least 1");
    TORCH_CHECK(interval() >= 1, "interval is ", interval(), ", expected at least 1");
  }
  /// Calls function(name, value) for every option that a checkpoint keeps.
  template <class Options, class Function>
  static void for_each_saved(Options& options, const Function& function) {
    function("lr", options.lr());
    function("betas", options.betas());
    function("eps", options.eps());
    function("weight_decay", options.weight_decay());
    function("max_preconditioner_dim", options.max_preconditioner_dim());
    function("interval", options.interval());
    function("graft_adam", options.graft_adam());
    function("graft_eps", options.graft_eps());
  }
};

/// Shampoo (Gupta, Koren & Singer, ICML 2018) in the form of Distributed Shampoo (Shi et al. 2023): for G [m, n]
///
///   L ← β₂ L + (1−β₂) GGᵀ,  R ← β₂ R + (1−β₂) GᵀG,  x ← (1−ηλ) x − η L^{-1/4} M R^{-1/4},
///
/// M being the filtered gradient. Where one side is longer than `max_preconditioner_dim` the other alone preconditions,
/// with the exponent −1/2; where both are, it is Adam's diagonal.
class Shampoo : public Baseline<ShampooOptions> {
 public:
  /// Groups without options of their own have `defaults`. Throws c10::Error if an option is out of its range.
  explicit Shampoo(const std::vector<torch::optim::OptimizerParamGroup>& groups,
                   ShampooOptions defaults = ShampooOptions())
      : Baseline(groups, defaults) {}
  /// The same for one group of these parameters.
  explicit Shampoo(std::vector<torch::Tensor> parameters, ShampooOptions defaults = ShampooOptions())
      : Shampoo({torch::optim::OptimizerParamGroup(std::move(parameters))}, defaults) {}

 protected:
  void update(const ShampooOptions& options, Batch& batch) override {
    const auto [beta1, beta2] = options.betas();
    const at::Tensor g = matrices(batch.gradient);
    at::Tensor filtered = batch.state("filtered");
    filtered.lerp_(batch.gradient, 1 - beta1);
    at::Tensor direction = matrices(filtered) / batch.bias_correction(beta1);

    const bool left = g.size(1) <= options.max_preconditioner_dim(),
               right = g.size(2) <= options.max_preconditioner_dim();
    const double exponent = left && right ? -0.25 : -0.5;
    if (left) direction = at::matmul(root(options, batch, "left", at::matmul(g, g.mT()), exponent), direction);
    if (right) direction = at::matmul(direction, root(options, batch, "right", at::matmul(g.mT(), g), exponent));
    direction = direction.reshape(batch.gradient.sizes());

    if (options.graft_adam() || !(left || right)) {
      // β₂ = 1 sums statistics; Adam, which has no mean of it, is left then for tensors of long sides alone.
      const double adam_beta2 = beta2 < 1 ? beta2 : 0.999;
      const at::Tensor adam = adam_direction(batch, batch.gradient, beta1, adam_beta2, options.graft_eps());
      if (left || right) {
        direction = direction * (norms(adam) / norms(direction).clamp_min(1e-30));
      } else {
        direction = adam;
      }
    }
    batch.move(1 - options.lr() * options.weight_decay(), options.lr() * direction);
  }

 private:
  /// (S + εI)^exponent of the running statistics S [k, d, d], computed anew every `interval` steps.
  static at::Tensor root(const ShampooOptions& options, Batch& batch, const std::string& side, const at::Tensor& fresh,
                         double exponent) {
    const double beta2 = std::get<1>(options.betas());
    at::Tensor statistics = batch.state(side, fresh.sizes().slice(1));
    statistics.mul_(beta2).add_(fresh, beta2 < 1 ? 1 - beta2 : 1);
    at::Tensor inverse = batch.state(side + "_root", fresh.sizes().slice(1));
    if ((batch.step - 1) % options.interval() == 0) {
      const double correction = beta2 < 1 ? batch.bias_correction(beta2) : 1;
      const auto [values, vectors] = at::linalg_eigh(statistics.to(at::kDouble) / correction);
      const at::Tensor powers = (values.clamp_min(0) + options.eps()).pow(exponent);
      inverse.copy_(at::matmul(vectors * powers.unsqueeze(-2), vectors.mT()));
    }
    return inverse;
  }
};

}  // namespace lora_rite::baselines
