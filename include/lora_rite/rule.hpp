#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>

#include "lora_rite/algebra.hpp"
#include "lora_rite/basis.hpp"
#include "lora_rite/options.hpp"

/// Act 2: LoRA-RITE itself (Yen et al., "LoRA Done RITE", ICLR 2025, Algorithm 1), r×r matrices only.
///
/// It speaks of one factor X (n×r, gradient G) and its partner Y. R is a root of YᵀY, U = Y R⁺ an orthonormal basis of
/// Y's columns, Ḡ = G R⁺ the unmagnified gradient, M the momentum in that basis; N = M R⁺ᵀ is the same momentum in X's
/// own coordinates, which is what is stored: it does not depend on the choice of the root.
///
/// `Matrix` is a batch of r×r matrices, `Scalar` a number for each of them, all double: at::Tensor (`algebra.hpp`) for
/// the device engine, lanes (`engine/lanes.hpp`) for the host engine.
namespace lora_rite::rule {

template <class Matrix>
using Scalar = typename ScalarOf<Matrix>::type;

/// Act 1 hands this in. C [r, r] are coordinates in which Y is well conditioned: Y itself squares its condition number
/// in a Gram matrix, which is harmless where floats are summed in double, and not for double factors. Their C is the
/// inverse root of YᵀY, good to κ²ε; one more root in these coordinates is exact (CholeskyQR2, Yamamoto et al. 2015).
template <class Matrix>
struct Statistics {
  Matrix coordinates;    ///< C, undefined where it is the identity
  Matrix gram;           ///< (YC)ᵀ (YC)
  Matrix cross;          ///< (YC)ᵀ Y_old, Y_old being the partner one step ago
  Matrix gradient_gram;  ///< (GC)ᵀ (GC), zero where there is no gradient; with row equilibration G's rows are scaled
  Matrix plain_gradient_gram;  ///< the same without that scale, undefined where there is none
  Scalar<Matrix> steps;        ///< how often Y has moved
};

/// What is remembered from step to step besides N.
template <class Matrix>
struct Moments {
  Matrix second_moment;         ///< V, in the basis that `inverse_root` belongs to
  Scalar<Matrix> escaped_mass;  ///< ρ
  Matrix inverse_root;          ///< R⁺ of the partner as it was in the last step
  Scalar<Matrix> step;          ///< t, how many gradients this factor has seen
};

/// The geometry of the partner and the gradient seen in it.
template <class Matrix>
struct Unmagnified {
  Matrix inverse_root;         ///< R⁺
  Matrix change;               ///< Q = Uᵀ Y_old: transports momenta, as N Qᵀ = M_old Pᵀ
  Matrix magnified_gram;       ///< (GC)ᵀ (GC) as it was handed in
  Matrix gradient_gram;        ///< ḠᵀḠ, of scaled rows with row equilibration
  Matrix plain_gradient_gram;  ///< ḠᵀḠ without that scale, undefined where there is none
  Matrix damping;              ///< K of `relative_change_damping`, undefined where nothing is bounded
};

/// What act 3 applies to the rows: M = N·momentum_map + G·gradient_map, N = M R⁺ᵀ, X ← (1−ηλ) X − ηN.
template <class Matrix>
struct Decision {
  Moments<Matrix> moments;
  Matrix momentum_map;  ///< β₁' Qᵀ
  Matrix gradient_map;  ///< (1−β₁') c R⁺ H K, H being ((V + ρI)^{1/2} + εI)^{-1} or `preconditioner_exponent`'s
  Matrix plain_map;     ///< c R⁺ H, for row equilibration only
};

/// Eigenvalues of a factor's Gram matrix up to this share of the largest are round-off: (unit round-off of the factors'
/// dtype)², and no less than what summing and the eigensolver leave in double.
inline double relative_cutoff(double dtype_epsilon, int64_t rank) {
  const double solver = 16.0 * static_cast<double>(rank) * std::numeric_limits<double>::epsilon();
  return std::max(0.25 * dtype_epsilon * dtype_epsilon, solver);
}

/// Every step rounds a factor Y and its momentum anew, at random, each column by a share of itself: after t steps an
/// eigenvector q of YᵀY whose eigenvalue is no more than this share of Σ_j q_j² ‖y_j‖² is nothing but that. Above
/// kMostRounding, where a thousand steps of float bring it, a direction is rather taken for one.
constexpr double kMostRounding = 1e-10;
template <class Number>
Number rounding_share(double dtype_epsilon, int64_t rank, const Number& steps) {
  return at_most((steps + 4.0) * (static_cast<double>(rank) * dtype_epsilon * dtype_epsilon), kMostRounding);
}

/// Does it matter how numbers of this dtype were rounded? For doubles it does not beside the eigensolver's round-off.
inline bool is_coarse(double dtype_epsilon) { return dtype_epsilon > std::numeric_limits<double>::epsilon(); }

/// What rounding left in Ḡ = G R⁺: E = scale^{1/2} diag(GᵀG)^{1/2} R⁺. Rounding changes each number of G by a share
/// below ε / 2, at random, and so direction v of ḠᵀḠ by no more than some 0.05 ‖E v‖² on average, with ε² for a scale.
/// Where Y is ill-conditioned R⁺ makes it large. ε is the gradients' dtype's.
template <class Matrix>
struct RoundOff {
  const Matrix& gradient_gram;  ///< GᵀG
  const Matrix& inverse_root;   ///< R⁺
  Scalar<Matrix> scale;

