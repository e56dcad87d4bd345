#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <lora_rite/io/safetensors.hpp>
#include <lora_rite/nn/nn.hpp>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "finetune/support.hpp"
#include "models/load_model.hpp"
#include "support/torch.hpp"

namespace finetune {

using Tensors = std::map<std::string, torch::Tensor>;

/// A folder of golden/, which make_goldens.py writes.
inline std::filesystem::path model_golden(const std::string& name) {
  return std::filesystem::path(LORA_RITE_TEST_DATA_DIR) / "finetune" / "models" / "golden" / name;
}

inline Tensors expected_of(const std::string& name) {
  return lora_rite::load_safetensors(model_golden(name) / "expected.safetensors").tensors;
}

/// All models of golden/ but the sharded one.
inline const std::vector<std::string>& model_names() {
  static const std::vector<std::string> names = {"llama",
                                                 "llama_tied_llama3",
                                                 "llama_linear_biases",
                                                 "llama_dynamic",
                                                 "gemma",
                                                 "gemma2",
                                                 "gemma2_uncapped",
                                                 "t5",
                                                 "t5_gated",
                                                 "mt5"};
  return names;
}

/// The batch of a golden: its tokens and target, with the masks under `padding` ("left", "right"; empty = none).
inline LanguageInput input_of(const Tensors& expected, const std::string& padding = "") {
  const auto get = [&](const std::string& name) {
    const auto found = expected.find(name);
    return found == expected.end() ? torch::Tensor() : found->second;
  };
  LanguageInput input{get("tokens"), {}, get("target"), {}};
  if (!padding.empty()) {
    input.mask = get(padding + ".mask");
    input.target_mask = get(padding + ".target_mask");
  }
  return input;
}

/// Which logits of a batch mean something, [batch, length, 1] float.
inline torch::Tensor real_places(const LanguageInput& input) {
  const bool has_target = input.target.defined();
  const torch::Tensor& mask = has_target ? input.target_mask : input.mask;
  const torch::Tensor& tokens = has_target ? input.target : input.tokens;
  return (mask.defined() ? mask.to(torch::kFloat) : torch::ones(tokens.sizes())).unsqueeze(-1);
}

/// Largest absolute difference, as a share of the largest absolute value.
inline double relative_distance(const torch::Tensor& left, const torch::Tensor& right) {
  return distance(left, right) / right.abs().max().item<double>();
}

/// Gives a golden's model the adapters of make_goldens.py, and returns its factors by their names there.
inline Tensors inject_factors(LanguageModel& model, const Tensors& expected) {
  lora_rite::nn::LoraConfig config;
  std::vector<std::string> targets;
  for (const auto& [name, tensor] : expected) {
    const std::string prefix = "factor.", suffix = ".lora_A.weight";
    if (name.rfind(prefix, 0) != 0 || name.find(suffix) == std::string::npos) continue;
    targets.push_back(name.substr(prefix.size(), name.size() - prefix.size() - suffix.size()));
    config.rank = tensor.size(0);
  }
  config.target_modules = targets;
  config.alpha = 1.5 * static_cast<double>(config.rank);
  lora_rite::nn::inject_lora(model, config);

  const torch::NoGradGuard no_grad;
  Tensors factors;
  for (const auto& pair : lora_rite::nn::factor_pairs(model)) {
    const std::string layer = pair.name.substr(0, pair.name.find(".default"));
    for (const auto& [factor, tensor] : {std::pair{".lora_A.weight", pair.a}, std::pair{".lora_B.weight", pair.b}}) {
      torch::Tensor(tensor).copy_(expected.at("factor." + layer + factor));
      factors[layer + factor] = tensor;
    }
  }
  return factors;
}

}  // namespace finetune
