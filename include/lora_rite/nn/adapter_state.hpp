#pragma once

#include <c10/util/Exception.h>
#include <torch/nn/module.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <functional>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/nn/adapters.hpp"
#include "lora_rite/nn/lora_layer.hpp"

/// The tensors of a model by the names that files have: one adapter's by PEFT's, the base's by those of a checkpoint
/// from before there were adapters.
namespace lora_rite::nn {

/// Tensors by name, as Adapter::tensors (io/peft.hpp) has them.
using NamedTensors = std::map<std::string, torch::Tensor>;

/// What load_base_state did not find.
struct LeftOut {
  std::vector<std::string> missing;     ///< in the model, not in the file
  std::vector<std::string> unexpected;  ///< in the file, not in the model
};

namespace detail {

/// Every parameter and buffer of the base by its name without adapters ("fc.weight", not "fc.base_layer.weight").
inline NamedTensors base_tensors(const torch::nn::Module& model, bool with_buffers) {
  NamedTensors tensors;
  const auto add = [&](const std::string& name, const torch::Tensor& tensor) {
    if (tensor.defined()) tensors.emplace(name, tensor);
  };
  std::set<const void*> layers_seen;
  // All names, also those of a module that is registered twice: a file has them, too.
  const std::function<void(const std::string&, torch::nn::Module&)> visit = [&](const std::string& prefix,
                                                                                torch::nn::Module& module) {
    const auto* layer = dynamic_cast<LoraLayer*>(&module);
    torch::nn::Module& owner = layer != nullptr ? layer->base_module() : module;
    for (const auto& item : ParameterAccess::of(owner)) add(joined(prefix, item.key()), item.value());
    if (with_buffers) {
      for (const auto& item : owner.named_buffers(/*recurse=*/false)) add(joined(prefix, item.key()), item.value());
    }
    if (layer != nullptr) return;
    for (const auto& child : module.named_children()) visit(joined(prefix, child.key()), *child.value());
  };
  visit("", const_cast<torch::nn::Module&>(model));
  return tensors;
}

/// What PEFT's files call the factors of the layer `name`: "fc.lora_A.weight", "e.lora_embedding_A".
inline std::pair<std::string, std::string> factor_names(const std::string& name, const LoraLayer& layer) {
  const auto [token_a, token_b] = layer.factor_tokens();
  const std::string ending = std::string(token_a) == "lora_A" ? ".weight" : "";
  return {joined(name, token_a) + ending, joined(name, token_b) + ending};
}

/// The biases that are trained with an adapter, by their names in PEFT's files. `adapted` has those of layers with
/// adapters, by their names without: "fc.bias".
inline NamedTensors bias_state(const torch::nn::Module& model, LoraBias bias, const std::set<std::string>& adapted) {
  NamedTensors tensors;
  if (bias == LoraBias::None) return tensors;
  for (const auto& [name, tensor] : base_tensors(model, /*with_buffers=*/false)) {
    const bool is_bias = name == "bias" || lora_rite::detail::ends_with(name, ".bias");
    const bool is_adapted = adapted.count(name) > 0;
    if (!is_bias || (bias == LoraBias::LoraOnly && !is_adapted)) continue;
    const std::string owner = name.substr(0, name.size() - 4);  // "fc." or ""
    tensors.emplace(is_adapted ? owner + "base_layer.bias" : name, tensor);
  }
  return tensors;
}

/// The names that are in one of both only.
template <class Own>
LeftOut left_out(const std::map<std::string, Own>& own, const NamedTensors& state) {
  LeftOut result;
  for (const auto& [name, value] : own) {
    if (state.count(name) == 0) result.missing.push_back(name);
  }
  for (const auto& [name, tensor] : state) {
    if (own.count(name) == 0) result.unexpected.push_back(name);
  }
  return result;
}

/// Throws c10::Error that lists up to eight names of each kind.
inline void check_names(const char* function, const LeftOut& left_out) {
  const auto some = [](std::vector<std::string> names) {
    const size_t more = names.size() > 8 ? names.size() - 8 : 0;
    names.resize(names.size() - more);
    return quoted_list(names) + (more > 0 ? " and " + std::to_string(more) + " more" : "");
  };
  TORCH_CHECK(left_out.missing.empty() && left_out.unexpected.empty(), function, ": missing: ", some(left_out.missing),
              "; unexpected: ", some(left_out.unexpected));
}

inline void check_shape(const char* function, const std::string& name, const torch::Tensor& own,
                        const torch::Tensor& other) {
  TORCH_CHECK(other.defined() && other.sizes() == own.sizes(), function, ": '", name, "' is ",
              other.defined() ? other.sizes() : at::IntArrayRef(), ", expected ", own.sizes());
}

/// Copies values in; every name is in both.
inline void copy_values(NamedTensors& own, const NamedTensors& others) {
  torch::NoGradGuard no_grad;
  for (auto& [name, tensor] : own) {
    const auto other = others.find(name);
    if (other != others.end()) tensor.copy_(other->second);
  }
}

}  // namespace detail

/// One adapter's tensors, the model's own, by their names in PEFT's files without "base_model.model.":
/// "<layer>.lora_A.weight" and "<layer>.lora_B.weight", of embeddings "<layer>.lora_embedding_A" and
/// "<layer>.lora_embedding_B", and the biases that LoraConfig::bias trains ("<layer>.base_layer.bias", with
/// LoraBias::All those of other modules as well). Of LoraInit::Pissa they fit the base weight that lacks the initial
/// product. Throws c10::Error if no layer has the adapter.
inline NamedTensors adapter_state(const torch::nn::Module& model, const std::string& adapter = "default") {
  NamedTensors tensors;
  LoraBias bias = LoraBias::None;
  const auto layers = detail::layers_with("adapter_state", model, {adapter});
  std::set<std::string> adapted;  // biases of layers that have any adapter are called so
  for (const auto& [name, layer] : layers) {
    if (!layer->adapter_names().empty()) adapted.insert(detail::joined(name, "bias"));
    if (!layer->has_adapter(adapter)) continue;
    const auto [name_a, name_b] = detail::factor_names(name, *layer);
    tensors.emplace(name_a, layer->adapter(adapter).a);
    tensors.emplace(name_b, layer->adapter(adapter).b);
    bias = layer->adapter(adapter).config.bias;
  }
  tensors.merge(detail::bias_state(model, bias, adapted));
  return tensors;
}

/// Copies an adapter's tensors into the model, cast to its dtypes; `state` is named as adapter_state names it. Throws
/// c10::Error naming what is missing, unexpected or of another shape; nothing is changed then.
inline void load_adapter_state(torch::nn::Module& model, const NamedTensors& state,
                               const std::string& adapter = "default") {
  NamedTensors own = adapter_state(model, adapter);
  const LeftOut left_out = detail::left_out(own, state);
  detail::check_names("load_adapter_state", left_out);
  for (const auto& [name, tensor] : own) detail::check_shape("load_adapter_state", name, tensor, state.at(name));
  detail::copy_values(own, state);
}

/// The parameters and buffers of the base, the model's own, by the names they have without adapters.
inline NamedTensors base_state(const torch::nn::Module& model) {
  return detail::base_tensors(model, /*with_buffers=*/true);
}

/// Copies the tensors of an ordinary checkpoint ("fc.weight") into the base, with adapters or without, cast to its
/// dtypes. Throws c10::Error naming what has another shape and, if `strict`, what is missing or unexpected; also if an
/// adapter started by LoraInit::Pissa, whose base weight is not the checkpoint's. Nothing is changed then. Returns what
/// was missing and unexpected, which only a load that is not `strict` has.
inline LeftOut load_base_state(torch::nn::Module& model, const NamedTensors& state, bool strict = true) {
  for (const auto& [name, layer] : lora_layers(model)) {
    for (const auto& adapter : layer->adapter_names()) {
      TORCH_CHECK(!layer->adapter(adapter).initial_a.defined(), "load_base_state: the adapter '", adapter, "' of '",
                  name, "' started by LoraInit::Pissa from another base weight; load the base before");
    }
  }
  NamedTensors own = base_state(model);
  LeftOut left_out = detail::left_out(own, state);
  if (strict) detail::check_names("load_base_state", left_out);
  for (const auto& [name, tensor] : own) {
    const auto other = state.find(name);
    if (other != state.end()) detail::check_shape("load_base_state", name, tensor, other->second);
  }
  detail::copy_values(own, state);
  return left_out;
}

}  // namespace lora_rite::nn
