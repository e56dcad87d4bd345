#pragma once

#include <c10/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <variant>
#include <vector>

#include "lora_rite/io/adapter_fields.hpp"
#include "lora_rite/io/json.hpp"

/// adapter_config.json, the description of a LoRA adapter in the format of the Python library PEFT: see docs/files.md.
/// Needs nlohmann-json.
namespace lora_rite {

/// What adapter_config.json says of a LoRA adapter. Names and defaults are PEFT's; patterns and module names are data
/// here, nothing is matched.
struct AdapterConfig {
  int64_t r = 8;                ///< the rank, ≥ 1
  double lora_alpha = 8;        ///< ΔW = lora_alpha / r · B A, or lora_alpha / √r with rslora
  double lora_dropout = 0;      ///< on the adapter's input, in training only, 0 to 1
  ModuleNames target_modules;   ///< the modules that have an adapter
  ModuleNames exclude_modules;  ///< those of them that have none
  std::optional<std::vector<std::string>> modules_to_save;   ///< modules trained and saved whole
  std::map<std::string, int64_t> rank_pattern;               ///< other ranks, by regular expression, ≥ 1
  std::map<std::string, double> alpha_pattern;               ///< other lora_alphas, by regular expression
  std::vector<int64_t> layers_to_transform;                  ///< only layers of these numbers, ≥ 0; all if empty
  ModuleNames layers_pattern;                                ///< what the list of layers is called
  bool use_rslora = false;                                   ///< scale by 1 / √r
  bool fan_in_fan_out = false;                               ///< the base's weights are [in, out]
  std::string bias = "none";                                 ///< biases that are trained: "none", "all" or "lora_only"
  std::variant<bool, std::string> init_lora_weights = true;  ///< how the factors started
  std::optional<std::string> task_type;                      ///< such as "CAUSAL_LM"
  std::optional<std::string> base_model_name_or_path;        ///< where a reader finds the base
  bool inference_mode = true;                                ///< loaded frozen
  /// All other fields, as they were read: written back untouched. A field of the list above has no effect here.
  nlohmann::json other = nlohmann::json::object();
};

namespace detail {

inline constexpr int kMaxAdapterConfigDepth = 16;

/// Calls visit(name, field) for every field of a description but `other`.
template <class Config, class Visit>
void for_each_field(Config& config, Visit visit) {
  visit("r", config.r);
  visit("lora_alpha", config.lora_alpha);
  visit("lora_dropout", config.lora_dropout);
  visit("target_modules", config.target_modules);
  visit("exclude_modules", config.exclude_modules);
  visit("modules_to_save", config.modules_to_save);
  visit("rank_pattern", config.rank_pattern);
  visit("alpha_pattern", config.alpha_pattern);
  visit("layers_to_transform", config.layers_to_transform);
  visit("layers_pattern", config.layers_pattern);
  visit("use_rslora", config.use_rslora);
  visit("fan_in_fan_out", config.fan_in_fan_out);
  visit("bias", config.bias);
  visit("init_lora_weights", config.init_lora_weights);
  visit("task_type", config.task_type);
  visit("base_model_name_or_path", config.base_model_name_or_path);
  visit("inference_mode", config.inference_mode);
}

/// Throws c10::Error with the label unless every number is in its range.
inline void check_config(const std::string& label, const AdapterConfig& config) {
  TORCH_CHECK(config.r >= 1, label, "r is ", config.r, ", expected ≥ 1");
  TORCH_CHECK(std::isfinite(config.lora_alpha), label, "lora_alpha is ", config.lora_alpha, ", expected a finite one");
  TORCH_CHECK(config.lora_dropout >= 0 && config.lora_dropout <= 1, label, "lora_dropout is ", config.lora_dropout,
              ", expected 0 to 1");
  TORCH_CHECK(config.bias == "none" || config.bias == "all" || config.bias == "lora_only", label, "bias is ",
              in_quotes(config.bias), ", expected 'none', 'all' or 'lora_only'");
  for (const auto& [pattern, rank] : config.rank_pattern) {
    TORCH_CHECK(rank >= 1, label, "rank_pattern[", in_quotes(pattern), "] is ", rank, ", expected ≥ 1");
  }
  for (const auto& [pattern, alpha] : config.alpha_pattern) {
    TORCH_CHECK(std::isfinite(alpha), label, "alpha_pattern[", in_quotes(pattern), "] is ", alpha,
                ", expected a finite one");
  }
  for (const int64_t layer : config.layers_to_transform) {
    TORCH_CHECK(layer >= 0, label, "layers_to_transform holds ", layer, ", expected ≥ 0");
  }
  TORCH_CHECK(config.other.is_object(), label, "the other fields are no JSON object");
}

/// A field of a description says nothing: null, false, an empty list or object.
inline bool is_off(const nlohmann::json& field) {
  return field.is_null() || field == false || (field.is_structured() && field.empty());
}

/// Whether a field among the others asks for something.
inline bool is_on(const AdapterConfig& config, const char* field) {
  const auto found = config.other.find(field);
  return found != config.other.end() && !is_off(*found);
}

/// The ranks that a description has for some module.
inline std::set<int64_t> ranks_of(const AdapterConfig& config) {
  std::set<int64_t> ranks = {config.r};
  for (const auto& [pattern, rank] : config.rank_pattern) ranks.insert(rank);
  return ranks;
}

/// Whether parameters have factors, which can hold many experts, and not modules alone.
inline bool has_target_parameters(const AdapterConfig& config) { return is_on(config, "target_parameters"); }

/// How many experts may share an A of so many rows: 1, or with target_parameters every number that leaves one of the
/// description's ranks to each. Empty: the description does not know the rank.
inline std::set<int64_t> possible_experts(const AdapterConfig& config, int64_t rows) {
  std::set<int64_t> numbers;
  for (const int64_t rank : ranks_of(config)) {
    if (rows == rank || (has_target_parameters(config) && rows % rank == 0)) numbers.insert(rows / rank);
  }
  return numbers;
}

}  // namespace detail

/// A description from the text of an adapter_config.json, which is not trusted: nested at most 16 deep, no key twice.
/// Fields that are not there are PEFT's defaults. Throws c10::Error beginning with `label` and naming the field, what
/// was found and what was expected if a field has another type or range, or peft_type is not "LORA".
inline AdapterConfig parse_adapter_config(const std::string& text, const std::string& label) {
  AdapterConfig config;
  config.other = detail::parse_json(text, label, detail::kMaxAdapterConfigDepth);
  TORCH_CHECK(config.other.is_object(), label, "is no JSON object");
  detail::FieldReader reader(label, config.other);
  std::string type;
  reader.read("peft_type", type);
  TORCH_CHECK(type == "LORA", label, "peft_type is ", detail::in_quotes(type), ", expected 'LORA'");
  detail::for_each_field(config, [&](const char* name, auto& value) { reader.read(name, value); });
  detail::check_config(label, config);
  return config;
}

/// The text of an adapter_config.json, as PEFT lays it out. Throws c10::Error if a number is out of its range or a text
/// no UTF-8.
inline std::string adapter_config_text(const AdapterConfig& config) {
  const std::string label = "AdapterConfig: ";
  detail::check_config(label, config);
  nlohmann::json fields = config.other;
  fields["peft_type"] = "LORA";
  detail::for_each_field(config, [&](const char* name, const auto& value) { fields[name] = detail::to_field(value); });
  fields["lora_dropout"] = config.lora_dropout;  // a fraction, 0.0 as well
  std::string text;
  try {
    text = fields.dump(2) + "\n";
  } catch (const nlohmann::json::exception&) {
    TORCH_CHECK(false, label, "a text is not valid UTF-8");
  }
  return text;
}

}  // namespace lora_rite
