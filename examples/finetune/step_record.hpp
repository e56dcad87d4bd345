#pragma once

#include <cstdint>
#include <optional>

namespace finetune {

/// Result of an evaluation.
struct Evaluation {
  double accuracy = 0;
  double accuracy_error = 0;  ///< its standard error, from the number of examples
  double loss = 0;            ///< mean cross-entropy
};

/// What is known of one training step.
struct StepRecord {
  int64_t step = 0;         ///< counted from 1
  double loss = 0;          ///< mean cross-entropy of the batch, before the step
  double lr = 0;            ///< rate of the factors in this step
  double ms_step = 0;       ///< batch, forward, backward and optimizer
  double ms_optimizer = 0;  ///< the optimizer's step() alone

  std::optional<Evaluation> test = std::nullopt;  ///< after the step, where one was asked for
};

}  // namespace finetune
