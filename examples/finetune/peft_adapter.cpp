#include "peft_adapter.hpp"

#include <nlohmann/json.hpp>

#include "files.hpp"
#include "safetensors.hpp"

namespace finetune {

void save_adapter(const std::filesystem::path& folder, const BertModel& model, const LoraConfig& config,
                  const std::string& base_model) {
  // PEFT matches these against the ends of module names. "dense" alone would also hit the pooler.
  const nlohmann::json target_modules = {"query",       "key", "value", "attention.output.dense", "intermediate.dense",
                                         "output.dense"};
  const nlohmann::json description = {{"peft_type", "LORA"},
                                      {"task_type", "FEATURE_EXTRACTION"},
                                      {"base_model_name_or_path", base_model},
                                      {"r", config.rank},
                                      {"lora_alpha", config.alpha},
                                      {"lora_dropout", config.dropout},
                                      {"target_modules", target_modules},
                                      {"bias", "none"},
                                      {"fan_in_fan_out", false},
                                      {"init_lora_weights", true},
                                      {"use_rslora", false},
                                      {"inference_mode", true}};
  Safetensors file;
  file.metadata["format"] = "pt";
  for (const auto& item : model.named_parameters()) {
    if (item.key().find(".lora_") != std::string::npos) {
      file.tensors["base_model.model." + item.key()] = item.value();
    }
  }
  replace_file(folder / "adapter_config.json", [&](std::ostream& out) { out << description.dump(2) << '\n'; });
  save_safetensors(folder / "adapter_model.safetensors", file);
}

void save_head(const std::filesystem::path& path, const torch::nn::LinearImpl& head,
               const std::vector<std::string>& classes) {
  Safetensors file;
  file.metadata["labels"] = nlohmann::json(classes).dump();
  file.tensors["weight"] = head.weight;
  file.tensors["bias"] = head.bias;
  save_safetensors(path, file);
}

}  // namespace finetune
