#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "lora_rite/engine/adamw.hpp"
#include "lora_rite/engine/basis_functions.hpp"
#include "lora_rite/engine/batches.hpp"
#include "lora_rite/leaf.hpp"
#include "lora_rite/optimizer_base.hpp"

/// What LoraRiteBase keeps beside its param groups.
namespace lora_rite {

namespace detail {

/// The first of some names, quoted, for a message.
inline std::string listed(const std::vector<std::string>& names) {
  constexpr size_t kMost = 5;
  std::string result = names.empty() ? "none" : "";
  for (size_t i = 0; i < std::min(names.size(), kMost); ++i) result += (i == 0 ? "'" : ", '") + names[i] + "'";
  return names.size() > kMost ? result + ", … (" + std::to_string(names.size()) + ")" : result;
}

}  // namespace detail

/// Beside the param group of the same index: factor pairs, or the parameters that AdamW steps.
struct LoraRiteBase::Group {
  struct Pairs {
    std::vector<FactorPair> all;
    std::vector<at::Tensor> leaves;          ///< the param group's tensors: without those that an earlier group has
    std::vector<PerSide<bool>> were_parts;   ///< which factors were parts of a leaf when they were added
    std::optional<engine::Batches> batches;  ///< built in the first step

    Pairs() = default;
    Pairs(std::vector<FactorPair> pairs, std::vector<at::Tensor> tensors)
        : all(std::move(pairs)), leaves(std::move(tensors)) {
      for (const FactorPair& pair : all) were_parts.push_back({detail::is_part(pair.a), detail::is_part(pair.b)});
    }

    std::optional<engine::Batches::Slot> slot_of(size_t pair) const {
      return batches ? batches->slots[pair] : std::nullopt;
    }
    engine::Batch& batch(size_t index) const { return *batches->all[index].batch; }
  };

  std::variant<Pairs, engine::AdamWParameters> content;

  Pairs* pairs() { return std::get_if<Pairs>(&content); }
  const Pairs* pairs() const { return std::get_if<Pairs>(&content); }
  engine::AdamWParameters* adamw() { return std::get_if<engine::AdamWParameters>(&content); }
  const engine::AdamWParameters* adamw() const { return std::get_if<engine::AdamWParameters>(&content); }

  size_t pair_count() const { return pairs() ? pairs()->all.size() : 0; }

  /// As archives call it.
  const char* kind() const { return pairs() ? "factor pairs" : "other parameters"; }
  /// The tensors that were added, as the param group has them.
  const std::vector<at::Tensor>& tensors() const { return pairs() ? pairs()->leaves : adamw()->parameters(); }
  /// The number of tensors that an archive has state of: factors, or other parameters.
  size_t state_count() const { return pairs() ? 2 * pairs()->all.size() : adamw()->parameters().size(); }

  /// Enters all tensors, which were checked when they were added.
  void record(detail::Owners& owners, size_t index) const {
    for (size_t i = 0; i < pair_count(); ++i) {
      const std::string label = detail::pair_label(pairs()->all[i], index, i);
      for (const Side side : kSides) owners.record(pairs()->all[i].factor(side), label);
    }
    for (size_t i = 0; adamw() && i < adamw()->parameters().size(); ++i)
      owners.record(adamw()->parameters()[i], parameter_label(index, i));
  }
  static std::string parameter_label(size_t group, size_t parameter) {
    return "parameter " + std::to_string(parameter) + " of group " + std::to_string(group);
  }

  /// Hands the states of the pairs, in their order, to the batches.
  void restore(const std::vector<PairState>& of_pairs) {
    for (const auto& [batch, indices] : pairs()->batches->all) {
      std::vector<PairState> states;
      for (const int64_t index : indices) states.push_back(of_pairs[static_cast<size_t>(index)]);
      batch->restore(states);
    }
  }
};

/// All that LoraRiteBase owns.
struct LoraRiteBase::Groups {
  engine::BasisFunctions basis;
  std::vector<Group> all;
  bool parts = false;          ///< are the factors one process's parts?
  detail::Owners owners;       ///< every tensor of every group, and whose it is
  std::vector<int64_t> order;  ///< of the batches' pairs among all, as it was last uploaded
  at::Tensor order_on_device;
  at::Tensor skipped;  ///< scalar on the device, so that counting needs no host read
};

}  // namespace lora_rite
