#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/ordered_dict.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <system_error>
#include <utility>
#include <variant>
#include <vector>

#include "lora_rite/factor_pair.hpp"
#include "lora_rite/io/adapter_names.hpp"
#include "lora_rite/io/files.hpp"
#include "lora_rite/io/json.hpp"
#include "lora_rite/io/safetensors.hpp"

/// LoRA adapters in the format of the Python library PEFT: see docs/files.md. Needs nlohmann-json; POSIX and
/// little-endian machines only.
namespace lora_rite {

/// Which modules are meant: nothing said, one text (a regular expression, or "all-linear"), or a list of names, each of
/// which stands for every module whose name is that or ends in "." and that.
using ModuleNames = std::variant<std::monostate, std::string, std::vector<std::string>>;

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

/// A LoRA adapter: its description, and its tensors by PEFT's names without "base_model.model.":
/// "<module>.lora_A.weight" [r, in…] and "<module>.lora_B.weight" [out, r, …], for embeddings
/// "<module>.lora_embedding_A" and "<module>.lora_embedding_B", and whatever else was trained.
struct Adapter {
  AdapterConfig config;
  std::map<std::string, at::Tensor> tensors;
};

namespace detail {

inline constexpr uint64_t kMaxAdapterConfigBytes = uint64_t{16} << 20;
inline constexpr int kMaxAdapterConfigDepth = 16;

/// Takes the fields of a description one by one out of a JSON object. A field that is not there leaves the default, as
/// in PEFT, whose versions differ in what they write. Throws c10::Error with the label and the field's name if one is
/// of another type.
class FieldReader {
 public:
  FieldReader(std::string label, nlohmann::json& fields) : label_(std::move(label)), fields_(fields) {}

  void read(const char* name, bool& value) {
    take(name, [&](const nlohmann::json& found) {
      check(found.is_boolean(), name, found, "true or false");
      value = found.get<bool>();
    });
  }

  void read(const char* name, int64_t& value) {
    take(name, [&](const nlohmann::json& found) { value = whole_number(name, found, 1); });
  }

  void read(const char* name, double& value) {
    take(name, [&](const nlohmann::json& found) { value = number(name, found); });
  }

  void read(const char* name, std::string& value) {
    take(name, [&](const nlohmann::json& found) {
      check(found.is_string(), name, found, "a text");
      value = found.get<std::string>();
    });
  }

  void read(const char* name, std::optional<std::string>& value) {
    take(name, [&](const nlohmann::json& found) {
      if (found.is_null()) return;
      check(found.is_string(), name, found, "a text or null");
      value = found.get<std::string>();
    });
  }

  void read(const char* name, std::variant<bool, std::string>& value) {
    take(name, [&](const nlohmann::json& found) {
      check(found.is_boolean() || found.is_string(), name, found, "true, false or a text");
      if (found.is_boolean()) {
        value = found.get<bool>();
      } else {
        value = found.get<std::string>();
      }
    });
  }

  void read(const char* name, ModuleNames& value) {
    take(name, [&](const nlohmann::json& found) {
      if (found.is_null()) return;
      check(found.is_string() || found.is_array(), name, found, "a text, a list of texts or null");
      if (found.is_string()) {
        value = found.get<std::string>();
      } else {
        value = texts(name, found);
      }
    });
  }

  void read(const char* name, std::optional<std::vector<std::string>>& value) {
    take(name, [&](const nlohmann::json& found) {
      if (!found.is_null()) value = texts(name, found);
    });
  }

  void read(const char* name, std::vector<int64_t>& value) {
    take(name, [&](const nlohmann::json& found) {
      if (found.is_null()) return;
      if (!found.is_array()) {  // one number stands for a list of it
        value = {whole_number(name, found, 0)};
        return;
      }
      for (const auto& element : found) value.push_back(whole_number(name, element, 0));
    });
  }

  void read(const char* name, std::map<std::string, int64_t>& value) {
    take(name, [&](const nlohmann::json& found) {
      for_each_entry(name, found, [&](const std::string& key, const std::string& place, const nlohmann::json& entry) {
        value.emplace(key, whole_number(place, entry, 1));
      });
    });
  }

  void read(const char* name, std::map<std::string, double>& value) {
    take(name, [&](const nlohmann::json& found) {
      for_each_entry(name, found, [&](const std::string& key, const std::string& place, const nlohmann::json& entry) {
        value.emplace(key, number(place, entry));
      });
    });
  }

 private:
  template <class Use>
  void take(const char* name, Use use) {
    const auto field = fields_.find(name);
    if (field == fields_.end()) return;
    use(*field);
    fields_.erase(field);
  }

