#pragma once

#include <c10/util/Exception.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/types.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <typeinfo>
#include <utility>
#include <vector>

#include "lora_rite/nn/adapters.hpp"
#include "lora_rite/nn/lora_config.hpp"
#include "lora_rite/nn/lora_conv2d.hpp"
#include "lora_rite/nn/lora_embedding.hpp"
#include "lora_rite/nn/lora_layer.hpp"
#include "lora_rite/nn/lora_linear.hpp"
#include "lora_rite/nn/module_names.hpp"

/// Giving adapters to the layers of a model that a LoraConfig names.
///
/// Python replaces a child of any module, because `self.fc(x)` looks the child up when it is called. C++ cannot: a
/// module of LibTorch holds `torch::nn::Linear fc` and calls through that member, which a replaced child in the list of
/// children does not change; nor is `LinearImpl::forward` virtual. A replacement would be registered, trained, saved,
/// and never called. Therefore
/// - models declare LoraLinear, LoraEmbedding and LoraConv2d where adapters may go. Without an adapter they are the
///   plain layers, under the same names, and inject_lora adds adapters to them in place;
/// - plain layers inside a torch::nn::Sequential, which calls what it has registered, are replaced;
/// - any other plain layer that the config names is an error that says which declaration to change.
namespace lora_rite::nn {

/// One layer that inject_lora gave an adapter.
struct InjectedLayer {
  std::string name;  ///< in the model
  int64_t rank;      ///< the config's, or a pattern's
  double alpha;      ///< likewise
  bool replaced;     ///< a plain layer was put into a LoRA layer; else it was one already
};

namespace detail {

/// A module as it is met on the way through a model, and all the places where it is registered.
struct Place {
  torch::nn::Module* parent;
  std::string key;
};
struct Found {
  std::string name;  ///< the first
  torch::nn::Module* module;
  std::vector<Place> places;
};

/// Every module below `parent` once, in the order of registration, and nothing inside of LoRA layers.
inline void find_modules(torch::nn::Module& parent, const std::string& prefix, std::vector<Found>& found,
                         std::map<const void*, size_t>& index) {
  for (const auto& child : parent.named_children()) {
    torch::nn::Module* module = child.value().get();
    const auto [at, is_new] = index.emplace(module, found.size());
    if (is_new) found.push_back({joined(prefix, child.key()), module, {}});
    const std::string name = found[at->second].name;
    found[at->second].places.push_back({&parent, child.key()});
    if (is_new && dynamic_cast<LoraLayer*>(module) == nullptr) find_modules(*module, name, found, index);
  }
}

/// A LoRA layer over a plain one, as a child and as what a Sequential calls.
struct Replacement {
  LoraLayer* layer;
  std::shared_ptr<torch::nn::Module> module;
  torch::nn::AnyModule any;
};

template <class Layer, class Base>
Replacement replacement_over(torch::nn::Module& plain) {
  auto base = std::dynamic_pointer_cast<typename Base::ContainedType>(plain.shared_from_this());
  auto layer = std::make_shared<typename Layer::ContainedType>(Base(std::move(base)));
  return {layer.get(), layer, torch::nn::AnyModule(layer)};
}

using MakeReplacement = Replacement (*)(torch::nn::Module&);

/// A kind of layer of LibTorch that can be replaced.
struct PlainLayer {
  const std::type_info& type;
  const char* plain;  ///< "torch::nn::Linear"
  const char* lora;   ///< "lora_rite::nn::LoraLinear"
  MakeReplacement replace;
};

/// The kind of a plain layer, nullptr if it is none: a class derived from one may compute something else.
inline const PlainLayer* plain_layer(const torch::nn::Module& module) {
  static const PlainLayer kinds[] = {
      {typeid(torch::nn::LinearImpl), "torch::nn::Linear", "lora_rite::nn::LoraLinear",
       &replacement_over<LoraLinear, torch::nn::Linear>},
      {typeid(torch::nn::EmbeddingImpl), "torch::nn::Embedding", "lora_rite::nn::LoraEmbedding",
       &replacement_over<LoraEmbedding, torch::nn::Embedding>},
      {typeid(torch::nn::Conv2dImpl), "torch::nn::Conv2d", "lora_rite::nn::LoraConv2d",
       &replacement_over<LoraConv2d, torch::nn::Conv2d>}};
  for (const auto& kind : kinds) {
    if (typeid(module) == kind.type) return &kind;
  }
  return nullptr;
}

/// Throws c10::Error unless every call of the plain layer goes through a Sequential that has registered it.
inline void check_replaceable(const std::string& function, const Found& found, const PlainLayer& kind) {
  for (const auto& [parent, key] : found.places) {
    TORCH_CHECK(dynamic_cast<torch::nn::SequentialImpl*>(parent) != nullptr, function, ": '", found.name, "' is a ",
                kind.plain, ", which its owner (", parent->name(),
                ") calls through a member of its own: a LoRA layer in ",
                "its place would never be called. Declare the member as ", kind.lora,
                " (same arguments, same parameter names), put the layer into a torch::nn::Sequential, or leave it out ",
                "(exclude_modules)");
  }
  // Each place has two owners: the list of children, and what the Sequential calls.
  const auto holders = found.module->weak_from_this().use_count() - 2 * static_cast<long>(found.places.size());
  TORCH_CHECK(holders <= 0, function, ": '", found.name, "' is a ", kind.plain, " that is held elsewhere than in its ",
              "torch::nn::Sequential, too (", holders, " more holders): calls from there would pass the adapter by. ",
              "Declare it as ", kind.lora, ", or let go of the others (`layer = nullptr`) before");
}

/// Puts the replacement where the plain layer was.
inline void replace(const Found& found, const Replacement& replacement) {
  for (const auto& [parent, key] : found.places) {
    auto& sequential = dynamic_cast<torch::nn::SequentialImpl&>(*parent);
    for (auto& element : sequential) {
      if (element.ptr().get() == found.module) element = replacement.any;
    }
    sequential.replace_module(key, replacement.module);
  }
}

/// Some names of what could have been a target, for a message.
inline std::string some_candidates(const std::vector<Found>& found) {
  std::vector<std::string> names;
  for (const auto& module : found) {
    const bool fits = dynamic_cast<LoraLayer*>(module.module) != nullptr || plain_layer(*module.module) != nullptr;
    if (fits && names.size() < 8) names.push_back(module.name);
  }
  return names.empty() ? "no linear layer, embedding or 2d convolution" : quoted_list(names) + ", …";
}

/// The modules that a config means.
inline std::vector<Found> find_targets(const std::vector<Found>& found, const LoraConfig& config) {
  const bool all_linear = is_all_linear(config.target_modules);
  const ModuleMatcher matcher(config);
  std::vector<Found> targets;
  for (const auto& module : found) {
    if (matcher.excludes(module.name)) continue;
    const bool is_linear = dynamic_cast<LoraLinearImpl*>(module.module) != nullptr ||
                           dynamic_cast<torch::nn::LinearImpl*>(module.module) != nullptr;
    const bool is_target =
        all_linear ? is_linear && !is_or_ends_in_any(module.name, config.output_heads) : matcher.targets(module.name);
    if (is_target) targets.push_back(module);
  }
  return targets;
}

/// requires_grad of everything but adapters' factors: of what `bias` says, and nothing else.
inline void freeze_base(torch::nn::Module& model, LoraBias bias, const std::set<const void*>& adapted) {
  std::set<const void*> seen;
  visit_modules(model, "", seen, [&](const std::string&, torch::nn::Module& module) {
    const auto* layer = dynamic_cast<LoraLayer*>(&module);
    const auto& parameters = ParameterAccess::of(layer != nullptr ? layer->base_module() : module);
    for (const auto& parameter : parameters) {
      if (!parameter.value().defined()) continue;
      const bool trained = parameter.key() == "bias" &&
                           (bias == LoraBias::All || (bias == LoraBias::LoraOnly && adapted.count(layer) > 0));
      torch::Tensor(parameter.value()).set_requires_grad(trained);
    }
  });
}

/// What is to be done to one layer.
struct InjectionStep {
  Found target;
  LoraLayer* layer;     ///< the target, or the layer that replaces it
  LoraConfig config;    ///< with the rank and the alpha of this layer
  LoraAdapter adapter;  ///< to be prepared
  Replacement replacement;
};

/// What is to be done to a model.
struct Injection {
  std::vector<InjectionStep> steps;
  bool is_first;   ///< the model has no adapter yet
  bool is_active;  ///< layers get the adapter as an active one
};

/// Every check of inject_lora but those of LoraLayer::prepare_adapter, which is to be called for each step. Changes
/// nothing. `function` begins the errors.
inline Injection plan_injection(const std::string& function, torch::nn::Module& model, const LoraConfig& config,
                                const std::string& adapter) {
  check_lora_config("LoraConfig: ", config);
  std::vector<Found> found;
  std::map<const void*, size_t> index;
  find_modules(model, "", found, index);
  const std::vector<Found> targets = find_targets(found, config);
  TORCH_CHECK(!targets.empty(), function, ": target_modules (less exclude_modules) names no module of the model, ",
              "which has ", some_candidates(found));

  std::vector<std::string> active;
  Injection injection{{}, true, false};
  for (const auto& [name, layer] : lora_layers(model)) {
    for (const auto& other : layer->adapter_names()) {
      injection.is_first = false;
      TORCH_CHECK(config.bias == LoraBias::None && layer->adapter(other).config.bias == LoraBias::None, function,
                  ": the model has the adapter '", other,
                  "'; with several adapters bias must be LoraBias::None for all of them");
    }
    active.insert(active.end(), layer->active().begin(), layer->active().end());
  }
  injection.is_active = injection.is_first || std::find(active.begin(), active.end(), adapter) != active.end();
  if (injection.is_first) {
    for (const auto& parameter : model.named_parameters()) {
      TORCH_CHECK(parameter.value().is_leaf(), function, ": '", parameter.key(),
                  "' is the result of an operation, expected a leaf tensor, which can be frozen");
    }
  }

  for (const auto& target : targets) {
    const auto* kind = plain_layer(*target.module);
    if (kind != nullptr) check_replaceable(function, target, *kind);
  }
  for (const auto& target : targets) {
    InjectionStep step{target, dynamic_cast<LoraLayer*>(target.module), config, {}, {}};
    if (step.layer == nullptr) {
      const auto* kind = plain_layer(*target.module);
      TORCH_CHECK(kind != nullptr, function, ": '", target.name, "' is a ", target.module->name(),
                  ", expected a linear layer, an embedding or a 2d convolution");
      step.replacement = kind->replace(*target.module);
      step.layer = step.replacement.layer;
    }
    step.config.rank = pattern_value("rank_pattern", config.rank_pattern, target.name, config.rank);
    step.config.alpha = pattern_value("alpha_pattern", config.alpha_pattern, target.name, config.alpha);
    injection.steps.push_back(std::move(step));
  }
  return injection;
}

/// Changes the model: nothing here fails but for want of memory.
inline std::vector<InjectedLayer> carry_out(Injection injection, torch::nn::Module& model, const LoraConfig& config,
                                            const std::string& adapter) {
  std::vector<InjectedLayer> injected;
  std::set<const void*> adapted;
  for (auto& step : injection.steps) {
    injected.push_back({step.target.name, step.config.rank, step.config.alpha, step.replacement.module != nullptr});
    adapted.insert(step.layer);
    step.layer->attach_adapter(adapter, std::move(step.adapter));
    if (step.replacement.module != nullptr) replace(step.target, step.replacement);
    if (injection.is_active) {
      step.layer->add_active(adapter);
    } else if (step.layer->active() == std::vector<std::string>{adapter}) {
      step.layer->set_active({});
    }
  }
  if (injection.is_first) freeze_base(model, config.bias, adapted);
  return injected;
}

}  // namespace detail

/// Gives every module of `model` that the config names an adapter, by PEFT's rules: names of modules are full
/// ("encoder.0.query"), an element of a list stands for what is called so or ends in "." and that, a text is a regular
/// expression for the whole name, "all-linear" means every linear layer but the output heads; exclude_modules come
/// first. LoRA layers get it in place, plain layers in a torch::nn::Sequential are replaced (they must be held nowhere
/// else).
///
/// With the first adapter everything but the factors is frozen, as far as `config.bias` does not say otherwise. Later
/// adapters change no parameter that was there, and become active by set_active_adapters, as in PEFT. Parameters keep
/// their tensors, so an optimizer over factors is best made after this.
///
/// Returns the layers in the order of their registration. Throws c10::Error, and nothing has changed, if a field is out
/// of its range or no regular expression, if nothing is named, if what is named can have no adapter or has one of this
/// name, if a plain layer is called in another way than through a Sequential (the message says what to declare), or if
/// biases are to be trained and there is another adapter.
inline std::vector<InjectedLayer> inject_lora(torch::nn::Module& model, const LoraConfig& config,
                                              const std::string& adapter = "default") {
  detail::Injection injection = detail::plan_injection("inject_lora", model, config, adapter);
  for (auto& step : injection.steps) {
    step.adapter = step.layer->prepare_adapter("inject_lora: '" + step.target.name + "': ", adapter, step.config);
  }
  return detail::carry_out(std::move(injection), model, config, adapter);
}

}  // namespace lora_rite::nn
