// max_relative_change: how much a step changes a factor relative to itself.

#include <gtest/gtest.h>
#include <lora_rite/engine/device/tensor_algebra.hpp>
#include <lora_rite/lora_rite.hpp>
#include <lora_rite/rule/decide.hpp>

#include <cmath>
#include <vector>

#include "support/pairs.hpp"

namespace lora_rite::test {
namespace {

/// ‖dX X⁺‖ in the spectral norm, for X [n, r] of full rank.
double relative_change(const torch::Tensor& before, const torch::Tensor& after) {
  const torch::Tensor x = before.to(torch::kDouble);
  const torch::Tensor change = (after.to(torch::kDouble) - x).matmul(torch::linalg_pinv(x));
  return torch::linalg_svdvals(change)[0].item<double>();
}

/// The largest relative changes of A and of B over steps from a product that has next to nothing in one direction.
/// Without memory ‖M‖ is n^{1/2} at most, so that the bound is one.
std::pair<double, double> largest_changes(double bound, torch::ScalarType dtype) {
  torch::manual_seed(81);
  const FactorPair pair = random_pair("pair", 4, 30, 20, dtype);
  {
    torch::NoGradGuard no_grad;
    pair.b.select(1, 2).mul_(1e-3);
  }
  LoraRite<> optimizer({pair}, LoraRiteOptions(0.05).betas({0, 0}).max_relative_change(bound).lr_ratio_b(2));
  std::pair<double, double> largest = {0, 0};
  for (int64_t step = 0; step < 10; ++step) {
    const torch::Tensor a = pair.a.detach().clone(), b = pair.b.detach().clone();
    set_gradients({pair}, step);
    optimizer.step();
    largest.first = std::max(largest.first, relative_change(a.t(), pair.a.detach().t()));
    largest.second = std::max(largest.second, relative_change(b, pair.b.detach()));
  }
  return largest;
}

TEST(RelativeChange, StaysBelowTheBoundAndNotWithoutOne) {
  for (const auto dtype : {torch::kDouble, torch::kFloat}) {
    const double round_off = dtype == torch::kDouble ? 1e-9 : 1e-4;
    for (const double bound : {0.1, 0.5}) {
      const auto [a, b] = largest_changes(bound, dtype);
      EXPECT_LT(a, bound * (1 + round_off));
      EXPECT_LT(b, bound * (1 + round_off));
      EXPECT_GT(std::max(a, b), 0.2 * bound) << "directions near σ = δ come close to it";
    }
    const auto [a, b] = largest_changes(0, dtype);
    EXPECT_GT(std::min(a, b), 1);
  }
}

TEST(RelativeChange, OfAZeroFactorIsNotBounded) {
  for (const bool zero_a : {false, true}) {
    const FactorPair bounded = random_pair("bounded", 3, 12, 10), free = clone_pairs({bounded})[0];
    torch::NoGradGuard no_grad;
    for (const auto& pair : {bounded, free}) (zero_a ? pair.a : pair.b).zero_();
    LoraRite<> with({bounded}, LoraRiteOptions(0.1).max_relative_change(0.01)), without({free}, LoraRiteOptions(0.1));
    set_gradients({bounded}, 0);
    set_gradients({free}, 0);
    with.step();
    without.step();
    EXPECT_TRUE(torch::equal(zero_a ? bounded.a : bounded.b, zero_a ? free.a : free.b));
    EXPECT_GT((zero_a ? bounded.a : bounded.b).norm().item<double>(), 0.1);
  }
}

/// (I + δ²ZZᵀ)^{-1} where Z spans ten decades: a direction that has next to nothing must not hold back the others.
TEST(RelativeChange, DampingLeavesHealthyDirectionsAlone) {
  const int64_t r = 4;
  const auto diagonal = [](std::vector<double> values) {
    return torch::tensor(std::move(values), torch::kDouble).diag().unsqueeze(0);
  };
  for (const double faint : {1e-4, 1e-8, 1e-12}) {  // σ of the last direction; the others have 1
    const torch::Tensor root = diagonal({1, 1, 1, 1 / faint}), own = torch::eye(r, torch::kDouble).unsqueeze(0);
    const torch::Tensor k = rule::relative_change_damping(root, own, torch::tensor(0.02, torch::kDouble),
                                                          torch::tensor(1.0, torch::kDouble), /*bound=*/0.5);
    const double delta_squared = 0.02 * 0.02;  // δ = η n^{1/2} / (2τ)
    EXPECT_NEAR(k[0][0][0].item<double>(), 1, 1.1 * delta_squared) << faint;
    EXPECT_LT(k[0][3][3].item<double>(), std::max(1.1 * faint * faint / delta_squared, 2e-12)) << faint;
  }
}

/// What comes of a float pair of rank 12 that learns a target of rank 8 with singular values from 1 to 1e-2 out of
/// batches of noisy examples.
struct Learnt {
  double error;      ///< ‖BA − W‖ / ‖W‖
  double condition;  ///< max(κ(A), κ(B))
};

Learnt learn_with_too_high_a_rank(double bound) {
  torch::manual_seed(82);
  const auto rotation = [](int64_t size) { return std::get<0>(torch::linalg_qr(torch::randn({size, size}))); };
  const auto target = (rotation(30).slice(1, 0, 8) * torch::logspace(0, -2, 8)).matmul(rotation(40).slice(0, 0, 8));
  const FactorPair pair = {"", (torch::randn({12, 40}) / 6).requires_grad_(), torch::zeros({30, 12}).requires_grad_()};
  LoraRite<> optimizer({pair}, LoraRiteOptions(0.01).max_relative_change(bound));
  WarmupLinear schedule(optimizer, 0, 200);
  for (int step = 0; step < 200; ++step) {
    const auto inputs = torch::randn({32, 40}), labels = inputs.matmul(target.t()) + 0.02 * torch::randn({32, 30});
    optimizer.zero_grad();
    ((inputs.matmul(pair.a.t()).matmul(pair.b.t()) - labels).square().sum() / 64).backward();
    optimizer.step();
    schedule.step();
  }
  const auto found = optimizer.diagnostics()[0];
  return {((pair.b.matmul(pair.a) - target).norm() / target.norm()).item<double>(),
          std::max(found.a.condition_number, found.b.condition_number)};
}

TEST(RelativeChange, BoundedKeepsFactorsOfTooHighARankWellConditioned) {
  const Learnt bounded = learn_with_too_high_a_rank(0.3), free = learn_with_too_high_a_rank(0);
  EXPECT_LT(bounded.error, 0.05);
  EXPECT_LT(bounded.condition, 1e3);
  EXPECT_GT(free.condition, 1e5) << "a direction of A doubles again and again while B's shrinks";
}

}  // namespace
}  // namespace lora_rite::test
