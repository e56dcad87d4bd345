#pragma once

#include <ATen/ATen.h>

#include "lora_rite/engine/choose.hpp"
#include "lora_rite/rule/vocabulary.hpp"

/// The rule's vocabulary for at::Tensor: matrices [..., r, r], scalars [..., 1, 1], eigenvalues [..., 1, r], all
/// double, leading dimensions a batch. Arithmetic, matmul, sqrt, rsqrt, reciprocal and pow are ATen's own.
namespace lora_rite {

template <>
struct ScalarOf<at::Tensor> {
  using type = at::Tensor;
};

inline Spectrum<at::Tensor, at::Tensor> eigh(const at::Tensor& symmetric) {
  const auto [values, vectors] = at::linalg_eigh(symmetric);
  return {values.unsqueeze(-2), vectors};
}

inline at::Tensor eigenvalues(const at::Tensor& symmetric) { return at::linalg_eigvalsh(symmetric).unsqueeze(-2); }

template <class Function>
at::Tensor map_values(const at::Tensor& values, const Function& function) {
  return function(values, values.amax(-1, /*keepdim=*/true).clamp_min(0));
}

template <class Function>
at::Tensor map_values(const at::Tensor& values, const at::Tensor& others, const Function& function) {
  return function(values, others);
}

inline at::Tensor smallest(const at::Tensor& values) { return values.amin(-1, /*keepdim=*/true); }

template <class Question>
bool surely(const at::Tensor&, const Question&) {
  return false;
}

inline at::Tensor largest_difference(const at::Tensor& a, const at::Tensor& b) {
  return (a - b).amax(-1, /*keepdim=*/true);
}

inline at::Tensor at_least(const at::Tensor& x, double bound) { return x.clamp_min(bound); }
inline at::Tensor at_least(const at::Tensor& x, const at::Tensor& bound) { return at::maximum(x, bound); }
inline at::Tensor at_most(const at::Tensor& x, double bound) { return x.clamp_max(bound); }
inline at::Tensor at_most(const at::Tensor& x, const at::Tensor& bound) { return at::minimum(x, bound); }

inline at::Tensor square_root(const at::Tensor& x) { return x.sqrt(); }

inline int64_t rank_of(const at::Tensor& matrix) { return matrix.size(-1); }
inline at::Tensor transpose(const at::Tensor& matrix) { return matrix.mT(); }
inline at::Tensor symmetrized(const at::Tensor& matrix) { return 0.5 * (matrix + matrix.mT()); }
inline at::Tensor identity_like(const at::Tensor& matrix) { return at::eye(matrix.size(-1), matrix.options()); }
inline at::Tensor trace_of(const at::Tensor& matrix) {
  return matrix.diagonal(0, -2, -1).sum(-1, /*keepdim=*/true).unsqueeze(-1);
}

inline at::Tensor scale_columns(const at::Tensor& matrix, const at::Tensor& values) { return matrix * values; }

inline at::Tensor scale_rows_by_norms(const at::Tensor& gram, const at::Tensor& matrix) {
  return gram.diagonal(0, -2, -1).clamp_min(0).sqrt().unsqueeze(-1) * matrix;
}

inline at::Tensor squared_norm_of_scaled_rows(const at::Tensor& gram, const at::Tensor& matrix) {
  return scale_rows_by_norms(gram, matrix).square().sum({-2, -1}, /*keepdim=*/true);
}

inline at::Tensor squared_column_norms(const at::Tensor& matrix) { return matrix.square().sum(-2, /*keepdim=*/true); }

// C++ LibTorch lacks the triangular solve on `meta`, where only shape and dtype count.
inline at::Tensor positive_inverse(const at::Tensor& matrix) {
  if (matrix.is_meta()) return at::zeros_like(matrix);
  const auto [lower, info] = at::linalg_cholesky_ex(matrix);
  const at::Tensor inverse =
      at::linalg_solve_triangular(lower, identity_like(matrix).expand_as(matrix), /*upper=*/false);
  return at::matmul(inverse.mT(), inverse);
}

inline at::Tensor orthogonal_factor(const at::Tensor& matrix) {
  const auto [orthogonal, triangle] = at::linalg_qr(matrix, "complete");
  const at::Tensor signs = choose(triangle.diagonal(0, -2, -1) < 0, at::full({}, -1.0, matrix.options()), 1.0);
  return scale_columns(orthogonal, signs.unsqueeze(-2));
}

}  // namespace lora_rite
