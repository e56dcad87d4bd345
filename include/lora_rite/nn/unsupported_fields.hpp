#pragma once

#include <utility>
#include <vector>

#include "lora_rite/io/peft.hpp"

namespace lora_rite::nn::detail {

/// The fields of a description that make an adapter more than factors on ordinary layers, and why the layers cannot do
/// what they ask for. Fields that only tell how factors started or were trained (eva_config, runtime_config, …), and
/// those that nobody knows yet, are none of them.
inline std::vector<std::pair<const char*, const char*>> unsupported_fields(const AdapterConfig& config) {
  static const std::pair<const char*, const char*> kinds[] = {
      {"use_dora", "DoRA is not there"},
      {"use_qalora", "QALoRA is not there"},
      {"use_bdlora", "BD-LoRA is not there"},
      {"arrow_config", "Arrow is not there"},
      {"kasa_config", "KaSA is not there"},
      {"monteclora_config", "MonteCLoRA is not there"},
      {"megatron_config", "layers of Megatron are not there"},
      {"alora_invocation_tokens", "activated LoRA is not there"},
      {"trainable_token_indices", "an embedding is trained by factors or whole"},
      {"target_parameters",
       "adapters are on modules, not on parameters; experts in one parameter are a model's own, see expert_pairs"},
      {"layer_replication", "the model's layers are as they are"},
      {"lora_bias", "factors have no bias"},
      {"ensure_weight_tying", "two layers have no adapter in common"}};
  std::vector<std::pair<const char*, const char*>> found;
  for (const auto& kind : kinds) {
    if (lora_rite::detail::is_on(config, kind.first)) found.push_back(kind);
  }
  return found;
}

}  // namespace lora_rite::nn::detail
