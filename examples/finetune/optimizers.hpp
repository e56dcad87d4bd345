#pragma once

#include <torch/optim/optimizer.h>

#include <cstdint>
#include <functional>
#include <memory>

#include "classifier.hpp"
#include "run_options.hpp"

namespace finetune {

/// An optimizer and what the program reports about it.
struct TrainingOptimizer {
  std::unique_ptr<torch::optim::Optimizer> optimizer;
  std::function<int64_t()> skipped_steps;  ///< steps left out because a gradient was not finite
};

/// The optimizer that `options` names, over the model's factors (at options.lr) and its head (at options.head_lr).
TrainingOptimizer make_optimizer(const RunOptions& options, const SentenceClassifier& model);

/// Size of everything the optimizer remembers between steps, in units of 10⁶ bytes.
double state_megabytes(const torch::optim::Optimizer& optimizer);

}  // namespace finetune
