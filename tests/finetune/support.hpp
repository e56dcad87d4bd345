#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <iostream>
#include <lora_rite/io/safetensors.hpp>
#include <map>
#include <memory>
#include <random>
#include <string>

#include "classifier.hpp"
#include "error.hpp"
#include "support/temporary_folder.hpp"
#include "trainer.hpp"

namespace finetune {

using lora_rite::load_safetensors;
using lora_rite::Safetensors;
using lora_rite::save_safetensors;
using lora_rite::testing::golden;
using lora_rite::testing::TemporaryFolder;

/// The message of the Error that `action` throws; fails the test if it throws none.
inline std::string error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  ADD_FAILURE() << "no Error was thrown";
  return {};
}

/// Largest absolute difference.
inline double distance(const torch::Tensor& left, const torch::Tensor& right) {
  return (left - right).abs().max().item<double>();
}

/// Sentences of the tiny model's tokens; those of class 1 contain the token 7.
inline Dataset tiny_dataset(int64_t size, uint32_t seed) {
  std::mt19937 random(seed);
  Dataset data;
  for (int64_t index = 0; index < size; ++index) {
    std::vector<int64_t> sentence(3 + random() % 8);
    for (int64_t& token : sentence) token = 8 + random() % 56;
    data.labels.push_back(random() % 2);
    if (data.labels.back() == 1) sentence[random() % sentence.size()] = 7;
    data.tokens.push_back(std::move(sentence));
  }
  return data;
}

/// Test data for three batches of an evaluation, for several processes to divide.
inline TaskData tiny_task() { return {tiny_dataset(50, 1), tiny_dataset(150, 2), {"no", "yes"}}; }

inline RunOptions tiny_options(const std::string& out, const std::string& optimizer) {
  RunOptions options;
  options.model = golden("tiny").string();
  options.out = out;
  options.optimizer = optimizer;
  options.lr = 2e-3;
  options.steps = 12;
  options.batch = 8;
  options.rank = 4;
  options.alpha = 4;
  options.checkpoint_every = 0;
  return options;
}

/// A run of the tiny model from its start (or its checkpoint, with `resume`), as main() would do it.
struct TinyRun {
  Outcome outcome;
  std::vector<StepRecord> records;
  std::map<std::string, torch::Tensor> trained;
};

inline TinyRun run_tiny(const RunOptions& options, bool resume = false,
                        const std::function<void(const StepRecord&)>& after_step = nullptr,
                        const Processes& processes = {}) {
  const auto model = make_classifier(options, load_bert(options.model), 2);
  TinyRun run;
  std::ostringstream ignored;
  const auto record = [&](const StepRecord& step) {
    run.records.push_back(step);
    if (after_step) after_step(step);
  };
  run.outcome = run_training(options, *model, tiny_task(), resume, {ignored, false, record}, processes);
  for (const auto& item : model->named_parameters()) {
    if (item.value().requires_grad()) run.trained[item.key()] = item.value().detach().clone();
  }
  return run;
}

}  // namespace finetune
