#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>

#include "lora_rite/rule/basis.hpp"
#include "lora_rite/rule/hyperparameters.hpp"
#include "lora_rite/rule/roots.hpp"
#include "lora_rite/rule/types.hpp"

/// Act 2: LoRA-RITE itself (Yen et al., "LoRA Done RITE", ICLR 2025, Algorithm 1), r×r matrices only. `types.hpp` has
/// the symbols, `vocabulary.hpp` the operations.
namespace lora_rite::rule {

/// Eigenvalues of a factor's Gram matrix up to this share of the largest are round-off: (unit round-off of the factors'
/// dtype)², and no less than what summing and the eigensolver leave in double.
LORA_RITE_FUNCTION inline double relative_cutoff(double dtype_epsilon, int64_t rank) {
  const double solver = 16.0 * static_cast<double>(rank) * std::numeric_limits<double>::epsilon();
  return std::max(0.25 * dtype_epsilon * dtype_epsilon, solver);
}

/// Every step rounds a factor Y and its momentum anew, at random, each column by a share of itself. After t steps an
/// eigenvector q of YᵀY is nothing but round-off if its eigenvalue is no more than this share of Σ_j q_j² ‖y_j‖². Float
/// factors reach kMostRounding after some 7000 / r steps; above it a direction is trusted.
constexpr double kMostRounding = 1e-10;
template <class Number>
LORA_RITE_FUNCTION Number rounding_share(double dtype_epsilon, int64_t rank, const Number& steps) {
  return at_most((steps + 4.0) * (static_cast<double>(rank) * dtype_epsilon * dtype_epsilon), kMostRounding);
}

/// R⁺ = C R̂⁺,  Q = R̂⁺ᵀ (YC)ᵀ Y_old,  ḠᵀḠ = R̂⁺ᵀ (GC)ᵀ(GC) R̂⁺,  R̂ being the root of (YC)ᵀ(YC). `factor_epsilon`
/// is the distance from 1 to the next number of the factors' dtype.
template <class Basis, class Matrix>
LORA_RITE_FUNCTION Unmagnified<Matrix> unmagnify(Statistics<Matrix> statistics, double factor_epsilon) {
  const int64_t rank = rank_of(statistics.gram);
  const double cutoff = relative_cutoff(factor_epsilon, rank);
  // Floats alone: half types cut off above kMostRounding anyway, and double's round-off is the eigensolver's.
  const Matrix root =
      is_coarse(factor_epsilon) && cutoff < kMostRounding
          ? Basis::inverse_root(statistics.gram, cutoff, rounding_share(factor_epsilon, rank, statistics.steps))
          : Basis::inverse_root(statistics.gram, cutoff);
  const auto project = [&](const Matrix& gram) { return symmetric_product(transpose(root), matmul(gram, root)); };
  Matrix projected = project(statistics.gradient_gram);
  return {statistics.coordinates.defined() ? matmul(statistics.coordinates, root) : root,
          matmul(transpose(root), statistics.cross),
          std::move(statistics.gradient_gram),
          std::move(projected),
          statistics.unscaled_gradient_gram.defined() ? project(statistics.unscaled_gradient_gram) : Matrix(),
          Matrix()};
}

/// β' = β (1−β^{t−1}) / (1−β^t), with which a running mean needs no bias correction; 1 where no gradient came.
template <class Number, class Flag>
LORA_RITE_FUNCTION Number bias_corrected_decay(double beta, const Number& step, const Flag& has_gradient) {
  const Number t = at_least(step, 1.0);
  const Number decay = (1.0 - pow(beta, t - 1.0)) * beta / (1.0 - pow(beta, t));
  return choose(has_gradient, decay, 1.0);
}

/// K = (I + δ² Z Zᵀ)^{-1} with Z = R_Y⁺ᵀ R_X⁺ and δ = η n^{1/2} / (2τ), for `max_relative_change` τ.
///
/// A step moves X by −ηN = −η M R_Y⁺ᵀ. Relative to X that is η M Z, and Z has the singular values 1/σ where σ are those
/// of BA: where BA has next to nothing, a step as long as all others turns X over. With K in front of Z the factor 1/σ
/// becomes σ / (σ² + δ²) ≤ 1 / (2δ), and where ‖S‖ is n^{1/2}, what S adds to the relative change stays below τ. `rate`
/// is η.
template <class Matrix>
LORA_RITE_FUNCTION Matrix relative_change_damping(const Matrix& inverse_root, const Matrix& own_inverse_root,
                                                  const Scalar<Matrix>& rate, const Scalar<Matrix>& rows,
                                                  double bound) {
  const Matrix z = matmul(transpose(inverse_root), own_inverse_root);
  const Scalar<Matrix> delta_squared = rate * rate * rows * (0.25 / (bound * bound));
  const Matrix w = symmetrized(symmetric_product(z, transpose(z))) * delta_squared;
  // Products leave W indefinite by some ε tr W, which must stay below 1. A direction so faint is at rest either way.
  constexpr double most = 1e12;
  return positive_inverse(identity_like(w) + w * (most / at_least(trace_of(w), most)));
}

/// One step of the rule. `rows` is n, `clip_factor` is c. `has_gradient` and `partner_edited` are flags, one for each
/// matrix. Where the partner was changed from outside, its old basis is gone, and V keeps its place in the new one
/// (P = I). `gradient_epsilon` is the distance from 1 to the next number of the gradients' dtype. `roots` says how
/// roots are taken and spectra compared.
template <class Roots = Eigenvalues, class Matrix>
LORA_RITE_FUNCTION Decision<Matrix> decide(const Moments<Matrix>& old, const Unmagnified<Matrix>& now,
                                           const Scalar<Matrix>& rows, const Scalar<Matrix>& clip_factor,
                                           const Scalar<Matrix>& has_gradient, const Scalar<Matrix>& partner_edited,
                                           double gradient_epsilon, const Hyperparameters& numbers,
                                           const Roots& roots = Roots()) {
  const Scalar<Matrix> step = old.step + has_gradient;
  const Scalar<Matrix> beta1 = bias_corrected_decay(numbers.beta1, step, has_gradient);
  const Scalar<Matrix> beta2 = bias_corrected_decay(numbers.beta2, step, has_gradient);

  // P = U_newᵀ U_old = Q R_old⁺ carries V into the new basis.
  Matrix transport = matmul(now.change, old.inverse_root);
  if (!surely(transport, [&] { return 1.0 - partner_edited; }))
    transport = choose(partner_edited, identity_like(transport), transport);
  const Matrix transported = symmetrized(symmetric_product(transport, matmul(old.second_moment, transpose(transport))));

  // ρ ← β₂' (ρ + d),  V ← β₂' P V Pᵀ + (1−β₂') c² ḠᵀḠ / n
  Scalar<Matrix> escaped_mass = old.escaped_mass;
  if (numbers.escape) escaped_mass = beta2 * (escaped_mass + roots.escaping_mass(old.second_moment, transported));
  const Scalar<Matrix> fresh = (1.0 - beta2) * clip_factor * clip_factor / rows;
  Matrix second_moment = transported * beta2 + symmetrized(now.gradient_gram) * fresh;

  // `magnified_gram` is GᵀG here: only doubles have coordinates C, and their rounding is not looked at.
  const bool coarse = is_coarse(gradient_epsilon);
  Scalar<Matrix> scale{};
  if (coarse) scale = clip_factor * clip_factor * (gradient_epsilon * gradient_epsilon) / rows;
  const RoundOff<Matrix> round_off = {now.magnified_gram, now.inverse_root, scale, rows, Roots::kOfSums};
  Matrix adaptive = roots.preconditioner(second_moment, escaped_mass, coarse ? &round_off : nullptr, numbers);
  Matrix row_map;
  if (numbers.row_equilibration) row_map = matmul(now.inverse_root, adaptive) * clip_factor;
  if (now.damping.defined()) adaptive = matmul(adaptive, now.damping);
  const Scalar<Matrix> length = (1.0 - beta1) * clip_factor * (numbers.maximize ? -1.0 : 1.0);
  return {{std::move(second_moment), escaped_mass, now.inverse_root, step},
          transpose(now.change) * beta1,
          matmul(now.inverse_root, adaptive) * length,
          std::move(row_map)};
}

}  // namespace lora_rite::rule
