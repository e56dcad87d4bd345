#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <optional>
#include <string>
#include <utility>
#include <vector>

/// What libraries call the parameters of LoRA layers: docs/names.md.
namespace lora_rite::detail {

/// Names of the two factors.
inline constexpr std::array<std::pair<const char*, const char*>, 9> kFactorNames = {{
    {"lora_A", "lora_B"},                                // PEFT, loralib: linear layers and convolutions
    {"lora_embedding_A", "lora_embedding_B"},            // PEFT: embeddings
    {"lora_down", "lora_up"},                            // kohya, LyCORIS
    {"lora.down", "lora.up"},                            // diffusers; XLabs
    {"lora_layer.down", "lora_layer.up"},                // diffusers: layers made for it
    {"lora_linear_layer.down", "lora_linear_layer.up"},  // diffusers: text encoders
    {"lora1.down", "lora1.up"},                          // XLabs
    {"lora2.down", "lora2.up"},
    {"lora_a", "lora_b"},  // torchtune
}};

/// Names of tensors with which ΔW is no product of two factors any more, and why.
inline constexpr std::array<std::pair<const char*, const char*>, 7> kNoProducts = {{
    {"lora_E", "AdaLoRA's: ΔW = B diag(E) A"},
    {"lora_diag", "KaSA's: ΔW = B diag(d) A"},
    {"lora_mid", "LoCon's in Tucker form: ΔW has a third tensor between the factors"},
    {"lora_latent_mapping", "LoRA-XS's: ΔW = B R A"},
    {"lora_monteclora_sampler", "MonteCLoRA's: A is drawn at random around its values"},
    {"poly_lora_A", "Poly's: the factors of several skills, mixed by a router"},
    {"poly_lora_B", "Poly's: the factors of several skills, mixed by a router"},
}};

/// Where `token` stands in `name` as a whole: behind the start, a '.' or a '_', and before the end or a '.'.
/// npos if it does not.
inline size_t find_token(const std::string& name, const std::string& token) {
  for (size_t at = name.find(token); at != std::string::npos; at = name.find(token, at + 1)) {
    const size_t end = at + token.size();
    const bool starts = at == 0 || name[at - 1] == '.' || name[at - 1] == '_';
    const bool ends = end == name.size() || name[end] == '.';
    if (starts && ends) return at;
  }
  return std::string::npos;
}

/// A factor's token in a name, its partner's, where it stands (npos: the name is no factor's), and whether it is an A.
struct FactorToken {
  std::string token, partner_token;
  size_t position = std::string::npos;
  bool is_a = false;
};

inline bool ends_with(const std::string& text, const std::string& ending) {
  return text.size() >= ending.size() && text.compare(text.size() - ending.size(), ending.size(), ending) == 0;
}

inline bool starts_with(const std::string& text, const std::string& beginning) {
  return text.compare(0, beginning.size(), beginning) == 0;
}

/// The first token in a name: what stands behind it may be an adapter's name, which can be called like a token. Biases
/// of LoRA layers are no factors; embeddings have none, so that "bias" there is an adapter's name.
inline FactorToken first_factor_token(const std::string& name) {
  FactorToken first;
  for (const auto& [token_a, token_b] : kFactorNames) {
    for (const bool is_a : {true, false}) {
      const std::string token = is_a ? token_a : token_b;
      const size_t at = find_token(name, token);
      if (at < first.position) first = {token, is_a ? token_b : token_a, at, is_a};
    }
  }
  const bool is_embedding = first.token.find("embedding") != std::string::npos;
  if (ends_with(name, ".bias") && !is_embedding) return {};
  return first;
}

/// `name` with the token at `position` replaced.
inline std::string with_token(std::string name, size_t position, const std::string& from, const std::string& to) {
  return name.replace(position, from.size(), to);
}

/// The name of the pair whose A is `name`: without the token, and the dot (or underscore) that joined it. The number
/// of XLabs' "lora1" remains, for there is a "lora2" beside it.
inline std::string pair_name_of(const std::string& name, const FactorToken& factor) {
  std::string number;
  for (const char c : factor.token)
    if (c >= '0' && c <= '9') number += c;
  std::string result = name;
  result.replace(factor.position == 0 ? 0 : factor.position - 1, factor.token.size() + 1, number);
  return result.empty() ? name : result;
}

/// "lora_A/lora_B, lora_embedding_A/lora_embedding_B, …", for messages.
inline std::string known_factor_names() {
  std::string text;
  for (const auto& [a, b] : kFactorNames) text += (text.empty() ? "" : ", ") + std::string(a) + "/" + b;
  return text;
}

/// Why factors beside a tensor of this name are no pair (kNoProducts); nothing if the name does not say so.
inline std::optional<std::string> no_product_reason(const std::string& name) {
  for (const auto& [token, reason] : kNoProducts) {
    // Behind a factor's token it is an adapter's name.
    if (find_token(name, token) < first_factor_token(name).position) return reason;
  }
  return std::nullopt;
}

/// Has a component "lora" for a word? "lora", "loras", "x_lora_y", "lora-a", "lora1" and "loraDown" have, "floral" and
/// "lora_unet_x", which begins the names of all modules of kohya, have not.
inline bool has_lora_word(const std::string& component) {
  for (const char* prefix :
       {"lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_prior_", "lora_transformer_"}) {
    if (starts_with(component, prefix)) return false;
  }
  const auto is_upper = [](char c) { return c >= 'A' && c <= 'Z'; };
  const auto lower = [&](char c) { return is_upper(c) ? static_cast<char>(c - 'A' + 'a') : c; };
  const auto is_letter = [&](char c) { return lower(c) >= 'a' && lower(c) <= 'z'; };
  std::string text;
  for (const char c : component) text += lower(c);
  for (size_t at = text.find("lora"); at != std::string::npos; at = text.find("lora", at + 1)) {
    if (at > 0 && is_letter(text[at - 1])) continue;
    size_t end = at + 4;
    if (end < text.size() && text[end] == 's' && !is_upper(component[end])) ++end;
    if (end == text.size() || !is_letter(text[end]) || (is_upper(component[end]) && !is_upper(component[end - 1])))
      return true;
  }
  return false;
}

/// Is a trained parameter of this name, which is no factor's, one of a LoRA layer all the same? One of its last three
/// components (as in lora_x.<adapter>.weight) has "lora" for a word, and it is neither a bias, a magnitude (DoRA) nor a
/// scale.
inline bool is_unknown_lora_name(const std::string& name) {
  std::vector<std::string> components(1);
  for (const char c : name) {
    if (c == '.') {
      components.emplace_back();
    } else {
      components.back() += c;
    }
  }
  for (const char* companion : {"bias", "alpha", "lora_alpha", "dora_scale", "magnitude", "scalar"}) {
    if (components.back() == companion) return false;
  }
  bool is_unknown = false;
  for (size_t i = components.size() - std::min<size_t>(3, components.size()); i < components.size(); ++i) {
    if (components[i] == "lora_magnitude_vector") return false;
    is_unknown = is_unknown || has_lora_word(components[i]);
  }
  return is_unknown;
}

}  // namespace lora_rite::detail
