#pragma once

#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "lora_rite/baselines/pair_baseline.hpp"

namespace lora_rite::baselines {

/// Options of a param group of PoLora, whose formulas explain the symbols.
struct PoLoraOptions : public BaselineOptions<PoLoraOptions> {
  using betas_t = std::tuple<double, double>;            ///< (β₁, β₂)
  explicit PoLoraOptions(double lr = 1e-2) : lr_(lr) {}  ///< all else by default

  /// η ≥ 0, the bound on ‖d(BA)‖₂ of a step. 2e-4 in the authors' code; the paper's best rates are about 1e-2.
  TORCH_ARG(double, lr) = 1e-2;
  TORCH_ARG(betas_t, betas) = std::make_tuple(0.9, 0.99);  ///< of the momentum and of the energies, in [0, 1)
  TORCH_ARG(double, damping) = 1e-4;                       ///< δ > 0, relative
  TORCH_ARG(double, eps) = 1e-12;                          ///< ε > 0: the energies at first, and below which is zero
  TORCH_ARG(int64_t, steps) = 8;                           ///< polynomials of a polar factor and of a root, ≥ 1
  TORCH_ARG(int64_t, power_steps) = 8;                     ///< power iterations of a norm, ≥ 1
  TORCH_ARG(bool, exact) = false;  ///< polar factors, roots and norms by decompositions in double instead

 public:
  /// Throws c10::Error that names an option out of its range, what it is and what was expected.
  void check() const {
    check_at_least_zero("lr", lr());
    check_decay_rate("betas[0]", std::get<0>(betas()));
    check_decay_rate("betas[1]", std::get<1>(betas()));
    TORCH_CHECK(damping() > 0 && std::isfinite(damping()), "damping is ", damping(), ", expected a finite number > 0");
    TORCH_CHECK(eps() > 0 && std::isfinite(eps()), "eps is ", eps(), ", expected a finite number > 0");
    TORCH_CHECK(steps() >= 1, "steps is ", steps(), ", expected at least 1");
    TORCH_CHECK(power_steps() >= 1, "power_steps is ", power_steps(), ", expected at least 1");
  }
  /// Calls function(name, value) for every option that a checkpoint keeps.
  template <class Options, class Function>
  static void for_each_saved(Options& options, const Function& function) {
    function("lr", options.lr());
    function("betas", options.betas());
    function("damping", options.damping());
    function("eps", options.eps());
    function("steps", options.steps());
    function("power_steps", options.power_steps());
    function("exact", options.exact());
  }
};

/// PoLoRA (Ghosh, Parshakova & Gower, "PoLoRA: A Preconditioned Orthogonalized LoRA Optimizer", arXiv 2607.17620,
/// Algorithm 1). With a pair's momenta M, one step of them ahead, and running energies q of A's columns, p of B's rows:
///
///   Q = diag(q / max q + δ),  P = diag(p / max p + δ),  C_B = BᵀPB,  C_A = AQAᵀ, both + max(δ λ₁(C), ε) I,
///   D_A = C_B^{-1/2} msign(C_B^{-1/2} M_A Q^{-1/2}) Q^{-1/2},  D_B likewise from the other side,
///   A ← A − ρ D_A / ‖D_A‖₂,  B ← B − ρ D_B / ‖D_B‖₂,  ρ = η / (‖A‖₂ + ‖B‖₂),
///   q ← β₂ q + (1−β₂) diag(G_Aᵀ C_B⁻¹ G_A) / r,  p ← β₂ p + (1−β₂) diag(G_B C_A⁻¹ G_Bᵀ) / r.
///
/// msign and the roots are eight Polar Express polynomials of an r × r matrix (its Appendix E), the norms power
/// iterations that start where the last step's ended. The paper was read through implementations of its Algorithm 1,
/// not itself; the tables of polynomials differ among them, and this one has the authors' code's. It takes a layer's
/// scale for 1, as the paper's α = r makes it.
class PoLora : public PairBaseline<PoLoraOptions> {
 public:
  /// One group of these pairs. Throws c10::Error naming a pair that does not fit together.
  explicit PoLora(const std::vector<FactorPair>& pairs, const PoLoraOptions& options = PoLoraOptions())
      : PairBaseline("PoLora", pairs, options) {}

 protected:
  void update(const PoLoraOptions& options, FactorBatch& a, FactorBatch& b) override {
    const Side of_a = side(options, a), of_b = side(options, b);
    const at::Tensor rho = options.lr() / (of_a.norm + of_b.norm).clamp_min(options.eps());
    advance(options, a, of_a.scale, of_b.root, rho);
    advance(options, b, of_b.scale, of_a.root, rho);
  }

 private:
  /// What a factor X [k, r, d] brings into the step.
  struct Side {
    at::Tensor scale;  ///< Q^{-1/2} [k, 1, d]
    at::Tensor root;   ///< (XQXᵀ)^{-1/2} [k, r, r], for the partner
    at::Tensor norm;   ///< ‖X‖₂ [k, 1, 1]
  };

  static Side side(const PoLoraOptions& options, FactorBatch& factor) {
    const at::Tensor x = factor.matrix();
    at::Tensor energy = factor.state("energy", {x.size(2)});
    if (factor.step == 1) energy.fill_(options.eps());
    const at::Tensor wide = energy.to(x.scalar_type()).unsqueeze(1);
    const at::Tensor weights = wide / wide.amax(-1, /*keepdim=*/true).clamp_min(kTiny) + options.damping();
    return {weights.rsqrt(), inverse_root(options, at::matmul(x * weights, x.mT())),
            norm(options, x, factor, "top_of_factor")};
  }

