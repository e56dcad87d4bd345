#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/ordered_dict.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <map>
#include <set>
#include <string>
#include <system_error>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "lora_rite/factor_pair.hpp"
#include "lora_rite/io/adapter_config.hpp"
#include "lora_rite/io/adapter_names.hpp"
#include "lora_rite/io/files.hpp"
#include "lora_rite/io/json.hpp"
#include "lora_rite/io/safetensors.hpp"

/// LoRA adapters in the format of the Python library PEFT, description and tensors: files, a module's parameters, pairs
/// of factors. See docs/files.md. Needs nlohmann-json; POSIX and little-endian machines only.
namespace lora_rite {

/// A LoRA adapter: its description, and its tensors by PEFT's names without "base_model.model.":
/// "<module>.lora_A.weight" [r, in…] and "<module>.lora_B.weight" [out, r, …], for embeddings
/// "<module>.lora_embedding_A" and "<module>.lora_embedding_B", and whatever else was trained.
struct Adapter {
  AdapterConfig config;                       ///< what adapter_config.json says
  std::map<std::string, at::Tensor> tensors;  ///< what adapter_model.safetensors holds
};

namespace detail {

inline constexpr uint64_t kMaxAdapterConfigBytes = uint64_t{16} << 20;

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
  detail::make_folders(folder, label + "the folder ");
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
