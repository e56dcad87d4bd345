#include "peft_adapter.hpp"

#include <lora_rite/io/peft.hpp>
#include <lora_rite/io/safetensors.hpp>
#include <nlohmann/json.hpp>

namespace finetune {

lora_rite::nn::LoraConfig adapter_of(const RunOptions& options) {
  lora_rite::nn::LoraConfig config;
  config.rank = options.rank;
  config.alpha = options.alpha;
  config.dropout = options.dropout;
  // These stand for the ends of module names. "dense" alone would also hit the pooler.
  config.target_modules =
      std::vector<std::string>{"query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"};
  return config;
}

void save_adapter(const std::filesystem::path& folder, const BertModel& model, const lora_rite::nn::LoraConfig& config,
                  const std::string& base_model) {
  lora_rite::Adapter adapter;
  adapter.config.r = config.rank;
  adapter.config.lora_alpha = config.alpha;
  adapter.config.lora_dropout = config.dropout;
  adapter.config.target_modules = config.target_modules;
  adapter.config.task_type = "FEATURE_EXTRACTION";
  adapter.config.base_model_name_or_path = base_model;
  adapter.tensors = lora_rite::adapter_tensors(model.named_parameters());
  lora_rite::save_adapter(folder, adapter);
}

void save_head(const std::filesystem::path& path, const torch::nn::LinearImpl& head,
               const std::vector<std::string>& classes) {
  lora_rite::save_safetensors(path, {{"weight", head.weight}, {"bias", head.bias}},
                              {{"labels", nlohmann::json(classes).dump()}});
}

}  // namespace finetune
