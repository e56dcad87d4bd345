#include "adapters/adapter_files.hpp"

#include <torch/types.h>
#include <torch/utils.h>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <cstdio>
#include <lora_rite/io/adapter_modules.hpp>
#include <lora_rite/io/safetensors.hpp>
#include <lora_rite/nn/module_names.hpp>
#include <lora_rite/nn/peft.hpp>
#include <set>
#include <utility>

#include "common/error.hpp"
#include "common/fingerprint.hpp"

namespace finetune {
namespace {

namespace fs = std::filesystem;
using lora_rite::nn::detail::joined;

// Runs of digits by their value, everything else by its characters.
bool in_natural_order(const std::string& left, const std::string& right) {
  const auto is_digit = [](char character) { return std::isdigit(static_cast<unsigned char>(character)) != 0; };
  size_t i = 0, j = 0;
  while (i < left.size() && j < right.size()) {
    if (is_digit(left[i]) && is_digit(right[j])) {
      const auto number_at = [&](const std::string& text, size_t& at) {
        const size_t begin = at;
        while (at < text.size() && is_digit(text[at])) ++at;
        const size_t first = std::min(text.find_first_not_of('0', begin), at);
        return text.substr(first, at - first);
      };
      const std::string a = number_at(left, i), b = number_at(right, j);
      if (a != b) return a.size() != b.size() ? a.size() < b.size() : a < b;
    } else if (left[i] != right[j]) {
      return left[i] < right[j];
    } else {
      ++i, ++j;
    }
  }
  return left.size() - i < right.size() - j;
}

// "layer.weight", as find_factor_pairs has it → "layer". Embeddings' factors have no ".weight".
std::string module_name(const std::string& pair_name) {
  for (const char* ending : {".weight", "weight"}) {
    if (ends_with(pair_name, ending)) return pair_name.substr(0, pair_name.size() - std::string(ending).size());
  }
  return pair_name;
}

}  // namespace

AdapterFile read_adapter(const fs::path& folder) {
  AdapterFile file;
  file.folder = folder;
  file.adapter = lora_rite::load_adapter(folder);
  const lora_rite::AdapterConfig& description = file.adapter.config;
  const std::vector<std::pair<std::string, double>> alphas(description.alpha_pattern.begin(),
                                                           description.alpha_pattern.end());
  std::vector<std::string> names;
  const auto add_layer = [&](const std::string& module, const std::string& expert, const lora_rite::FactorPair& pair) {
    lora_rite::nn::LoraConfig own;
    own.use_rslora = description.use_rslora;
    own.rank = pair.a.size(0);
    own.alpha = lora_rite::nn::detail::pattern_value("alpha_pattern", alphas, module, description.lora_alpha);
    AdapterLayer layer;
    layer.module = module + expert;
    layer.pair = {layer.module, pair.a, pair.b};
    layer.scale = own.scale();
    file.layers.push_back(std::move(layer));
    names.push_back(module);
  };
  const bool has_experts = lora_rite::detail::has_target_parameters(description);
  if (has_experts) {
    for (const lora_rite::FactorPair& pair : lora_rite::expert_pairs(file.adapter)) {
      const size_t bracket = std::min(pair.name.rfind('['), pair.name.size());
      add_layer(module_name(pair.name.substr(0, bracket)), pair.name.substr(bracket), pair);
    }
  }
  for (const auto& [module, parts] : lora_rite::adapter_modules(file.adapter)) {
    if (parts.a.defined() && !has_experts) {
      add_layer(module, "", {module, parts.a, parts.b});
      file.layers.back().embedding = parts.embedding;
      file.layers.back().base_weight = parts.base_weight;
    } else if (parts.base_weight.defined()) {
      file.others.push_back(joined(module, "base_layer.weight"));
    }
    if (parts.bias.defined()) file.biases.emplace(module, parts.bias);
    for (const auto& [parameter, tensor] : parts.whole) file.whole.emplace(joined(module, parameter), tensor);
    if (parts.magnitude.defined()) file.others.push_back(joined(module, "lora_magnitude_vector"));
    file.others.insert(file.others.end(), parts.others.begin(), parts.others.end());
  }
  if (file.layers.empty()) {
    fail((folder / "adapter_model.safetensors").string(),
         ": holds no factors; an adapter that PEFT or 'finetune train' wrote is expected");
  }
  file.notes = lora_rite::nn::idle_patterns(description, names);
  std::sort(file.layers.begin(), file.layers.end(),
            [](const auto& left, const auto& right) { return in_natural_order(left.module, right.module); });
  return file;
}

void check_plain(const AdapterFile& file) {
  lora_rite::AdapterConfig description = file.adapter.config;
  description.init_lora_weights = true;  // how the factors started does not matter any more
  description.modules_to_save = {};      // the file has them
  try {
    lora_rite::nn::lora_config(description);
  } catch (const c10::Error& error) {
    fail((file.folder / "adapter_config.json").string(), ": ", error.what_without_backtrace());
  }
  if (file.others.empty()) return;
  fail((file.folder / "adapter_model.safetensors").string(), ": tensor '", file.others.front(),
       "' is neither a factor, a bias nor a part of a module of modules_to_save, and what it does would be lost; ",
       "let PEFT merge the adapter (merge_and_unload)");
}

bool is_copy(const torch::Tensor& own, const torch::Tensor& base) {
  return own.sizes() == base.sizes() && own.equal(base.to(own.scalar_type()));
}

void check_fits_ordinary_base(const AdapterFile& file) {
  lora_rite::nn::check_fits_ordinary_base((file.folder / "adapter_config.json").string() + ": ", file.adapter.config);
}

void check_shape(const AdapterLayer& layer, at::IntArrayRef shape, const std::string& origin) {
  const torch::Tensor& a = layer.pair.a;
  const torch::Tensor& b = layer.pair.b;
  bool fits = a.dim() == static_cast<int64_t>(shape.size());
  if (layer.embedding) {
    fits = fits && shape.size() == 2 && a.size(1) == shape[0] && b.size(0) == shape[1];
  } else {
    fits = fits && b.size(0) == shape[0] && b.numel() == b.size(0) * b.size(1) && a.sizes().slice(1) == shape.slice(1);
  }
  if (fits) return;
  fail(origin, " has shape ", shape, ", but the adapter's factors of '", layer.module, "' are ", a.sizes(), " and ",
       b.sizes(), "; it was trained on another base model");
}

torch::Tensor delta_weight(const AdapterLayer& layer, at::IntArrayRef shape) {
  const torch::NoGradGuard no_grad;
  const auto wide = [](const torch::Tensor& factor) {
    return factor.flatten(1).to(factor.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat);
  };
  const torch::Tensor product = torch::matmul(wide(layer.pair.b), wide(layer.pair.a)).mul_(layer.scale);
  return layer.embedding ? product.t() : product.view(shape);
}

std::string fingerprint(const AdapterFile& adapter) {
  Fingerprint hash;
  const auto add = [&](const void* data, size_t size) {
    const auto* bytes = static_cast<const unsigned char*>(data);
    for (size_t i = 0; i < size; ++i) hash.add(bytes[i]);
  };
  for (const AdapterLayer& layer : adapter.layers) {
    add(layer.module.data(), layer.module.size());
    add(&layer.scale, sizeof layer.scale);
    for (const torch::Tensor& factor : {layer.pair.a, layer.pair.b}) {
      const torch::Tensor plain = factor.contiguous();
      add(plain.const_data_ptr(), plain.nbytes());
    }
  }
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash.value()));
  return text;
}

}  // namespace finetune
