#pragma once

#include <lora_rite/schedulers.hpp>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <vector>

#include "classifier.hpp"

namespace finetune {

/// The parts of a run that change while it trains.
struct TrainingState {
  SentenceClassifier& model;
  const std::vector<std::unique_ptr<torch::optim::Optimizer>>& optimizers;
  std::vector<lora_rite::WarmupLinear>& schedulers;  ///< one for each optimizer
  int64_t step = 0;                                  ///< finished steps; the batch order follows from it
};

/// Saves trainable parameters, optimizers, schedulers, position and random number generator. An interruption leaves the
/// old file or the new one, never half of one.
void save_checkpoint(const std::filesystem::path& path, const TrainingState& state);

/// Restores all of that into a freshly built run. Throws Error if the file belongs to another model.
void load_checkpoint(const std::filesystem::path& path, TrainingState& state);

}  // namespace finetune
