#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "lora_rite/algebra.hpp"
#include "lora_rite/choose.hpp"
#include "lora_rite/options.hpp"
#include "lora_rite/rule.hpp"

/// Act 2 without eigenvalues, for a step that a CUDA graph records: eigensolvers wait for the device, while the
/// Cholesky factorisation, triangular solves and matrix products are batched at every rank and never do.
namespace lora_rite::engine {

/// The root R = chol(S)ᵀ, QR's R of the paper. In place of dropping eigenvalues below the cutoff, cutoff · tr S is
/// added to all of them: R⁺ of a null direction is then large but bounded, and meets gradients that are zero there.
/// Differs from the other roots by a rotation and a share of cutoff · κ(S).
struct CholeskyRoot {
  static at::Tensor inverse_root(const at::Tensor& gram, double cutoff) {
    const at::Tensor trace = trace_of(gram), is_positive = trace > 0;
    const at::Tensor scale = choose(is_positive, trace, 1.0);
    const at::Tensor identity = identity_like(gram).expand_as(gram);
    const auto [lower, info] = at::linalg_cholesky_ex(symmetrized(gram) / scale + cutoff * identity);
    const at::Tensor inverse = at::linalg_solve_triangular(lower.mT(), identity, /*upper=*/true);
    return choose(is_positive, inverse / scale.sqrt(), 0.0);
  }
};

/// Roots by products and Cholesky factors; stands in for rule::Eigenvalues.
struct ProductRoots {
  /// max(0, tr V − tr PVPᵀ): a bound on rule::Eigenvalues' d, and equal to it where at most one direction escapes.
  static at::Tensor escaping_mass(const at::Tensor& second_moment, const at::Tensor& transported) {
    return at_least(trace_of(second_moment) - trace_of(transported), 0.0);
  }

  /// H of rule::Eigenvalues, for p = 1/2 or 1/4: roots by Newton–Schulz steps, the inverse by Cholesky. Eigenvalues
  /// cannot be held at the floor there, so the floor is added: the result differs by a share of about r ε_double κ(V).
  static at::Tensor preconditioner(const at::Tensor& second_moment, const at::Tensor& escaped_mass,
                                   const LoraRiteOptions& options) {
    const double rank = static_cast<double>(rank_of(second_moment));
    const double floor = rank * std::numeric_limits<double>::epsilon();
    const at::Tensor identity = identity_like(second_moment);
    const at::Tensor shifted =
        second_moment + (escaped_mass + floor * at_least(trace_of(second_moment), 0.0) + options.eps_root()) * identity;
    at::Tensor root = square_root(shifted, floor) + options.eps() * identity;
    if (options.preconditioner_exponent() < 0.5) {
      // W's eigenvalues are at least (floor · tr W²)^{1/2}, and its trace at most (r · tr W²)^{1/2}.
      const at::Tensor mean_root = rule::root_of_mean(second_moment, escaped_mass, options);
      root = square_root(root, 0.5 * std::sqrt(floor / rank)) * mean_root.sqrt();
    }
    const at::Tensor inverse = positive_inverse(root);
    const at::Tensor nothing = trace_of(shifted) + options.eps() <= 0;  // V = 0 and ε = 0: nothing to scale
    return choose(negated(nothing), inverse, 0.0);
  }

 private:
  /// W^{1/2} of positive W whose eigenvalues lie in [floor, 1] · tr W. Y → W^{1/2} and Z → W^{-1/2} by
  /// T = ½ p (3 I − p² Z Y), Y ← Y T, Z ← T Z; p stretches the spectrum so that its known lower end grows fastest
  /// (scaled Newton–Schulz, Chen & Chow 2014), which halves the number of steps.
  static at::Tensor square_root(const at::Tensor& matrix, double floor) {
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

}  // namespace lora_rite::engine
