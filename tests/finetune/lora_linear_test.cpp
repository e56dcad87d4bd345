#include "lora_linear.hpp"

#include <cmath>

#include "support.hpp"

namespace finetune {
namespace {

std::shared_ptr<LoraLinear> make_layer(const LoraConfig& config) {
  auto layer = std::make_shared<LoraLinear>(12, 7);
  const torch::NoGradGuard no_grad;
  for (torch::Tensor& parameter : layer->parameters()) parameter.normal_();
  layer->add_adapter(config);
  return layer;
}

TEST(LoraLinear, ParametersAreNamedAndShapedAsInPeft) {
  const auto layer = make_layer({3, 6, 0});
  const auto parameters = layer->named_parameters();
  EXPECT_EQ(parameters["lora_A.weight"].sizes(), (std::vector<int64_t>{3, 12}));
  EXPECT_EQ(parameters["lora_B.weight"].sizes(), (std::vector<int64_t>{7, 3}));
  EXPECT_EQ(parameters.size(), 4U);
}

TEST(LoraLinear, StartsWithoutEffectAndWithKaimingUniformA) {
  const auto layer = make_layer({512, 512, 0});
  EXPECT_EQ(layer->delta_weight().abs().max().item<double>(), 0);
  const torch::Tensor a = layer->named_parameters()["lora_A.weight"];
  const double bound = 1 / std::sqrt(12.0);  // Kaiming-uniform with a = √5: 1/√in
  EXPECT_LE(a.abs().max().item<double>(), bound);
  EXPECT_NEAR(a.std().item<double>(), bound / std::sqrt(3.0), 0.02 * bound);
}

TEST(LoraLinear, OutputIsThatOfTheMergedWeight) {
  const auto layer = make_layer({3, 6, 0});
  auto parameters = layer->named_parameters();
  const torch::NoGradGuard no_grad;
  parameters["lora_B.weight"].normal_();
  const torch::Tensor delta = layer->delta_weight();
  EXPECT_LT(distance(delta, 2 * parameters["lora_B.weight"].matmul(parameters["lora_A.weight"])), 1e-6);
  EXPECT_GT(delta.abs().max().item<double>(), 0.1);

  const torch::Tensor x = torch::randn({4, 5, 12});
  const torch::Tensor expected = x.matmul((parameters["weight"] + delta).t()) + parameters["bias"];
  EXPECT_LT(distance(layer->forward(x), expected), 1e-5);
}

TEST(LoraLinear, DropoutActsInTrainingOnly) {
  const auto layer = make_layer({3, 3, 0.5});
  const torch::NoGradGuard no_grad;
  layer->named_parameters()["lora_B.weight"].normal_();
  const torch::Tensor x = torch::randn({4, 12});
  EXPECT_GT(distance(layer->forward(x), layer->forward(x)), 0);
  layer->eval();
  EXPECT_EQ(distance(layer->forward(x), layer->forward(x)), 0);
}

TEST(LoraLinear, ARankBelowOneAndASecondAdapterAreRefused) {
  EXPECT_NE(error_of([] { make_layer({0, 1, 0}); }).find("rank is 0"), std::string::npos);
  const auto layer = make_layer({3, 3, 0});
  EXPECT_NE(error_of([&] { layer->add_adapter({3, 3, 0}); }).find("adapter already"), std::string::npos);
}

}  // namespace
}  // namespace finetune
