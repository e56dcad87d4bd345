#pragma once

#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/normalization.h>

#include <fstream>
#include <lora_rite/nn/nn.hpp>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "support/torch.hpp"

/// What the tests of lora_rite::nn share.
namespace lora_rite::test {

/// What PEFT computed and what it calls things (make_peft_golden.py writes it).
inline const nlohmann::json& peft_golden() {
  static const nlohmann::json golden =
      nlohmann::json::parse(std::ifstream(LORA_RITE_TEST_DATA_DIR "/nn/peft_golden.json"));
  return golden;
}

/// A tensor of the golden file, in double.
inline torch::Tensor tensor_of(const nlohmann::json& numbers) {
  return torch::tensor(numbers["data"].get<std::vector<double>>(), torch::kDouble)
      .reshape(numbers["shape"].get<std::vector<int64_t>>());
}

/// Largest difference, relative to the largest element of `expected`; infinite if shapes differ or a number is NaN.
inline double largest_difference(const torch::Tensor& actual, const torch::Tensor& expected) {
  if (actual.sizes() != expected.sizes()) return INFINITY;
  const auto reference = expected.detach().to(torch::kDouble);
  const double difference = (actual.detach().to(torch::kDouble) - reference).abs().max().item<double>();
  return std::isfinite(difference) ? difference / std::max(reference.abs().max().item<double>(), 1e-300) : INFINITY;
}

/// The names of a module's parameters, in their order.
inline std::vector<std::string> parameter_names(const torch::nn::Module& module) {
  return module.named_parameters().keys();
}

/// A config with a target list.
inline nn::LoraConfig lora_config(int64_t rank, double alpha, std::vector<std::string> targets = {}) {
  nn::LoraConfig config;
  config.rank = rank;
  config.alpha = alpha;
  if (!targets.empty()) config.target_modules = std::move(targets);
  return config;
}

/// The model of the golden file's "model".
struct SmallImpl : torch::nn::Cloneable<SmallImpl> {
  SmallImpl() { reset(); }

  void reset() override {
    embed = register_module("embed", nn::LoraEmbedding(9, 4));
    conv = register_module("conv", nn::LoraConv2d(1, 3, 2));
    body = register_module("body", torch::nn::Sequential(nn::LoraLinear(4, 6), torch::nn::ReLU(),
                                                         nn::LoraLinear(torch::nn::LinearOptions(6, 4).bias(false))));
    norm = register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({4})));
    head = register_module("head", nn::LoraLinear(4, 2));
  }

  /// indices [n] → [n, 2]. Every layer takes part.
  torch::Tensor forward(const torch::Tensor& indices) {
    const auto vectors = embed->forward(indices);                                 // [n, 4]
    const auto image = vectors.view({-1, 1, 2, 2});                               // [n, 1, 2, 2]
    const auto pixels = conv->forward(image).mean({1, 2, 3}, /*keepdim=*/false);  // [n]
    return head->forward(norm->forward(body->forward(vectors))) + pixels.unsqueeze(1);
  }

  nn::LoraEmbedding embed{nullptr};
  nn::LoraConv2d conv{nullptr};
  torch::nn::Sequential body{nullptr};
  torch::nn::LayerNorm norm{nullptr};
  nn::LoraLinear head{nullptr};
};
TORCH_MODULE(Small);

/// Fills both factors of every adapter with normal numbers, so that no ΔW is zero.
inline void randomize_factors(const torch::nn::Module& model) {
  torch::NoGradGuard no_grad;
  for (const auto& pair : find_factor_pairs(model)) {
    pair.a.copy_(0.5 * torch::randn(pair.a.sizes(), torch::kDouble));
    pair.b.copy_(0.5 * torch::randn(pair.b.sizes(), torch::kDouble));
  }
}

/// Copies of a model's parameters by name.
inline std::vector<torch::Tensor> copies_of(const std::vector<torch::Tensor>& tensors) {
  std::vector<torch::Tensor> copies;
  for (const auto& tensor : tensors) copies.push_back(tensor.detach().clone());
  return copies;
}

}  // namespace lora_rite::test
