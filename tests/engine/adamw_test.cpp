#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <sstream>
#include <string>

#include "support/pairs.hpp"

namespace lora_rite::test {
namespace {

/// A pair of factors and a head of two tensors.
std::shared_ptr<torch::nn::Module> module_with_head() {
  torch::manual_seed(41);
  auto module = std::make_shared<torch::nn::Module>("m");
  module->register_parameter("lora_A", torch::randn({2, 5}));
  module->register_parameter("lora_B", torch::randn({4, 2}));
  module->register_parameter("head_weight", torch::randn({3, 4}));
  module->register_parameter("head_bias", torch::randn({3}));
  module->register_parameter("frozen", torch::randn({3}), /*requires_grad=*/false);
  return module;
}

void give_gradients(const torch::nn::Module& module, uint64_t seed) {
  torch::manual_seed(seed);
  for (auto& parameter : module.parameters()) {
    if (parameter.requires_grad()) parameter.mutable_grad() = torch::randn_like(parameter);
  }
}

class OtherParameters : public testing::TestWithParam<bool> {};

TEST_P(OtherParameters, OfAModuleStepAsWithTorchsAdamW) {
  const auto options = torch::optim::AdamWOptions(1e-2).weight_decay(0.1).betas({0.8, 0.95}).amsgrad(GetParam());
  const auto module = module_with_head(), other = module_with_head();
  LoraRite<> optimizer(*module, LoraRiteOptions(1e-3), options);
  const auto parameters = other->named_parameters();
  torch::optim::AdamW expected({parameters["head_weight"], parameters["head_bias"]}, options);
  for (int i = 0; i < 10; ++i) {
    give_gradients(*module, i);
    give_gradients(*other, i);
    optimizer.step();
    expected.step();
  }
  const auto found = module->named_parameters();
  for (const char* name : {"head_weight", "head_bias"}) {
    // Ten float steps of size 1e-2: a few ulps each.
    EXPECT_LT((found[name] - parameters[name]).abs().max().item<double>(), 1e-5) << name;
  }
  EXPECT_TRUE(torch::equal(found["frozen"], parameters["frozen"]));
  EXPECT_GT((found["lora_A"] - parameters["lora_A"]).abs().max().item<double>(), 1e-4);
}

INSTANTIATE_TEST_SUITE_P(AmsGrad, OtherParameters, testing::Bool());

TEST(OtherParametersOfAModule, FormAGroupOfTheirOwn) {
  const auto module = module_with_head();
  LoraRite<> optimizer(*module, LoraRiteOptions(2e-3).weight_decay(0.05));
  ASSERT_EQ(optimizer.param_groups().size(), 2u);
  EXPECT_EQ(optimizer.param_groups()[0].params().size(), 2u);
  EXPECT_EQ(optimizer.param_groups()[1].params().size(), 2u);
  const auto& options = static_cast<const torch::optim::AdamWOptions&>(optimizer.param_groups()[1].options());
  EXPECT_EQ(options.lr(), 2e-3);
  EXPECT_EQ(options.weight_decay(), 0.05);
}

TEST(OtherParametersOfAModule, ANaNInTheHeadSkipsTheWholeStepBitForBit) {
  const auto module = module_with_head(), other = module_with_head();
  LoraRite<> optimizer(*module), undisturbed(*other);
  for (int i = 0; i < 6; ++i) {
    give_gradients(*module, i);
    optimizer.step();
    give_gradients(*other, i);
    undisturbed.step();
    if (i % 2 == 0) {
      give_gradients(*module, 100 + i);
      module->named_parameters()["head_bias"].mutable_grad()[1] =
          i == 0 ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
      optimizer.step();
    }
  }
  EXPECT_EQ(optimizer.skipped_steps(), 3);
  EXPECT_EQ(undisturbed.skipped_steps(), 0);
  for (size_t i = 0; i < module->parameters().size(); ++i) {
    EXPECT_TRUE(torch::equal(module->parameters()[i], other->parameters()[i])) << i;
  }
}

/// The fused kernel would read past what does not fit; all is as before when the step has thrown.
TEST(OtherParametersOfAModule, WhatDoesNotFitTogetherIsRefusedAndNothingMoves) {
  const auto module = module_with_head();
  LoraRite<> optimizer(*module);
  give_gradients(*module, 1);
  optimizer.step();
  torch::Tensor head = module->named_parameters()["head_weight"];
  const torch::Tensor kept = head.data();
  const auto expect_refusal = [&](const std::string& message, const std::function<void()>& change) {
    give_gradients(*module, 2);
    change();
    const torch::Tensor factor = module->named_parameters()["lora_A"], before = factor.detach().clone();
    EXPECT_TRUE(mentions(error_of([&] { optimizer.step(); }), message));
    EXPECT_TRUE(torch::equal(factor, before)) << message;
    head.mutable_grad() = torch::Tensor();
    head.set_data(kept);
  };
  expect_refusal("the gradient of parameter 0 has shape [2, 2]", [&] { head.mutable_grad() = torch::ones({2, 2}); });
  const auto replace = [&](const torch::Tensor& data) {
    head.mutable_grad() = torch::Tensor();
    head.set_data(data);
    head.mutable_grad() = torch::ones_like(data);
  };
  expect_refusal("parameter 0 is now Float[30, 40]", [&] { replace(torch::ones({30, 40})); });
  expect_refusal("parameter 0 is now Double[3, 4]", [&] { replace(kept.to(torch::kDouble)); });
  expect_refusal("with strides [1, 3] on cpu, expected", [&] { replace(kept.t().contiguous().t()); });
  expect_refusal("expected elements without gaps", [&] { replace(torch::ones({3, 8}).slice(1, 0, 8, 2)); });

  auto& options = static_cast<torch::optim::AdamWOptions&>(optimizer.param_groups()[1].options());
  options.lr(std::numeric_limits<double>::quiet_NaN());
  EXPECT_TRUE(mentions(error_of([&] { optimizer.step(); }), "group 1: lr is nan"));
  options.lr(1e-3);
  optimizer.step();
  EXPECT_TRUE(
      mentions(error_of([&] { optimizer.add_parameters({torch::zeros({2})}, torch::optim::AdamWOptions().eps(-1)); }),
               "eps is -1"));
}

TEST(OtherParametersOfAModule, StridesOfAGradientAndOfASavedMomentDoNotMatter) {
  const auto module = module_with_head(), other = module_with_head();
  torch::Tensor transposed = other->named_parameters()["head_weight"];
  transposed.set_data(transposed.detach().t().contiguous().t());
  LoraRite<> optimizer(*module), strided(*other);
  for (int i = 0; i < 3; ++i) {
    give_gradients(*module, static_cast<uint64_t>(i));
    for (const auto& parameter : other->named_parameters()) {
      torch::Tensor target = parameter.value();
      const torch::Tensor gradient = module->named_parameters()[parameter.key()].grad();
      if (target.requires_grad()) target.mutable_grad() = i == 1 ? gradient.clone() : gradient.t().clone().t();
    }
    optimizer.step();
    strided.step();
    load_bytes(strided, saved_bytes(optimizer));
  }
  EXPECT_TRUE(torch::equal(module->named_parameters()["head_weight"], transposed));
  EXPECT_FALSE(transposed.is_contiguous());
}

TEST(OtherParametersOfAModule, WhatHasTwoNamesIsSteppedOnce) {
  const auto module = module_with_head(), tied = std::make_shared<torch::nn::Module>("tied");
  tied->register_module("one", module);
  tied->register_module("two", module);
  EXPECT_EQ(find_factor_pairs(*tied).size(), 1U);
  EXPECT_EQ(find_factor_pairs(*tied)[0].name, "one");
  LoraRite<> optimizer(*tied);
  EXPECT_EQ(optimizer.param_groups()[0].params().size(), 2U);
  EXPECT_EQ(optimizer.param_groups()[1].params().size(), 2U);
}

TEST(OtherParametersOfAModule, LargeFiniteGradientsAreNotMistakenForInfiniteOnes) {
  const auto module = module_with_head();
  LoraRite<> optimizer(*module);
  give_gradients(*module, 1);
  auto bias = module->named_parameters()["head_bias"];
  const auto before = bias.detach().clone();
  bias.mutable_grad().fill_(1.5e19);  // each square is a float, their sum is not
  optimizer.step();
  EXPECT_EQ(optimizer.skipped_steps(), 0);
  EXPECT_FALSE(torch::equal(bias, before));
}

TEST(OtherParametersOfAModule, AscendWhereTheModulesFactorsDo) {
  const auto up = module_with_head(), down = module_with_head(), explicit_up = module_with_head();
  const auto options = LoraRiteOptions(1e-2).weight_decay(0.1);
  const auto head = torch::optim::AdamWOptions(1e-2).weight_decay(0.1);
  auto maximize = options;
  maximize.maximize(true);
  LoraRite<> ascent(*up, maximize), descent(*down, options), explicit_ascent(*explicit_up, maximize, head);
  for (uint64_t i = 0; i < 4; ++i) {
    for (const auto& module : {up, down, explicit_up}) give_gradients(*module, i);
    for (auto& parameter : down->parameters())
      if (parameter.requires_grad()) parameter.mutable_grad().neg_();
    ascent.step();
    descent.step();
    explicit_ascent.step();
    if (i == 1) load_bytes(ascent, saved_bytes(ascent));
  }
  for (const auto& parameter : up->named_parameters()) {
    EXPECT_TRUE(torch::equal(parameter.value(), down->named_parameters()[parameter.key()])) << parameter.key();
    EXPECT_TRUE(torch::equal(parameter.value(), explicit_up->named_parameters()[parameter.key()])) << parameter.key();
  }
}

/// A pair that never moves and one other parameter.
struct OneParameter {
  FactorPair pair = random_pair("q", 2, 4, 4);
  torch::Tensor value;
  LoraRite<> optimizer;

