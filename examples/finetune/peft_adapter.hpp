#pragma once

#include <filesystem>
#include <lora_rite/nn/lora_config.hpp>
#include <string>
#include <vector>

#include "classifier.hpp"
#include "run_options.hpp"

namespace finetune {

/// The adapters that a run gives to a BERT encoder: on every linear layer of its attention and feed-forward blocks.
lora_rite::nn::LoraConfig adapter_of(const RunOptions& options);

/// Writes the adapters in the format of the Python library PEFT, for a plain `BertModel`: adapter_config.json and
/// adapter_model.safetensors in `folder`. `base_model` is where a reader finds the base (a folder or a hub name).
void save_adapter(const std::filesystem::path& folder, const BertModel& model, const lora_rite::nn::LoraConfig& config,
                  const std::string& base_model);

/// Writes the classifier head: `weight` [classes, hidden], `bias` [classes], and the class names as a JSON list in the
/// metadata's `labels`.
void save_head(const std::filesystem::path& path, const torch::nn::LinearImpl& head,
               const std::vector<std::string>& classes);

}  // namespace finetune