  static void advance(const PoLoraOptions& options, FactorBatch& factor, const at::Tensor& scale,
                      const at::Tensor& root, const at::Tensor& rho) {
    const auto [beta1, beta2] = options.betas();
    at::Tensor momentum = factor.state("momentum");
    momentum.lerp_(factor.gradient, 1 - beta1);
    const at::Tensor ahead = factor.matrix(factor.gradient.lerp(momentum, beta1));
    const at::Tensor z = at::matmul(root, ahead) * scale;
    const at::Tensor sign =
        options.exact() ? spectral::exact_polar(z) : spectral::polar_by_gram(z, polynomials(options), kTiny);
    const at::Tensor direction = at::matmul(root, sign) * scale;
    const at::Tensor length = norm(options, direction, factor, "top_of_step").clamp_min(options.eps());

    const at::Tensor whitened = at::matmul(root, factor.matrix(factor.gradient));
    at::Tensor energy = factor.state("energy", {whitened.size(2)});
    energy.lerp_(whitened.square().mean(1).to(energy.scalar_type()), 1 - beta2);
    factor.move_matrix(1, rho / length * direction);
  }

  /// (C + max(δ λ₁(C), ε) I)^{-1/2} [k, r, r]
  static at::Tensor inverse_root(const PoLoraOptions& options, const at::Tensor& c) {
    const at::Tensor s = (c + c.mT()) / 2;
    at::Tensor top;  // [k, 1, 1]
    if (options.exact()) {
      top = at::linalg_eigvalsh(s.to(at::kDouble)).amax(-1).to(s.scalar_type()).view({-1, 1, 1});
    } else {
      const at::Tensor v = iterated(options, s, s.sum(-1, /*keepdim=*/true));
      top = (v * at::matmul(s, v)).sum({1, 2}, /*keepdim=*/true);
      top = at::maximum(top, s.square().sum(-1).amax(-1).sqrt().view({-1, 1, 1}));
    }
    const at::Tensor damped = s + (options.damping() * top).clamp_min(options.eps()) * at::eye(s.size(1), s.options());
    if (options.exact()) return spectral::exact_inverse_root(damped);
    const at::Tensor trace = damped.diagonal(0, -2, -1).sum(-1).view({-1, 1, 1});
    return spectral::inverse_root(damped / trace, polynomials(options)) * trace.rsqrt();
  }

  /// ‖X‖₂ [k, 1, 1] of each X [k, r, d]: by power iterations never too large, and at least the longest row and column.
  /// The state `top` keeps the vectors where they end.
  static at::Tensor norm(const PoLoraOptions& options, const at::Tensor& x, FactorBatch& factor,
                         const std::string& top) {
    const at::Tensor gram = at::matmul(x, x.mT());
    if (options.exact()) {
      const at::Tensor largest = at::linalg_eigvalsh(gram.to(at::kDouble)).amax(-1).clamp_min(0).sqrt();
      return largest.to(x.scalar_type()).view({-1, 1, 1});
    }
    at::Tensor state = factor.state(top, {x.size(1)});
    const at::Tensor last = state.to(x.scalar_type()).unsqueeze(-1);
    const at::Tensor length = norms(last);
    const at::Tensor usable = length.gt(0).logical_and(length.isfinite());
    const at::Tensor v = iterated(options, gram, at::where(usable, last, x.sum(-1, /*keepdim=*/true)));
    state.copy_(v.squeeze(-1));
    const at::Tensor square = (v * at::matmul(gram, v)).sum({1, 2});
    const at::Tensor bound = at::maximum(gram.diagonal(0, -2, -1).amax(-1), x.square().sum(1).amax(-1));
    return at::maximum(square, bound).sqrt().view({-1, 1, 1});
  }

  /// Power iterations of symmetric S [k, r, r] from v [k, r, 1].
  static at::Tensor iterated(const PoLoraOptions& options, const at::Tensor& s, at::Tensor v) {
    const auto normalized = [](const at::Tensor& x) { return x / norms(x).clamp_min(kTiny); };
    v = normalized(v);
    for (int64_t i = 0; i < options.power_steps(); ++i) v = normalized(at::matmul(s, v));
    return v;
  }

  /// Polar Express (Amsel et al., arXiv 2505.16932) for singular values from 1e-3 on, all but the last shrunk by 1.01.
  static spectral::Quintics polynomials(const PoLoraOptions& options) {
    static const spectral::Quintics table = {{8.31968561540051, -23.85945031896673, 17.53144504181025},
                                             {4.123266419055485, -2.980709974760902, 0.5520797360741728},
                                             {3.9656114721772022, -2.941248486368672, 0.5589295013119786},
                                             {3.3312009004415994, -2.4980080275937966, 0.5111272954169234},
                                             {2.320007312889811, -1.6862169729967622, 0.42068027340235137},
                                             {1.8951443404954809, -1.2722050191923813, 0.377227344813122},
                                             {1.875006772051659, -1.250007524486259, 0.37500075245392533},
                                             {1.8750008025096776, -1.2500016050034328, 0.375000802493755},
                                             {1.8749954784656357, -1.249990956953079, 0.374995478487443},
                                             {1.8749954775662068, -1.2499909551542292, 0.3749954775880226}};
    spectral::Quintics result = spectral::first(table, options.steps());
    for (size_t i = 0; i + 1 < result.size(); ++i) result[i] = spectral::shrunk(result[i], 1.01);
    return result;
  }

  static constexpr double kTiny = 1e-30;  ///< a norm below is that of zero
};

}  // namespace lora_rite::baselines
