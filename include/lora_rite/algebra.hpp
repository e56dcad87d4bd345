#pragma once

#include <ATen/ATen.h>

#include "lora_rite/choose.hpp"

/// The few operations that the rule is written in, spelled for at::Tensor: matrices [..., r, r], scalars [..., 1, 1],
/// eigenvalues [..., 1, r], all double, leading dimensions a batch. `engine/lanes.hpp` spells the same for a CPU.
/// Arithmetic, matmul, sqrt, rsqrt, reciprocal and pow are ATen's own.
namespace lora_rite {

/// S = Q diag(λ) Qᵀ.
template <class Matrix, class Values>
struct Spectrum {
  Values values;   ///< λ
  Matrix vectors;  ///< Q
};

/// The type of scalars that goes with a type of matrices.
template <class Matrix>
struct ScalarOf {
  using type = at::Tensor;
};

inline Spectrum<at::Tensor, at::Tensor> eigh(const at::Tensor& symmetric) {
  const auto [values, vectors] = at::linalg_eigh(symmetric);
  return {values.unsqueeze(-2), vectors};
}

/// Eigenvalues, ascending.
inline at::Tensor eigenvalues(const at::Tensor& symmetric) { return at::linalg_eigvalsh(symmetric).unsqueeze(-2); }

/// f(λ, λ_max) of every eigenvalue; λ_max is at least 0.
template <class Function>
at::Tensor map_values(const at::Tensor& values, const Function& function) {
  return function(values, values.amax(-1, /*keepdim=*/true).clamp_min(0));
}

/// f(λ, x) of every eigenvalue and the number that stands beside it.
template <class Function>
at::Tensor map_values(const at::Tensor& values, const at::Tensor& others, const Function& function) {
  return function(values, others);
}

/// λ_min
inline at::Tensor smallest(const at::Tensor& values) { return values.amin(-1, /*keepdim=*/true); }

/// Does the flag that `question()` returns hold for every matrix of this kind? Only where the answer costs next to
/// nothing: a GPU would have to be waited for, and so tensors are not asked. It may spare work, never decide a result.
template <class Question>
bool surely(const at::Tensor&, const Question&) {
  return false;
}

/// max_i (a_i − b_i)
inline at::Tensor largest_difference(const at::Tensor& a, const at::Tensor& b) {
  return (a - b).amax(-1, /*keepdim=*/true);
}

inline double at_least(double x, double bound) { return x > bound ? x : bound; }
inline double at_most(double x, double bound) { return x < bound ? x : bound; }
inline at::Tensor at_least(const at::Tensor& x, double bound) { return x.clamp_min(bound); }
inline at::Tensor at_least(const at::Tensor& x, const at::Tensor& bound) { return at::maximum(x, bound); }
inline at::Tensor at_most(const at::Tensor& x, double bound) { return x.clamp_max(bound); }
inline at::Tensor at_most(const at::Tensor& x, const at::Tensor& bound) { return at::minimum(x, bound); }

inline int64_t rank_of(const at::Tensor& matrix) { return matrix.size(-1); }
inline at::Tensor transpose(const at::Tensor& matrix) { return matrix.mT(); }
inline at::Tensor symmetrized(const at::Tensor& matrix) { return 0.5 * (matrix + matrix.mT()); }
inline at::Tensor identity_like(const at::Tensor& matrix) { return at::eye(matrix.size(-1), matrix.options()); }
inline at::Tensor trace_of(const at::Tensor& matrix) {
  return matrix.diagonal(0, -2, -1).sum(-1, /*keepdim=*/true).unsqueeze(-1);
}

/// M diag(d)
inline at::Tensor scale_columns(const at::Tensor& matrix, const at::Tensor& values) { return matrix * values; }

/// diag(S)^{1/2} M: rows of M times the norms of X's columns, S being XᵀX.
inline at::Tensor scale_rows_by_norms(const at::Tensor& gram, const at::Tensor& matrix) {
  return gram.diagonal(0, -2, -1).clamp_min(0).sqrt().unsqueeze(-1) * matrix;
}

/// ‖diag(S)^{1/2} M‖²
inline at::Tensor squared_norm_of_scaled_rows(const at::Tensor& gram, const at::Tensor& matrix) {
  return scale_rows_by_norms(gram, matrix).square().sum({-2, -1}, /*keepdim=*/true);
}

/// Squared norms of columns.
inline at::Tensor squared_column_norms(const at::Tensor& matrix) { return matrix.square().sum(-2, /*keepdim=*/true); }

/// S^{-1} = L^{-T} L^{-1} of positive definite S = L Lᵀ. (C++ LibTorch lacks the triangular solve on `meta`, where only
/// shape and dtype count.)
inline at::Tensor positive_inverse(const at::Tensor& matrix) {
  if (matrix.is_meta()) return at::zeros_like(matrix);
  const auto [lower, info] = at::linalg_cholesky_ex(matrix);
  const at::Tensor inverse =
      at::linalg_solve_triangular(lower, identity_like(matrix).expand_as(matrix), /*upper=*/false);
  return at::matmul(inverse.mT(), inverse);
}

/// O of matrix = O R with O orthogonal and R upper triangular, its diagonal non-negative.
inline at::Tensor orthogonal_factor(const at::Tensor& matrix) {
  const auto [orthogonal, triangle] = at::linalg_qr(matrix, "complete");
  const at::Tensor signs = choose(triangle.diagonal(0, -2, -1) < 0, at::full({}, -1.0, matrix.options()), 1.0);
  return scale_columns(orthogonal, signs.unsqueeze(-2));
}

}  // namespace lora_rite
