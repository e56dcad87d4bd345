#pragma once

#include <torch/types.h>

#include <cstdint>
#include <filesystem>
#include <lora_rite/io/safetensors.hpp>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace finetune {

struct AdapterFile;

/// One spelling for all that a tensor has: without what wrappers and models with a head put in front of it in memory or
/// in files ("model.", "language_model.", GPT-2's "transformer.", ColPali's "vlm.", "bert." in a model of that type,
/// "vision_model." within a vision tower), and with the weight and bias of a norm that the oldest files of BERT call
/// gamma and beta.
/// "model.language_model.layers.0" (Gemma 3, LLaVA and Qwen2-VL in memory), "language_model.model.layers.0" (the first
/// two in files) and "model.layers.0" (the last one in files) are all "layers.0".
std::string plain_name(const std::string& model_type, std::string name);

/// A model's folder as every command sees it: which files make the checkpoint, what they hold and under which names.
/// Only headers are read; tensors are mapped.
class BaseCheckpoint {
 public:
  /// Reads config.json and the headers of the files that lora_rite::open_checkpoint finds. Throws Error or c10::Error
  /// naming the file if one is missing or damaged, if the checkpoint is quantised (by config.json or by its tensors),
  /// or if its names are torch.compile's.
  explicit BaseCheckpoint(std::filesystem::path folder);

  const std::filesystem::path& folder() const { return folder_; }
  const std::string& model_type() const { return model_type_; }

  /// All tensors by the names in the files.
  const std::map<std::string, torch::Tensor>& tensors() const;

  /// One of them, held by nobody else. Throws c10::Error if there is none of this name.
  torch::Tensor tensor(const std::string& name) const;

  /// What it is; no byte of it is read.
  lora_rite::TensorInfo info(const std::string& name) const;

  /// Which file each tensor stands in; all in "model.safetensors" where there is no index.
  const std::map<std::string, std::string>& file_of() const { return file_of_; }
  bool is_sharded() const { return checkpoint_.is_sharded; }

  /// The free texts of each file's header, by the file's name.
  const std::map<std::string, std::map<std::string, std::string>>& metadata() const { return metadata_; }

  /// The fingerprints of the adapters that `finetune merge` put into these weights.
  std::vector<std::string> merged_adapters() const;

  /// The name in the files of what a model in memory calls `name`, whatever the spelling; empty if there is none.
  /// Throws Error naming both if there are two.
  std::string find(const std::string& name) const;

  /// The name of the tensor that is the `parameter` ("weight", "bias") of a module that an adapter names, by `find`.
  /// Throws Error, naming the adapter's module and some of the tensors, if there is none, or it holds no floating-point
  /// numbers.
  std::string tensor_of(const std::string& module, const std::string& parameter,
                        const std::filesystem::path& adapter) const;

  /// The files' names of the embedding of tokens and of the output matrix; empty where they have none.
  const std::string& embedding_name() const { return embedding_; }
  const std::string& output_name() const { return output_; }

  /// Whether embedding and output are one matrix: if config.json ties them, and the files do not hold two that differ.
  /// Reads both where they hold two, once.
  bool is_tied() const;

  /// The vocab_size of config.json's text_config, or its own; 0 where neither says it.
  int64_t vocab_size() const { return vocab_size_; }

 private:
  const lora_rite::SafetensorsFile& holder_of(const std::string& name) const;

  std::filesystem::path folder_;
  std::string model_type_;
  bool config_ties_ = false;
  int64_t vocab_size_ = 0;
  lora_rite::Checkpoint checkpoint_;
  std::map<std::string, size_t> part_of_;  // in checkpoint_.files
  std::map<std::string, std::string> file_of_;
  std::map<std::string, std::vector<std::string>> spellings_;  // by plain_name
  std::map<std::string, std::map<std::string, std::string>> metadata_;
  std::string embedding_, output_;
  mutable std::map<std::string, torch::Tensor> tensors_;  // filled when asked for
  mutable std::optional<bool> is_tied_;                   // likewise
};

/// Takes those of the adapter's other tensors away that are the base's own: with save_embedding_layers PEFT writes the
/// embeddings beside the factors.
void drop_copies(AdapterFile& adapter, const BaseCheckpoint& base);

/// Throws Error if `finetune merge` put the adapter into these weights.
void check_not_merged(const AdapterFile& adapter, const BaseCheckpoint& base);

/// The key of a safetensors header's metadata under which merge remembers what it merged: a JSON list of fingerprints.
constexpr const char* kMergedKey = "merged_adapters";

}  // namespace finetune
