#pragma once

#include <lora_rite/schedulers.hpp>

#include <cstdint>
#include <filesystem>

#include "classifier.hpp"

namespace finetune {

/// The parts of a run that change while it trains.
struct TrainingState {
  SentenceClassifier& model;
  torch::optim::Optimizer& optimizer;
  lora_rite::WarmupLinear& scheduler;
  int64_t step = 0;  ///< finished steps; the batch order follows from it
};

/// Saves trainable parameters, optimizer, scheduler, position and random number generator. An interruption leaves the
/// old file or the new one, never half of one.
void save_checkpoint(const std::filesystem::path& path, const TrainingState& state);

/// Restores all of that into a freshly built run. Throws Error if the file belongs to another model.
void load_checkpoint(const std::filesystem::path& path, TrainingState& state);

}  // namespace finetune