  explicit OneParameter(torch::Tensor start, double lr = 1e-2, LoraRiteOptions options = LoraRiteOptions())
      : value(start.requires_grad_()), optimizer(std::vector<FactorPair>{pair}, options) {
    optimizer.add_parameters({value}, torch::optim::AdamWOptions(lr).weight_decay(0));
  }

  void step(const torch::Tensor& gradient) {
    // A gradient of another dtype than the parameter's, as `GradScaler` leaves it, past autograd's own check.
    value.mutable_grad() = gradient;
    optimizer.step();
  }
};

TEST(OtherParameters, ThatAreAddedDoAsTheOptimizerWasBuilt) {
  OneParameter up(torch::zeros({3}), 1e-2, LoraRiteOptions().maximize(true)), down(torch::zeros({3}));
  up.step(torch::ones({3}));
  down.step(torch::ones({3}));
  EXPECT_GT(up.value.min().item<double>(), 0.009);
  EXPECT_LT(down.value.max().item<double>(), -0.009);
  load_bytes(down.optimizer, saved_bytes(up.optimizer));  // and a checkpoint tells
  for (int i = 0; i < 30; ++i) down.step(torch::ones({3}));
  EXPECT_GT(down.value.min().item<double>(), 0);
}

constexpr double kHalfRounding = 0x1p-11;  // of a number below 1, at most

TEST(HalfParameters, MoveAsFloatOnesDoButForTheirRounding) {
  for (const double gradient : {1e-9, 1e-3, 1e5}) {
    SCOPED_TRACE(gradient);
    OneParameter half(torch::full({4}, 0.5, torch::kHalf)), whole(torch::full({4}, 0.5));
    for (int i = 0; i < 10; ++i) {
      half.step(torch::full({4}, gradient));
      whole.step(torch::full({4}, gradient));
      EXPECT_TRUE(torch::isfinite(half.value).all().item<bool>());
    }
    EXPECT_EQ(half.optimizer.skipped_steps(), 0);
    EXPECT_EQ(half.value.scalar_type(), torch::kHalf);
    EXPECT_LT((half.value.to(torch::kFloat) - whole.value).abs().max().item<double>(), 10 * kHalfRounding);
    EXPECT_GT((whole.value - 0.5).abs().min().item<double>(), gradient < 1e-8 ? 8e-3 : 0.09);
  }
}

TEST(HalfParameters, WithHalfGradientsKeepFloatMoments) {
  OneParameter half(torch::full({4}, 0.5, torch::kHalf)), whole(torch::full({4}, 0.5));
  for (int i = 0; i < 10; ++i) {  // the square of 1e-3 is below half's smallest normal number, that of 1e-4 is 0
    half.step(torch::full({4}, 1e-4, torch::kHalf));
    whole.step(torch::full({4}, 1e-4, torch::kHalf).to(torch::kFloat));
  }
  EXPECT_LT((half.value.to(torch::kFloat) - whole.value).abs().max().item<double>(), 10 * kHalfRounding);
}

TEST(HalfParameters, ThatOutgrowTheirTypeAreHeldAtTheLargestNumber) {
  OneParameter half(torch::tensor({65504.0, -65504.0}, torch::kHalf), /*lr=*/1e3);
  half.step(torch::tensor({-1.0, 1.0}));
  EXPECT_TRUE(torch::equal(half.value.to(torch::kFloat), torch::tensor({65504.0F, -65504.0F})));
}

TEST(HalfParameters, StayBitForBitWhereAStepIsSkipped) {
  torch::manual_seed(3);
  for (const auto dtype : {torch::kHalf, torch::kBFloat16}) {
    OneParameter half(torch::randn({50}).to(dtype));
    half.step(torch::randn({50}));
    const auto before = half.value.detach().clone();
    half.step(torch::full({50}, std::numeric_limits<float>::infinity()));
    EXPECT_TRUE(torch::equal(half.value, before));
    EXPECT_EQ(half.optimizer.skipped_steps(), 1);
  }
}

TEST(OtherParameters, AreLeftAloneByAGradientThatIsInfiniteInTheirDtype) {
  OneParameter one(torch::zeros({3}));
  one.step(torch::full({3}, 1e200, torch::kDouble));
  EXPECT_EQ(one.optimizer.skipped_steps(), 1);
  EXPECT_TRUE(torch::equal(one.value, torch::zeros({3})));
}

/// What an earlier version wrote of `OneParameter` with a half parameter: moments in half, nothing of `maximize`.
std::string archive_of_an_earlier_version(const OneParameter& one, double mean, double square) {
  torch::serialize::OutputArchive archive, group, options, pair, others, adamw_options, parameter;
  archive.write("format", c10::IValue("lora_rite.LoraRite 1"));
  archive.write("basis", c10::IValue("polar"));
  archive.write("skipped_steps", c10::IValue(int64_t{0}));
  archive.write("group_count", c10::IValue(int64_t{2}));
  one.optimizer.param_groups()[0].options().serialize(options);
  group.write("options", options);
  group.write("kind", c10::IValue("factor pairs"));
  group.write("size", c10::IValue(int64_t{2}));
  pair.write("name", c10::IValue("q"));
  pair.write("stepped", c10::IValue(false));
  group.write("0", pair);
  archive.write("0", group);
  one.optimizer.param_groups()[1].options().serialize(adamw_options);
  others.write("options", adamw_options);
  others.write("kind", c10::IValue("other parameters"));
  others.write("size", c10::IValue(int64_t{1}));
  parameter.write("step", torch::full({}, 5.0f), true);
  parameter.write("mean", torch::full_like(one.value, mean), true);
  parameter.write("square", torch::full_like(one.value, square), true);
  others.write("0", parameter);
  archive.write("1", others);
  std::stringstream stream;
  archive.save_to(stream);
  return stream.str();
}

TEST(HalfParameters, TakeOverTheHalfMomentsOfAnEarlierVersionAndAscendAsBuilt) {
  OneParameter half(torch::zeros({4}, torch::kHalf), 1e-2, LoraRiteOptions().maximize(true));
  half.step(torch::ones({4}));
  half.value.data().zero_();
  load_bytes(half.optimizer, archive_of_an_earlier_version(half, 0.5, 0.25));
  half.step(torch::full({4}, 0.5));
  // Adam by hand on −gradient: t = 6, m = 0.9 · 0.5 − 0.1 · 0.5, v = 0.999 · 0.25 + 0.001 · 0.25.
  const double expected = -1e-2 * (0.4 / (1 - std::pow(0.9, 6))) / std::sqrt(0.25 / (1 - std::pow(0.999, 6)));
  EXPECT_NEAR(half.value[0].item<double>(), expected, kHalfRounding * std::abs(expected) + 1e-7);
}

TEST(OtherParameters, MayBeEmptyAmongOthers) {
  const auto pair = random_pair("q", 2, 4, 4);
  const auto empty = torch::zeros({0, 3}).requires_grad_(), head = torch::zeros({2}).requires_grad_();
  LoraRite<> optimizer({pair});
  optimizer.add_parameters({empty, head}, torch::optim::AdamWOptions(1e-2).weight_decay(0));
  for (int i = 0; i < 2; ++i) {
    torch::Tensor(empty).mutable_grad() = torch::zeros({0, 3});
    torch::Tensor(head).mutable_grad() = torch::ones({2});
    optimizer.step();
    load_bytes(optimizer, saved_bytes(optimizer));
  }
  EXPECT_NEAR(head[0].item<double>(), -0.02, 1e-6);
}

}  // namespace
}  // namespace lora_rite::test
