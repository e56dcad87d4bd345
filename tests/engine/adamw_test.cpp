#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <string>

#include "support/pairs.hpp"

namespace lora_rite {
namespace {

using testing::error_of;
using testing::load_bytes;
using testing::mentions;
using testing::saved_bytes;

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

class OtherParameters : public ::testing::TestWithParam<bool> {};

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

INSTANTIATE_TEST_SUITE_P(AmsGrad, OtherParameters, ::testing::Bool());

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
      const torch::Tensor& gradient = module->named_parameters()[parameter.key()].grad();
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

}  // namespace
}  // namespace lora_rite
