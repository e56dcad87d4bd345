#pragma once

#include <cstdint>

namespace finetune {

/// What is known of one training step.
struct StepRecord {
  int64_t step = 0;         ///< counted from 1
  double loss = 0;          ///< mean cross-entropy of the batch, before the step
  double lr = 0;            ///< rate of the factors in this step
  double ms_step = 0;       ///< batch, forward, backward and optimizer
  double ms_optimizer = 0;  ///< the optimizer's step() alone
};

}  // namespace finetune
