#pragma once

#include <cmath>
#include <tuple>
#include <vector>

#include "lora_rite/baselines/muon.hpp"
#include "lora_rite/baselines/pair_baseline.hpp"

namespace lora_rite::baselines {

/// Options of a param group of LoraTsd, whose formulas explain the symbols.
struct LoraTsdOptions : public BaselineOptions<LoraTsdOptions> {
  explicit LoraTsdOptions(double lr = 5e-3) : lr_(lr) {}  ///< all else by default

  TORCH_ARG(double, lr) = 5e-3;                ///< η ≥ 0, about ‖d(BA)‖₂ of a step
  TORCH_ARG(double, momentum) = 0.95;          ///< μ, in [0, 1)
  TORCH_ARG(int64_t, iterations) = 5;          ///< τ ≥ 1
  TORCH_ARG(int64_t, steps) = 5;               ///< Newton–Schulz steps of a polar factor, ≥ 1
  TORCH_ARG(double, ridge) = 1e-8;             ///< > 0, relative to the mean diagonal of a Gram matrix
  TORCH_ARG(int64_t, balance_interval) = 250;  ///< steps between two rescalings to ‖A‖_F = ‖B‖_F, 0 for none
  TORCH_ARG(bool, exact) = false;              ///< polar factors by SVDs in double instead

 public:
  /// Throws c10::Error that names an option out of its range, what it is and what was expected.
  void check() const {
    check_at_least_zero("lr", lr());
    check_decay_rate("momentum", momentum());
    TORCH_CHECK(iterations() >= 1, "iterations is ", iterations(), ", expected at least 1");
    TORCH_CHECK(steps() >= 1, "steps is ", steps(), ", expected at least 1");
    TORCH_CHECK(ridge() > 0 && std::isfinite(ridge()), "ridge is ", ridge(), ", expected a finite number > 0");
    TORCH_CHECK(balance_interval() >= 0, "balance_interval is ", balance_interval(), ", expected at least 0");
  }
  /// Calls function(name, value) for every option that a checkpoint keeps.
  template <class Options, class Function>
  static void for_each_saved(Options& options, const Function& function) {
    function("lr", options.lr());
    function("momentum", options.momentum());
    function("iterations", options.iterations());
    function("steps", options.steps());
    function("ridge", options.ridge());
    function("balance_interval", options.balance_interval());
    function("exact", options.exact());
  }
};

/// LoRA-TSD (Andriianov, Veprikov & Beznosikov, "LoRA-TSD: Tangent-Space Spectral Descent for LoRA via Muon-Style
/// Updates", arXiv 2609.02734, Algorithm 2). With P_T(Z) = P_B Z + Z P_A − P_B Z P_A, the projection into the tangent
/// space of the matrices of rank r at BA, and G the weight's gradient, of which the momenta M ← μM + (1−μ)G of the
/// factors are enough:
///
///   X₀ = P_T(G),  X_{t+1} = P_T(msign(X_t)),  dB = −η X_τ A⁺,  dA = B⁺(−η X_τ − dB A),
///
/// X being a product L R of 2r columns and rows, and msign Muon's Newton–Schulz iteration in between two QR
/// decompositions. τ = 5 and the rescaling are those of the paper's runs at 8B. What is for the authors' code to say:
/// the pseudo-inverses have a ridge, and P_A, P_B are QR bases'; that code also bounds ‖d(BA)‖_F by 0.1, which the
/// paper does not mention, nor does this.
class LoraTsd : public PairBaseline<LoraTsdOptions> {
 public:
  /// One group of these pairs. Throws c10::Error naming a pair that does not fit together.
  explicit LoraTsd(const std::vector<FactorPair>& pairs, const LoraTsdOptions& options = LoraTsdOptions())
      : PairBaseline("LoraTsd", pairs, options) {}

