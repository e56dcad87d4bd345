#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "lora_rite/engine/device/tensor_algebra.hpp"
#include "lora_rite/rule/roots.hpp"

/// Act 2 without eigenvalues, for a step that a CUDA graph records: eigensolvers wait for the device, while the
/// Cholesky factorisation, triangular solves and matrix products are batched at every rank and never do.
namespace lora_rite::device {

/// The root R = Lᵀ of S = L Lᵀ by Cholesky's factorisation with pivots: the largest diagonal element of what is left of
/// S comes next, and once that is below cutoff · tr S, or below its share of S's own, the rest counts as zero. So R
/// drops the directions that S has not, whatever their number, without a host read. Differs from the other roots by a
/// rotation.
struct PivotedCholesky {
  /// R⁺ = L (LᵀL)^{-1}, the pseudo-inverse; the columns of L that were dropped are zero. L = L̂ D with D =
  /// diag(pivots)^{1/2} and L̂'s elements at most 1, which is well conditioned whatever S is.
  template <class Share = double>
  static at::Tensor inverse_root(const at::Tensor& gram, double cutoff, const Share& share = Share(0)) {
    const at::Tensor least = at_least(trace_of(gram), 0.0) * cutoff;
    const at::Tensor of_columns = at_least(gram.diagonal(0, -2, -1), 0.0).unsqueeze(-2) * share;  // [..., 1, r]
    at::Tensor left = symmetrized(gram);
    std::vector<at::Tensor> columns, pivots;
    for (int64_t j = 0; j < gram.size(-1); ++j) {
      const auto [largest, place] = left.diagonal(0, -2, -1).max(-1, /*keepdim=*/true);
      const at::Tensor pivot = largest.unsqueeze(-1);
      const at::Tensor is_kept = pivot > at_least(of_columns.gather(-1, place.unsqueeze(-2)), least);
      std::vector<int64_t> shape = left.sizes().vec();
      shape.back() = 1;
      const at::Tensor column = choose(is_kept, left.gather(-1, place.unsqueeze(-1).expand(shape)) / pivot, 0.0);
      left = left - at::matmul(column * pivot, column.mT());
      columns.push_back(column);
      pivots.push_back(choose(is_kept, pivot.rsqrt(), 0.0));
    }
    const at::Tensor unit = at::cat(columns, -1);
    const at::Tensor inverse_scale = at::cat(pivots, -1);
    const at::Tensor dropped = choose(inverse_scale > 0, at::zeros_like(inverse_scale), 1.0) * identity_like(gram);
    return at::matmul(unit, positive_inverse(at::matmul(unit.mT(), unit) + dropped)) * inverse_scale;
  }
};

/// Roots by products and Cholesky factors; stands in for rule::Eigenvalues.
struct ProductRoots {
  static constexpr double kOfSums = rule::Eigenvalues::kOfSums;

  /// max(0, tr V − tr PVPᵀ): a bound on rule::Eigenvalues' d, and equal to it where at most one direction escapes.
  static at::Tensor escaping_mass(const at::Tensor& second_moment, const at::Tensor& transported) {
    return at_least(trace_of(second_moment) - trace_of(transported), 0.0);
  }

  /// H of rule::Eigenvalues, for p = 1/2 or 1/4: roots by Newton–Schulz steps, the inverse by Cholesky. Eigenvalues
  /// cannot be held at the floor there, so the floor is added: the result differs by a share of about r ε_double κ(V).
  /// Faint directions cannot be told by eigenvectors: F² with F = (V + EᵀE + fI)^{-1} V in front of H takes the place
  /// of (1 − ‖E v‖² / λ)⁺, f being kFaintest · tr V. Behind H stands (V + fI)^{-1} V: what round-off made of the
  /// product outside of V's column space was magnified by H.
  static at::Tensor preconditioner(const at::Tensor& second_moment, const at::Tensor& escaped_mass,
                                   const rule::RoundOff<at::Tensor>* round_off, const rule::Hyperparameters& numbers) {
    const double rank = static_cast<double>(rank_of(second_moment));
    const double floor = round_off ? kFaintest : rank * std::numeric_limits<double>::epsilon();
    const at::Tensor identity = identity_like(second_moment);
    const at::Tensor least = floor * at_least(trace_of(second_moment), 0.0);
    const at::Tensor shifted = second_moment + (escaped_mass + least + numbers.eps_root) * identity;
    at::Tensor root = newton_schulz_root(shifted, floor) + numbers.eps * identity;
    if (numbers.preconditioner_exponent < 0.5) {
      // W's eigenvalues are at least (floor · tr W²)^{1/2}, and its trace at most (r · tr W²)^{1/2}.
      const at::Tensor mean_root = rule::root_of_mean(second_moment, escaped_mass, numbers);
      root = newton_schulz_root(root, 0.5 * std::sqrt(floor / rank)) * mean_root.sqrt();
    }
    at::Tensor result = positive_inverse(root);
    const at::Tensor nothing = trace_of(shifted) + numbers.eps <= 0;  // V = 0 and ε = 0: nothing to scale
    if (round_off) {
      const at::Tensor apart = choose(least > 0, least, 1.0) * identity;
      const auto share_beside = [&](const at::Tensor& noise) {
        return at::matmul(positive_inverse(symmetrized(second_moment + noise)), second_moment);
      };
      const at::Tensor e = round_off->unscaled();
      const at::Tensor kept = share_beside(at::matmul(e.mT(), e) * round_off->scale + apart);
      result = at::matmul(at::matmul(kept, kept), at::matmul(result, share_beside(apart)));
    }
    return choose(negated(nothing), result, 0.0);
  }

 private:
  /// The least share of tr V that F and H are solved for where gradients are no doubles: products and solves leave
  /// round-off / kFaintest, which must be no more than a float's.
  static constexpr double kFaintest = 1e-10;

  /// W^{1/2} of positive W whose eigenvalues lie in [floor, 1] · tr W. Y → W^{1/2} and Z → W^{-1/2} by
  /// T = ½ p (3 I − p² Z Y), Y ← Y T, Z ← T Z; p stretches the spectrum so that its known lower end grows fastest
  /// (scaled Newton–Schulz, Chen & Chow 2014), which halves the number of steps.
  static at::Tensor newton_schulz_root(const at::Tensor& matrix, double floor) {
    const at::Tensor trace = trace_of(matrix), scale = choose(trace > 0, trace, 1.0);
    const at::Tensor identity = identity_like(matrix);
    at::Tensor y = matrix / scale, z = identity.expand_as(matrix);
    for (const double p : stretches(std::sqrt(floor / (1 + floor)))) {
      const at::Tensor t = 1.5 * p * identity - 0.5 * p * p * p * at::matmul(z, y);
      y = symmetrized(at::matmul(y, t));
      z = symmetrized(at::matmul(t, z));
    }
    return y * scale.sqrt();
  }

  /// The p of each step, until singular values from `lower` on have come to 1.
  static std::vector<double> stretches(double lower) {
    std::vector<double> result;
    while (1 - lower > 1e-15 && result.size() < 64) {
      const double p = std::sqrt(3 / (1 + lower + lower * lower));
      lower = std::min(1.0, 0.5 * p * lower * (3 - p * p * lower * lower));
      result.push_back(p);
    }
    result.push_back(1);  // takes back what round-off the large stretches left
    result.push_back(1);
    return result;
  }
};

}  // namespace lora_rite::device
