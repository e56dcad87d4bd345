#pragma once

// A naive LoRA-RITE in plain Eigen double: one pair at a time, every tall matrix explicit, one line a
// formula. It is written from the paper (Yen et al., "LoRA Done RITE", ICLR 2025) and shares no code
// with the library: tall bases are stored, roots come from an SVD or a Householder QR of the factor
// itself and never from a Gram matrix.
//
// Shapes: n rows of the factor X (Aᵀ or B), m rows of its partner Y, rank r.

#include <Eigen/Dense>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

namespace lora_rite::test {

using Matrix = Eigen::MatrixXd;
using Vector = Eigen::VectorXd;

/// Which root R of YᵀY is used. Results do not depend on it, except after an edit from outside: there
/// V is kept in basis coordinates, and these are the root's.
enum class Root { Polar, Qr };

struct OracleOptions {
  double lr = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double eps_root = 0;
  double preconditioner_exponent = 0.5;
  double weight_decay = 0;
  bool escape = true;
  double clip = 1;
  double max_update_rms = 0;
  double max_relative_change = 0;
  bool row_equilibration = false;
  double lr_ratio_b = 1;
  bool balance = false;
  bool maximize = false;
};

/// A root of a tall matrix, its pseudo-inverse, and the orthonormal basis of the columns.
struct Basis {
  Matrix r;       ///< [r, r], RᵀR = YᵀY
  Matrix r_pinv;  ///< [r, r], Moore-Penrose inverse of R
  Matrix u;       ///< [m, r], U = Y R⁺; columns of a deficient rank are zero (or a partial isometry)
};

/// Relative cut-off of the pseudo-inverse: singular values below it are round-off of exact zeros.
constexpr double kRankCutoff = 1e-12;

/// `matrix`⁺ by its singular values.
inline Matrix pseudo_inverse(const Matrix& matrix) {
  const Eigen::JacobiSVD<Matrix> svd(matrix, Eigen::ComputeThinU | Eigen::ComputeThinV);
  const Vector& s = svd.singularValues();
  Vector inverse = Vector::Zero(s.size());
  for (Eigen::Index i = 0; i < s.size(); ++i) {
    if (s[i] > 0 && s[i] > kRankCutoff * s[0]) inverse[i] = 1 / s[i];
  }
  return svd.matrixV() * inverse.asDiagonal() * svd.matrixU().transpose();
}

/// Largest over smallest singular value, exact zeros left out: how much a product with the matrix and
/// one with its pseudo-inverse can magnify round-off together.
inline double condition(const Matrix& matrix, double cutoff = kRankCutoff) {
  const Vector s = Eigen::JacobiSVD<Matrix>(matrix).singularValues();
  double smallest = s[0];
  for (const double value : s) {
    if (value > cutoff * s[0]) smallest = value;
  }
  return smallest > 0 ? s[0] / smallest : 1;
}

inline Basis basis_of(const Matrix& y, Root root) {
  const Eigen::Index r = y.cols();
  Basis basis;
  if (root == Root::Polar) {  // Y = W Σ Zᵀ: R = Z Σ Zᵀ
    const Eigen::JacobiSVD<Matrix> svd(y, Eigen::ComputeThinU | Eigen::ComputeThinV);
    basis.r = svd.matrixV() * svd.singularValues().asDiagonal() * svd.matrixV().transpose();
  } else {  // Y = Q R with a diagonal ≥ 0; rows of zeros below if r > m
    Matrix padded = Matrix::Zero(std::max(y.rows(), r), r);
    padded.topRows(y.rows()) = y;
    const Eigen::HouseholderQR<Matrix> qr(padded);
    basis.r = qr.matrixQR().topRows(r).triangularView<Eigen::Upper>();
    for (Eigen::Index i = 0; i < r; ++i) {
      if (basis.r(i, i) < 0) basis.r.row(i) *= -1;
    }
  }
  basis.r_pinv = pseudo_inverse(basis.r);
  basis.u = y * basis.r_pinv;
  return basis;
}

/// Eigenvalues of a symmetric matrix, ascending.
inline Vector eigenvalues(const Matrix& matrix) {
  return Eigen::SelfAdjointEigenSolver<Matrix>(matrix, Eigen::EigenvaluesOnly).eigenvalues();
}

/// ((V + (ρ + eps_root) I)^{1/2} + ε I)^{-1}, round-off below zero floored; 1/0 is 0 (a direction that
/// never had a gradient has nothing to precondition). With an exponent p < 1/2 each eigenvalue d of the root becomes
/// d (d / d̄)^{2p−1}, d̄ being that of the mean eigenvalue of V.
inline Matrix inverse_root(const Matrix& v, double rho, double eps, double eps_root, double exponent = 0.5) {
  const Eigen::SelfAdjointEigenSolver<Matrix> solver(v);
  Vector d = (solver.eigenvalues().array().max(0.0) + rho + eps_root).sqrt() + eps;
  const double mean = std::sqrt(v.diagonal().mean() + rho + eps_root) + eps;
  for (Eigen::Index i = 0; i < d.size(); ++i) d[i] = d[i] > 0 ? std::pow(d[i] / mean, 1 - 2 * exponent) / d[i] : 0;
  return solver.eigenvectors() * d.asDiagonal() * solver.eigenvectors().transpose();
}

/// β' = β (1 − β^{t−1}) / (1 − β^t), t counted from 1: an average with β' is already bias-corrected.
inline double corrected_decay(double beta, int64_t t) {
  const double exponent = static_cast<double>(t);
  return beta * (1 - std::pow(beta, exponent - 1)) / (1 - std::pow(beta, exponent));
}

/// d = max(0, min(max_i(λ_i(V) − λ_i(PVPᵀ)), tr V − tr PVPᵀ)): the mass that left the column space.
inline double escaped_mass(const Matrix& v, const Matrix& transported) {
  const double by_eigenvalue = (eigenvalues(v) - eigenvalues(transported)).maxCoeff();
  const double by_trace = v.trace() - transported.trace();
  return std::max(0.0, std::min(by_eigenvalue, by_trace));
}

/// One factor, and its moments in the partner's basis.
struct OracleFactor {
  Matrix x;                   ///< [n, r]
  Matrix m;                   ///< [n, r], momentum in the partner's basis
  Matrix v;                   ///< [r, r], second moment in the partner's basis
  Vector rows;                ///< [n], second moments of the rows
  double rho = 0;             ///< escaped mass
  int64_t t = 0;              ///< steps with a gradient
  Basis basis;                ///< of this factor at the last step
  bool edited = false;        ///< changed from outside since then
  double amplification = 1;   ///< largest κ(R) κ((V + ρI)^{1/2} + εI) of any step, or κ(R_X) κ(R_Y) κ(K)
  double gram_condition = 1;  ///< largest κ(V) of any step, zeros of V left out