 protected:
  void update(const LoraTsdOptions& options, FactorBatch& a_batch, FactorBatch& b_batch) override {
    const at::Tensor a = a_batch.matrix(), b = b_batch.matrix().mT();  // [k, r, n], [k, m, r]
    const at::Tensor of_a = inverse_gram(options, a), of_b = inverse_gram(options, b.mT());
    const at::Tensor m_a = averaged(options, a_batch), m_b = averaged(options, b_batch).mT();
    const at::Tensor basis_a = std::get<0>(at::linalg_qr(a.mT())), basis_b = std::get<0>(at::linalg_qr(b));

    const at::Tensor unmagnified = at::matmul(of_b, m_a);  // B⁺G
    const at::Tensor inside = at::matmul(at::matmul(unmagnified, a.mT()), of_a);
    at::Tensor left = at::cat({b, at::matmul(m_b, of_a)}, 2);
    at::Tensor right = at::cat({unmagnified - at::matmul(inside, a), a}, 1);
    for (int64_t i = 0; i < options.iterations(); ++i) {
      std::tie(left, right) = projected(msign(options, left, right), basis_a, basis_b);
    }

    const at::Tensor d_b = at::matmul(at::matmul(left, at::matmul(right, a.mT())), of_a);
    const at::Tensor rest = at::matmul(at::matmul(b.mT(), left), right) - at::matmul(at::matmul(b.mT(), d_b), a);
    a_batch.move_matrix(1, options.lr() * at::matmul(of_b, rest));
    b_batch.move_matrix(1, options.lr() * d_b.mT());
    if (options.balance_interval() > 0 && a_batch.step % options.balance_interval() == 0) balance(a_batch, b_batch);
  }

 private:
  /// L [k, m, c] and R [k, c, n]
  using Product = std::tuple<at::Tensor, at::Tensor>;

  static at::Tensor averaged(const LoraTsdOptions& options, FactorBatch& factor) {
    at::Tensor momentum = factor.state("momentum");
    momentum.lerp_(factor.gradient, 1 - options.momentum());
    return factor.matrix(momentum);
  }

  /// (YYᵀ + ridge · mean diagonal)⁻¹ [k, r, r] of each Y [k, r, d]
  static at::Tensor inverse_gram(const LoraTsdOptions& options, const at::Tensor& y) {
    const at::Tensor wide = y.to(at::kDouble), gram = at::matmul(wide, wide.mT());
    const at::Tensor ridge = options.ridge() * gram.diagonal(0, -2, -1).mean(-1).clamp_min(1e-12).view({-1, 1, 1});
    const at::Tensor damped = gram + ridge * at::eye(gram.size(1), gram.options());
    return std::get<0>(at::linalg_inv_ex(damped)).to(y.scalar_type());
  }

  static Product msign(const LoraTsdOptions& options, const at::Tensor& left, const at::Tensor& right) {
    const auto [q_left, r_left] = at::linalg_qr(left);
    const auto [q_right, r_right] = at::linalg_qr(right.mT());
    const at::Tensor core = at::matmul(r_left, r_right.mT());
    const at::Tensor sign = options.exact() ? spectral::exact_polar(core) : Muon::orthogonalized(core, options.steps());
    return {at::matmul(q_left, sign), q_right.mT()};
  }

  /// P_T(LR) = P_B LR (I − P_A) + LR P_A
  static Product projected(const Product& x, const at::Tensor& basis_a, const at::Tensor& basis_b) {
    const auto& [left, right] = x;
    const at::Tensor on_b = at::matmul(basis_b.mT(), left), on_a = at::matmul(right, basis_a);
    const at::Tensor rest = at::matmul(on_b, right) - at::matmul(at::matmul(on_b, on_a), basis_a.mT());
    return {at::cat({basis_b, at::matmul(left, on_a)}, 2), at::cat({rest, basis_a.mT()}, 1)};
  }

  /// A ← cA and B ← B/c, and the momenta as their gradients; nothing where a factor is zero.
  static void balance(FactorBatch& a_batch, FactorBatch& b_batch) {
    const at::Tensor a = a_batch.matrix(), b = b_batch.matrix(), of_a = norms(a), of_b = norms(b);
    const at::Tensor both = of_a.gt(0).logical_and(of_b.gt(0));
    const at::Tensor c = at::where(both, (of_b / of_a).sqrt(), at::ones_like(of_a));
    a_batch.assign(a * c);
    b_batch.assign(b / c);
    at::Tensor m_a = a_batch.state("momentum"), m_b = b_batch.state("momentum");
    m_a.copy_(a_batch.shaped(a_batch.matrix(m_a) / c));
    m_b.copy_(b_batch.shaped(b_batch.matrix(m_b) * c));
  }
};

}  // namespace lora_rite::baselines
