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
#include "lora_rite/engine/cuda_engine.hpp"
#include "lora_rite/engine/device/device_batch.hpp"
#include "lora_rite/engine/device/rank_group.hpp"
#include "lora_rite/engine/host/host_batch.hpp"

/// The engines are chosen here and nowhere else, so that nothing else needs to include them.
namespace lora_rite::engine {

/// What the pairs of a batch have in common.
struct BatchKey {
  Engine engine;
  std::vector<int64_t> a, b;  ///< shapes
  at::ScalarType dtype;
  std::string device;
  std::tuple<int64_t, int64_t, bool, bool> whole;  ///< of shards: rows, and which factors are sharded

  bool operator<(const BatchKey& other) const { return tied() < other.tied(); }

 private:
  std::tuple<Engine, const std::vector<int64_t>&, const std::vector<int64_t>&, at::ScalarType, const std::string&,
             const std::tuple<int64_t, int64_t, bool, bool>&>
  tied() const {
    return {engine, a, b, dtype, device, whole};
  }
};

/// The pairs of a batch that is to be made.
struct BatchMembers {
  BatchKey key;
  std::optional<RowShards> shards;
  std::vector<FactorPair> pairs;
  std::vector<std::string> labels;
};

/// Which engine steps a pair, `wanted` being the option. `has_basis`: do the kernels of Engine::Cuda know the basis?
inline Engine engine_of(const FactorPair& pair, const std::string& label, bool is_shard, Engine wanted,
                        bool has_basis) {
  if (wanted == Engine::Cuda) {
    TORCH_CHECK(cuda_engine != nullptr, label, ": engine is Engine::Cuda, expected a program that links ",
                "lora_rite::cuda, which has its kernels; use Engine::Automatic");
    TORCH_CHECK(cuda_engine->on_gpu == pair.a.is_cuda(), label, " is on ", pair.a.device(),
                ", expected factors on a CUDA device for Engine::Cuda; use Engine::Automatic");
    return !is_shard && has_basis && cuda_engine->takes(pair) ? Engine::Cuda : Engine::Device;
  }
  const bool on_host = wanted != Engine::Device && !is_shard && host::HostBatch::takes(pair);
  TORCH_CHECK(on_host || wanted != Engine::Host, label, " is ", pair.a.scalar_type(), pair.a.sizes(), " and ",
              pair.b.scalar_type(), pair.b.sizes(), " on ", pair.a.device(),
              ", expected contiguous float factors on a CPU",
              host::kernels::chosen() != nullptr ? "" : ", and kernels, of which none are in use (see kernel_name),",
              " for Engine::Host; use Engine::Automatic");
  return on_host ? Engine::Host : Engine::Device;
}

/// Who shares a batch, in the order of first appearance: the same in all processes. Fills in `result.slots` and the
/// indices of `result.all`.
inline std::vector<BatchMembers> partition(const std::vector<PairToPlace>& pairs, Engine engine, bool has_basis,
                                           Batches& result) {
  std::map<BatchKey, size_t> known;
  std::vector<BatchMembers> members;
  for (const auto& [index, pair, label, shards] : pairs) {
    BatchKey key = {engine_of(pair, label, shards.has_value(), engine, has_basis),
                    pair.a.sizes().vec(),
                    pair.b.sizes().vec(),
                    pair.a.scalar_type(),
                    pair.a.device().str(),
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

/// Batches that agree in rank, dtype and device, in the order of first appearance: who does act 2 together.
template <class BatchType>
class RankMembers {
 public:
  void add(std::unique_ptr<BatchType> batch, size_t place, Batches& result) {
    const Key key = {batch->rank(), batch->dtype(), batch->device().str()};
    auto known = std::find_if(all_.begin(), all_.end(), [&](const Members& other) { return other.key == key; });
    if (known == all_.end()) known = all_.insert(all_.end(), Members{key, {}, {}});
    known->batches.push_back(batch.get());
    known->places.push_back(place);
    result.all[place].batch = std::move(batch);
  }
  /// make(batches, places) of each
  template <class Function>
  void make_groups(Batches& result, const Function& make) {
    for (Members& members : all_) result.groups.push_back(make(std::move(members.batches), std::move(members.places)));
  }

 private:
  using Key = std::tuple<int64_t, at::ScalarType, std::string>;
  struct Members {
    Key key;
    std::vector<BatchType*> batches;
    std::vector<size_t> places;
  };
  std::vector<Members> all_;
};

template <class Basis>
Batches make_batches(const std::vector<PairToPlace>& pairs, size_t pair_count, Engine engine) {
  Batches result;
  result.slots.resize(pair_count);
  const bool has_basis = cuda_engine != nullptr && cuda_engine->make_group<Basis>() != nullptr;
  std::vector<BatchMembers> members = partition(pairs, engine, has_basis, result);
  RankMembers<device::DeviceBatch> on_device;
  RankMembers<Batch> on_cuda;
  for (size_t i = 0; i < members.size(); ++i) {
    auto& [key, shards, batch_pairs, labels] = members[i];
    if (key.engine == Engine::Host) {
      auto batch = std::make_unique<host::HostBatch>(std::move(batch_pairs), std::move(labels));
      result.groups.push_back(std::make_unique<host::HostGroup<Basis>>(*batch, i));
      result.all[i].batch = std::move(batch);
    } else if (key.engine == Engine::Cuda) {
      on_cuda.add(cuda_engine->make_batch(std::move(batch_pairs), std::move(labels)), i, result);
    } else {
      auto batch = std::make_unique<device::DeviceBatch>(std::move(batch_pairs), std::move(labels));
      if (shards) batch->set_row_shards(*shards);
      on_device.add(std::move(batch), i, result);
    }
  }
  on_device.make_groups(result, [](auto batches, auto places) {
    return std::make_unique<device::RankGroup<Basis>>(std::move(batches), std::move(places));
  });
  on_cuda.make_groups(result, [](const auto& batches, auto places) {
    return cuda_engine->make_group<Basis>()(batches, std::move(places));
  });
  return result;
}

}  // namespace lora_rite::engine