  explicit OracleFactor(Matrix initial)
      : x(std::move(initial)),
        m(Matrix::Zero(x.rows(), x.cols())),
        v(Matrix::Zero(x.cols(), x.cols())),
        rows(Vector::Ones(x.rows())) {}

  void edit(Matrix value) {
    x = std::move(value);
    edited = true;
  }
};

/// The gradient of one factor in its tall form, or none.
using TallGradient = std::optional<Matrix>;

struct OraclePair {
  size_t group;
  OracleFactor a;  ///< Aᵀ, [in, r]
  OracleFactor b;  ///< B, [out, r]
};

class Oracle {
 public:
  explicit Oracle(Root root) : root_(root) {}

  std::vector<OracleOptions> groups;
  std::vector<OraclePair> pairs;

  /// One step: gradients[i] = (of Aᵀ, of B) of pair i.
  void step(const std::vector<std::pair<TallGradient, TallGradient>>& gradients) {
    std::vector<Work> work;
    double squared_norm = 0;  // of Ḡ over all pairs of all groups
    for (size_t i = 0; i < pairs.size(); ++i) {
      const auto& [gradient_a, gradient_b] = gradients[i];
      OraclePair& pair = pairs[i];
      const bool maximize = groups[pair.group].maximize;
      Work w;
      w.basis_a = basis_of(pair.a.x, root_);
      w.basis_b = basis_of(pair.b.x, root_);
      w.g_a = unmagnified(gradient_a, w.basis_b, maximize);
      w.g_b = unmagnified(gradient_b, w.basis_a, maximize);
      if (w.g_a) squared_norm += w.g_a->squaredNorm();
      if (w.g_b) squared_norm += w.g_b->squaredNorm();
      work.push_back(std::move(w));
    }

    for (size_t i = 0; i < pairs.size(); ++i) {
      OraclePair& pair = pairs[i];
      Work& w = work[i];
      const OracleOptions& options = groups[pair.group];
      // c = min(1, clip / ‖all Ḡ‖)
      const double norm = std::sqrt(squared_norm);
      const double c = options.clip > 0 && norm > options.clip ? options.clip / norm : 1;
      update_moments(pair.a, pair.b, w.g_a, w.basis_b, w.basis_a, c, options.lr, options);
      update_moments(pair.b, pair.a, w.g_b, w.basis_a, w.basis_b, c, options.lr * options.lr_ratio_b, options);
      // Both factors use the old partner.
      if (w.g_a) move(pair.a, w.basis_b, options.lr, options);
      if (w.g_b) move(pair.b, w.basis_a, options.lr * options.lr_ratio_b, options);
      pair.a.basis = std::move(w.basis_a);
      pair.b.basis = std::move(w.basis_b);
      pair.a.edited = pair.b.edited = false;
      if (options.balance && w.g_a && w.g_b) balance(pair);
    }
  }

 private:
  struct Work {
    Basis basis_a, basis_b;
    TallGradient g_a, g_b;  ///< unmagnified
  };

