#pragma once

#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "lora_rite/baselines/pair_baseline.hpp"

namespace lora_rite::baselines {

/// Options of a param group of ScaledAdam, whose formulas explain the symbols.
struct ScaledAdamOptions : public BaselineOptions<ScaledAdamOptions> {
  using betas_t = std::tuple<double, double>;                ///< (β₁, β₂)
  explicit ScaledAdamOptions(double lr = 1e-3) : lr_(lr) {}  ///< all else by default

  TORCH_ARG(double, lr) = 1e-3;  ///< ≥ 0
  /// Decay rates (β₁, β₂) of the two moments, each in [0, 1).
  TORCH_ARG(betas_t, betas) = std::make_tuple(0.9, 0.999);
  TORCH_ARG(double, eps) = 1e-8;          ///< ≥ 0
  TORCH_ARG(double, weight_decay) = 0.0;  ///< ≥ 0, decoupled
  TORCH_ARG(double, damping) = 1e-6;      ///< δ > 0; PEFT's default is 1e-2, the authors' 1e-6

 public:
  /// Throws c10::Error that names an option out of its range, what it is and what was expected.
  void check() const {
    check_at_least_zero("lr", lr());
    check_decay_rate("betas[0]", std::get<0>(betas()));
    check_decay_rate("betas[1]", std::get<1>(betas()));
    check_at_least_zero("eps", eps());
    check_at_least_zero("weight_decay", weight_decay());
    TORCH_CHECK(damping() > 0 && std::isfinite(damping()), "damping is ", damping(), ", expected a finite number > 0");
  }
  /// Calls function(name, value) for every option that a checkpoint keeps.
  template <class Options, class Function>
  static void for_each_saved(Options& options, const Function& function) {
    function("lr", options.lr());
    function("betas", options.betas());
    function("eps", options.eps());
    function("weight_decay", options.weight_decay());
    function("damping", options.damping());
  }
};

/// Scaled AdamW for LoRA (Zhang & Pilanci, "Riemannian Preconditioned LoRA", 2024): the gradients of a pair are
/// preconditioned by the partner, G_A ← (BᵀB + δI)^{-1} G_A and G_B ← G_B (AAᵀ + δI)^{-1}, and then go through AdamW.
/// Its first half is invariant, Adam's elements are not.
class ScaledAdam : public Baseline<ScaledAdamOptions> {
 public:
  /// One group of these pairs. Throws c10::Error naming a pair that does not fit together.
  explicit ScaledAdam(const std::vector<FactorPair>& pairs, ScaledAdamOptions options = ScaledAdamOptions())
      : Baseline({torch::optim::OptimizerParamGroup(detail::alternating_factors(pairs))}, options) {
    for (size_t i = 0; i < pairs.size(); ++i) detail::check_trained_pair(pairs[i], detail::pair_label(pairs[i], 0, i));
  }

 protected:
  std::vector<at::Tensor> gradients(const torch::optim::OptimizerParamGroup& group,
                                    const ScaledAdamOptions& options) override {
    const std::vector<at::Tensor>& factors = group.params();
    check_alternating_factors(factors, "ScaledAdam");
    std::vector<at::Tensor> result(factors.size());
    std::map<std::string, std::vector<size_t>> batches;  // by the shapes of a factor and its partner
    for (size_t i = 0; i < factors.size(); ++i) {
      if (!factors[i].grad().defined()) continue;
      batches[c10::str(i % 2, factors[i].sizes(), factors[i ^ 1].sizes(), factors[i].scalar_type(),
                       factors[i].device())]
          .push_back(i);
    }
    for (const auto& [key, indices] : batches) {
      const bool is_a = indices[0] % 2 == 0;
      std::vector<at::Tensor> own, partner;
      for (const size_t i : indices) {
        own.push_back(factors[i].grad());
        partner.push_back(factors[i ^ 1]);
      }
      // The rank is A's first dimension and B's second one; both are brought to [k, r, …].
      const at::Tensor gradient = is_a ? at::stack(own) : at::stack(own).movedim(2, 1);
      const at::Tensor y = is_a ? at::stack(partner).movedim(2, 1) : at::stack(partner);
      at::Tensor solved = spectral::damped_solve(y.flatten(2), options.damping(), gradient.flatten(2));
      solved = solved.to(gradient.scalar_type()).reshape(gradient.sizes());
      if (!is_a) solved = solved.movedim(1, 2).contiguous();
      const std::vector<at::Tensor> slices = solved.unbind(0);
      for (size_t i = 0; i < indices.size(); ++i) result[indices[i]] = slices[i];
    }
    return result;
  }

  void update(const ScaledAdamOptions& options, Batch& batch) override {
    const auto [beta1, beta2] = options.betas();
    batch.move(1 - options.lr() * options.weight_decay(),
               options.lr() * adam_direction(batch, batch.gradient, beta1, beta2, options.eps()));
  }
};

}  // namespace lora_rite::baselines
