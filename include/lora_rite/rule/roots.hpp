#pragma once

#include <cstdint>
#include <limits>

#include "lora_rite/rule/hyperparameters.hpp"
#include "lora_rite/rule/types.hpp"

/// The adaptive part of act 2: what second moments say about directions.
namespace lora_rite::rule {

/// Does it matter how numbers of this dtype were rounded? For doubles it does not beside the eigensolver's round-off.
LORA_RITE_FUNCTION inline bool is_coarse(double dtype_epsilon) {
  return dtype_epsilon > std::numeric_limits<double>::epsilon();
}

/// What rounding left in Ḡ = G R⁺: E = scale^{1/2} diag(GᵀG)^{1/2} R⁺. Rounding changes each number of G by a share
/// below ε / 2, at random, and so direction v of ḠᵀḠ by no more than some 0.05 ‖E v‖² on average, with ε² for a scale.
/// Where Y is ill-conditioned R⁺ makes it large. ε is the gradients' dtype's.
template <class Matrix>
struct RoundOff {
  const Matrix& gradient_gram;  ///< GᵀG
  const Matrix& inverse_root;   ///< R⁺
  Scalar<Matrix> scale;
  Scalar<Matrix> rows;  ///< n, of G
  double of_sums;       ///< what a sum over n rows leaves in double, ÷ ε √n

  /// E without its scale.
  LORA_RITE_FUNCTION Matrix unscaled() const { return scale_rows_by_norms(gradient_gram, inverse_root); }

  /// What doubles leave of V, as a share of its largest eigenvalue: sums over n rows, and the eigensolver (LAPACK was
  /// seen to leave 3 ε for r up to 128).
  LORA_RITE_FUNCTION Scalar<Matrix> of_doubles() const {
    return (sqrt(rows) * of_sums + 8.0) * std::numeric_limits<double>::epsilon();
  }
};

/// w = (tr V / r + ρ)^{1/2} + ε
template <class Matrix>
LORA_RITE_FUNCTION Scalar<Matrix> root_of_mean(const Matrix& second_moment, const Scalar<Matrix>& escaped_mass,
                                               const Hyperparameters& numbers) {
  const Scalar<Matrix> mean =
      at_least(trace_of(second_moment), 0.0) * (1.0 / static_cast<double>(rank_of(second_moment)));
  return sqrt(mean + escaped_mass + numbers.eps_root) + numbers.eps;
}

/// How act 2 takes roots and compares spectra: by eigenvalues, to round-off. (`ProductRoots` of the device engine does
/// without them.)
struct Eigenvalues {
  static constexpr double kOfSums = 2;  ///< RoundOff::of_sums of ATen's products, which add one row after the other

  /// d = max(0, min( max_i (λ_i(V) − λ_i(PVPᵀ)), tr V − tr PVPᵀ )): second moment that the new basis no longer sees.
  template <class Matrix>
  LORA_RITE_FUNCTION static Scalar<Matrix> escaping_mass(const Matrix& second_moment, const Matrix& transported) {
    return escaping_mass(eigenvalues(second_moment), second_moment, transported);
  }
  /// The same with V's eigenvalues, ascending.
  template <class Values, class Matrix>
  LORA_RITE_FUNCTION static Scalar<Matrix> escaping_mass(const Values& values, const Matrix& second_moment,
                                                         const Matrix& transported) {
    const auto largest_loss = largest_difference(values, eigenvalues(transported));
    return at_least(at_most(largest_loss, trace_of(second_moment) - trace_of(transported)), 0.0);
  }

  /// H = W^{-2p} w^{2p−1} with W = (V + ρI)^{1/2} + εI, and w the same of V's mean eigenvalue; W^{-1} for p = 1/2. V is
  /// positive semi-definite, so eigenvalues below the solver's round-off are raised to it: none is negative, and no
  /// direction blows up. `round_off` is null where rounding does not matter. (A pointer, for std::optional checks
  /// itself by a function that a GPU does not have.)
  ///
  /// A faint direction is an eigenvector v of V with an eigenvalue λ near ν = ‖E v‖², or near what doubles leave of V.
  /// It tells less of the gradient than of how it was rounded. Its share of H is (1 − ν / λ)⁺: it rests where there is
  /// nothing but round-off.
  template <class Matrix>
  LORA_RITE_FUNCTION static Matrix preconditioner(const Matrix& second_moment, const Scalar<Matrix>& escaped_mass,
                                                  const RoundOff<Matrix>* round_off, const Hyperparameters& numbers) {
    return preconditioner(eigh(second_moment), second_moment, escaped_mass, round_off, numbers);
  }
  /// The same with V's spectrum.
  template <class Spectrum, class Matrix>
  LORA_RITE_FUNCTION static Matrix preconditioner(const Spectrum& spectrum, const Matrix& second_moment,
                                                  const Scalar<Matrix>& escaped_mass, const RoundOff<Matrix>* round_off,
                                                  const Hyperparameters& numbers) {
    const double floor = static_cast<double>(rank_of(second_moment)) * std::numeric_limits<double>::epsilon();
    const double power = 2 * numbers.preconditioner_exponent;
    auto inverse = map_values(spectrum.values, [&](const auto& value, const auto& largest) {
      const auto root = sqrt(at_least(value, largest * floor) + escaped_mass + numbers.eps_root) + numbers.eps;
      const auto scale = power == 1 ? reciprocal(root) : pow(root, -power);
      return choose(root > 0.0, scale, 0.0);  // V = 0 and ε = 0: nothing to scale
    });
    if (round_off) {
      // No ‖E v‖² is more than ‖E‖². Where that is negligible beside all of V, every share is 1 to a float's precision.
      constexpr double negligible = 1e-8;
      const Scalar<Matrix> of_doubles = at_least(trace_of(second_moment), 0.0) * round_off->of_doubles();
      const auto most =
          squared_norm_of_scaled_rows(round_off->gradient_gram, round_off->inverse_root) * round_off->scale;
      const auto matters = at_least(most, of_doubles) > smallest(spectrum.values) * negligible;
      if (!surely(second_moment, [&] { return 1.0 - matters; })) {
        const auto noise = squared_column_norms(matmul(round_off->unscaled(), spectrum.vectors));
        const auto share = map_values(spectrum.values, noise, [&](const auto& value, const auto& of_noise) {
          const auto scaled = at_least(of_noise * round_off->scale, of_doubles);
          return choose(matters, choose(value > scaled, 1.0 - scaled / value, 0.0), 1.0);
        });
        inverse = inverse * share;
      }
    }
    Matrix result = symmetric_product(scale_columns(spectrum.vectors, inverse), transpose(spectrum.vectors));
    if (power == 1) return result;
    const Scalar<Matrix> mean_root = root_of_mean(second_moment, escaped_mass, numbers);
    return result * choose(mean_root > 0.0, pow(mean_root, power - 1), 0.0);
  }
};

}  // namespace lora_rite::rule
