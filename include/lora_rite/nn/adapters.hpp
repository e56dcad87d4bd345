#pragma once

#include <c10/util/Exception.h>
#include <torch/nn/module.h>
#include <torch/types.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/factor_pair.hpp"
#include "lora_rite/nn/lora_layer.hpp"

/// All LoRA layers of a model at once: which there are, what is active, merging, counting.
namespace lora_rite::nn {

namespace detail {

/// "encoder" and "0" → "encoder.0".
inline std::string joined(const std::string& prefix, const std::string& name) {
  return prefix.empty() ? name : prefix + "." + name;
}

/// visit(name, module) for `module` and everything below it, each module once, by its first name, and nothing inside of
/// LoRA layers.
template <class Visit>
void visit_modules(torch::nn::Module& module, const std::string& name, std::set<const void*>& seen,
                   const Visit& visit) {
  if (!seen.insert(&module).second) return;
  visit(name, module);
  if (dynamic_cast<LoraLayer*>(&module) != nullptr) return;
  for (const auto& child : module.named_children())
    visit_modules(*child.value(), joined(name, child.key()), seen, visit);
}

}  // namespace detail

/// A LoRA layer of a model; the pointer lives as long as the model holds the layer.
struct NamedLoraLayer {
  std::string name;  ///< in the model; empty if the model is the layer
  LoraLayer* layer;  ///< never null
};

/// All LoRA layers of a model, with adapters or without, in the order of their registration.
inline std::vector<NamedLoraLayer> lora_layers(const torch::nn::Module& model) {
  std::vector<NamedLoraLayer> layers;
  std::set<const void*> seen;
  // Nothing is changed here; LibTorch hands out children of a const module as non-const, too.
  detail::visit_modules(const_cast<torch::nn::Module&>(model), "", seen,
                        [&](const std::string& name, torch::nn::Module& module) {
                          if (auto* layer = dynamic_cast<LoraLayer*>(&module)) layers.push_back({name, layer});
                        });
  return layers;
}

/// The names of a model's adapters, in the order of their first appearance.
inline std::vector<std::string> adapter_names(const torch::nn::Module& model) {
  std::vector<std::string> names;
  for (const auto& [layer_name, layer] : lora_layers(model)) {
    for (const auto& name : layer->adapter_names()) {
      if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
    }
  }
  return names;
}

namespace detail {

/// The LoRA layers; throws c10::Error, beginning with the function's name, if an adapter is in none of them.
inline std::vector<NamedLoraLayer> layers_with(const char* function, const torch::nn::Module& model,
                                               const std::vector<std::string>& adapters) {
  const auto known = adapter_names(model);
  for (const auto& adapter : adapters) {
    TORCH_CHECK(std::find(known.begin(), known.end(), adapter) != known.end(), function, ": the model has no adapter '",
                adapter, "', expected one of ", quoted_list(known));
  }
  return lora_layers(model);
}

}  // namespace detail

/// LoraLayer::set_active for every layer, with those of the adapters that it has. Throws c10::Error if an adapter is in
/// no layer, or stands there twice; nothing is changed then.
inline void set_active_adapters(torch::nn::Module& model, const std::vector<std::string>& adapters) {
  const auto layers = detail::layers_with("set_active_adapters", model, adapters);
  TORCH_CHECK(std::set<std::string>(adapters.begin(), adapters.end()).size() == adapters.size(),
              "set_active_adapters: an adapter stands twice in the list ", detail::quoted_list(adapters));
  for (const auto& [name, layer] : layers) {
    std::vector<std::string> own;
    for (const auto& adapter : adapters) {
      if (layer->has_adapter(adapter)) own.push_back(adapter);
    }
    layer->set_active(own);
  }
}

/// LoraLayer::enable_adapters for every layer.
inline void enable_adapters(torch::nn::Module& model, bool enabled) {
  for (const auto& [name, layer] : lora_layers(model)) layer->enable_adapters(enabled);
}

/// LoraLayer::delete_adapter for every layer that has it. Throws c10::Error if none does.
inline void delete_adapter(torch::nn::Module& model, std::string adapter) {  // a copy: it may be a name that goes
  for (const auto& [name, layer] : detail::layers_with("delete_adapter", model, {adapter})) {
    if (layer->has_adapter(adapter)) layer->delete_adapter(adapter);
  }
}

/// LoraLayer::merge for every layer with adapters.
inline void merge_adapters(torch::nn::Module& model) {
  for (const auto& [name, layer] : lora_layers(model)) {
    if (!layer->adapter_names().empty()) layer->merge();
  }
}

/// LoraLayer::unmerge for every layer.
inline void unmerge_adapters(torch::nn::Module& model) {
  for (const auto& [name, layer] : lora_layers(model)) layer->unmerge();
}

/// LoraLayer::merge_and_unload for every layer: a model without adapters, whose weights hold the active ones.
inline void merge_and_unload(torch::nn::Module& model) {
  for (const auto& [name, layer] : lora_layers(model)) layer->merge_and_unload();
}

/// The factor pairs of one adapter, named by layer and adapter as find_factor_pairs names them: for LoraRite, where a
/// model has several adapters and one is trained. Throws c10::Error if no layer has it.
inline std::vector<FactorPair> factor_pairs(const torch::nn::Module& model, const std::string& adapter = "default") {
  std::vector<FactorPair> pairs;
  for (const auto& [name, layer] : detail::layers_with("factor_pairs", model, {adapter})) {
    if (!layer->has_adapter(adapter)) continue;
    const bool in_module = std::string(layer->factor_tokens().first) == "lora_A";  // …lora_A.default.weight
    const LoraAdapter& found = layer->adapter(adapter);
    pairs.push_back({detail::joined(name, adapter) + (in_module ? ".weight" : ""), found.a, found.b});
  }
  return pairs;
}

/// How many parameters of a model are trained.
struct TrainableParameters {
  int64_t trainable = 0;  ///< elements of parameters that require gradients
  int64_t all = 0;        ///< elements of all parameters

  /// Of a model without parameters 0.
  double percent() const { return all == 0 ? 0 : 100 * static_cast<double>(trainable) / static_cast<double>(all); }

  /// As PEFT's print_trainable_parameters has it:
  /// "trainable params: 294,912 || all params: 109,777,152 || trainable%: 0.2686".
  std::string text() const {
    const auto with_commas = [](int64_t number) {
      std::string digits = std::to_string(number);
      for (size_t at = digits.size(); at > 3;) digits.insert(at -= 3, ",");
      return digits;
    };
    char share[32];
    std::snprintf(share, sizeof(share), "%.4f", percent());
    return "trainable params: " + with_commas(trainable) + " || all params: " + with_commas(all) +
           " || trainable%: " + share;
  }
};

/// Counts a model's parameters; one that has several names counts once.
inline TrainableParameters trainable_parameters(const torch::nn::Module& model) {
  TrainableParameters count;
  std::set<const void*> seen;
  for (const auto& parameter : model.parameters()) {
    if (!seen.insert(parameter.unsafeGetTensorImpl()).second) continue;
    count.all += parameter.numel();
    if (parameter.requires_grad()) count.trainable += parameter.numel();
  }
  return count;
}

}  // namespace lora_rite::nn