  /// E but for its scale.
  Matrix unscaled() const { return scale_rows_by_norms(gradient_gram, inverse_root); }
};

/// R⁺ = C R̂⁺,  Q = R̂⁺ᵀ (YC)ᵀ Y_old,  ḠᵀḠ = R̂⁺ᵀ (GC)ᵀ(GC) R̂⁺,  R̂ being the root of (YC)ᵀ(YC). `factor_epsilon`
/// is their dtype's distance from 1 to the next number.
template <class Basis, class Matrix>
Unmagnified<Matrix> unmagnify(Statistics<Matrix> statistics, double factor_epsilon) {
  const int64_t rank = rank_of(statistics.gram);
  const double cutoff = relative_cutoff(factor_epsilon, rank);
  // Only floats have a share that can be more than the cut-off.
  const Matrix root =
      is_coarse(factor_epsilon) && cutoff < kMostRounding
          ? Basis::inverse_root(statistics.gram, cutoff, rounding_share(factor_epsilon, rank, statistics.steps))
          : Basis::inverse_root(statistics.gram, cutoff);
  const auto project = [&](const Matrix& gram) { return matmul(transpose(root), matmul(gram, root)); };
  Matrix projected = project(statistics.gradient_gram);
  return {statistics.coordinates.defined() ? matmul(statistics.coordinates, root) : root,
          matmul(transpose(root), statistics.cross),
          std::move(statistics.gradient_gram),
          std::move(projected),
          statistics.plain_gradient_gram.defined() ? project(statistics.plain_gradient_gram) : Matrix(),
          Matrix()};
}

/// β' = β (1−β^{t−1}) / (1−β^t), with which a running mean needs no bias correction; 1 where no gradient came.
template <class Number, class Flag>
Number bias_corrected_decay(double beta, const Number& step, const Flag& has_gradient) {
  const Number t = at_least(step, 1.0);
  const Number decay = (1.0 - pow(beta, t - 1.0)) * beta / (1.0 - pow(beta, t));
  return choose(has_gradient, decay, 1.0);
}

/// w = (tr V / r + ρ)^{1/2} + ε
template <class Matrix>
Scalar<Matrix> root_of_mean(const Matrix& second_moment, const Scalar<Matrix>& escaped_mass,
                            const LoraRiteOptions& options) {
  const Scalar<Matrix> mean =
      at_least(trace_of(second_moment), 0.0) * (1.0 / static_cast<double>(rank_of(second_moment)));
  return sqrt(mean + escaped_mass + options.eps_root()) + options.eps();
}

/// How act 2 takes roots and compares spectra: by eigenvalues, to round-off. (`engine/capturable.hpp` has another way.)
struct Eigenvalues {
  /// d = max(0, min( max_i (λ_i(V) − λ_i(PVPᵀ)), tr V − tr PVPᵀ )): second moment that the new basis no longer sees.
  template <class Matrix>
  static Scalar<Matrix> escaping_mass(const Matrix& second_moment, const Matrix& transported) {
    const auto largest_loss = largest_difference(eigenvalues(second_moment), eigenvalues(transported));
    return at_least(at_most(largest_loss, trace_of(second_moment) - trace_of(transported)), 0.0);
  }

