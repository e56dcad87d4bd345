#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "lora_rite/engine/acts.hpp"
#include "lora_rite/engine/batch.hpp"
#include "lora_rite/factor_pair.hpp"

namespace lora_rite::engine {

/// A pair to be put into a batch.
struct PairToPlace {
  size_t index;  ///< among the pairs of the param group
  FactorPair pair;
  std::string label;  ///< names the pair in messages
  std::optional<RowShards> shards;
};

struct PlacedBatch {
  std::unique_ptr<Batch> batch;
  std::vector<int64_t> pair_indices;  ///< of its pairs among those of the param group
};

/// The pairs of a param group, batched, and where each of them is found.
struct Batches {
  struct Slot {
    size_t batch;
    int64_t index;  ///< of the pair within the batch
  };
  std::vector<PlacedBatch> all;
  std::vector<std::unique_ptr<BatchGroup>> groups;  ///< who steps them
  std::vector<std::optional<Slot>> slots;           ///< by pair; none for one that is not placed here
};

}  // namespace lora_rite::engine
