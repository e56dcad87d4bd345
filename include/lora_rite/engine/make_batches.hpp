#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/engine/batches.hpp"
#include "lora_rite/engine/device.hpp"
#include "lora_rite/engine/host.hpp"

/// The engines are chosen here and nowhere else, so that nothing else need include them.
namespace lora_rite::engine {

template <class Basis>
Batches make_batches(const std::vector<FactorPair>& pairs, const std::vector<std::string>& labels, Engine engine) {
  struct Members {
    bool on_host;
    std::vector<FactorPair> pairs;
    std::vector<std::string> labels;
  };
  std::map<std::string, size_t> known;
  std::vector<Members> members;
  Batches result;
  for (size_t i = 0; i < pairs.size(); ++i) {
    const auto& [name, a, b] = pairs[i];
    const bool possible = HostBatch<Basis>::takes(pairs[i]);
    TORCH_CHECK(possible || engine != Engine::Host, labels[i], " is ", a.scalar_type(), a.sizes(), " and ",
                b.scalar_type(), b.sizes(), " on ", a.device(),
                ", expected contiguous float factors on a CPU for Engine::Host; use Engine::Automatic");
    const bool on_host = possible && engine != Engine::Device;
    const std::string key = c10::str(on_host, a.sizes(), b.sizes(), a.scalar_type(), a.device());
    const size_t batch = known.emplace(key, members.size()).first->second;
    if (batch == members.size()) members.push_back({on_host, {}, {}});
    result.places.push_back({batch, static_cast<int64_t>(members[batch].pairs.size())});
    members[batch].pairs.push_back(pairs[i]);
    members[batch].labels.push_back(labels[i]);
  }
  std::map<std::string, std::vector<DeviceBatch<Basis>*>> companions;
  for (auto& [on_host, batch_pairs, batch_labels] : members) {
    if (on_host) {
      result.all.push_back(std::make_unique<HostBatch<Basis>>(std::move(batch_pairs), std::move(batch_labels)));
    } else {
      const torch::Tensor a = batch_pairs[0].a;
      auto batch = std::make_unique<DeviceBatch<Basis>>(std::move(batch_pairs), std::move(batch_labels));
      companions[c10::str(a.size(0), a.scalar_type(), a.device())].push_back(batch.get());
      result.all.push_back(std::move(batch));
    }
  }
  for (const auto& [key, batches] : companions) {
    for (DeviceBatch<Basis>* batch : batches) batch->set_companions(batches);
  }
  return result;
}

}  // namespace lora_rite::engine
