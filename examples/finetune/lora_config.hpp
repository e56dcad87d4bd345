#pragma once

#include <cstdint>

namespace finetune {

/// What an adapter is made of; the same for every layer of a model.
struct LoraConfig {
  int64_t rank = 16;
  double alpha = 16;   ///< ΔW = (alpha / rank) · B A
  double dropout = 0;  ///< on the adapter's input, in training only
};

}  // namespace finetune
