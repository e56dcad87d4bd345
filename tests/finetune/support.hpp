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

#include "common/error.hpp"
#include "models/load_model.hpp"
#include "support/temporary_folder.hpp"
#include "training/trainer.hpp"
#include "workloads/language_workload.hpp"
#include "workloads/sentence_workload.hpp"

namespace finetune {

using lora_rite::load_safetensors;
using lora_rite::Safetensors;
using lora_rite::save_safetensors;
using lora_rite::test::golden;
using lora_rite::test::TemporaryFolder;

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
inline TaskData tiny_task(bool with_validation = false) {
  return {tiny_dataset(50, 1), with_validation ? tiny_dataset(80, 3) : Dataset(), tiny_dataset(150, 2), {"no", "yes"}};
}

/// Prompts and completions of the tiny language models' tokens: a completion repeats the prompt's last tokens.
inline std::vector<TextRecord> tiny_texts(int64_t size, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<TextRecord> records(size);
  for (TextRecord& record : records) {
    record.prompt.resize(3 + random() % 6);
    for (int64_t& token : record.prompt) token = 3 + random() % 45;
    record.completion.assign(record.prompt.end() - 1 - random() % 3, record.prompt.end());
    record.completion.push_back(1);
    record.references = {"yes"};
  }
  return records;
}

inline LanguageData tiny_language_data(bool with_validation = false) {
  LanguageData data{"gsm8k", tiny_texts(45, 1), {}, {"gsm8k", tiny_texts(20, 2), {}}};
  if (with_validation) data.validation = {"gsm8k", tiny_texts(20, 3), {}};
  return data;
}

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

/// The workload of the tiny model that `options` name, with the data above in place of files; data to validate on
/// wherever options.validation says anything.
inline std::unique_ptr<Workload> tiny_workload(const RunOptions& options) {
  const bool with_validation = !options.validation.empty();
  if (options.model == golden("tiny").string()) {
    return std::make_unique<SentenceWorkload>(options, load_bert(options.model), tiny_task(with_validation));
  }
  const auto dtype = options.dtype == "bfloat16" ? torch::kBFloat16 : torch::kFloat;
  return std::make_unique<LanguageWorkload>(options, load_model(options.model, dtype),
                                            tiny_language_data(with_validation));
}

/// A run of a tiny model from its start (or its checkpoint, with `resume`), as `finetune train` would do it.
struct TinyRun {
  Outcome outcome;
  std::vector<StepRecord> records;
  std::map<std::string, torch::Tensor> trained;
  std::string output;
};

inline TinyRun run_tiny(const RunOptions& options, bool resume = false,
                        const std::function<void(const StepRecord&)>& after_step = nullptr,
                        const Processes& processes = {}) {
  const auto workload = tiny_workload(options);
  TinyRun run;
  std::ostringstream output;
  const auto record = [&](const StepRecord& step) {
    run.records.push_back(step);
    if (after_step) after_step(step);
  };
  run.outcome =
      run_training(options, *workload, resume ? Start::Resume : Start::Anew, {output, false, record}, processes);
  run.output = output.str();
  for (const auto& item : workload->model().named_parameters()) {
    if (item.value().requires_grad()) run.trained[item.key()] = item.value().detach().clone();
  }
  return run;
}

}  // namespace finetune
