#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <map>
#include <string>
#include <vector>

#include "lora_rite/io/adapter_names.hpp"
#include "lora_rite/io/peft.hpp"

/// What an adapter holds, module by module: the one place that tells from a tensor's name what it is.
namespace lora_rite {

/// What an adapter holds of one module. Tensors that it has not are undefined.
struct AdapterModule {
  at::Tensor a,            ///< the factor A [r, in…]; of embeddings [r, num_embeddings]
      b;                   ///< the factor B [out, r, …]; of embeddings [dim, r]
  bool embedding = false;  ///< ΔW = scale · (B A)ᵀ
  at::Tensor base_weight;  ///< the weight beneath the factors, which PEFT copies beside those of embeddings and heads
  at::Tensor bias;         ///< the module's bias, trained beside the factors
  at::Tensor magnitude;    ///< DoRA's: the norms of the whole weight
  std::map<std::string, at::Tensor> whole;  ///< all parameters of a module that was trained whole (modules_to_save)
  std::vector<std::string> others;          ///< names of tensors of any other kind
};

/// Whether modules_to_save names the module, or one around it: by the end of its name, and to PEFT "norm" is an end of
/// "input_layernorm" as well.
inline bool is_saved_whole(const AdapterConfig& config, const std::string& module) {
  if (!config.modules_to_save) return false;
  for (size_t end = 0; end != std::string::npos;) {
    end = module.find('.', end + 1);
    const std::string around = module.substr(0, end);
    for (const std::string& name : *config.modules_to_save) {
      if (detail::ends_with(around, name)) return true;
    }
  }
  return false;
}

/// The modules of an adapter by their names, and what it holds of each. What was of use in training only is left out.
/// Throws c10::Error naming a module with factors of two kinds, those of a layer and those of an embedding.
inline std::map<std::string, AdapterModule> adapter_modules(const Adapter& adapter) {
  std::map<std::string, AdapterModule> modules;
  for (const auto& [name, tensor] : adapter.tensors) {
    if (detail::is_of_training_only(name)) continue;
    const size_t component = detail::find_known_component(name);
    if (component != std::string::npos) {
      AdapterModule& module = modules[component == 0 ? std::string() : name.substr(0, component - 1)];
      const std::string token = name.substr(component);
      const auto is = [&](const char* word) { return token == word; };
      const bool is_a = is("lora_A.weight") || is("lora_embedding_A");
      if (is_a || is("lora_B.weight") || is("lora_embedding_B")) {
        const bool is_embedding = is("lora_embedding_A") || is("lora_embedding_B");
        const bool is_first = !module.a.defined() && !module.b.defined();
        TORCH_CHECK(is_first || module.embedding == is_embedding, "adapter: '", name.substr(0, component),
                    "' has lora_A or lora_B and lora_embedding_A or lora_embedding_B, expected one of both kinds");
        module.embedding = is_embedding;
        (is_a ? module.a : module.b) = tensor;
      } else if (is("lora_magnitude_vector")) {
        module.magnitude = tensor;
      } else {
        module.others.push_back(name);
      }
      continue;
    }
    const size_t dot = name.rfind('.');
    const std::string owner = dot == std::string::npos ? std::string() : name.substr(0, dot);
    const std::string parameter = name.substr(dot + 1);  // npos + 1 is 0
    const std::string module = detail::BaseParameters::without_base_layer(owner);
    if (is_saved_whole(adapter.config, module)) {
      modules[module].whole[parameter] = tensor;
    } else if (parameter == "bias") {
      modules[module].bias = tensor;
    } else if (parameter == "weight" && module != owner) {
      modules[module].base_weight = tensor;
    } else {
      modules[module].others.push_back(name);
    }
  }
  return modules;
}

}  // namespace lora_rite