  void check(bool condition, const std::string& name, const nlohmann::json& found, const char* expected) const {
    TORCH_CHECK(condition, label_, name, " is ", in_quotes(found.dump()), ", expected ", expected);
  }

  int64_t whole_number(const std::string& name, const nlohmann::json& found, int64_t least) const {
    const bool fits = found.is_number_unsigned() && found.get<uint64_t>() <= INT64_MAX && found.get<int64_t>() >= least;
    check(fits, name, found, least == 0 ? "a whole number ≥ 0" : "a whole number ≥ 1");
    return found.get<int64_t>();
  }

  double number(const std::string& name, const nlohmann::json& found) const {
    check(found.is_number(), name, found, "a number");
    return found.get<double>();
  }

  std::vector<std::string> texts(const std::string& name, const nlohmann::json& found) const {
    check(found.is_array(), name, found, "a list of texts");
    std::vector<std::string> result;
    for (const auto& element : found) {
      check(element.is_string(), name + "[" + std::to_string(result.size()) + "]", element, "a text");
      result.push_back(element.get<std::string>());
    }
    return result;
  }

  template <class Use>
  void for_each_entry(const std::string& name, const nlohmann::json& found, Use use) const {
    if (found.is_null()) return;
    check(found.is_object(), name, found, "an object or null");
    for (const auto& [key, entry] : found.items()) use(key, name + "[" + in_quotes(key) + "]", entry);
  }

