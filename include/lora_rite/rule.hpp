#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "lora_rite/basis.hpp"
#include "lora_rite/choose.hpp"
#include "lora_rite/options.hpp"

/// Act 2: LoRA-RITE itself (Yen et al., "LoRA Done RITE", ICLR 2025, Algorithm 1), r×r matrices only.
///
/// It speaks of one factor X (n×r, gradient G) and its partner Y. R is a root of YᵀY, U = Y R⁺ an orthonormal basis of
/// Y's columns, Ḡ = G R⁺ the unmagnified gradient, M the momentum in that basis; N = M R⁺ᵀ is the same momentum in X's
/// own coordinates, which is what is stored: it does not depend on the choice of the root.
///
/// Shapes: matrices [..., r, r], scalars [..., 1, 1], all double. Leading dimensions are a batch.
namespace lora_rite::rule {

/// Act 1 hands this in. C [r, r] are coordinates in which Y is well conditioned: Y itself squares its condition number
/// in a Gram matrix, which is harmless where floats are summed in double, and not for double factors. Their C is the
/// inverse root of YᵀY, good to κ²ε; one more root in these coordinates is exact (CholeskyQR2, Yamamoto et al. 2015).
struct Statistics {
  at::Tensor coordinates;    ///< C, undefined where it is the identity
  at::Tensor gram;           ///< (YC)ᵀ (YC)
  at::Tensor cross;          ///< (YC)ᵀ Y_old, Y_old being the partner one step ago
  at::Tensor gradient_gram;  ///< (GC)ᵀ (GC), zero where there is no gradient
};

/// What is remembered from step to step besides N.
struct Moments {
  at::Tensor second_moment;  ///< V, in the basis that `inverse_root` belongs to
  at::Tensor escaped_mass;   ///< ρ, scalar
  at::Tensor inverse_root;   ///< R⁺ of the partner as it was in the last step
  at::Tensor step;           ///< t, how many gradients this factor has seen, scalar
};

/// The geometry of the partner and the gradient seen in it.
struct Unmagnified {
  at::Tensor inverse_root;   ///< R⁺
  at::Tensor change;         ///< Q = Uᵀ Y_old: transports momenta, as N Qᵀ = M_old Pᵀ
  at::Tensor gradient_gram;  ///< ḠᵀḠ
};

/// What act 3 applies to the rows: M = N·momentum_map + G·gradient_map, N = M R⁺ᵀ, X ← (1−ηλ) X − ηN.
struct Decision {
  Moments moments;
  at::Tensor momentum_map;  ///< β₁' Qᵀ
  at::Tensor gradient_map;  ///< (1−β₁') c R⁺ ((V + ρI)^{1/2} + εI)^{-1}
};

/// Eigenvalues of a Gram matrix below this share of the largest are round-off: (unit round-off of the factors' dtype)²,
/// and no less than what summing and the eigensolver leave in double.
inline double relative_cutoff(double dtype_epsilon, int64_t rank) {
  const double solver = 16.0 * static_cast<double>(rank) * std::numeric_limits<double>::epsilon();
  return std::max(0.25 * dtype_epsilon * dtype_epsilon, solver);
}

/// R⁺ = C R̂⁺,  Q = R̂⁺ᵀ (YC)ᵀ Y_old,  ḠᵀḠ = R̂⁺ᵀ (GC)ᵀ(GC) R̂⁺,  R̂ being the root of (YC)ᵀ(YC).
template <class Basis>
Unmagnified unmagnify(const Statistics& statistics, double cutoff) {
  const at::Tensor root = Basis::inverse_root(statistics.gram, cutoff);
  return {statistics.coordinates.defined() ? at::matmul(statistics.coordinates, root) : root,
          at::matmul(root.mT(), statistics.cross), at::matmul(root.mT(), at::matmul(statistics.gradient_gram, root))};
}

/// β' = β (1−β^{t−1}) / (1−β^t), with which a running mean needs no bias correction; 1 where no gradient came.
inline at::Tensor bias_corrected_decay(double beta, const at::Tensor& step, const at::Tensor& has_gradient) {
  const at::Tensor t = step.clamp_min(1);
  const at::Tensor decay = (1.0 - at::pow(beta, t - 1)) * beta / (1.0 - at::pow(beta, t));
  return choose(has_gradient, decay, 1.0);
}

/// Trace of every matrix in the batch, as a scalar.
inline at::Tensor batch_trace(const at::Tensor& matrix) {
  return matrix.diagonal(0, -2, -1).sum(-1, /*keepdim=*/true).unsqueeze(-1);
}

/// d = max(0, min( max_i (λ_i(V) − λ_i(PVPᵀ)), tr V − tr PVPᵀ )): second moment that the new basis no longer sees.
inline at::Tensor escaping_mass(const at::Tensor& second_moment, const at::Tensor& transported) {
  const at::Tensor values = at::linalg_eigvalsh(at::stack({second_moment, transported}));
  const at::Tensor largest_loss = (values[0] - values[1]).amax(-1, /*keepdim=*/true).unsqueeze(-1);
  return at::minimum(largest_loss, batch_trace(second_moment) - batch_trace(transported)).clamp_min(0);
}

/// ((V + ρI)^{1/2} + εI)^{-1}, `root_shift` being added to ρ. V is positive semi-definite, so eigenvalues below the
/// solver's round-off are held there: none is negative, and none makes a direction blow up.
inline at::Tensor preconditioner(const at::Tensor& second_moment, const at::Tensor& escaped_mass, double eps,
                                 double root_shift) {
  const auto [values, vectors] = at::linalg_eigh(second_moment);
  const double floor = static_cast<double>(second_moment.size(-1)) * std::numeric_limits<double>::epsilon();
  const at::Tensor floored = at::maximum(values, values.narrow(-1, -1, 1).clamp_min(0) * floor);
  const at::Tensor root = (floored + escaped_mass.squeeze(-1) + root_shift).sqrt() + eps;
  const at::Tensor inverse = choose(root > 0, root.reciprocal(), 0.0);  // V = 0 and ε = 0: nothing to scale
  return at::matmul(detail::scale_columns(vectors, inverse), vectors.mT());
}

/// One step of the rule. `rows` is n, `clip_factor` is c, `partner_edited` tells where the partner was changed from
/// outside: the old basis is gone there, so V keeps its place in the new one (P = I). All three are scalars [..., 1,
/// 1].
inline Decision decide(const Moments& old, const Unmagnified& now, const at::Tensor& rows,
                       const at::Tensor& clip_factor, const at::Tensor& has_gradient, const at::Tensor& partner_edited,
                       const LoraRiteOptions& options) {
  const at::Tensor step = old.step + has_gradient;
  const at::Tensor beta1 = bias_corrected_decay(std::get<0>(options.betas()), step, has_gradient);
  const at::Tensor beta2 = bias_corrected_decay(std::get<1>(options.betas()), step, has_gradient);

  // P = U_newᵀ U_old = Q R_old⁺ carries V into the new basis.
  const at::Tensor identity = at::eye(now.change.size(-1), now.change.options());
  const at::Tensor transport = choose(partner_edited, identity, at::matmul(now.change, old.inverse_root));
  const at::Tensor carried = at::matmul(transport, at::matmul(old.second_moment, transport.mT()));
  const at::Tensor transported = 0.5 * (carried + carried.mT());

  // ρ ← β₂' (ρ + d),  V ← β₂' P V Pᵀ + (1−β₂') c² ḠᵀḠ / n
  at::Tensor escaped_mass = old.escaped_mass;
  if (options.escape()) escaped_mass = beta2 * (escaped_mass + escaping_mass(old.second_moment, transported));
  const at::Tensor fresh = now.gradient_gram * (clip_factor.square() / rows);
  at::Tensor second_moment = beta2 * transported + (1 - beta2) * (0.5 * (fresh + fresh.mT()));

  const at::Tensor scaled =
      at::matmul(now.inverse_root, preconditioner(second_moment, escaped_mass, options.eps(), options.eps_root()));
  const double sign = options.maximize() ? -1.0 : 1.0;
  return {{second_moment, escaped_mass, now.inverse_root, step},
          beta1 * now.change.mT(),
          (1 - beta1) * clip_factor * sign * scaled};
}

}  // namespace lora_rite::rule
