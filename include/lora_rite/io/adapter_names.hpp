#pragma once

#include <algorithm>
#include <cstddef>
#include <set>
#include <string>
#include <utility>
#include <vector>

/// What the names of an adapter's tensors say. Pure functions of names.
namespace lora_rite::detail {

inline constexpr const char* kPeftPrefix = "base_model.model.";

inline bool begins_with(const std::string& text, const std::string& beginning) {
  return text.compare(0, beginning.size(), beginning) == 0;
}

/// Where `part` stands in a dotted name as a whole component; npos if it does not.
inline size_t find_component(const std::string& name, const std::string& part) {
  for (size_t at = name.find(part); at != std::string::npos; at = name.find(part, at + 1)) {
    const size_t end = at + part.size();
    if ((at == 0 || name[at - 1] == '.') && (end == name.size() || name[end] == '.')) return at;
  }
  return std::string::npos;
}

/// Where the last component of a name stands that `is_meant`; npos if none is.
template <class IsMeant>
size_t find_last_component(const std::string& name, const IsMeant& is_meant) {
  size_t found = std::string::npos;
  for (size_t begin = 0; begin < name.size();) {
    const size_t end = std::min(name.find('.', begin), name.size());
    if (is_meant(name.substr(begin, end - begin))) found = begin;
    begin = end + 1;
  }
  return found;
}

/// Where the component of a parameter's name stands that says what PEFT calls it ("lora_A", "lora_magnitude_vector");
/// npos if there is none.
inline size_t find_known_component(const std::string& name) {
  static const std::set<std::string> known = {
      "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "lora_velora_embed"};
  return find_last_component(name, [](const std::string& component) { return known.count(component) > 0; });
}

/// Likewise, or of any other that begins so. Modules before it and the adapter behind it may have names that begin with
/// "lora_", too.
inline size_t find_lora_component(const std::string& name) {
  const size_t known = find_known_component(name);
  if (known != std::string::npos) return known;
  return find_last_component(name, [](const std::string& component) { return begins_with(component, "lora_"); });
}

/// A name as PEFT's files have it, of one that a model in memory has: without the modules that torch.compile, FSDP and
/// activation checkpointing put around others, and without the adapter's own name behind "lora_A" or
/// "modules_to_save", which goes into `adapters`.
inline std::string name_in_file(const std::string& name, std::set<std::string>& adapters) {
  std::vector<std::string> parts;
  for (size_t begin = 0; begin <= name.size();) {
    const size_t end = std::min(name.find('.', begin), name.size());
    const std::string part = name.substr(begin, end - begin);
    if (part != "_orig_mod" && part != "_fsdp_wrapped_module" && part != "_checkpoint_wrapped_module") {
      parts.push_back(part);
    }
    begin = end + 1;
  }
  const auto joined = [&] {
    std::string text;
    for (const auto& part : parts) text += (text.empty() ? "" : ".") + part;
    return text;
  };
  const auto take_name = [&](size_t at) {
    adapters.insert(parts[at]);
    parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(at));
  };
  const std::string plain = joined();
  const size_t component = find_known_component(plain);
  if (component != std::string::npos) {
    const size_t at =
        static_cast<size_t>(std::count(plain.begin(), plain.begin() + static_cast<std::ptrdiff_t>(component), '.'));
    const size_t behind = parts.size() - at - 1;
    const bool ends_in_parameter = parts.back() == "weight" || parts.back() == "bias";
    const bool is_module = parts[at] == "lora_A" || parts[at] == "lora_B";
    if (behind == 2 && ends_in_parameter) take_name(at + 1);
    if (behind == 1 && !ends_in_parameter) take_name(at + 1);
    // Files have DoRA's magnitudes without the module that holds them.
    if (!is_module && parts.size() == at + 2 && parts.back() == "weight") parts.pop_back();
  } else {
    for (size_t at = 1; at + 2 < parts.size(); ++at) {
      if (parts[at] != "modules_to_save") continue;
      take_name(at + 1);
      parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(at));
      break;
    }
  }
  return joined();
}

/// Whether a tensor was of use in training only: VeLoRA's projection of the inputs that are kept for the backward pass.
inline bool is_of_training_only(const std::string& name) {
  return find_component(name, "lora_velora_embed") != std::string::npos;
}

}  // namespace lora_rite::detail
