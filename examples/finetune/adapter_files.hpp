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

}  // namespace finetune
