#pragma once

#include <ATen/ATen.h>
#include <torch/nn/module.h>
#include <torch/ordered_dict.h>
#include <torch/types.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/leaf.hpp"
#include "lora_rite/names.hpp"
#include "lora_rite/rule/side.hpp"

namespace lora_rite {

/// The two factors of one LoRA layer, ΔW = scale · B A, in PEFT's layout. An optimizer takes leaves that require a
/// gradient (one of the two may be frozen), both of the same dtype (float, double, bfloat16 or half) and on the same
/// device, with r at most `in` or at most `out`.
struct FactorPair {
  std::string name;  ///< used in messages and checkpoints; may be empty
  torch::Tensor a;   ///< [r, in...]: the rank in dimension 0, all others flattened to n = in
  torch::Tensor b;   ///< [out, r, ...]: the rank in dimension 1, all others flattened to n = out

  /// `a` or `b`.
  torch::Tensor& factor(Side side) { return side == Side::A ? a : b; }
  /// The same, to read.
  const torch::Tensor& factor(Side side) const { return side == Side::A ? a : b; }
};

/// The pairs of E experts whose factors share two tensors, as PEFT has them for a parameter that holds all experts of a
/// layer (target_parameters): row e r + k of A [E r, in] and column k E + e of B [out, r E] belong to expert e. The
/// change of expert e is then b a of the pair `result[e]`, named "<name>[e]".
///
/// The pairs' tensors are views, which LoraRite moves, and whose gradients arrive at `whole.a` and `whole.b`: backward,
/// zero_grad and files know only those. Do not ask a view for its `grad()`. Where the memory of `whole` is replaced
/// (module.to, set_data) the pairs must be made anew.
///
/// Throws c10::Error naming the pair if `experts` is < 1 or does not divide the rank dimension, or a factor is not
/// two-dimensional or no leaf.
inline std::vector<FactorPair> expert_pairs(const FactorPair& whole, int64_t experts) {
  const std::string label = "expert_pairs: pair '" + whole.name + "'";
  TORCH_CHECK(experts >= 1, label, ": the number of experts is ", experts, ", expected ≥ 1");
  for (const auto& [which, factor] : {std::pair{"a", &whole.a}, std::pair{"b", &whole.b}}) {
    TORCH_CHECK(factor->defined(), label, ": factor ", which, " is undefined, expected a tensor");
    TORCH_CHECK(factor->dim() == 2, label, ": factor ", which, " has shape ", factor->sizes(),
                ", expected two dimensions");
    TORCH_CHECK(!factor->is_view() && factor->is_leaf(), label, ": factor ", which, " is ",
                factor->is_view() ? "a view of another tensor" : "the result of an operation",
                ", expected a leaf tensor (give it a clone())");
  }
  const int64_t rows = whole.a.size(0);
  TORCH_CHECK(rows == whole.b.size(1), label, ": the ranks differ: a has shape ", whole.a.sizes(),
              " (rank in dimension 0), b has shape ", whole.b.sizes(), " (rank in dimension 1)");
  TORCH_CHECK(rows > 0 && rows % experts == 0, label, ": the rank dimension is ", rows, ", expected a multiple of the ",
              experts, " experts");
  const int64_t rank = rows / experts;
  at::NoGradGuard no_grad;
  std::vector<FactorPair> pairs;
  for (int64_t e = 0; e < experts; ++e) {
    pairs.push_back({whole.name + "[" + std::to_string(e) + "]", whole.a.narrow(0, e * rank, rank),
                     whole.b.unflatten(1, {rank, experts}).select(2, e)});
  }
  return pairs;
}

/// The inverse: the pairs of all experts, in their order and of equal shapes, as the two tensors that PEFT's files
/// have. Copies. Throws c10::Error if there is none, or shapes differ.
inline FactorPair join_experts(const std::string& name, const std::vector<FactorPair>& experts) {
  TORCH_CHECK(!experts.empty(), "join_experts: '", name, "': the list of pairs is empty, expected at least one pair");
  at::NoGradGuard no_grad;
  std::vector<at::Tensor> a, b;
  for (const auto& pair : experts) {
    for (const bool is_a : {true, false}) {
      const at::Tensor &own = is_a ? pair.a : pair.b, &first = is_a ? experts[0].a : experts[0].b;
      TORCH_CHECK(own.defined() && own.dim() == 2 && own.sizes() == first.sizes(), "join_experts: '", name,
                  "': factor ", is_a ? "a" : "b", " of pair '", pair.name, "' is ",
                  own.defined() ? c10::str(own.sizes()) : "undefined", ", expected two dimensions, the same for all");
      (is_a ? a : b).push_back(own);
    }
  }
  return {name, at::cat(a, 0), at::stack(b, 2).flatten(1)};
}

namespace detail {

/// The base parameters that a pair of factors may change, by the name of the layer that holds them.
class BaseParameters {
 public:
  explicit BaseParameters(const torch::OrderedDict<std::string, torch::Tensor>& named_parameters) {
    for (const auto& item : named_parameters) {
      const int64_t dimensions = item.value().dim();
      if (dimensions != 2 && dimensions != 3) continue;
      const size_t dot = item.key().rfind('.');
      by_layer_[without_base_layer(dot == std::string::npos ? "" : item.key().substr(0, dot))].push_back(
          {item.key(), item.value().sizes().vec()});
    }
  }

