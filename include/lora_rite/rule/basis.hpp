#pragma once

#include <type_traits>

#include "lora_rite/rule/vocabulary.hpp"

/// Roots of a Gram matrix. Any R with RᵀR = S = YᵀY makes U = Y R⁺ an orthonormal basis of Y's columns. Two roots
/// differ by a rotation from the left, and the rule is equivariant under it, so each of them gives the same steps.
namespace lora_rite {
namespace detail {

/// λ^{-1/2} of the eigenvalues of S = YᵀY that are more than round-off, else 0: the pseudo-inverse. Round-off is what
/// lies below cutoff · λ_max, or below share · Σ_j q_j² S_jj for the eigenvector q. Of S = 0 nothing is kept. A share
/// that is a plain 0 decides nothing.
template <class Matrix, class Spectrum, class Share>
LORA_RITE_FUNCTION auto pseudo_inverse_root(const Matrix& gram, const Spectrum& spectrum, double cutoff,
                                            const Share& share) {
  auto inverse = map_values(spectrum.values, [&](const auto& value, const auto& largest) {
    return choose(value > largest * cutoff, rsqrt(value), 0.0);
  });
  if constexpr (std::is_same_v<Share, double>) {
    if (share == 0) return inverse;
  }
  // No Σ_j q_j² S_jj is more than tr S.
  if (surely(gram, [&] { return smallest(spectrum.values) > trace_of(gram) * share; })) return inverse;
  const auto columns = squared_column_norms(scale_rows_by_norms(gram, spectrum.vectors));
  return inverse * map_values(spectrum.values, columns, [&](const auto& value, const auto& of_columns) {
           return choose(value > of_columns * share, of_columns * 0.0 + 1.0, 0.0);
         });
}

}  // namespace detail

/// The polar factor: R = S^{1/2}, so that U = Y R⁺ is the orthonormal matrix nearest to Y. It changes continuously with
/// Y, which is why it is the default.
struct PolarBasis {
  /// What checkpoints call it.
  static constexpr const char* name() { return "polar"; }

  /// R⁺ = Q λ^{+1/2} Qᵀ. Eigenvalues that are round-off count as zero: `cutoff` and `share` say which.
  template <class Matrix, class Share = double>
  LORA_RITE_FUNCTION static Matrix inverse_root(const Matrix& gram, double cutoff, const Share& share = Share(0)) {
    const auto spectrum = eigh(gram);
    return symmetric_product(
        scale_columns(spectrum.vectors, detail::pseudo_inverse_root(gram, spectrum, cutoff, share)),
        transpose(spectrum.vectors));
  }
};

/// QR's R, the root of the paper and of its code. Here it comes from the r×r matrix λ^{1/2} Qᵀ = O R instead of the
/// tall Y: the same R, with the signs that make its diagonal non-negative, also where Y is rank-deficient.
struct QrBasis {
  /// What checkpoints call it.
  static constexpr const char* name() { return "qr"; }

  /// R⁺ = Q λ^{+1/2} O. Eigenvalues that are round-off count as zero: `cutoff` and `share` say which.
  template <class Matrix, class Share = double>
  LORA_RITE_FUNCTION static Matrix inverse_root(const Matrix& gram, double cutoff, const Share& share = Share(0)) {
    const auto spectrum = eigh(gram);
    const auto root =
        map_values(spectrum.values, [](const auto& value, const auto&) { return sqrt(at_least(value, 0.0)); });
    const Matrix orthogonal = orthogonal_factor(transpose(scale_columns(spectrum.vectors, root)));
    const auto inverse = detail::pseudo_inverse_root(gram, spectrum, cutoff, share);
    return matmul(scale_columns(spectrum.vectors, inverse), orthogonal);
  }
};

}  // namespace lora_rite
