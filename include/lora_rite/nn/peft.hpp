#pragma once

#include <ATen/ops/cat.h>
#include <c10/util/Exception.h>
#include <torch/nn/module.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "lora_rite/io/peft.hpp"
#include "lora_rite/nn/adapter_state.hpp"
#include "lora_rite/nn/adapters.hpp"
#include "lora_rite/nn/inject.hpp"
#include "lora_rite/nn/lora_config.hpp"
#include "lora_rite/nn/lora_layer.hpp"
#include "lora_rite/nn/unsupported_fields.hpp"

/// From the layers of a model to PEFT's files (io/peft.hpp) and back: docs/layers.md. Not in nn/nn.hpp, since it needs
/// nlohmann-json.
namespace lora_rite::nn {

namespace detail {

/// Throws c10::Error naming a field that asks for what the layers cannot do.
inline void check_supported(const AdapterConfig& config) {
  const auto refuse = [](const std::string& field, const std::string& found, const char* expected, const char* why) {
    TORCH_CHECK(false, "AdapterConfig: ", field, " is ", lora_rite::detail::in_quotes(found), ", expected ", expected,
                ": ", why);
  };
  if (config.fan_in_fan_out) {
    refuse("fan_in_fan_out", "true", "false", "the weights of these layers are [out, in]");
  }
  if (config.modules_to_save && !config.modules_to_save->empty()) {
    refuse("modules_to_save", nlohmann::json(*config.modules_to_save).dump(), "none",
           "modules are trained whole by setting requires_grad, and saved apart");
  }
  for (const auto& [field, why] : unsupported_fields(config)) refuse(field, config.other.at(field).dump(), "none", why);
}

/// init_lora_weights as these layers know it; nothing if they do not.
inline std::optional<LoraInit> known_init(const std::variant<bool, std::string>& init) {
  if (const auto* flag = std::get_if<bool>(&init)) return *flag ? LoraInit::Kaiming : LoraInit::Random;
  const auto& text = std::get<std::string>(init);
  if (text == "gaussian") return LoraInit::Gaussian;
  if (text == "orthogonal") return LoraInit::Orthogonal;
  if (text == "pissa") return LoraInit::Pissa;
  return std::nullopt;
}

inline std::variant<bool, std::string> init_field(LoraInit init) {
  switch (init) {
    case LoraInit::Kaiming:
      return true;
    case LoraInit::Gaussian:
      return std::string("gaussian");
    case LoraInit::Orthogonal:
      return std::string("orthogonal");
    case LoraInit::Pissa:
      return std::string("pissa");
    case LoraInit::Random:
      break;
  }
  return false;
}

inline const char* bias_field(LoraBias bias) {
  return bias == LoraBias::None ? "none" : bias == LoraBias::All ? "all" : "lora_only";
}

/// A regular expression for one module, by its full name.
inline std::string pattern_of(const std::string& name) {
  std::string pattern = "^";
  for (const char character : name) {
    if (std::string(R"(.^$*+?()[]{}|\)").find(character) != std::string::npos) pattern += '\\';
    pattern += character;
  }
  return pattern;
}

/// One layer of an adapter as its file has it.
struct DescribedLayer {
  std::string name;
  int64_t rank;
  double alpha;
};

/// Whether a config's patterns give every layer its rank and its alpha, in the order in which files have patterns.
inline bool gives_ranks(const AdapterConfig& config, const std::vector<DescribedLayer>& layers) {
  const std::vector<std::pair<std::string, int64_t>> ranks(config.rank_pattern.begin(), config.rank_pattern.end());
  const std::vector<std::pair<std::string, double>> alphas(config.alpha_pattern.begin(), config.alpha_pattern.end());
  return std::all_of(layers.begin(), layers.end(), [&](const auto& layer) {
    return pattern_value("rank_pattern", ranks, layer.name, config.r) == layer.rank &&
           pattern_value("alpha_pattern", alphas, layer.name, config.lora_alpha) == layer.alpha;
  });
}

/// Sets r, lora_alpha and the patterns; those that are there remain if they do.
inline void describe_ranks(AdapterConfig& config, const std::vector<DescribedLayer>& layers) {
  // A layer's own config has the layer's rank in place of the one that is for all others.
  for (const auto& layer : layers) {
    config.r = layer.rank;
    const std::vector<std::pair<std::string, int64_t>> ranks(config.rank_pattern.begin(), config.rank_pattern.end());
    if (pattern_value("rank_pattern", ranks, layer.name, int64_t{0}) == 0) break;
  }
  for (const auto& layer : layers) {
    config.lora_alpha = layer.alpha;
    const std::vector<std::pair<std::string, double>> alphas(config.alpha_pattern.begin(), config.alpha_pattern.end());
    if (std::isnan(pattern_value<double>("alpha_pattern", alphas, layer.name, NAN))) break;
  }
  if (gives_ranks(config, layers)) return;
  config.r = layers.front().rank;
  config.lora_alpha = layers.front().alpha;
  config.rank_pattern.clear();
  config.alpha_pattern.clear();
  for (const auto& layer : layers) {
    if (layer.rank != config.r) config.rank_pattern.emplace(pattern_of(layer.name), layer.rank);
    if (layer.alpha != config.lora_alpha) config.alpha_pattern.emplace(pattern_of(layer.name), layer.alpha);
  }
}

/// Sets the names of modules so that they mean these layers of the model and no others: as `own` says it, else by the
/// names' last components, else by the full names, else by a regular expression of them.
inline void describe_targets(AdapterConfig& config, torch::nn::Module& model, const LoraConfig& own,
                             const std::vector<DescribedLayer>& layers) {
  std::vector<Found> found;
  std::map<const void*, size_t> index;
  find_modules(model, "", found, index);
  const auto means_these = [&](const LoraConfig& other) {
    const std::vector<Found> targets = find_targets(found, other);
    return std::equal(targets.begin(), targets.end(), layers.begin(), layers.end(),
                      [](const Found& target, const DescribedLayer& layer) { return target.name == layer.name; });
  };
  // "all-linear" would mean other layers to Python, which knows the output heads.
  if (!is_all_linear(own.target_modules) && means_these(own)) return;
  std::set<std::string> endings, names;
  for (const auto& layer : layers) {
    endings.insert(layer.name.substr(layer.name.rfind('.') + 1));  // npos + 1 is 0
    names.insert(layer.name);
  }
  LoraConfig by_ending;
  by_ending.target_modules = std::vector<std::string>(endings.begin(), endings.end());
  LoraConfig by_name;
  by_name.target_modules = std::vector<std::string>(names.begin(), names.end());
  if (means_these(by_ending)) {
    config.target_modules = by_ending.target_modules;
  } else if (means_these(by_name)) {
    config.target_modules = by_name.target_modules;
  } else {  // a full name is another's ending
    std::string pattern;
    for (const std::string& name : names) pattern += (pattern.empty() ? "" : "|") + pattern_of(name).substr(1);
    config.target_modules = pattern;
  }
  config.exclude_modules = {};
  config.layers_to_transform.clear();
  config.layers_pattern = {};
}

/// Throws c10::Error naming a field in which the layers of one adapter differ and a file has one value for all.
inline void check_alike(const std::string& name, const LoraConfig& config, const std::string& first_name,
                        const LoraConfig& first) {
  const auto check = [&](const char* field, const auto& found, const auto& expected) {
    TORCH_CHECK(found == expected, "peft_adapter: ", field, " is ", found, " for '", name, "', but ", expected,
                " for '", first_name, "', expected one value for all layers of an adapter");
  };
  check("dropout", config.dropout, first.dropout);
  check("use_rslora", config.use_rslora, first.use_rslora);
  check("bias", std::string(bias_field(config.bias)), std::string(bias_field(first.bias)));
}

}  // namespace detail

/// Whether factors that started as init_lora_weights says ("pissa", "olora", …) had their start taken out of the base
/// weight.
inline bool changes_base(const AdapterConfig& description) {
  static const std::set<std::string> harmless = {"gaussian", "orthogonal", "eva", "mica"};
  const auto* init = std::get_if<std::string>(&description.init_lora_weights);
  return init != nullptr && harmless.count(*init) == 0;
}

/// Throws c10::Error, beginning with `label`, if an adapter fits no ordinary base because its start changed the base it
/// was trained on (changes_base).
inline void check_fits_ordinary_base(const std::string& label, const AdapterConfig& description) {
  TORCH_CHECK(!changes_base(description), label, "init_lora_weights is ",
              lora_rite::detail::in_quotes(std::get<std::string>(description.init_lora_weights)),
              ", expected true, false, 'gaussian', 'orthogonal', 'eva' or 'mica': the others change the base weight, ",
              "and such factors fit no other one; let PEFT write the adapter with ",
              "path_initial_model_for_weight_conversion");
}

/// A sentence for every pattern of rank_pattern and alpha_pattern that means none of the modules, of which PEFT warns.
inline std::vector<std::string> idle_patterns(const AdapterConfig& description,
                                              const std::vector<std::string>& modules) {
  std::vector<std::string> sentences;
  const auto add = [&](const char* field, const auto& patterns) {
    for (const std::string& pattern : detail::idle_patterns(field, patterns, modules)) {
      sentences.push_back(std::string(field) + "['" + pattern + "'] means none of the layers with an adapter");
    }
  };
  add("rank_pattern", description.rank_pattern);
  add("alpha_pattern", description.alpha_pattern);
  return sentences;
}

/// What inject_lora needs of a description from a file. PEFT's patterns stand in the order of their texts; factor_dtype
/// and output_heads are the defaults. Throws c10::Error naming the field, what it is and what was expected if the
/// layers cannot do what it asks (fan_in_fan_out, modules_to_save, DoRA and others of PEFT's kinds), init_lora_weights
/// is none of LoraInit, or a field is out of its range.
inline LoraConfig lora_config(const AdapterConfig& description) {
  const std::string label = "AdapterConfig: ";
  lora_rite::detail::check_config(label, description);
  detail::check_supported(description);
  const std::optional<LoraInit> init = detail::known_init(description.init_lora_weights);
  TORCH_CHECK(init, label, "init_lora_weights is ",
              lora_rite::detail::in_quotes(lora_rite::detail::to_field(description.init_lora_weights).dump()),
              ", expected true, false, 'gaussian', 'orthogonal' or 'pissa'");
  LoraConfig config;
  config.rank = description.r;
  config.alpha = description.lora_alpha;
  config.dropout = description.lora_dropout;
  config.use_rslora = description.use_rslora;
  config.init = *init;
  config.bias = description.bias == "none"  ? LoraBias::None
                : description.bias == "all" ? LoraBias::All
                                            : LoraBias::LoraOnly;
  config.target_modules = description.target_modules;
  config.exclude_modules = description.exclude_modules;
  config.rank_pattern.assign(description.rank_pattern.begin(), description.rank_pattern.end());
  config.alpha_pattern.assign(description.alpha_pattern.begin(), description.alpha_pattern.end());
  config.layers_to_transform = description.layers_to_transform;
  if (const auto* text = std::get_if<std::string>(&description.layers_pattern); text != nullptr && !text->empty()) {
    config.layers_pattern = {*text};
  }
  if (const auto* list = std::get_if<std::vector<std::string>>(&description.layers_pattern)) {
    config.layers_pattern = *list;
  }
  check_lora_config(label, config);
  return config;
}

/// A description with what a config says. What a file cannot say is left out: factor_dtype, output_heads, and the order
/// of patterns, which PEFT sorts by their texts (of one text the first counts). Throws c10::Error naming a field that
/// is out of its range.
inline AdapterConfig adapter_config(const LoraConfig& config) {
  check_lora_config("LoraConfig: ", config);
  AdapterConfig description;
  description.r = config.rank;
  description.lora_alpha = config.alpha;
  description.lora_dropout = config.dropout;
  description.use_rslora = config.use_rslora;
  description.init_lora_weights = detail::init_field(config.init);
  description.bias = detail::bias_field(config.bias);
  description.target_modules = config.target_modules;
  description.exclude_modules = config.exclude_modules;
  description.rank_pattern.insert(config.rank_pattern.begin(), config.rank_pattern.end());
  description.alpha_pattern.insert(config.alpha_pattern.begin(), config.alpha_pattern.end());
  description.layers_to_transform = config.layers_to_transform;
  if (!config.layers_pattern.empty()) description.layers_pattern = config.layers_pattern;
  return description;
}

/// An adapter of the model as save_adapter writes it and PEFT reads it. The tensors are the model's own, and biases
/// that are trained with it are there. The description means exactly the layers that have the adapter, with their ranks
/// and alphas: as the config that they got says it, unless that means others (layers that got adapters one by one,
/// patterns that depend on their order, "all-linear"); then by names.
///
/// An adapter that started by LoraInit::Pissa is written as its difference to the start, which fits the ordinary base
/// weight: A [2r, in], B [out, 2r], alpha such that the scale remains, as PEFT converts it
/// (path_initial_model_for_weight_conversion).
///
/// `origin` tells what layers do not know: task_type, base_model_name_or_path, inference_mode and `other` are taken
/// from it, nothing else; that of the file an adapter came from keeps these fields.
///
/// Throws c10::Error if no layer has the adapter, the model is itself the layer, layers differ in dropout, use_rslora
/// or bias, or `origin` asks for what the layers cannot do (as in lora_config).
inline Adapter peft_adapter(const torch::nn::Module& model, const std::string& adapter = "default",
                            const AdapterConfig& origin = {}) {
  detail::check_supported(origin);
  Adapter result;
  result.tensors = adapter_state(model, adapter);
  torch::NoGradGuard no_grad;
  const LoraConfig* first = nullptr;
  bool differences_only = true;
  std::vector<detail::DescribedLayer> layers;
  for (const auto& [name, layer] : lora_layers(model)) {
    if (!layer->has_adapter(adapter)) continue;
    TORCH_CHECK(!name.empty(), "peft_adapter: the model is itself a LoRA layer, expected one that has it in a module");
    const LoraAdapter& own = layer->adapter(adapter);
    if (first == nullptr) first = &own.config;
    detail::check_alike(name, own.config, layers.empty() ? name : layers.front().name, *first);
    layers.push_back({name, own.config.rank, own.config.alpha});
    differences_only = differences_only && own.initial_a.defined();
    if (!own.initial_a.defined()) continue;
    // ΔW = s (B A − B₀ A₀) = s [B, −B₀] [A; A₀]
    const auto [name_a, name_b] = detail::factor_names(name, *layer);
    result.tensors[name_a] = at::cat({own.a, own.initial_a.to(own.a.device(), own.a.scalar_type())}, 0);
    result.tensors[name_b] = at::cat({own.b, own.initial_b.to(own.b.device(), own.b.scalar_type()).neg()}, 1);
    layers.back().rank *= 2;
    layers.back().alpha *= own.config.use_rslora ? std::sqrt(2.0) : 2;
  }
  result.config = adapter_config(*first);
  if (differences_only) {
    for (auto& [pattern, rank] : result.config.rank_pattern) rank *= 2;
    for (auto& [pattern, alpha] : result.config.alpha_pattern) alpha *= first->use_rslora ? std::sqrt(2.0) : 2;
  }
  if (first->init == LoraInit::Pissa) result.config.init_lora_weights = true;
  detail::describe_targets(result.config, const_cast<torch::nn::Module&>(model), *first, layers);
  detail::describe_ranks(result.config, layers);
  result.config.task_type = origin.task_type;
  result.config.base_model_name_or_path = origin.base_model_name_or_path;
  result.config.inference_mode = origin.inference_mode;
  result.config.other = origin.other;
  return result;
}

/// inject_lora by an adapter's description, with its tensors for values, cast to the layers' dtypes and copied. Base
/// weights that PEFT wrote beside the factors (of embeddings and output heads) go into the model; what was of use in
/// training only (VeLoRA's) is left out. Draws no random numbers. Warns (TORCH_WARN) of rank_pattern and alpha_pattern
/// that mean none of the layers. Throws c10::Error, and nothing has changed, for what inject_lora and lora_config do,
/// for an adapter whose init_lora_weights has changed the base weight ("pissa", "olora", …: it fits no ordinary base;
/// let PEFT write it with path_initial_model_for_weight_conversion), and if a tensor is missing, unexpected or of
/// another shape.
inline std::vector<InjectedLayer> inject_adapter(torch::nn::Module& model, const Adapter& adapter,
                                                 const std::string& name = "default") {
  AdapterConfig description = adapter.config;
  check_fits_ordinary_base("AdapterConfig: ", description);
  if (!detail::known_init(description.init_lora_weights)) description.init_lora_weights = true;
  const LoraConfig config = lora_config(description);
  detail::Injection injection = detail::plan_injection("inject_adapter", model, config, name);

  NamedTensors tensors;
  for (const auto& item : adapter.tensors) {
    if (!lora_rite::detail::is_of_training_only(item.first)) tensors.insert(item);
  }
  std::set<std::string> adapted;
  NamedTensors own;  // factors undefined: they are not there yet
  std::vector<std::string> names;
  for (const auto& step : injection.steps) {
    const auto [name_a, name_b] = detail::factor_names(step.target.name, *step.layer);
    own.emplace(name_a, torch::Tensor());
    own.emplace(name_b, torch::Tensor());
    adapted.insert(detail::joined(step.target.name, "bias"));
    names.push_back(step.target.name);
  }
  NamedTensors others = detail::bias_state(model, config.bias, adapted);
  for (const auto& step : injection.steps) {
    // PEFT adds the weights under embeddings and output heads (save_embedding_layers), and takes them over.
    const std::string name = detail::joined(step.target.name, "base_layer.weight");
    if (tensors.count(name) > 0) {
      others.emplace(name, step.layer->base_module().named_parameters(/*recurse=*/false)["weight"]);
    }
  }
  own.insert(others.begin(), others.end());
  detail::check_names("inject_adapter", detail::left_out(own, tensors));
  for (const auto& [other, tensor] : others) detail::check_shape("inject_adapter", other, tensor, tensors.at(other));
  for (auto& step : injection.steps) {
    const auto [name_a, name_b] = detail::factor_names(step.target.name, *step.layer);
    step.adapter = step.layer->prepare_adapter("inject_adapter: '" + step.target.name + "': ", name, step.config,
                                               FactorValues{tensors.at(name_a), tensors.at(name_b)});
  }
  for (const std::string& idle : idle_patterns(description, names)) TORCH_WARN("inject_adapter: ", idle);
  auto injected = detail::carry_out(std::move(injection), model, config, name);
  detail::copy_values(others, tensors);
  return injected;
}

}  // namespace lora_rite::nn
