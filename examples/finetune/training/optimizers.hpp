#pragma once

#include <torch/nn/module.h>
#include <torch/optim/optimizer.h>

#include <cstdint>
#include <functional>
#include <lora_rite/schedulers.hpp>
#include <memory>
#include <vector>

#include "training/process_group.hpp"
#include "training/run_options.hpp"

namespace finetune {

/// What trains a model, and what the program reports about it.
struct TrainingOptimizer {
  /// The first has the factors. LoraRite trains a head too; the others leave it to an AdamW, the second one here.
  std::vector<std::unique_ptr<torch::optim::Optimizer>> optimizers;
  std::function<int64_t()> skipped_steps;  ///< steps left out because a gradient was not finite

  /// Everything that is trained.
  std::vector<torch::Tensor> parameters() const;
};

/// The optimizer that `options` names, over the model's factors (at options.lr) and whatever else is trainable, its
/// head (at options.head_lr). With options.shard_optimizer the processes divide the factors; all of them then step,
/// save and load together. Throws Error for options that the optimizer has not.
TrainingOptimizer make_optimizer(const RunOptions& options, const torch::nn::Module& model,
                                 const Processes& processes = {});

/// The schedule that `options` name, of one optimizer's rates.
std::unique_ptr<lora_rite::WarmupScheduler> make_scheduler(const RunOptions& options,
                                                           torch::optim::Optimizer& optimizer);

/// Size of everything the optimizers remember between steps, of all processes that divide it, in units of 10⁶ bytes.
double state_megabytes(const TrainingOptimizer& training);

}  // namespace finetune
