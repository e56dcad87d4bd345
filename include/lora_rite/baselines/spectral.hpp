#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

/// Functions of singular values and eigenvalues, of k matrices at once: by polynomials, which need products alone, and
/// by decompositions in double.
namespace lora_rite::baselines::spectral {

/// Norm of each of k tensors [k, shape], shaped to be multiplied with them [k, 1, …].
inline at::Tensor norms(const at::Tensor& batch) {
  std::vector<int64_t> ones(static_cast<size_t>(batch.dim()), 1);
  ones[0] = batch.size(0);
  return batch.flatten(1).norm(2, -1).view(ones);
}

/// p(x) = a x + b x³ + c x⁵
struct Quintic {
  double a,  ///< of x
      b,     ///< of x³
      c;     ///< of x⁵
};

/// Applied one after the other.
using Quintics = std::vector<Quintic>;

/// The first `count` of them, the last one repeated where there are fewer.
inline Quintics first(const Quintics& all, int64_t count) {
  Quintics result;
  for (size_t i = 0; i < static_cast<size_t>(count); ++i) result.push_back(i < all.size() ? all[i] : all.back());
  return result;
}

/// p(x/γ): a singular value that rounding or an estimate put above 1 does not run away.
inline Quintic shrunk(const Quintic& p, double gamma) {
  const double cube = gamma * gamma * gamma;
  return {p.a / gamma, p.b / cube, p.c / (cube * gamma * gamma)};
}

/// U p(Σ) Vᵀ of each X = U Σ Vᵀ [k, m, n], which is divided by its Frobenius norm (or `floor`, if that is more) first.
inline at::Tensor polar(const at::Tensor& batch, const Quintics& polynomials, double floor) {
  const bool tall = batch.size(1) > batch.size(2);
  at::Tensor x = tall ? batch.mT() : batch;
  x = x / norms(x).clamp_min(floor);
  for (const auto& [a, b, c] : polynomials) {
    const at::Tensor gram = at::matmul(x, x.mT());
    x = a * x + at::matmul(b * gram + c * at::matmul(gram, gram), x);
  }
  return tall ? x.mT() : x;
}

/// About R^{-1/2} of each symmetric R [k, r, r] with eigenvalues in (0, 1], polynomials being such that they bring
/// singular values from there to 1.
inline at::Tensor inverse_root(at::Tensor r, const Quintics& polynomials) {
  at::Tensor root;
  for (const auto& [a, b, c] : polynomials) {
    const at::Tensor factor = at::baddbmm(r, r, r, /*beta=*/b, /*alpha=*/c);
    factor.diagonal(0, -2, -1).add_(a);
    root = root.defined() ? at::matmul(factor, root) : factor;
    r = at::matmul(at::matmul(factor, r), factor);
  }
  return root;
}

/// `polar` by `inverse_root` of XXᵀ: the long side is multiplied twice only, at the price of squared singular values.
inline at::Tensor polar_by_gram(const at::Tensor& batch, const Quintics& polynomials, double floor) {
  const bool tall = batch.size(1) > batch.size(2);
  at::Tensor x = tall ? batch.mT() : batch;
  x = x / norms(x).clamp_min(floor);
  x = at::matmul(inverse_root(at::matmul(x, x.mT()), polynomials), x);
  return tall ? x.mT() : x;
}

/// UVᵀ of each X = U Σ Vᵀ over the singular values that are no round-off; zero for zero.
inline at::Tensor exact_polar(const at::Tensor& batch) {
  const auto [u, s, vh] = at::linalg_svd(batch.to(at::kDouble), /*full_matrices=*/false);
  const double unit = batch.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                                         : double{std::numeric_limits<float>::epsilon()};
  const double side = static_cast<double>(std::max(batch.size(1), batch.size(2)));
  const at::Tensor kept = s.gt(s.amax(-1, /*keepdim=*/true) * (side * unit)).to(at::kDouble);
  return at::matmul(u * kept.unsqueeze(-2), vh).to(batch.scalar_type());
}

/// S^{-1/2} of each symmetric S [k, r, r], zero in the directions of eigenvalues that are not positive.
inline at::Tensor exact_inverse_root(const at::Tensor& batch) {
  const auto [values, vectors] = at::linalg_eigh(batch.to(at::kDouble));
  const at::Tensor powers = at::where(values.gt(0), values.rsqrt(), at::zeros_like(values));
  return at::matmul(vectors * powers.unsqueeze(-2), vectors.mT()).to(batch.scalar_type());
}

/// (YYᵀ + damping I)^{-1} X of each Y [k, r, m] and X [k, r, n], in double.
inline at::Tensor damped_solve(const at::Tensor& y, double damping, const at::Tensor& x) {
  const at::Tensor wide = y.to(at::kDouble);
  const at::Tensor damped = at::matmul(wide, wide.mT()) + damping * at::eye(wide.size(1), wide.options());
  return at::cholesky_solve(x.to(at::kDouble), std::get<0>(at::linalg_cholesky_ex(damped)));
}

}  // namespace lora_rite::baselines::spectral
