#pragma once

#include <torch/types.h>

#include <filesystem>
#include <lora_rite/factor_pair.hpp>
#include <lora_rite/io/peft.hpp>
#include <lora_rite/nn/lora_config.hpp>
#include <map>
#include <string>
#include <vector>

namespace finetune {

/// One layer of an adapter as its file has it.
struct AdapterLayer {
  std::string module;          ///< "model.layers.0.self_attn.q_proj"
  lora_rite::FactorPair pair;  ///< named as the module
  double scale = 1;            ///< ΔW = scale · B A
  bool embedding = false;      ///< ΔW = scale · (B A)ᵀ
};

/// An adapter's folder, read: its layers in the order of their names, "layers.2" before "layers.10".
struct AdapterFile {
  std::filesystem::path folder;
  lora_rite::Adapter adapter;
  lora_rite::nn::LoraConfig config;
  std::vector<AdapterLayer> layers;
  /// Biases trained beside the factors, by the module's name.
  std::map<std::string, torch::Tensor> biases;
};

/// Reads adapter_config.json and adapter_model.safetensors. Throws Error or c10::Error naming the file and the field or
/// tensor where one is missing or damaged, or holds what is no plain LoRA (DoRA, modules_to_save, fan_in_fan_out, …).
AdapterFile read_adapter(const std::filesystem::path& folder);

/// Throws c10::Error if the factors fit no ordinary base, because their start was taken out of it.
void check_fits_ordinary_base(const AdapterFile& adapter);

/// Throws Error naming module and shapes unless the factors fit a base weight of this shape; `origin` begins the
/// message.
void check_shape(const AdapterLayer& layer, at::IntArrayRef shape, const std::string& origin);

/// ΔW of a layer in the shape of its base weight, which it must fit, in float, or double if a factor is.
torch::Tensor delta_weight(const AdapterLayer& layer, at::IntArrayRef shape);

/// What tells one adapter from another whatever its folder is called: a number made of its layers' names, scales and
/// values, in hexadecimal.
std::string fingerprint(const AdapterFile& adapter);

/// The weights of a model's folder by the names its files have, mapped rather than read.
class BaseCheckpoint {
 public:
  /// Reads config.json and the headers of model.safetensors or of the shards of model.safetensors.index.json. Throws
  /// Error or c10::Error naming the file if one is missing or damaged.
  explicit BaseCheckpoint(std::filesystem::path folder);

  const std::filesystem::path& folder() const { return folder_; }
  const std::map<std::string, torch::Tensor>& tensors() const { return tensors_; }

  /// Which file each tensor stands in; all in "model.safetensors" where there is no index.
  const std::map<std::string, std::string>& file_of() const { return file_of_; }
  bool is_sharded() const { return is_sharded_; }

  /// The free texts of each file's header, by the file's name.
  const std::map<std::string, std::map<std::string, std::string>>& metadata() const { return metadata_; }

  /// The fingerprints of the adapters that `finetune merge` put into these weights.
  std::vector<std::string> merged_adapters() const;

  /// The name of the tensor that is the `parameter` ("weight", "bias") of a module that an adapter names. Names may
  /// differ by the prefix that transformers gives a model with a head ("bert.", "model."). Throws Error, naming the
  /// adapter's module and some of the tensors, if there is none.
  std::string tensor_of(const std::string& module, const std::string& parameter,
                        const std::filesystem::path& adapter) const;

  /// Throws Error if the adapter changes a matrix that the model uses twice, as embedding and as output.
  void check_not_tied(const AdapterFile& adapter) const;

 private:
  std::filesystem::path folder_;
  std::string model_type_;
  bool is_tied_ = false;
  bool is_sharded_ = false;
  std::map<std::string, torch::Tensor> tensors_;
  std::map<std::string, std::string> file_of_;
  std::map<std::string, std::map<std::string, std::string>> metadata_;
};

/// Throws Error if `finetune merge` put the adapter into these weights.
void check_not_merged(const AdapterFile& adapter, const BaseCheckpoint& base);

/// The key of a safetensors header's metadata under which merge remembers what it merged: a JSON list of fingerprints.
constexpr const char* kMergedKey = "merged_adapters";

}  // namespace finetune