  /// H = W^{-2p} w^{2p−1} with W = (V + ρI)^{1/2} + εI, and w the same of V's mean eigenvalue; W^{-1} for p = 1/2. V is
  /// positive semi-definite, so eigenvalues below the solver's round-off are held there: none is negative, and none
  /// makes a direction blow up.
  ///
  /// A faint direction, an eigenvector v of V with eigenvalue λ near ‖E v‖², tells less of the gradient than of how it
  /// was rounded. Its share of H is (1 − ‖E v‖² / λ)⁺: it is at rest where there is nothing but round-off.
  template <class Matrix>
  static Matrix preconditioner(const Matrix& second_moment, const Scalar<Matrix>& escaped_mass,
                               const std::optional<RoundOff<Matrix>>& round_off, const LoraRiteOptions& options) {
    const double floor = static_cast<double>(rank_of(second_moment)) * std::numeric_limits<double>::epsilon();
    const double power = 2 * options.preconditioner_exponent();
    const auto spectrum = eigh(second_moment);
    auto inverse = map_values(spectrum.values, [&](const auto& value, const auto& largest) {
      const auto root = sqrt(at_least(value, largest * floor) + escaped_mass + options.eps_root()) + options.eps();
      const auto scale = power == 1 ? reciprocal(root) : pow(root, -power);
      return choose(root > 0.0, scale, 0.0);  // V = 0 and ε = 0: nothing to scale
    });
    // No ‖E v‖² is more than ‖E‖²: where that is next to nothing beside all of V, every share is 1.
    constexpr double next_to_nothing = 1e-9;
    const auto is_next_to_nothing = [&] {
      const auto most = squared_norm_of_scaled_rows(round_off->gradient_gram, round_off->inverse_root);
      return smallest(spectrum.values) * next_to_nothing > most * round_off->scale;
    };
    if (round_off && !surely(second_moment, is_next_to_nothing)) {
      const auto noise = squared_column_norms(matmul(round_off->unscaled(), spectrum.vectors));
      const auto share = map_values(spectrum.values, noise, [&](const auto& value, const auto& of_noise) {
        const auto scaled = of_noise * round_off->scale;
        return choose(value > scaled, 1.0 - scaled / value, 0.0);
      });
      inverse = inverse * share;
    }
    Matrix result = matmul(scale_columns(spectrum.vectors, inverse), transpose(spectrum.vectors));
    if (power == 1) return result;
    const Scalar<Matrix> mean_root = root_of_mean(second_moment, escaped_mass, options);
    return result * choose(mean_root > 0.0, pow(mean_root, power - 1), 0.0);
  }
};

/// K = (I + δ² Z Zᵀ)^{-1} with Z = R_Y⁺ᵀ R_X⁺ and δ = η n^{1/2} / (2τ), for `max_relative_change` τ.
///
/// A step moves X by −ηN = −η M R_Y⁺ᵀ. Relative to X that is η M Z, and Z has the singular values 1/σ where σ are those
/// of BA: where BA has next to nothing, a step as long as all others turns X over. With K in front of Z the factor 1/σ
/// becomes σ / (σ² + δ²) ≤ 1 / (2δ), and where ‖S‖ is n^{1/2}, what S adds to the relative change stays below τ. `rate`
/// is η.
template <class Matrix>
Matrix relative_change_damping(const Matrix& inverse_root, const Matrix& own_inverse_root, const Scalar<Matrix>& rate,
                               const Scalar<Matrix>& rows, double bound) {
  const Matrix z = matmul(transpose(inverse_root), own_inverse_root);
  const Scalar<Matrix> delta_squared = rate * rate * rows * (0.25 / (bound * bound));
  const Matrix w = symmetrized(matmul(z, transpose(z))) * delta_squared;
  // Products leave W indefinite by some ε tr W, which must stay below 1. A direction so faint is at rest either way.
  constexpr double most = 1e12;
  return positive_inverse(identity_like(w) + w * (most / at_least(trace_of(w), most)));
}

/// One step of the rule. `rows` is n, `clip_factor` is c, `partner_edited` tells where the partner was changed from
/// outside: the old basis is gone there, so V keeps its place in the new one (P = I). `has_gradient` and
/// `partner_edited` are flags, one for each matrix; `gradient_epsilon` is the gradients' dtype's distance from 1 to the
/// next number.
template <class Roots = Eigenvalues, class Matrix>
Decision<Matrix> decide(const Moments<Matrix>& old, const Unmagnified<Matrix>& now, const Scalar<Matrix>& rows,
                        const Scalar<Matrix>& clip_factor, const Scalar<Matrix>& has_gradient,
                        const Scalar<Matrix>& partner_edited, double gradient_epsilon, const LoraRiteOptions& options) {
  const Scalar<Matrix> step = old.step + has_gradient;
  const Scalar<Matrix> beta1 = bias_corrected_decay(std::get<0>(options.betas()), step, has_gradient);
  const Scalar<Matrix> beta2 = bias_corrected_decay(std::get<1>(options.betas()), step, has_gradient);

  // P = U_newᵀ U_old = Q R_old⁺ carries V into the new basis.
  Matrix transport = matmul(now.change, old.inverse_root);
  if (!surely(transport, [&] { return 1.0 - partner_edited; }))
    transport = choose(partner_edited, identity_like(transport), transport);
  const Matrix transported = symmetrized(matmul(transport, matmul(old.second_moment, transpose(transport))));

  // ρ ← β₂' (ρ + d),  V ← β₂' P V Pᵀ + (1−β₂') c² ḠᵀḠ / n
  Scalar<Matrix> escaped_mass = old.escaped_mass;
  if (options.escape()) escaped_mass = beta2 * (escaped_mass + Roots::escaping_mass(old.second_moment, transported));
  const Scalar<Matrix> fresh = (1.0 - beta2) * clip_factor * clip_factor / rows;
  Matrix second_moment = transported * beta2 + symmetrized(now.gradient_gram) * fresh;

  // Coordinates C are for double factors alone, whose gradients are doubles, too.
  std::optional<RoundOff<Matrix>> round_off;
  if (is_coarse(gradient_epsilon)) {
    const double squared = gradient_epsilon * gradient_epsilon;
    round_off.emplace(
        RoundOff<Matrix>{now.magnified_gram, now.inverse_root, clip_factor * clip_factor * squared / rows});
  }
  Matrix adaptive = Roots::preconditioner(second_moment, escaped_mass, round_off, options);
  Matrix plain_map;
  if (options.row_equilibration()) plain_map = matmul(now.inverse_root, adaptive) * clip_factor;
  if (now.damping.defined()) adaptive = matmul(adaptive, now.damping);
  const Scalar<Matrix> length = (1.0 - beta1) * clip_factor * (options.maximize() ? -1.0 : 1.0);
  return {{std::move(second_moment), escaped_mass, now.inverse_root, step},
          transpose(now.change) * beta1,
          matmul(now.inverse_root, adaptive) * length,
          std::move(plain_map)};
}

}  // namespace lora_rite::rule
