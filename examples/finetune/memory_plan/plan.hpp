#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <filesystem>
#include <lora_rite/nn/lora_config.hpp>
#include <string>
#include <utility>
#include <vector>

namespace finetune {

/// What the memory of a run depends on.
struct MemoryQuestion {
  std::filesystem::path model;          ///< folder with config.json and safetensors files
  c10::ScalarType dtype = c10::kFloat;  ///< of the frozen weights; a sentence classifier's are float32
  lora_rite::nn::LoraConfig lora;       ///< which layers get an adapter, and of which rank
  std::string optimizer = "rite";       ///< one of optimizer_names()
  bool row_equilibration = false;       ///< rite's option, which has a state of its own
  int64_t rows = 1;                     ///< examples that are computed at once
  int64_t length = 1;                   ///< tokens of the longest; of an encoder-decoder the longest source
  int64_t completion = 1;               ///< tokens of the longest completion; unused by a classifier
  int64_t classes = 2;                  ///< of a sentence classifier
  bool gradient_checkpointing = false;  ///< of a language model
};

/// How much memory a run takes, part by part.
struct MemoryPlan {
  std::vector<std::pair<std::string, double>> parts;  ///< "base weights: 134.5 M in bfloat16" and bytes

  double total() const;
  std::string text() const;  ///< one line a part, and the total
};

/// Reckons how much memory training will take, from config.json and the headers of the safetensors files: no weight is
/// read, and none has memory yet. Weights, factors, gradients and the optimizer's saved state are exact; where a file
/// holds an output matrix beside the embedding, both are counted, although equal ones will be one. Activations and
/// logits are an estimate of the most that forward and backward hold at a time, with adapters on all layers. Not
/// counted: the program itself, and the pages of the files, which the system takes back when it needs them.
///
/// Throws Error or c10::Error naming file and field where load_model and inject_lora would: an unsupported
/// config.json, missing or damaged safetensors files, target_modules that name no layer, an unknown optimizer.
MemoryPlan plan_memory(const MemoryQuestion& question);

/// Throws Error with the sum and the way out if the plan needs more than `limit` bytes.
void check_memory(const MemoryPlan& plan, double limit);

}  // namespace finetune
