#pragma once

#include <ATen/ATen.h>

#include "lora_rite/algebra.hpp"

/// Roots of a Gram matrix. Any R with RᵀR = S = YᵀY makes U = Y R⁺ an orthonormal basis of Y's columns; which one is a
/// matter of taste, for two roots differ by a rotation from the left, and the rule is equivariant under it.
///
/// `Matrix` is a batch of r×r matrices in double: at::Tensor, or the host engine's lanes.
namespace lora_rite {
namespace detail {

/// λ^{-1/2} where λ > cutoff · λ_max, else 0: the pseudo-inverse. For S = 0 nothing is kept.
template <class Values, class Cutoff>
auto pseudo_inverse_root(const Values& values, const Cutoff& cutoff) {
  return map_values(values, [&cutoff](const auto& value, const auto& largest) {
    return choose(value > largest * cutoff, rsqrt(value), 0.0);
  });
}

}  // namespace detail

/// The polar factor: R = S^{1/2} = R_Yᵀ, so that U = Y R⁺ is the orthonormal matrix next to Y. It changes continuously
/// with Y, which is why it is the default.
struct PolarBasis {
  static constexpr const char* name() { return "polar"; }

  /// R⁺ = Q λ^{+1/2} Qᵀ; eigenvalues up to cutoff · λ_max count as zero. The cutoff is a number, or one a matrix.
  template <class Matrix, class Cutoff>
  static Matrix inverse_root(const Matrix& gram, const Cutoff& cutoff) {
    const auto spectrum = eigh(gram);
    return matmul(scale_columns(spectrum.vectors, detail::pseudo_inverse_root(spectrum.values, cutoff)),
                  transpose(spectrum.vectors));
  }
};

/// QR's R, the root of the paper and of its code. Here it comes from the r×r matrix λ^{1/2} Qᵀ = O R instead of the
/// tall Y: the same R, with the signs that make its diagonal non-negative, also where Y is rank-deficient.
struct QrBasis {
  static constexpr const char* name() { return "qr"; }

  /// R⁺ = Q λ^{+1/2} O; eigenvalues up to cutoff · λ_max count as zero. The cutoff is a number, or one a matrix.
  template <class Matrix, class Cutoff>
  static Matrix inverse_root(const Matrix& gram, const Cutoff& cutoff) {
    const auto spectrum = eigh(gram);
    const auto root =
        map_values(spectrum.values, [](const auto& value, const auto&) { return sqrt(at_least(value, 0.0)); });
    const Matrix orthogonal = orthogonal_factor(transpose(scale_columns(spectrum.vectors, root)));
    return matmul(scale_columns(spectrum.vectors, detail::pseudo_inverse_root(spectrum.values, cutoff)), orthogonal);
  }
};

}  // namespace lora_rite
