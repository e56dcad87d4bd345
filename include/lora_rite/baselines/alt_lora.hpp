#pragma once

#include <cmath>
#include <vector>

#include "lora_rite/baselines/pair_baseline.hpp"

namespace lora_rite::baselines {

/// Options of a param group of AltLora, whose formulas explain the symbols.
struct AltLoraOptions : public BaselineOptions<AltLoraOptions> {
  explicit AltLoraOptions(double lr = 1e-2) : lr_(lr) {}  ///< all else by default

  TORCH_ARG(double, lr) = 1e-2;           ///< ≥ 0
  TORCH_ARG(double, momentum) = 0.9;      ///< β₁, in [0, 1)
  TORCH_ARG(double, weight_decay) = 0.0;  ///< γ ≥ 0, decoupled; 1e-5 in the authors' code
  TORCH_ARG(double, damping) = 1e-6;      ///< δ > 0; 1e-3 by default in the authors' code, 1e-5 in its runs
  /// One factor a step, A first, as in the paper. Else both in every step, B by the new A, as the authors' code does
  /// where both have gradients.
  TORCH_ARG(bool, alternating) = true;

 public:
  /// Throws c10::Error that names an option out of its range, what it is and what was expected.
  void check() const {
    check_at_least_zero("lr", lr());
    check_decay_rate("momentum", momentum());
    check_at_least_zero("weight_decay", weight_decay());
    TORCH_CHECK(damping() > 0 && std::isfinite(damping()), "damping is ", damping(), ", expected a finite number > 0");
  }
  /// Calls function(name, value) for every option that a checkpoint keeps.
  template <class Options, class Function>
  static void for_each_saved(Options& options, const Function& function) {
    function("lr", options.lr());
    function("momentum", options.momentum());
    function("weight_decay", options.weight_decay());
    function("damping", options.damping());
    function("alternating", options.alternating());
  }
};

/// AltLoRA (Yu, Wang, Chen & Xue, "AltLoRA: Towards Better Gradient Approximation in Low-Rank Adaptation with
/// Alternating Projections", NeurIPS 2025, arXiv 2505.12455, Algorithm 1): scaled gradient descent whose momentum is
/// projected along as the partner moves. At a step of A, B₋ being the B of A's last one, and δ in every inverse:
///
///   M_A ← β₁ (BᵀB)⁻¹ BᵀB₋ M_A + (1−β₁) (BᵀB)⁻¹ G_A,  A ← (1−ηγ) A − η M_A,
///
/// and the same for B from the other side. The authors' code corrects the momentum's bias, which the paper does not,
/// nor does this; a layer's scale, by whose square the paper divides a gradient, is taken for 1.
class AltLora : public PairBaseline<AltLoraOptions> {
 public:
  /// One group of these pairs. Throws c10::Error naming a pair that does not fit together.
  explicit AltLora(const std::vector<FactorPair>& pairs, const AltLoraOptions& options = AltLoraOptions())
      : PairBaseline("AltLora", pairs, options) {}

 protected:
  void update(const AltLoraOptions& options, FactorBatch& a, FactorBatch& b) override {
    for (FactorBatch* factor : {&a, &b}) factor->state("momentum");  // from the first step on, whose turn it is or not
    const bool is_turn_of_a = a.step % 2 == 1;
    if (is_turn_of_a || !options.alternating()) advance(options, a, b);
    if (!is_turn_of_a || !options.alternating()) advance(options, b, a);
  }

 private:
  static void advance(const AltLoraOptions& options, FactorBatch& factor, FactorBatch& partner) {
    const at::Tensor before = factor.matrix(), y = partner.matrix();
    const int64_t rank = y.size(1);
    // YY₋ᵀ, which the partner's step left here: between two steps of a factor the partner makes one.
    const at::Tensor overlap = factor.state("overlap", {rank, rank}).to(y.scalar_type());
    at::Tensor momentum = factor.state("momentum");
    const at::Tensor carried = at::matmul(overlap, factor.matrix(momentum));
    const at::Tensor sum = carried.lerp(factor.matrix(factor.gradient), 1 - options.momentum());
    momentum.copy_(factor.shaped(spectral::damped_solve(y, options.damping(), sum)));
    factor.move(1 - options.lr() * options.weight_decay(), options.lr() * momentum);
    at::Tensor of_partner = partner.state("overlap", {rank, rank});
    of_partner.copy_(at::matmul(factor.matrix(), before.mT()));
  }
};

}  // namespace lora_rite::baselines
