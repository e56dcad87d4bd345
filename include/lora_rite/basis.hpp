#pragma once

#include <ATen/ATen.h>

#include "lora_rite/choose.hpp"

/// Roots of a Gram matrix. Any R with RᵀR = S = YᵀY makes U = Y R⁺ an orthonormal basis of Y's columns; which one is a
/// matter of taste, for two roots differ by a rotation from the left, and the rule is equivariant under it.
///
/// All matrices are [..., r, r] in double.
namespace lora_rite {
namespace detail {

/// S = Q diag(λ) Qᵀ with what both bases need of it.
struct GramSpectrum {
  at::Tensor vectors;       ///< Q [..., r, r]
  at::Tensor root;          ///< max(λ, 0)^{1/2} [..., r]
  at::Tensor inverse_root;  ///< λ^{-1/2} where λ > cutoff · λ_max, else 0: the pseudo-inverse [..., r]
};

inline GramSpectrum gram_spectrum(const at::Tensor& gram, double cutoff) {
  const auto [values, vectors] = at::linalg_eigh(gram);
  const at::Tensor positive = values.clamp_min(0);
  // eigh's values ascend, the last one is the largest; for S = 0 nothing is kept.
  const at::Tensor keep = positive > positive.narrow(-1, -1, 1) * cutoff;
  return {vectors, positive.sqrt(), choose(keep, positive.rsqrt(), 0.0)};
}

/// Q diag(d) [..., r, r]
inline at::Tensor scale_columns(const at::Tensor& vectors, const at::Tensor& diagonal) {
  return vectors * diagonal.unsqueeze(-2);
}

}  // namespace detail

/// The polar factor: R = S^{1/2} = R_Yᵀ, so that U = Y R⁺ is the orthonormal matrix next to Y. It changes continuously
/// with Y, which is why it is the default.
struct PolarBasis {
  static constexpr const char* name() { return "polar"; }

  /// R⁺ = Q λ^{+1/2} Qᵀ; eigenvalues up to cutoff · λ_max count as zero.
  static at::Tensor inverse_root(const at::Tensor& gram, double cutoff) {
    const auto spectrum = detail::gram_spectrum(gram, cutoff);
    return at::matmul(detail::scale_columns(spectrum.vectors, spectrum.inverse_root), spectrum.vectors.mT());
  }
};

/// QR's R, the root of the paper and of its code. Here it comes from the r×r matrix λ^{1/2} Qᵀ = O R instead of the
/// tall Y: the same R, with the signs that make its diagonal non-negative, also where Y is rank-deficient.
struct QrBasis {
  static constexpr const char* name() { return "qr"; }

  /// R⁺ = Q λ^{+1/2} O; eigenvalues up to cutoff · λ_max count as zero.
  static at::Tensor inverse_root(const at::Tensor& gram, double cutoff) {
    const auto spectrum = detail::gram_spectrum(gram, cutoff);
    const auto [orthogonal, triangle] =
        at::linalg_qr(detail::scale_columns(spectrum.vectors, spectrum.root).mT(), "complete");
    const at::Tensor signs = choose(triangle.diagonal(0, -2, -1) < 0, at::full({}, -1.0, gram.options()), 1.0);
    return at::matmul(detail::scale_columns(spectrum.vectors, spectrum.inverse_root),
                      detail::scale_columns(orthogonal, signs));
  }
};

}  // namespace lora_rite
