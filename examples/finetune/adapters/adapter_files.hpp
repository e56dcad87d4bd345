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
  torch::Tensor
      base_weight;  ///< the base's weight, as PEFT copies it beside the factors of embeddings and heads; or undefined
};

/// An adapter's folder, read: what it holds, whatever that is. What a command can use of it is for the command to say.
struct AdapterFile {
  std::filesystem::path folder;
  lora_rite::Adapter adapter;
  /// The layers with factors in the order of their names, "layers.2" before "layers.10"; every expert of a parameter
  /// (target_parameters) is one.
  std::vector<AdapterLayer> layers;
  std::map<std::string, torch::Tensor> biases;  ///< trained beside the factors, by the module's name
  std::map<std::string, torch::Tensor> whole;   ///< of modules that were trained whole, by the parameter's name
  std::vector<std::string> others;              ///< names of all other tensors: DoRA's magnitudes, …
  std::vector<std::string> notes;               ///< sentences about what in the description has no effect
};

/// Reads adapter_config.json and adapter_model.safetensors. Throws Error or c10::Error naming the file and the field or
/// tensor where one is missing or damaged, or there are no factors.
AdapterFile read_adapter(const std::filesystem::path& folder);

/// Throws Error or c10::Error naming the field or the tensor unless the adapter is W + scale · B A, trained biases and
/// modules that were trained whole, and nothing else (DoRA, fan_in_fan_out, …).
void check_plain(const AdapterFile& adapter);

/// Whether a tensor of an adapter has the values of the base's, at the precision that it has in the adapter: PEFT
/// copies what it did not train, in the dtype that it was loaded in.
bool is_copy(const torch::Tensor& own, const torch::Tensor& base);

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

}  // namespace finetune
