#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/bodies.hpp"
#include "lora_rite/engine/batches.hpp"
#include "lora_rite/engine/host/kernels/dispatch.hpp"
#include "lora_rite/leaf.hpp"
#include "lora_rite/optimizer_base.hpp"
#include "lora_rite/step/group.hpp"

/// Bodies of LoraRiteBase: batches, and what they remember.
namespace lora_rite {

// --- Batches -------------------------------------------------------------------------------------------------------

/// Calls the function with batches built; not before the first step, for until then a module may still be moved or
/// converted. If it throws, those that are new are forgotten: what failed did not take place. (What an accelerator
/// could not finish in act 3 is the exception: factors that had moved then lose their state.)
LORA_RITE_BODY void LoraRiteBase::with_batches(const std::function<void()>& function) {
  std::vector<bool> had_batches;
  for (const Group& group : own_->all) had_batches.push_back(group.pairs() && group.pairs()->batches);
  try {
    check_groups();
    for (size_t g = 0; g < group_count(); ++g)
      if (own_->all[g].pairs() && !own_->all[g].pairs()->batches) build_batches(g, own_->all[g]);
    function();
  } catch (...) {
    for (size_t g = 0; g < had_batches.size(); ++g)
      if (own_->all[g].pairs() && !had_batches[g]) own_->all[g].pairs()->batches.reset();
    throw;
  }
}

/// Builds the batches of a group that is, or will be, number `g`.
LORA_RITE_BODY void LoraRiteBase::build_batches(size_t g, Group& group) {
  std::vector<FactorPair>& pairs = group.pairs()->all;
  std::vector<engine::PairToPlace> to_place;
  bool needs_device = rite_options(g).capturable();
  for (size_t i = 0; i < pairs.size(); ++i) {
    const std::string label = detail::pair_label(pairs[i], g, i);
    detail::check_trained_pair(pairs[i], label);
    auto shards = row_shards(g, i);
    detail::check_rank(pairs[i], shards ? shards->rows : detail::rows_of(pairs[i]), label);
    needs_device = needs_device || shards;
    if (keeps(g, i)) to_place.push_back({i, pairs[i], label, std::move(shards)});
  }
  group.pairs()->batches =
      own_->basis.make_batches(to_place, pairs.size(), needs_device ? Engine::Device : rite_options(g).engine());
}

// --- State ---------------------------------------------------------------------------------------------------------

LORA_RITE_BODY int64_t LoraRiteBase::skipped_steps() const {
  return own_->skipped.defined() ? own_->skipped.item<int64_t>() : 0;
}

LORA_RITE_BODY std::vector<PairDiagnostics> LoraRiteBase::diagnostics() const {
  at::NoGradGuard no_grad;
  std::vector<PairDiagnostics> result;
  const int64_t skipped = skipped_steps();
  for (const Group& group : own_->all) {
    for (size_t i = 0; i < group.pair_count(); ++i) {
      const FactorPair& pair = group.pairs()->all[i];
      const auto slot = group.pairs()->slot_of(i);
      // Before the first step, and of pairs that other processes keep, only the factors are known.
      result.push_back(slot ? group.pairs()->batch(slot->batch).diagnose(slot->index)
                            : engine::Batch({pair}, {pair.name}).diagnose(0));
      result.back().skipped_steps = skipped;
    }
  }
  return result;
}

LORA_RITE_BODY std::optional<StateOfPair> LoraRiteBase::state_of(const std::string& name) const {
  const auto [group, pair] = find_pair(name);
  return state_of(group, pair);
}

LORA_RITE_BODY std::optional<StateOfPair> LoraRiteBase::state_of(size_t group, size_t pair) const {
  check_pair(group, pair);
  if (!own_->all[group].pairs()->batches) return std::nullopt;
  TORCH_CHECK(own_->all[group].pairs()->slot_of(pair), label_of(group, pair), ": its state is kept by another process");
  return pick(group, pair).told();
}

LORA_RITE_BODY void LoraRiteBase::reset_state(const std::string& name) {
  const auto [group, pair] = find_pair(name);
  reset_state(group, pair);
}

LORA_RITE_BODY void LoraRiteBase::reset_state(size_t group, size_t pair) {
  at::NoGradGuard no_grad;
  check_pair(group, pair);
  agree_on_call("reset_state", label_of(group, pair));
  const auto slot = own_->all[group].pairs()->slot_of(pair);
  if (!slot) return;  // nothing is remembered, at least not here
  engine::Batch& batch = own_->all[group].pairs()->batch(slot->batch);
  std::vector<PairState> states;
  for (int64_t i = 0; i < batch.count(); ++i)
    states.push_back(i == slot->index ? read_state(nullptr, group, pair) : batch.pick(i));
  batch.restore(states);
}

LORA_RITE_BODY void LoraRiteBase::reset_state() {
  agree_on_call("reset_state", "all");
  for (Group& group : own_->all) {
    if (group.pairs())
      group.pairs()->batches.reset();
    else
      group.adamw()->forget();
  }
  own_->skipped = at::Tensor();
}

LORA_RITE_BODY void LoraRiteBase::remove_pair(const std::string& name) {
  const auto [group, pair] = find_pair(name);
  remove_pair(group, pair);
}

LORA_RITE_BODY void LoraRiteBase::remove_pair(size_t g, size_t pair) {
  at::NoGradGuard no_grad;
  TORCH_CHECK(can_remove_pairs(), "LoraRite: a pair cannot be taken out where several processes share the work, ",
              "expected a new optimizer without it");
  check_groups();
  check_pair(g, pair);
  Group rest{Group::Pairs()};
  std::vector<PairState> states;  // of those that stay
  for (size_t i = 0; i < pairs_of(g).size(); ++i) {
    if (i == pair) continue;
    rest.pairs()->all.push_back(pairs_of(g)[i]);
    if (own_->all[g].pairs()->slot_of(i)) states.push_back(pick(g, i));
  }
  // All groups are claimed anew: labels hold places, which move up, and a leaf that groups share may now belong to a
  // later one.
  detail::Owners owners;
  std::vector<std::vector<torch::Tensor>> leaves(group_count());
  for (size_t i = 0; i < group_count(); ++i) {
    const Group& group = i == g ? rest : own_->all[i];
    if (group.pairs()) {
      for (const torch::Tensor& leaf : detail::leaves_of(group.pairs()->all))
        if (!owners.know(leaf)) leaves[i].push_back(leaf);
    }
    group.claim(owners, i);
  }
  std::vector<std::vector<torch::Tensor>> tensors = leaves;
  if (!states.empty()) {
    build_batches(g, rest);
    rest.restore(states);
  }
  // What follows cannot fail.
  own_->all[g] = std::move(rest);
  for (size_t i = 0; i < group_count(); ++i) {
    if (!own_->all[i].pairs()) continue;
    param_groups_[i].params().swap(tensors[i]);
    own_->all[i].pairs()->leaves.swap(leaves[i]);
  }
  own_->owners = std::move(owners);
}

// --- Kernels -------------------------------------------------------------------------------------------------------

LORA_RITE_BODY std::string kernel_name() {
  const host::kernels::Table* kernels = host::kernels::chosen();
  return kernels == nullptr ? "none" : kernels->name;
}

}  // namespace lora_rite
