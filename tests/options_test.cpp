#include <gtest/gtest.h>

#include <limits>

#include "support/pairs.hpp"

namespace lora_rite::test {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct BadOption {
  const char* name;
  LoraRiteOptions options;
  std::string words;
};

const std::vector<BadOption>& bad_options() {
  static const std::vector<BadOption> rows = {
      {"NegativeLr", LoraRiteOptions(-1), "lr is -1"},
      {"NaNLr", LoraRiteOptions(kNaN), "lr is nan"},
      {"InfiniteLr", LoraRiteOptions(INFINITY), "lr is inf"},
      {"Beta1One", LoraRiteOptions().betas({1.0, 0.999}), "betas[0] is 1"},
      {"Beta2NaN", LoraRiteOptions().betas({0.9, kNaN}), "betas[1] is nan"},
      {"Beta2Negative", LoraRiteOptions().betas({0.9, -0.1}), "betas[1] is -0.1"},
      {"NegativeEps", LoraRiteOptions().eps(-1e-8), "eps is -1e-08"},
      {"NaNEpsRoot", LoraRiteOptions().eps_root(kNaN), "eps_root is nan"},
      {"NegativeExponent", LoraRiteOptions().preconditioner_exponent(-0.1), "preconditioner_exponent is -0.1"},
      {"ExponentAboveAHalf", LoraRiteOptions().preconditioner_exponent(0.6), "preconditioner_exponent is 0.6"},
      {"NaNExponent", LoraRiteOptions().preconditioner_exponent(kNaN), "preconditioner_exponent is nan"},
      {"ExponentAndCapturable", LoraRiteOptions().preconditioner_exponent(0.3).capturable(true),
       "preconditioner_exponent is 0.3, expected 1/2 or 1/4"},
      {"NegativeWeightDecay", LoraRiteOptions().weight_decay(-1), "weight_decay is -1"},
      {"DecayTurnsFactorsAround", LoraRiteOptions(1).weight_decay(1), "lr · weight_decay is 1"},
      {"NegativeClip", LoraRiteOptions().clip_unmagnified_norm(-1), "clip_unmagnified_norm is -1"},
      {"NaNMaxRms", LoraRiteOptions().max_update_rms(kNaN), "max_update_rms is nan"},
      {"NaNRelativeChange", LoraRiteOptions().max_relative_change(kNaN), "max_relative_change is nan"},
      {"ZeroRatio", LoraRiteOptions().lr_ratio_b(0), "lr_ratio_b is 0"},
      {"HostAndCapturable", LoraRiteOptions().engine(Engine::Host).capturable(true), "engine is Engine::Host"},
      {"UnknownEngine", LoraRiteOptions().engine(static_cast<Engine>(9)), "engine is 9"},
  };
  return rows;
}

class OptionOutOfRange : public testing::TestWithParam<BadOption> {};

TEST_P(OptionOutOfRange, IsNamedByTheConstructorAndAddsNoGroup) {
  const auto pair = random_pair("q", 2, 4, 4);
  EXPECT_TRUE(mentions(error_of([&] { LoraRite<> optimizer({pair}, GetParam().options); }), GetParam().words));

  LoraRite<> optimizer({pair});
  const auto other = random_pair("k", 2, 4, 4);
  EXPECT_TRUE(mentions(error_of([&] { optimizer.add_pairs({other}, GetParam().options); }), GetParam().words));
  EXPECT_EQ(optimizer.param_groups().size(), 1u);
  optimizer.add_pairs({other}, LoraRiteOptions());  // the tensors are still free
}

TEST_P(OptionOutOfRange, IsNamedByTheNextStepWhichChangesNothing) {
  const std::vector<FactorPair> pairs = {random_pair("q", 2, 4, 4)};
  LoraRite<> optimizer(pairs);
  run_steps(optimizer, pairs, 0, 2);
  const auto before = clone_pairs(pairs);
  const std::string state = saved_bytes(optimizer);
  auto& options = static_cast<LoraRiteOptions&>(optimizer.param_groups()[0].options());
  const LoraRiteOptions good = options;
  options = GetParam().options;
  EXPECT_TRUE(mentions(error_of([&] { optimizer.step(); }), GetParam().words));
  options = good;
  EXPECT_TRUE(equal_factors(pairs, before));
  EXPECT_EQ(saved_bytes(optimizer), state);
}

INSTANTIATE_TEST_SUITE_P(Table, OptionOutOfRange, testing::ValuesIn(bad_options()),
                         [](const auto& info) { return info.param.name; });

TEST(LoraRiteOptions, DefaultsAreTheDocumentedOnes) {
  const LoraRiteOptions options;
  EXPECT_EQ(options.lr(), 1e-3);
  EXPECT_EQ(options.betas(), std::make_tuple(0.9, 0.999));
  EXPECT_TRUE(options.escape());
  EXPECT_EQ(options.clip_unmagnified_norm(), 1.0);
  EXPECT_EQ(options.max_update_rms(), 0.0);
  EXPECT_EQ(options.preconditioner_exponent(), 0.5);
  EXPECT_EQ(options.max_relative_change(), 0.0);
  EXPECT_FALSE(options.row_equilibration());
  EXPECT_EQ(options.lr_ratio_b(), 1.0);
}

TEST(LoraRiteOptions, ReferenceIsTheAuthorsArithmetic) {
  const auto options = LoraRiteOptions::reference(3e-4);
  EXPECT_EQ(options.lr(), 3e-4);
  EXPECT_FALSE(options.escape());
  EXPECT_EQ(options.clip_unmagnified_norm(), 1.0);
  EXPECT_EQ(options.eps(), 1e-6);
  EXPECT_EQ(options.eps_root(), 1e-12);
}

TEST(LoraRiteOptions, AreDrivenThroughLibTorchsInterface) {
  LoraRite<> optimizer({random_pair("q", 2, 4, 4)}, LoraRiteOptions(1e-2));
  EXPECT_EQ(optimizer.param_groups()[0].options().get_lr(), 1e-2);
  optimizer.param_groups()[0].options().set_lr(5e-3);
  EXPECT_EQ(static_cast<LoraRiteOptions&>(optimizer.param_groups()[0].options()).lr(), 5e-3);
}

}  // namespace
}  // namespace lora_rite::test
