// The example's models on a GPU against transformers' figures, as tests/finetune/models has them on a CPU.

#include <gtest/gtest.h>
#include <torch/cuda.h>

#include <limits>

#include "finetune/models/support.hpp"

namespace finetune {
namespace {

// As on a CPU (language_model_test.cpp); a GPU's exp and tanh are of a few units more.
constexpr double kRounding = 200 * std::numeric_limits<float>::epsilon();

torch::Tensor there(const torch::Tensor& tensor) { return tensor.defined() ? tensor.to(torch::kCUDA) : tensor; }

LanguageInput there(const LanguageInput& input) {
  return {there(input.tokens), there(input.mask), there(input.target), there(input.target_mask)};
}

class CudaModels : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    if (!torch::cuda::is_available()) GTEST_SKIP() << "LibTorch finds no GPU";
    expected_ = expected_of(GetParam());
    model_ = load_model(model_golden(GetParam()));
  }

  Tensors expected_;
  std::shared_ptr<LanguageModel> model_;
};

TEST_P(CudaModels, LogitsAreThoseOfTransformers) {
  const torch::NoGradGuard no_grad;
  model_->to(torch::kCUDA);
  for (const std::string padding : {"", "left", "right"}) {
    const LanguageInput input = input_of(expected_, padding);
    const torch::Tensor real = real_places(input),
                        wanted = expected_.at(padding.empty() ? "logits" : padding + ".logits");
    EXPECT_LT(relative_distance(model_->forward(there(input)).cpu() * real, wanted * real), kRounding) << padding;
  }
}

TEST_P(CudaModels, GradientsAreThoseOfTransformersAlsoWhenLayersAreComputedAgain) {
  const Tensors factors = inject_factors(*model_, expected_);
  model_->to(torch::kCUDA);
  const LanguageInput input = there(input_of(expected_, "left"));
  for (const bool again : {false, true}) {
    model_->set_gradient_checkpointing(again);
    model_->zero_grad();
    (model_->forward(input) * there(expected_.at("lora.weights"))).sum().backward();
    for (const auto& [factor, tensor] : factors) {
      EXPECT_LT(relative_distance(tensor.grad().cpu(), expected_.at("gradient." + factor)), 10 * kRounding)
          << factor << again;
    }
  }
}

TEST_P(CudaModels, DropoutIsTheSameWhenLayersAreComputedAgain) {
  inject_factors(*model_, expected_);
  model_->to(torch::kCUDA);
  model_->train();
  const LanguageInput input = there(input_of(expected_, "left"));
  std::vector<std::vector<torch::Tensor>> gradients;
  for (const bool again : {false, true}) {
    model_->set_gradient_checkpointing(again);
    model_->zero_grad();
    torch::cuda::manual_seed(3);
    (model_->forward(input) * there(expected_.at("lora.weights"))).sum().backward();
    gradients.emplace_back();
    for (const auto& parameter : model_->parameters()) {
      if (parameter.requires_grad()) gradients.back().push_back(parameter.grad().cpu());
    }
  }
  for (size_t i = 0; i < gradients[0].size(); ++i) {
    EXPECT_LT(relative_distance(gradients[1][i], gradients[0][i]), 10 * kRounding) << i;
  }
}

TEST_P(CudaModels, GeneratesTheTokensOfTransformers) {
  if (GetParam() == "llama_dynamic") GTEST_SKIP() << "is not generated with beyond its positions";
  model_->to(torch::kCUDA);
  LanguageInput prompt = there(input_of(expected_, "left"));
  prompt.target = torch::Tensor();
  prompt.target_mask = torch::Tensor();
  const torch::Tensor wanted = expected_.at("generated");
  EXPECT_TRUE(model_->generate(prompt, wanted.size(1)).cpu().equal(wanted));
}

TEST_P(CudaModels, Bfloat16IsNearFloat) {
  const torch::NoGradGuard no_grad;
  const auto half = load_model(model_golden(GetParam()), torch::kBFloat16);
  half->to(torch::kCUDA);
  const LanguageInput input = input_of(expected_, "left");
  const torch::Tensor real = real_places(input), wanted = expected_.at("left.logits");
  const torch::Tensor found = half->forward(there(input)).cpu().to(torch::kFloat);
  EXPECT_LT(relative_distance(found * real, wanted * real), 0.1);
}

INSTANTIATE_TEST_SUITE_P(Models, CudaModels, ::testing::ValuesIn(model_names()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace finetune