  /// Ḡ = G R⁺
  static TallGradient unmagnified(const TallGradient& g, const Basis& partner, bool maximize) {
    if (!g) return std::nullopt;
    return Matrix((maximize ? -1.0 : 1.0) * *g * partner.r_pinv);
  }

  /// V, ρ and M of the factor x in the new basis of its partner y, with the new gradient if any.
  static void update_moments(OracleFactor& x, const OracleFactor& y, const TallGradient& gradient, const Basis& basis,
                             const Basis& own, double c, double lr, const OracleOptions& o) {
    if (y.basis.u.size() > 0 && y.edited) {
      // P = I: V is kept in basis coordinates, N = M R⁺ᵀ in the factor's own.
      x.m = x.m * y.basis.r_pinv.transpose() * basis.r.transpose();
    } else if (y.basis.u.size() > 0) {
      const Matrix p = basis.u.transpose() * y.basis.u;  // P = U_tᵀ U_{t-1}
      const Matrix transported = p * x.v * p.transpose();
      if (o.escape) x.rho += escaped_mass(x.v, transported);
      x.v = transported;
      x.m = x.m * p.transpose();
    }
    if (gradient) add_gradient(x, *gradient, basis, own, c, lr, o);
    if (o.max_update_rms > 0) {
      const double rms = x.m.norm() / std::sqrt(static_cast<double>(x.m.size()));
      x.m /= std::max(1.0, rms / o.max_update_rms);
    }
  }

  static void add_gradient(OracleFactor& x, const Matrix& gradient, const Basis& basis, const Basis& own, double c,
                           double lr, const OracleOptions& o) {
    x.t += 1;
    const double beta1 = corrected_decay(o.beta1, x.t);
    const double beta2 = corrected_decay(o.beta2, x.t);
    const Matrix g = c * gradient;
    x.rho = o.escape ? beta2 * x.rho : 0;
    const Matrix seen = o.row_equilibration ? Matrix(row_scale(x.rows, 1).asDiagonal() * g) : g;
    x.v = beta2 * x.v + (1 - beta2) * (seen.transpose() * seen) / static_cast<double>(g.rows());
    x.v = ((x.v + x.v.transpose()) / 2).eval();
    const Matrix preconditioner = inverse_root(x.v, x.rho, o.eps, o.eps_root, o.preconditioner_exponent);
    Matrix s = g * preconditioner;
    if (o.row_equilibration) {
      x.rows = beta2 * x.rows + (1 - beta2) * s.rowwise().squaredNorm() / static_cast<double>(s.cols());
      s = row_scale(x.rows, 0).asDiagonal() * s;
    }
    x.amplification = std::max(x.amplification, condition(basis.r) * condition(preconditioner));
    x.gram_condition = std::max(x.gram_condition, condition(x.v, /*cutoff=*/1e-15));
    if (o.max_relative_change > 0) {
      const Matrix k = damping(basis, own, lr * std::sqrt(static_cast<double>(g.rows())) / (2 * o.max_relative_change));
      s = s * k;
      // An error of Z, a product of both inverse roots, appears in K beside the smallest of its eigenvalues.
      x.amplification = std::max(x.amplification, condition(basis.r) * condition(own.r) * condition(k));
    }
    x.m = beta1 * x.m + (1 - beta1) * s;
  }

  /// row^{-1/2}, `unseen` for a row that never had a gradient.
  static Vector row_scale(const Vector& rows, double unseen) {
    Vector scale = rows;
    for (double& value : scale) value = value > 0 ? 1 / std::sqrt(value) : unseen;
    return scale;
  }

  /// 1 / (1 + c² z²) in the partner's basis, where z are the singular values of Z = R_Y⁺ᵀ R_X⁺ = L diag(z) …
  static Matrix damping(const Basis& partner, const Basis& own, double c) {
    const Eigen::JacobiSVD<Matrix> svd(partner.r_pinv.transpose() * own.r_pinv, Eigen::ComputeFullU);
    const Vector kept = 1 / (1 + (c * svd.singularValues()).array().square());
    return svd.matrixU() * kept.asDiagonal() * svd.matrixU().transpose();
  }

  /// X ← (1 − ηλ) X − η M R⁺ᵀ
  static void move(OracleFactor& x, const Basis& partner, double lr, const OracleOptions& o) {
    x.x = (1 - lr * o.weight_decay) * x.x - lr * x.m * partner.r_pinv.transpose();
  }

  /// Equal norms, same product. U does not change, so neither do moments in the basis; R does.
  static void balance(OraclePair& pair) {
    const double norm_a = pair.a.x.norm(), norm_b = pair.b.x.norm();
    if (norm_a == 0 || norm_b == 0) return;
    const double scale = std::sqrt(norm_b / norm_a);
    multiply(pair.a, scale);
    multiply(pair.b, 1 / scale);
  }
  static void multiply(OracleFactor& factor, double scale) {
    factor.x *= scale;
    factor.basis.r *= scale;
    factor.basis.r_pinv /= scale;
  }

  Root root_;
};

}  // namespace lora_rite::test