  /// How many experts there are in the factors of `layer` (what stands before ".lora_A"): those of a parameter
  /// [E, x, y] beside them whose x and y are in and out, in either order, and whose E divides the rank; 1 without such
  /// a parameter. Throws c10::Error if there are two with different E.
  int64_t experts(const std::string& layer, const FactorPair& pair) const {
    const Parameter* found = nullptr;
    for (const Parameter& parameter : of(layer)) {
      const auto& shape = parameter.shape;
      if (shape.size() != 3 || !is_in_out(shape[1], shape[2], pair)) continue;
      if (shape[0] < 1 || pair.a.size(0) % shape[0] != 0) continue;
      if (found == nullptr) found = &parameter;
      TORCH_CHECK(found->shape[0] == shape[0], "find_factor_pairs: '", pair.name, "' (a ", pair.a.sizes(), ", b ",
                  pair.b.sizes(), ") may be the factors of the ", found->shape[0], " experts of '", found->name, "' ",
                  at::IntArrayRef(found->shape), " or of the ", shape[0], " of '", parameter.name, "' ",
                  at::IntArrayRef(shape), "; expected one number; say it with expert_pairs");
    }
    return found == nullptr ? 1 : found->shape[0];
  }

  /// Throws c10::Error if A is block-diagonal (BD-LoRA): narrower than its layer by a whole number.
  void check_is_dense(const std::string& layer, const FactorPair& pair) const {
    const int64_t in = pair.a.size(1), out = pair.b.size(0);
    for (const Parameter& parameter : of(layer)) {
      const auto& shape = parameter.shape;
      if (shape.size() != 2 || !ends_with(parameter.name, "base_layer.weight")) continue;
      TORCH_CHECK(shape[0] != out || shape[1] == in || shape[1] % in != 0, "find_factor_pairs: '", pair.name,
                  "' has a ", pair.a.sizes(), " for the weight ", at::IntArrayRef(shape), " of '", parameter.name,
                  "': blocks of a matrix (BD-LoRA), whose ΔW is no product of two factors; expected a [r, ", shape[1],
                  "]");
    }
  }

  /// PEFT's layers nest where several parameters of a module have factors.
  static std::string without_base_layer(std::string layer) {
    const std::string nested = "base_layer";
    while (ends_with(layer, "." + nested) || layer == nested)
      layer.resize(layer.size() - std::min(layer.size(), nested.size() + 1));
    return layer;
  }

 private:
  struct Parameter {
    std::string name;
    std::vector<int64_t> shape;
  };

  const std::vector<Parameter>& of(const std::string& layer) const {
    static const std::vector<Parameter> none;
    const auto found = by_layer_.find(without_base_layer(layer));
    return found == by_layer_.end() ? none : found->second;
  }

  static bool is_in_out(int64_t x, int64_t y, const FactorPair& pair) {
    const int64_t in = pair.a.size(1), out = pair.b.size(0);
    return (x == in && y == out) || (x == out && y == in);
  }

