#pragma once

#include <torch/optim/optimizer.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "classifier.hpp"
#include "process_group.hpp"
#include "run_options.hpp"

namespace finetune {

/// What trains a model, and what the program reports about it.
struct TrainingOptimizer {
  /// The first has the factors. LoraRite trains the head too; the others leave it to an AdamW, the second one here.
  std::vector<std::unique_ptr<torch::optim::Optimizer>> optimizers;
  std::function<int64_t()> skipped_steps;  ///< steps left out because a gradient was not finite
};

/// The optimizer that `options` names, over the model's factors (at options.lr) and its head (at options.head_lr). With
/// options.shard_optimizer the processes divide the factors; all of them then step, save and load together.
TrainingOptimizer make_optimizer(const RunOptions& options, const SentenceClassifier& model,
                                 const Processes& processes = {});

/// Size of everything the optimizers remember between steps, of all processes that divide it, in units of 10⁶ bytes.
double state_megabytes(const TrainingOptimizer& training);

}  // namespace finetune
