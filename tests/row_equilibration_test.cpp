// row_equilibration beyond what the oracle and the invariance tests say of it.

#include <gtest/gtest.h>
#include <lora_rite/lora_rite.hpp>

#include <limits>
#include <vector>

#include "support/pairs.hpp"

namespace lora_rite {
namespace {

using testing::clone_pairs;
using testing::equal_factors;
using testing::error_of;
using testing::load_bytes;
using testing::mentions;
using testing::random_pair;
using testing::run_steps;
using testing::saved_bytes;

// From B = 0 the first gradient of A is zero, and so are its rows' moments: they must not shut V off.
TEST(RowEquilibration, FromZeroBTheStepsDoNotDependOnASmallEpsilon) {
  const auto trained = [](double eps) {
    torch::manual_seed(91);
    const FactorPair pair = random_pair("pair", 3, 12, 10);
    const torch::Tensor target = torch::randn({10, 12}, torch::kDouble);
    torch::NoGradGuard no_grad;
    torch::Tensor a = pair.a, b = pair.b;
    b.zero_();
    LoraRite<> optimizer({pair}, LoraRiteOptions(0.01).eps(eps).row_equilibration(true));
    for (int step = 0; step < 10; ++step) {
      const torch::Tensor residual = b.matmul(a) - target;
      a.mutable_grad() = b.t().matmul(residual);
      b.mutable_grad() = residual.matmul(a.t());
      optimizer.step();
    }
    return b.matmul(a).clone();
  };
  const torch::Tensor product = trained(1e-8);
  EXPECT_GT(product.norm().item<double>(), 0.1);
  EXPECT_LT((trained(0) - product).norm().item<double>(), 1e-4 * product.norm().item<double>());
}

TEST(RowEquilibration, ASkippedStepLeavesTheRowsAsTheyWere) {
  const std::vector<FactorPair> pairs = {random_pair("pair", 3, 12, 10)}, others = clone_pairs(pairs);
  const auto options = LoraRiteOptions(1e-2).row_equilibration(true);
  LoraRite<> optimizer(pairs, options), undisturbed(others, options);
  run_steps(optimizer, pairs, 0, 3);
  run_steps(undisturbed, others, 0, 3);
  torch::Tensor(pairs[0].a).mutable_grad()[0][0] = std::numeric_limits<double>::quiet_NaN();
  optimizer.step();
  EXPECT_EQ(optimizer.skipped_steps(), 1);
  run_steps(optimizer, pairs, 3, 6);
  run_steps(undisturbed, others, 3, 6);
  EXPECT_TRUE(equal_factors(pairs, others));
}

TEST(RowEquilibration, IsRefusedWhereTheHostEngineWasChosenAlready) {
  const std::vector<FactorPair> pairs = {random_pair("pair", 3, 12, 10, torch::kFloat)}, others = clone_pairs(pairs);
  LoraRite<> saved(pairs, LoraRiteOptions(1e-2).row_equilibration(true)), loaded(others);
  run_steps(saved, pairs, 0, 2);
  load_bytes(loaded, saved_bytes(saved));
  EXPECT_TRUE(mentions(error_of([&] { run_steps(loaded, others, 2, 3); }), "row_equilibration"));
}

}  // namespace
}  // namespace lora_rite
