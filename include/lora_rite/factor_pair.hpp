#pragma once

#include <torch/nn/module.h>
#include <torch/ordered_dict.h>
#include <torch/types.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace lora_rite {

/// The two factors of one LoRA layer, ΔW = scale · B A, in PEFT's layout.
struct FactorPair {
  std::string name;  ///< used in messages and checkpoints; may be empty
  torch::Tensor a;   ///< [r, in...]: the rank in dimension 0, all others flattened to n = in
  torch::Tensor b;   ///< [out, r, ...]: the rank in dimension 1, all others flattened to n = out
};

namespace detail {

/// Names that libraries give to the two factors: PEFT (linear and convolution, embedding), kohya and diffusers.
inline constexpr std::array<std::pair<const char*, const char*>, 4> kFactorNames = {{
    {"lora_A", "lora_B"},
    {"lora_embedding_A", "lora_embedding_B"},
    {"lora_down", "lora_up"},
    {"lora.down", "lora.up"},
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

}  // namespace detail

/// Finds the LoRA factors among named parameters by the names of PEFT (`lora_A`/`lora_B`, `lora_embedding_A`/`_B`, with
/// or without an adapter's name behind), kohya (`lora_down`/`lora_up`) and diffusers (`lora.down`/`lora.up`).
/// Biases of LoRA layers (`….bias`) are no factors. The order is that of the A factors in the dictionary, a pair's name
/// the A factor's without its token (`layer.lora_A.weight` → `layer.weight`). A pair with several names, as that of a
/// layer that is registered twice, is found once, under the first of them.
/// Throws c10::Error naming the factor whose partner is missing. Whether a found pair fits together is checked by
/// LoraRite.
inline std::vector<FactorPair> find_factor_pairs(
    const torch::OrderedDict<std::string, torch::Tensor>& named_parameters) {
  std::vector<FactorPair> pairs;
  std::set<std::pair<const void*, const void*>> known;
  for (const auto& item : named_parameters) {
    const std::string& name = item.key();
    const auto [token, partner_token, at, is_a] = detail::first_factor_token(name);
    if (at == std::string::npos) continue;
    const std::string partner = detail::with_token(name, at, token, partner_token);
    const auto* found = named_parameters.find(partner);
    TORCH_CHECK(found != nullptr, "find_factor_pairs: '", name, "' has no partner, expected a parameter '", partner,
                "'");
    if (!is_a) continue;
    std::string pair_name = name;
    // The token goes, and the dot (or underscore) that joined it.
    const size_t begin = at == 0 ? 0 : at - 1;
    pair_name.erase(begin, token.size() + 1);
    if (!known.emplace(item.value().unsafeGetTensorImpl(), found->unsafeGetTensorImpl()).second) continue;
    pairs.push_back({pair_name.empty() ? name : pair_name, item.value(), *found});
  }
  return pairs;
}

/// The same for all parameters of a module and its submodules.
inline std::vector<FactorPair> find_factor_pairs(const torch::nn::Module& module) {
  return find_factor_pairs(module.named_parameters(/*recurse=*/true));
}

namespace detail {

/// Throws c10::Error naming `label` (and what was found, what was expected) unless the two tensors are a factor pair:
/// defined, dense, leaf, one floating dtype and device, at least two dimensions, none empty, equal ranks.
inline void check_factor_pair(const FactorPair& pair, const std::string& label) {
  const auto check_factor = [&](const char* which, const torch::Tensor& factor) {
    TORCH_CHECK(factor.defined(), label, ": factor ", which, " is undefined, expected a tensor");
    TORCH_CHECK(factor.layout() == torch::kStrided, label, ": factor ", which, " has layout ", factor.layout(),
                ", expected a dense (strided) tensor");
    const auto dtype = factor.scalar_type();
    TORCH_CHECK(dtype == torch::kFloat || dtype == torch::kDouble || dtype == torch::kBFloat16 || dtype == torch::kHalf,
                label, ": factor ", which, " has dtype ", dtype, ", expected float, double, bfloat16 or half");
    TORCH_CHECK(factor.dim() >= 2, label, ": factor ", which, " has shape ", factor.sizes(),
                ", expected at least two dimensions (", which[0] == 'a' ? "[r, in...]" : "[out, r, ...]", ")");
    TORCH_CHECK(factor.numel() > 0, label, ": factor ", which, " has shape ", factor.sizes(),
                ", expected no empty dimension");
    TORCH_CHECK(factor.is_leaf(), label, ": factor ", which,
                " is the result of an operation, expected a leaf tensor (its gradient would never arrive)");
  };
  check_factor("a", pair.a);
  check_factor("b", pair.b);
  TORCH_CHECK(pair.a.size(0) == pair.b.size(1), label, ": the ranks differ: a has shape ", pair.a.sizes(),
              " (rank in dimension 0), b has shape ", pair.b.sizes(), " (rank in dimension 1)");
  TORCH_CHECK(pair.a.scalar_type() == pair.b.scalar_type(), label, ": the dtypes differ: a is ", pair.a.scalar_type(),
              ", b is ", pair.b.scalar_type());
  TORCH_CHECK(pair.a.device() == pair.b.device(), label, ": the devices differ: a is on ", pair.a.device(),
              ", b is on ", pair.b.device());
}

/// May two elements of the tensor lie at one place, as those of an expanded one do? Dimensions that nest do not
/// overlap; what else does not is too rare to be told apart.
inline bool may_overlap(const torch::Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // stride, size
  for (int64_t d = 0; d < tensor.dim(); ++d)
    if (tensor.size(d) > 1) dimensions.emplace_back(tensor.stride(d), tensor.size(d));
  std::sort(dimensions.begin(), dimensions.end());
  int64_t last = 0;  // the farthest element of the dimensions so far
  for (const auto& [stride, size] : dimensions) {
    if (stride <= last) return true;
    last += stride * (size - 1);
  }
  return false;
}

/// {in, out}: the rows of A and B, seen as [in, r] and [out, r].
inline std::array<int64_t, 2> rows_of(const FactorPair& pair) {
  return {pair.a.numel() / pair.a.size(0), pair.b.numel() / pair.b.size(1)};
}

/// `check_factor_pair`, and that no two elements of a factor share a place, which a step would write twice.
inline void check_trained_pair(const FactorPair& pair, const std::string& label) {
  check_factor_pair(pair, label);
  for (const auto& [which, factor] : {std::pair{"a", pair.a}, std::pair{"b", pair.b}}) {
    TORCH_CHECK(!may_overlap(factor), label, ": factor ", which, " has shape ", factor.sizes(), " and strides ",
                factor.strides(), ", expected elements that do not overlap (give it a clone())");
  }
}

/// Throws c10::Error naming `label` if the rank is above both sides of the whole pair, `rows` = {in, out}. No layer is
/// adapted so; what looks like it is mostly a pair in the wrong order.
inline void check_rank(const FactorPair& pair, const std::array<int64_t, 2>& rows, const std::string& label) {
  const int64_t rank = pair.a.size(0);
  TORCH_CHECK(rank <= rows[0] || rank <= rows[1], label, ": the rank ", rank, " is above both sides, in = ", rows[0],
              " and out = ", rows[1], " (a has shape ", pair.a.sizes(), ", b has shape ", pair.b.sizes(),
              "); are a and b swapped? Expected a [r, in...] and b [out, r, ...]");
}

/// `pair.name`, or its place if it has none.
inline std::string pair_label(const FactorPair& pair, size_t group, size_t index) {
  if (!pair.name.empty()) return "pair '" + pair.name + "'";
  return "pair " + std::to_string(index) + " of group " + std::to_string(group);
}

/// a₀, b₀, a₁, b₁, …
inline std::vector<at::Tensor> alternating_factors(const std::vector<FactorPair>& pairs) {
  std::vector<at::Tensor> factors;
  for (const auto& pair : pairs) factors.insert(factors.end(), {pair.a, pair.b});
  return factors;
}

}  // namespace detail
}  // namespace lora_rite
