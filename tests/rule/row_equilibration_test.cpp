// row_equilibration beyond what the oracle and the invariance tests say of it.

#include <gtest/gtest.h>
#include <lora_rite/lora_rite.hpp>

#include <cmath>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "support/pairs.hpp"

namespace lora_rite::test {
namespace {

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

/// The second moments of a factor's rows in a saved optimizer of one pair, undefined if there are none.
torch::Tensor saved_rows(const LoraRite<>& optimizer, const char* entry) {
  std::istringstream bytes(saved_bytes(optimizer));
  torch::serialize::InputArchive archive, group, pair;
  archive.load_from(bytes);
  archive.read("0", group);
  group.read("0", pair);
  torch::Tensor rows;
  pair.try_read(entry, rows, /*is_buffer=*/true);
  return rows;
}

struct Place {
  const char* name;
  torch::Dtype dtype;
  Engine engine;
};

class RowEquilibrationOn : public testing::TestWithParam<Place> {
 protected:
  static LoraRiteOptions options() { return LoraRiteOptions(1e-2).row_equilibration(true).engine(GetParam().engine); }
  static FactorPair pair() {
    torch::manual_seed(92);
    return random_pair("pair", 3, 12, 10, GetParam().dtype);
  }
};

TEST_P(RowEquilibrationOn, TheFirstStepRemembersTheRowsAndNormsThem) {
  const std::vector<FactorPair> pairs = {pair()};
  LoraRite<> optimizer(pairs, options().betas({0.0, 0.5}).clip_unmagnified_norm(0));
  set_gradients(pairs, 93);
  torch::Tensor b = pairs[0].b, a = pairs[0].a;
  a.mutable_grad().select(1, 7) *= 100;  // a row of A is a column in memory
  b.mutable_grad().select(0, 4) *= 100;
  b.mutable_grad().select(0, 5).zero_();
  const torch::Tensor a0 = a.detach().to(torch::kDouble).clone(), b0 = b.detach().to(torch::kDouble).clone();
  optimizer.step();
  const torch::Tensor rows_a = saved_rows(optimizer, "rows_a"), rows_b = saved_rows(optimizer, "rows_b");
  ASSERT_EQ(rows_a.sizes(), at::IntArrayRef({1, 12}));
  ASSERT_EQ(rows_b.sizes(), at::IntArrayRef({1, 10}));
  EXPECT_EQ(rows_a.argmax().item<int64_t>(), 7);
  EXPECT_EQ(rows_b.argmax().item<int64_t>(), 4);
  EXPECT_EQ(rows_b[0][5].item<double>(), 0);
  // Without a past the rows of S have the mean square 1, and dB A = −η S Uᵀ has the norms of its rows.
  // A step is a hundredth of a factor, whose round-off κ(R) κ(V^{1/2}), a hundred here, amplifies on the way.
  const double tolerance = GetParam().dtype == torch::kDouble ? 1e-11 : 1e-4;
  const torch::Tensor of_b = (b.detach().to(torch::kDouble) - b0).matmul(a0).norm(2, 1) / (1e-2 * std::sqrt(3.0));
  const torch::Tensor of_a = b0.matmul(a.detach().to(torch::kDouble) - a0).norm(2, 0) / (1e-2 * std::sqrt(3.0));
  torch::Tensor expected = torch::ones({10}, torch::kDouble);
  expected[5] = 0;
  EXPECT_LT((of_b - expected).abs().max().item<double>(), tolerance);
  EXPECT_LT((of_a - 1).abs().max().item<double>(), tolerance);
}

TEST_P(RowEquilibrationOn, ASkippedStepLeavesTheRowsAsTheyWere) {
  for (const double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    const std::vector<FactorPair> pairs = {pair()}, others = clone_pairs(pairs);
    LoraRite<> optimizer(pairs, options()), undisturbed(others, options());
    run_steps(optimizer, pairs, 0, 3);
    run_steps(undisturbed, others, 0, 3);
    set_gradients(pairs, 94);
    torch::Tensor(pairs[0].a).mutable_grad()[0][0] = bad;
    optimizer.step();
    EXPECT_EQ(optimizer.skipped_steps(), 1);
    EXPECT_TRUE(torch::equal(saved_rows(optimizer, "rows_a"), saved_rows(undisturbed, "rows_a")));
    EXPECT_TRUE(torch::equal(saved_rows(optimizer, "rows_b"), saved_rows(undisturbed, "rows_b")));
    run_steps(optimizer, pairs, 3, 6);
    run_steps(undisturbed, others, 3, 6);
    EXPECT_TRUE(equal_factors(pairs, others));
  }
}

TEST_P(RowEquilibrationOn, AFactorWithoutAGradientKeepsItsRows) {
  const std::vector<FactorPair> pairs = {pair()};
  LoraRite<> optimizer(pairs, options());
  run_steps(optimizer, pairs, 0, 3);
  const torch::Tensor rows_a = saved_rows(optimizer, "rows_a"), rows_b = saved_rows(optimizer, "rows_b");
  set_gradients(pairs, 95);
  torch::Tensor(pairs[0].b).mutable_grad() = torch::Tensor();
  optimizer.step();
  EXPECT_FALSE(torch::equal(saved_rows(optimizer, "rows_a"), rows_a));
  EXPECT_TRUE(torch::equal(saved_rows(optimizer, "rows_b"), rows_b));
}

TEST_P(RowEquilibrationOn, AFactorThatNeverHadAGradientHasNoRows) {
  const std::vector<FactorPair> pairs = {pair()};
  LoraRite<> optimizer(pairs, options());
  set_gradients(pairs, 96);
  torch::Tensor(pairs[0].b).mutable_grad() = torch::Tensor();
  optimizer.step();
  EXPECT_TRUE(saved_rows(optimizer, "rows_a").defined());
  EXPECT_FALSE(saved_rows(optimizer, "rows_b").defined());
  run_steps(optimizer, pairs, 1, 3);
  EXPECT_TRUE(saved_rows(optimizer, "rows_b").defined());
  EXPECT_TRUE(pairs[0].b.isfinite().all().item<bool>());
}

TEST_P(RowEquilibrationOn, SwitchedOffTheRowsWaitAsTheyAre) {
  const std::vector<FactorPair> pairs = {pair()}, others = clone_pairs(pairs);
  LoraRite<> optimizer(pairs, options()), undisturbed(others, options());
  run_steps(optimizer, pairs, 0, 3);
  run_steps(undisturbed, others, 0, 4);
  const torch::Tensor rows = saved_rows(optimizer, "rows_a");
  auto& changed = static_cast<LoraRiteOptions&>(optimizer.param_groups()[0].options());
  changed.row_equilibration(false);
  run_steps(optimizer, pairs, 3, 4);
  EXPECT_FALSE(equal_factors(pairs, others));
  EXPECT_TRUE(torch::equal(saved_rows(optimizer, "rows_a"), rows));
  changed.row_equilibration(true);
  run_steps(optimizer, pairs, 4, 5);
  EXPECT_FALSE(torch::equal(saved_rows(optimizer, "rows_a"), rows));
}

TEST_P(RowEquilibrationOn, LoadSwitchesItOnInAnOptimizerThatHasSteppedWithout) {
  const std::vector<FactorPair> pairs = {pair()}, others = clone_pairs(pairs);
  LoraRite<> saved(pairs, options()), loaded(others, options().row_equilibration(false));
  run_steps(loaded, others, 0, 2);
  run_steps(saved, pairs, 0, 3);
  load_bytes(loaded, saved_bytes(saved));
  {
    torch::NoGradGuard no_grad;
    torch::Tensor(others[0].a).copy_(pairs[0].a);
    torch::Tensor(others[0].b).copy_(pairs[0].b);
  }
  run_steps(saved, pairs, 3, 6);
  run_steps(loaded, others, 3, 6);
  EXPECT_TRUE(equal_factors(pairs, others));
  EXPECT_TRUE(saved_bytes(saved) == saved_bytes(loaded));
}

INSTANTIATE_TEST_SUITE_P(Engines, RowEquilibrationOn,
                         testing::Values(Place{"device_double", torch::kDouble, Engine::Device},
                                         Place{"device_float", torch::kFloat, Engine::Device},
                                         Place{"host", torch::kFloat, Engine::Host}),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace lora_rite::test