  std::map<std::string, std::vector<Parameter>> by_layer_;
};

}  // namespace detail

/// Finds the LoRA factors among named parameters by the names that libraries give them (PEFT, kohya, diffusers, XLabs,
/// torchtune: docs/names.md), with or without an adapter's name behind. Biases of LoRA layers (`….bias`) are no
/// factors. The order is that of the A factors in the dictionary, a pair's name the A factor's without its token
/// (`layer.lora_A.weight` → `layer.weight`). A pair with several names, as that of a layer that is registered twice, is
/// found once, under the first of them.
///
/// Factors of PEFT's beside a parameter [E, x, y] of their layer with x and y their in and out, in either order, are
/// those of E experts: E pairs (`expert_pairs`) in their place. Without that parameter nothing tells experts from a
/// pair of a higher rank; then call expert_pairs.
///
/// Throws c10::Error naming the factor whose partner is missing, what stands where ΔW is no product of two factors
/// (AdaLoRA, KaSA, Tucker's form of LoCon, …), a trained matrix that is named like one of a LoRA layer but not
/// known, and factors of which the number of experts is not clear. Whether a found pair fits together is checked by
/// LoraRite.
inline std::vector<FactorPair> find_factor_pairs(
    const torch::OrderedDict<std::string, torch::Tensor>& named_parameters) {
  std::vector<FactorPair> pairs;
  std::set<std::pair<const void*, const void*>> known;
  const detail::BaseParameters bases(named_parameters);
  for (const auto& item : named_parameters) {
    const std::string& name = item.key();
    const auto reason = detail::no_product_reason(name);
    TORCH_CHECK(!reason, "find_factor_pairs: '", name, "' is ", reason.value_or(""),
                ", which is no product of two factors, expected pairs with ΔW = B A; see docs/names.md");
    const detail::FactorToken factor = detail::first_factor_token(name);
    if (factor.position == std::string::npos) {
      // Whatever its name, a vector is no factor: a module may be called "lora" and have a norm.
      const bool could_be = item.value().requires_grad() && item.value().dim() >= 2;
      TORCH_CHECK(!could_be || !detail::is_unknown_lora_name(name), "find_factor_pairs: '", name,
                  "' is named like a parameter of a LoRA layer, but is none that is known, expected ",
                  detail::known_factor_names(), "; give LoraRite the pairs themselves, and what is no factor by ",
                  "add_parameters; see docs/names.md");
      continue;
    }
    const std::string partner = detail::with_token(name, factor.position, factor.token, factor.partner_token);
    const auto* found = named_parameters.find(partner);
    TORCH_CHECK(found != nullptr, "find_factor_pairs: '", name, "' has no partner, expected a parameter '", partner,
                "'");
    if (!factor.is_a) continue;
    if (!known.emplace(item.value().unsafeGetTensorImpl(), found->unsafeGetTensorImpl()).second) continue;
    const FactorPair pair = {detail::pair_name_of(name, factor), item.value(), *found};
    int64_t experts = 1;
    if (factor.token == "lora_A" && pair.a.dim() == 2 && pair.b.dim() == 2 && pair.a.numel() > 0) {
      const std::string layer = name.substr(0, factor.position == 0 ? 0 : factor.position - 1);
      experts = bases.experts(layer, pair);
      bases.check_is_dense(layer, pair);
    }
    if (experts == 1) {
      pairs.push_back(pair);
    } else {
      for (auto& expert : expert_pairs(pair, experts)) pairs.push_back(std::move(expert));
    }
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
    check_part(factor, label, which);
    TORCH_CHECK(is_part(factor) || factor.is_leaf(), label, ": factor ", which,
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

/// in and out: the rows of A and B, seen as [in, r] and [out, r].
inline PerSide<int64_t> rows_of(const FactorPair& pair) {
  return {pair.a.numel() / pair.a.size(0), pair.b.numel() / pair.b.size(1)};
}

/// Throws c10::Error naming `label` if two elements of a factor share a place, which a step would write twice.
inline void check_no_overlap(const torch::Tensor& factor, const std::string& label, const char* which) {
  TORCH_CHECK(factor.is_contiguous() || !may_overlap(factor), label, ": factor ", which, " has shape ", factor.sizes(),
              " and strides ", factor.strides(), ", expected elements that do not overlap (give it a clone())");
}

/// `check_factor_pair`, and that a step can write both factors: no two elements share a place, which would be written
/// twice.
inline void check_trained_pair(const FactorPair& pair, const std::string& label) {
  check_factor_pair(pair, label);
  for (const auto& [which, factor] : {std::pair{"a", pair.a}, std::pair{"b", pair.b}}) {
    check_writable(factor, label, ": factor ", which);
    check_no_overlap(factor, label, which);
  }
}

/// Throws c10::Error naming `label` if the rank is above both sides of the whole pair, whose rows are in and out. No
/// layer is adapted like that; it is mostly a pair in the wrong order.
inline void check_rank(const FactorPair& pair, const PerSide<int64_t>& rows, const std::string& label) {
  const int64_t rank = pair.a.size(0);
  TORCH_CHECK(rank <= rows.a || rank <= rows.b, label, ": the rank ", rank, " is above both sides, in = ", rows.a,
              " and out = ", rows.b, " (a has shape ", pair.a.sizes(), ", b has shape ", pair.b.sizes(),
              "); are a and b swapped? Expected a [r, in...] and b [out, r, ...]");
}

/// `pair.name`, or its place if it has none.
inline std::string pair_label(const FactorPair& pair, size_t group, size_t index) {
  if (!pair.name.empty()) return "pair '" + pair.name + "'";
  return "pair " + std::to_string(index) + " of group " + std::to_string(group);
}

/// a₀, b₀, a₁, b₁, …, for optimizers that know nothing of parts. Throws c10::Error naming the first one.
inline std::vector<at::Tensor> alternating_factors(const std::vector<FactorPair>& pairs) {
  std::vector<at::Tensor> factors;
  for (const auto& pair : pairs) {
    TORCH_CHECK(!is_part(pair.a) && !is_part(pair.b), "pair '", pair.name, "' is a view of a leaf, as experts are, ",
                "expected leaves: only LoraRite steps such a pair");
    factors.insert(factors.end(), {pair.a, pair.b});
  }
  return factors;
}

/// The leaves that have the gradients of these pairs, once each, in the order in which they appear first: a₀, b₀, a₁, …
inline std::vector<at::Tensor> leaves_of(const std::vector<FactorPair>& pairs) {
  std::vector<at::Tensor> factors;
  for (const auto& pair : pairs) factors.insert(factors.end(), {pair.a, pair.b});
  return leaves_of(factors);
}

}  // namespace detail
}  // namespace lora_rite
