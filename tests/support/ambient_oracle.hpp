#pragma once

// The same algorithm in ΔW-space, to check the oracle itself: no root, no basis and no transport
// matrix occurs. With the projector Π = Y (YᵀY)^{-1} Yᵀ [m, m], everything r×r is lifted,
//
//   V̂ = U V Uᵀ [m, m],   M̂ = M Uᵀ [n, m],   P V Pᵀ ↦ Π V̂ Π,   M Pᵀ ↦ M̂ Π,   Ḡ ↦ ∇W Π [n, m],
//   M R⁺ᵀ = M̂ Y (YᵀY)^{-1},
//
// where ∇W is the explicit gradient with respect to the product X Yᵀ. Full-rank factors only.

#include "oracle.hpp"

namespace lora_rite::test {

/// One factor's moments in ΔW-space.
struct AmbientMoments {
  Matrix m;  ///< [n, m]
  Matrix v;  ///< [m, m]
  double rho = 0;

  AmbientMoments(Eigen::Index rows, Eigen::Index partner_rows)
      : m(Matrix::Zero(rows, partner_rows)), v(Matrix::Zero(partner_rows, partner_rows)) {}
};

/// One pair X Yᵀ = B A with both moments.
class AmbientOracle {
 public:
  AmbientOracle(Matrix a_tall, Matrix b, OracleOptions options)
      : a_(std::move(a_tall)),
        b_(std::move(b)),
        options_(options),
        moments_a_(a_.rows(), b_.rows()),
        moments_b_(b_.rows(), a_.rows()) {}

  const Matrix& a_tall() const { return a_; }
  const Matrix& b() const { return b_; }

  /// grad_w: gradient with respect to ΔW = B A, [out, in].
  void step(const Matrix& grad_w) {
    ++t_;
    const Matrix projector_a = projector(a_), projector_b = projector(b_);
    const Matrix g_a = grad_w.transpose() * projector_b;  // [in, out]
    const Matrix g_b = grad_w * projector_a;              // [out, in]
    const double norm = std::sqrt(g_a.squaredNorm() + g_b.squaredNorm());
    const double c = options_.clip > 0 ? std::min(1.0, options_.clip / norm) : 1.0;
    update(moments_a_, c * g_a, projector_b);
    update(moments_b_, c * g_b, projector_a);
    const double shrink = 1 - options_.lr * options_.weight_decay;
    const Matrix a = shrink * a_ - options_.lr * moments_a_.m * left_inverse_transposed(b_);
    b_ = shrink * b_ - options_.lr * moments_b_.m * left_inverse_transposed(a_);
    a_ = a;
  }

 private:
  /// Y (YᵀY)^{-1}
  static Matrix left_inverse_transposed(const Matrix& y) { return y * (y.transpose() * y).inverse(); }

  static Matrix projector(const Matrix& y) { return left_inverse_transposed(y) * y.transpose(); }

  void update(AmbientMoments& x, const Matrix& g, const Matrix& projector) {
    const double beta1 = corrected_decay(options_.beta1, t_);
    const double beta2 = corrected_decay(options_.beta2, t_);
    const Matrix kept = projector * x.v * projector;
    // The m − r zero eigenvalues of both sides pair up and change neither maximum nor trace.
    if (options_.escape) x.rho = beta2 * (x.rho + escaped_mass(x.v, kept));
    x.v = beta2 * kept + (1 - beta2) * g.transpose() * g / static_cast<double>(g.rows());
    x.v = ((x.v + x.v.transpose()) / 2).eval();
    const Matrix s = g * inverse_root(x.v, x.rho, options_.eps, options_.eps_root) * projector;
    x.m = beta1 * x.m * projector + (1 - beta1) * s;
  }

  Matrix a_;  ///< Aᵀ, [in, r]
  Matrix b_;  ///< [out, r]
  OracleOptions options_;
  int64_t t_ = 0;
  AmbientMoments moments_a_, moments_b_;
};

}  // namespace lora_rite::test
