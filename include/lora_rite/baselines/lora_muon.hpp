#pragma once

#include <cmath>
#include <vector>

#include "lora_rite/baselines/pair_baseline.hpp"

namespace lora_rite::baselines {

/// Options of a param group of LoraMuon, whose formulas explain the symbols.
struct LoraMuonOptions : public BaselineOptions<LoraMuonOptions> {
  explicit LoraMuonOptions(double lr = 0.1) : lr_(lr) {}  ///< all else by default

  TORCH_ARG(double, lr) = 0.1;            ///< η ≥ 0, half of which is ‖B dA‖₂ and half ‖dB A‖₂
  TORCH_ARG(double, momentum) = 0.9;      ///< β, in [0, 1)
  TORCH_ARG(double, weight_decay) = 0.0;  ///< λ ≥ 0, of BA, with ηλ < 1; 0.01 in the paper
  TORCH_ARG(double, damping) = 1e-5;      ///< ε > 0, relative to ‖S‖_F
  TORCH_ARG(int64_t, steps) = 8;          ///< polynomials of a polar factor, 1 to 8
  TORCH_ARG(int64_t, root_steps) = 7;     ///< polynomials of a root, 1 to 7
  TORCH_ARG(bool, exact) = false;         ///< polar factors and roots by decompositions in double instead

 public:
  /// Throws c10::Error that names an option out of its range, what it is and what was expected.
  void check() const {
    check_at_least_zero("lr", lr());
    check_decay_rate("momentum", momentum());
    check_at_least_zero("weight_decay", weight_decay());
    TORCH_CHECK(lr() * weight_decay() < 1, "lr times weight_decay is ", lr() * weight_decay(),
                ", expected less than 1");
    TORCH_CHECK(damping() > 0 && std::isfinite(damping()), "damping is ", damping(), ", expected a finite number > 0");
    TORCH_CHECK(steps() >= 1 && steps() <= 8, "steps is ", steps(), ", expected 1 to 8");
    TORCH_CHECK(root_steps() >= 1 && root_steps() <= 7, "root_steps is ", root_steps(), ", expected 1 to 7");
  }
  /// Calls function(name, value) for every option that a checkpoint keeps.
  template <class Options, class Function>
  static void for_each_saved(Options& options, const Function& function) {
    function("lr", options.lr());
    function("momentum", options.momentum());
    function("weight_decay", options.weight_decay());
    function("damping", options.damping());
    function("steps", options.steps());
    function("root_steps", options.root_steps());
    function("exact", options.exact());
  }
};

/// LoRA-Muon (Cesista, Crowson, Simal & Biderman, "LoRA-Muon: Spectral Steepest Descent on the Low-Rank Manifold",
/// arXiv 2606.12921, Algorithm 1): the spectral norm's steepest descent of BA, half of it by either factor. With the
/// momenta M ← βM + (1−β)G, S_B = BᵀB, S_A = AAᵀ and s = √(1−ηλ):
///
///   A ← sA − (η/2s) S_B^{-1/2} msign(S_B^{-1/2} M_A),  B ← sB − (η/2s) msign(M_B S_A^{-1/2}) S_A^{-1/2}.
///
/// msign and the roots, of S/‖S‖_F + εI, are the polynomials of its Appendices B.3 and B.4. The paper leaves open what
/// the root of S = 0 is, with which LoRA starts: zero here, so that the partner rests, whose gradient is zero too. Its
/// occasional rescaling of the factors (Appendix B.1) is left out, and a layer's scale taken for 1.
class LoraMuon : public PairBaseline<LoraMuonOptions> {
 public:
  /// One group of these pairs. Throws c10::Error naming a pair that does not fit together.
  explicit LoraMuon(const std::vector<FactorPair>& pairs, const LoraMuonOptions& options = LoraMuonOptions())
      : PairBaseline("LoraMuon", pairs, options) {}

 protected:
  void update(const LoraMuonOptions& options, FactorBatch& a, FactorBatch& b) override {
    const at::Tensor for_a = inverse_root(options, b.matrix()), for_b = inverse_root(options, a.matrix());
    advance(options, a, for_a);
    advance(options, b, for_b);
  }

 private:
  static void advance(const LoraMuonOptions& options, FactorBatch& factor, const at::Tensor& root) {
    static const spectral::Quintics table = {
        {7.2086, -15.5131, 9.0178}, {3.9623, -2.5813, 0.4542}, {3.9466, -2.5765, 0.4544}, {3.8991, -2.5671, 0.4566},
        {3.7186, -2.5308, 0.4653},  {3.1390, -2.3073, 0.4733}, {2.1715, -1.5246, 0.3885}, {1.8648, -1.2224, 0.3577}};
    at::Tensor momentum = factor.state("momentum");
    momentum.lerp_(factor.gradient, 1 - options.momentum());
    const at::Tensor z = at::matmul(root, factor.matrix(momentum));
    const at::Tensor sign =
        options.exact() ? spectral::exact_polar(z) : spectral::polar(z, spectral::first(table, options.steps()), 1e-20);
    const double keep = std::sqrt(1 - options.lr() * options.weight_decay());
    factor.move_matrix(keep, options.lr() / (2 * keep) * at::matmul(root, sign));
  }

  /// (YYᵀ + ε‖YYᵀ‖_F I)^{-1/2} [k, r, r] of each Y [k, r, d], zero for zero.
  static at::Tensor inverse_root(const LoraMuonOptions& options, const at::Tensor& y) {
    static const spectral::Quintics table = {{7.424865680309214, -18.39581635618996, 12.896720413604342},
                                             {3.4877256051546017, -2.3300436563986993, 0.4404692168431095},
                                             {2.7766085124882527, -2.070643152532662, 0.46302261050004967},
                                             {1.9913142104341506, -1.373936700681269, 0.3875934979568538},
                                             {1.8754637749479246, -1.2505152090010534, 0.37505152463617264},
                                             {1.874999066623701, -1.2499981332141676, 0.37499906659046633},
                                             {1.875, -1.25, 0.375}};
    const at::Tensor gram = at::matmul(y, y.mT());
    const at::Tensor size = norms(gram);
    const at::Tensor damped = gram / size.clamp_min(1e-30) + options.damping() * at::eye(gram.size(1), gram.options());
    at::Tensor root;
    if (options.exact()) {
      root = spectral::exact_inverse_root(damped);
    } else {
      spectral::Quintics polynomials = spectral::first(table, options.root_steps());
      for (auto& polynomial : polynomials) polynomial = spectral::shrunk(polynomial, 1.001);
      root = spectral::inverse_root(damped, polynomials);
    }
    return at::where(size.gt(0), root * size.rsqrt(), at::zeros_like(root));
  }
};

}  // namespace lora_rite::baselines
