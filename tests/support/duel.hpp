#pragma once

// One double pair stepped by the library and by the oracle side by side, with the same gradients.

#include "tensors.hpp"

#include <gtest/gtest.h>
#include <lora_rite/lora_rite.hpp>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <type_traits>

namespace lora_rite::test {

/// The oracle's spelling of a param group's options.
inline OracleOptions oracle_options(const LoraRiteOptions& o) {
  OracleOptions result;
  result.lr = o.lr();
  std::tie(result.beta1, result.beta2) = o.betas();
  result.eps = o.eps();
  result.eps_root = o.eps_root();
  result.weight_decay = o.weight_decay();
  result.escape = o.escape();
  result.clip = o.clip_unmagnified_norm();
  result.max_update_rms = o.max_update_rms();
  result.preconditioner_exponent = o.preconditioner_exponent();
  result.max_relative_change = o.max_relative_change();
  result.row_equilibration = o.row_equilibration();
  result.lr_ratio_b = o.lr_ratio_b();
  result.balance = o.balance();
  result.maximize = o.maximize();
  return result;
}

/// The oracle's root for a basis of the library.
template <class Basis>
constexpr Root kRoot = std::is_same_v<Basis, QrBasis> ? Root::Qr : Root::Polar;

template <class Basis>
class Duel {
 public:
  torch::Tensor a, b;  ///< [r, in], [out, r], the library's

  Duel(torch::Tensor initial_a, torch::Tensor initial_b, const LoraRiteOptions& options)
      : a(initial_a.requires_grad_()),
        b(initial_b.requires_grad_()),
        optimizer({FactorPair{"pair", a, b}}, options),
        oracle(kRoot<Basis>) {
    oracle.groups.push_back(oracle_options(options));
    oracle.pairs.push_back({0, OracleFactor(tall_a(a)), OracleFactor(tall_b(b))});
  }

  /// One step of both.
  void step(const torch::Tensor& gradient_a, const torch::Tensor& gradient_b) {
    a.mutable_grad() = gradient_a.clone();
    b.mutable_grad() = gradient_b.clone();
    optimizer.step();
    oracle.step({{tall_a(gradient_a), tall_b(gradient_b)}});
  }

  /// Steps with random gradients.
  void random_steps(int count) {
    for (int i = 0; i < count; ++i) step(torch::randn_like(a).detach(), torch::randn_like(b).detach());
  }

  /// Tells the oracle that the factor was changed from outside to what the library sees now.
  void announce_edit_of_a() { oracle.pairs[0].a.edit(tall_a(a)); }
  void announce_edit_of_b() { oracle.pairs[0].b.edit(tall_b(b)); }

  /// Largest ‖X − X_oracle‖ / ‖X_oracle‖ of the two factors; infinite if something is NaN.
  double disagreement() const {
    const auto relative = [](const Matrix& x, const Matrix& expected) {
      const double size = expected.norm();
      return (x - expected).norm() / (size > 0 ? size : 1);
    };
    const double of_a = relative(tall_a(a), oracle.pairs[0].a.x);
    const double of_b = relative(tall_b(b), oracle.pairs[0].b.x);
    return std::isfinite(of_a + of_b) ? std::max(of_a, of_b) : INFINITY;
  }

  LoraRite<Basis> optimizer;
  Oracle oracle;
};

}  // namespace lora_rite::test
