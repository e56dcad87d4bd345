#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "lora_rite/engine/basis_functions.hpp"
#include "lora_rite/engine/batches.hpp"
#include "lora_rite/engine/device/device_batch.hpp"
#include "lora_rite/engine/device/rank_group.hpp"
#include "lora_rite/engine/host/host_batch.hpp"

/// The engines are chosen here and nowhere else, so that nothing else needs to include them.
namespace lora_rite::engine {

/// What the pairs of a batch have in common.
struct BatchKey {
  bool on_host;
  std::vector<int64_t> a, b;  ///< shapes
  at::ScalarType dtype;
  std::string device;
  std::tuple<int64_t, int64_t, bool, bool> whole;  ///< of shards: rows, and which factors are sharded

  bool operator<(const BatchKey& other) const { return tied() < other.tied(); }

 private:
  std::tuple<bool, const std::vector<int64_t>&, const std::vector<int64_t>&, at::ScalarType, const std::string&,
             const std::tuple<int64_t, int64_t, bool, bool>&>
  tied() const {
    return {on_host, a, b, dtype, device, whole};
  }
};

/// The pairs of a batch that is to be made.
struct BatchMembers {
  BatchKey key;
  std::optional<RowShards> shards;
  std::vector<FactorPair> pairs;
  std::vector<std::string> labels;
};

/// Who shares a batch, in the order of first appearance: the same in all processes. Fills in `result.slots` and the
/// indices of `result.all`.
inline std::vector<BatchMembers> partition(const std::vector<PairToPlace>& pairs, Engine engine, Batches& result) {
  std::map<BatchKey, size_t> known;
  std::vector<BatchMembers> members;
  for (const auto& [index, pair, label, shards] : pairs) {
    const bool on_host = engine != Engine::Device && !shards && host::HostBatch::takes(pair);
    TORCH_CHECK(on_host || engine != Engine::Host, label, " is ", pair.a.scalar_type(), pair.a.sizes(), " and ",
                pair.b.scalar_type(), pair.b.sizes(), " on ", pair.a.device(),
                ", expected contiguous float factors on a CPU",
                host::kernels::chosen() != nullptr ? "" : ", and kernels, of which none are in use (see kernel_name),",
                " for Engine::Host; use Engine::Automatic");
    BatchKey key = {on_host, pair.a.sizes().vec(), pair.b.sizes().vec(), pair.a.scalar_type(), pair.a.device().str(),
                    {}};
    if (shards) key.whole = {shards->rows.a, shards->rows.b, shards->sharded.a, shards->sharded.b};
    const size_t batch = known.emplace(key, members.size()).first->second;
    if (batch == members.size()) {
      members.push_back({key, shards, {}, {}});
      result.all.emplace_back();
    }
    result.slots[index] = {batch, static_cast<int64_t>(members[batch].pairs.size())};
    result.all[batch].pair_indices.push_back(static_cast<int64_t>(index));
    members[batch].pairs.push_back(pair);
    members[batch].labels.push_back(label);
  }
  return members;
}

template <class Basis>
Batches make_batches(const std::vector<PairToPlace>& pairs, size_t pair_count, Engine engine) {
  Batches result;
  result.slots.resize(pair_count);
  using RankKey = std::tuple<int64_t, at::ScalarType, std::string>;
  struct RankMembers {
    RankKey key;
    std::vector<device::DeviceBatch*> batches;
    std::vector<size_t> places;
  };
  std::vector<RankMembers> ranks;  // in the order of first appearance
  std::vector<BatchMembers> members = partition(pairs, engine, result);
  for (size_t i = 0; i < members.size(); ++i) {
    auto& [key, shards, batch_pairs, labels] = members[i];
    const RankKey rank = {batch_pairs[0].a.size(0), key.dtype, key.device};
    if (key.on_host) {
      auto batch = std::make_unique<host::HostBatch>(std::move(batch_pairs), std::move(labels));
      result.groups.push_back(std::make_unique<host::HostGroup<Basis>>(*batch, i));
      result.all[i].batch = std::move(batch);
      continue;
    }
    auto batch = std::make_unique<device::DeviceBatch>(std::move(batch_pairs), std::move(labels));
    if (shards) batch->set_row_shards(*shards);
    auto known = std::find_if(ranks.begin(), ranks.end(), [&](const RankMembers& other) { return other.key == rank; });
    if (known == ranks.end()) known = ranks.insert(ranks.end(), RankMembers{rank, {}, {}});
    known->batches.push_back(batch.get());
    known->places.push_back(i);
    result.all[i].batch = std::move(batch);
  }
  for (RankMembers& rank : ranks) {
    result.groups.push_back(
        std::make_unique<device::RankGroup<Basis>>(std::move(rank.batches), std::move(rank.places)));
  }
  return result;
}

}  // namespace lora_rite::engine