  std::string label_;
  nlohmann::json& fields_;
};

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

/// Numbers that are whole are written as such: PEFT's lora_alpha is one.
inline nlohmann::json to_field(double value) {
  constexpr double kMostExact = 9007199254740992;  // 2⁵³
  if (std::trunc(value) == value && std::abs(value) <= kMostExact) return static_cast<int64_t>(value);
  return value;
}
inline nlohmann::json to_field(const std::map<std::string, double>& values) {
  nlohmann::json result = nlohmann::json::object();
  for (const auto& [key, value] : values) result[key] = to_field(value);
  return result;
}
inline nlohmann::json to_field(const ModuleNames& names) {
  if (const auto* text = std::get_if<std::string>(&names)) return *text;
  if (const auto* list = std::get_if<std::vector<std::string>>(&names)) return *list;
  return nullptr;
}
inline nlohmann::json to_field(const std::variant<bool, std::string>& value) {
  if (const auto* text = std::get_if<std::string>(&value)) return *text;
  return std::get<bool>(value);
}
template <class Value>
nlohmann::json to_field(const std::optional<Value>& value) {
  return value ? nlohmann::json(*value) : nlohmann::json();
}
inline nlohmann::json to_field(const std::vector<int64_t>& layers) {
  return layers.empty() ? nlohmann::json() : nlohmann::json(layers);
}
template <class Value>
nlohmann::json to_field(const Value& value) {
  return value;
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

/// Throws c10::Error unless every lora_A has a lora_B (embeddings' likewise), with one rank, which the description
/// knows.
inline void check_factors(const std::string& label, const Adapter& adapter) {
  for (const auto& [own, other, is_a] : {std::tuple{"lora_A", "lora_B", true}, std::tuple{"lora_B", "lora_A", false},
                                         std::tuple{"lora_embedding_A", "lora_embedding_B", true},
                                         std::tuple{"lora_embedding_B", "lora_embedding_A", false}}) {
    for (const auto& [name, tensor] : adapter.tensors) {
      const size_t at = find_component(name, own);
      if (at == std::string::npos || (name.size() >= 5 && name.compare(name.size() - 5, 5, ".bias") == 0)) continue;
      std::string partner_name = name;
      partner_name.replace(at, std::strlen(own), other);
      const auto partner = adapter.tensors.find(partner_name);
      TORCH_CHECK(partner != adapter.tensors.end(), label, "tensor ", in_quotes(name), " has no partner, expected ",
                  in_quotes(partner_name));
      TORCH_CHECK(tensor.defined(), label, "tensor ", in_quotes(name), " is undefined");
      TORCH_CHECK(tensor.dim() >= 2 && tensor.numel() > 0, label, "tensor ", in_quotes(name), " is ", tensor.sizes(),
                  ", expected at least two dimensions, none of them 0");
      if (!is_a) continue;
      const at::Tensor& b = partner->second;
      TORCH_CHECK(b.defined() && b.dim() >= 2 && b.size(1) == tensor.size(0), label, "tensor ", in_quotes(name), " is ",
                  tensor.sizes(), ", its partner ", b.defined() ? b.sizes() : at::IntArrayRef(),
                  ", expected the rank in dimension 0 of one and 1 of the other");
      TORCH_CHECK(
          !possible_experts(adapter.config, tensor.size(0)).empty(), label, "tensor ", in_quotes(name), " has rank ",
          tensor.size(0), ", expected r = ", adapter.config.r, " or a rank of rank_pattern",
          has_target_parameters(adapter.config) ? ", or a multiple of them for the experts of a parameter" : "");
    }
  }
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

/// Reads an adapter from a folder with adapter_config.json (at most 16 MB) and adapter_model.safetensors. The tensors
/// are as SafetensorsFile::tensor gives them. Names as a model in memory has them are taken, too: with the adapter's
/// own (lora_A.default.weight) and with the modules of torch.compile and FSDP (_orig_mod); they are left out. Throws
/// c10::Error naming the file, the field or tensor, what was found and what was expected if a file is missing or
/// damaged (an adapter_model.bin is not read), describes no LoRA adapter, a tensor's name does not begin with
/// "base_model.model.", there are several adapters, or a factor lacks its partner or has a rank that the description
/// does not know.
inline Adapter load_adapter(const std::filesystem::path& folder) {
  const std::filesystem::path config_path = folder / "adapter_config.json";
  const std::string config_label = "adapter description " + config_path.string() + ": ";
  Adapter adapter;
  adapter.config =
      parse_adapter_config(detail::read_file(config_path, config_label, detail::kMaxAdapterConfigBytes), config_label);

  const std::filesystem::path path = folder / "adapter_model.safetensors";
  const std::string label = "adapter " + path.string() + ": ";
  const std::string prefix = detail::kPeftPrefix;
  std::error_code ignored;
  TORCH_CHECK(std::filesystem::exists(path, ignored) || !std::filesystem::exists(folder / "adapter_model.bin", ignored),
              label,
              "does not exist, but adapter_model.bin does, a pickle of Python, which is not read; let PEFT write "
              "the adapter again (PeftModel.from_pretrained(...).save_pretrained(folder))");
  std::set<std::string> adapters;
  for (auto& [full_name, tensor] : load_safetensors(path).tensors) {
    const std::string name = detail::name_in_file(full_name, adapters);
    TORCH_CHECK(detail::begins_with(name, prefix) && name.size() > prefix.size(), label, "tensor ",
                detail::in_quotes(full_name), " has a name that does not begin with '", prefix, "'");
    TORCH_CHECK(adapters.size() <= 1, label, "holds the adapters ", detail::in_quotes(*adapters.begin()), " and ",
                detail::in_quotes(*adapters.rbegin()), ", expected one");
    TORCH_CHECK(adapter.tensors.emplace(name.substr(prefix.size()), tensor).second, label, "tensor ",
                detail::in_quotes(full_name), " is there twice, as ", detail::in_quotes(name));
  }
  detail::check_factors(label, adapter);
  return adapter;
}

/// Writes an adapter so that PEFT and load_adapter read it: adapter_model.safetensors and then adapter_config.json in
/// `folder`, which is made. Each file is replaced whole, as save_safetensors does it. Throws c10::Error naming the file
/// and the field or tensor if the adapter is none that load_adapter would take, or the system refuses.
inline void save_adapter(const std::filesystem::path& folder, const Adapter& adapter) {
  const std::string label = "adapter " + folder.string() + ": ";
  const std::string description = adapter_config_text(adapter.config);
  detail::check_factors(label, adapter);
  std::map<std::string, at::Tensor> tensors;
  for (const auto& [name, tensor] : adapter.tensors) {
    TORCH_CHECK(!name.empty(), label, "a tensor has no name");
    tensors.emplace(detail::kPeftPrefix + name, tensor);
  }
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  TORCH_CHECK(!error, label, "the folder cannot be made: ", error.message());
  save_safetensors(folder / "adapter_model.safetensors", tensors, {{"format", "pt"}});
  const std::filesystem::path path = folder / "adapter_config.json";
  detail::replace_file(path, "adapter description " + path.string() + ": ", description);
}

/// The tensors of one adapter among a module's named parameters, by the names that PEFT's files have: those with a
/// component "lora_…". An adapter's name right behind that component is left out (layer.lora_A.default.weight →
/// layer.lora_A.weight, layer.lora_embedding_A.default → layer.lora_embedding_A), and parameters of adapters with
/// another name are passed over. Throws c10::Error if two parameters get one name.
inline std::map<std::string, at::Tensor> adapter_tensors(
    const torch::OrderedDict<std::string, at::Tensor>& named_parameters, const std::string& adapter_name = "default") {
  std::map<std::string, at::Tensor> result;
  for (const auto& item : named_parameters) {
    std::string name = item.key();
    const size_t component = detail::find_lora_component(name);
    if (component == std::string::npos) continue;
    // Behind "lora_A" stands nothing, ".weight", ".<adapter>" or ".<adapter>.weight".
    const size_t dot = name.find('.', component);
    std::string rest = dot == std::string::npos ? "" : name.substr(dot);
    if (rest == "." + adapter_name) {
      rest.clear();
    } else if (detail::begins_with(rest, "." + adapter_name + ".")) {
      rest.erase(0, adapter_name.size() + 1);
    } else if (!rest.empty() && rest != ".weight" && rest != ".bias") {
      continue;
    }
    name = name.substr(0, dot);
    // PEFT's files have DoRA's magnitudes without the module that holds them.
    if (name.compare(component, std::string::npos, "lora_magnitude_vector") != 0) name += rest;
    TORCH_CHECK(result.emplace(name, item.value()).second, "adapter_tensors: two parameters would be called ",
                detail::in_quotes(name));
  }
  return result;
}

/// How many experts the factors of a layer hold, "<layer>.lora_A.weight" (PEFT's nested layers end in ".base_layer"): 1
/// but for the parameters that target_parameters names. The file does not say it. It is the number that leaves a rank
/// of the description to each expert, in all factors of the same module, whose parameters have all experts in common.
/// Throws c10::Error if there is no such layer, or more than one such number: then it is for the caller to know, and
/// `expert_pairs(pair, experts)` to be told.
inline int64_t expert_count(const Adapter& adapter, const std::string& layer) {
  const std::string token = ".lora_A.weight";
  const auto own = adapter.tensors.find(layer + token);
  TORCH_CHECK(own != adapter.tensors.end(), "expert_count: the adapter has no tensor ",
              detail::in_quotes(layer + token));
  if (!detail::has_target_parameters(adapter.config)) return 1;
  if (const auto* names = std::get_if<std::vector<std::string>>(&adapter.config.target_modules)) {
    for (const std::string& name : *names)
      if (layer == name || detail::ends_with(layer, "." + name)) return 1;
  }
  const std::string module = detail::BaseParameters::without_base_layer(layer);
  std::set<int64_t> numbers = detail::possible_experts(adapter.config, own->second.size(0));
  for (const auto& [name, tensor] : adapter.tensors) {
    if (!detail::ends_with(name, token)) continue;
    if (detail::BaseParameters::without_base_layer(name.substr(0, name.size() - token.size())) != module) continue;
    const std::set<int64_t> others = detail::possible_experts(adapter.config, tensor.size(0));
    for (auto number = numbers.begin(); number != numbers.end();)
      number = others.count(*number) > 0 ? std::next(number) : numbers.erase(number);
  }
  TORCH_CHECK(numbers.size() == 1, "expert_count: ", detail::in_quotes(layer + token), " is ", own->second.sizes(),
              ", and the ranks of the description leave ", numbers.size(),
              " numbers of experts possible, expected one; call expert_pairs with the number");
  return *numbers.begin();
}

/// All pairs of an adapter, named as find_factor_pairs names them, in the order of their names, each expert's by itself
/// (`expert_pairs`, `expert_count`). They are the adapter's tensors or views of them. ΔW = scale · B A, where the scale
/// of experts is lora_alpha / r (√r with rslora) with the r of one expert. Throws c10::Error as the three do.
inline std::vector<FactorPair> expert_pairs(const Adapter& adapter) {
  torch::OrderedDict<std::string, at::Tensor> tensors;
  for (const auto& [name, tensor] : adapter.tensors) {
    // Those of a file may be views of it.
    tensors.insert(name, tensor.defined() && tensor.is_view() ? tensor.detach() : tensor);
  }
  std::vector<FactorPair> pairs;
  for (const FactorPair& pair : find_factor_pairs(tensors)) {
    const std::string ending = ".weight";
    const std::string layer = pair.name.substr(0, pair.name.size() - std::min(pair.name.size(), ending.size()));
    const bool is_linear = detail::ends_with(pair.name, ending) && adapter.tensors.count(layer + ".lora_A.weight") > 0;
    const int64_t experts = is_linear ? expert_count(adapter, layer) : 1;
    if (experts == 1) {
      pairs.push_back(pair);
    } else {
      for (auto& expert : expert_pairs(pair, experts)) pairs.push_back(std::move(expert));
    }
  }
  return pairs;
}

}  // namespace lora_rite
