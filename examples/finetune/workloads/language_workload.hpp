#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "data/batches.hpp"
#include "evaluation/measure.hpp"
#include "models/language_model.hpp"
#include "workloads/workload.hpp"

namespace finetune {

/// The data of a language model's run.
struct LanguageData {
  std::string task;  ///< "gsm8k", "arc", …
  std::vector<TextRecord> train;
  LanguageTest validation;  ///< may be empty
  LanguageTest test;        ///< may be empty
};

/// How the files of prepare_tasks.py are to be read for the model that a config.json describes.
TaskReading reading_of(const std::filesystem::path& config);

/// Reads the run's files of prepare_tasks.py.
LanguageData load_language_data(const RunOptions& options, const TaskReading& reading);

/// A language model that learns to continue prompts. Steps take records of like length (LengthBuckets); a base with
/// dropout of its own (T5's config.json) trains with it.
class LanguageWorkload : public Workload {
 public:
  /// At its start, with fresh adapters for `model`. Throws Error for options that a language model has not.
  LanguageWorkload(RunOptions options, std::shared_ptr<LanguageModel> model, LanguageData data);

  LanguageModel& model() override { return *model_; }
  std::vector<int64_t> examples_of(int64_t step) override { return buckets_.indices(step); }
  double weight(const std::vector<int64_t>& examples) const override;
  int64_t tokens(const std::vector<int64_t>& examples) const override;
  torch::Tensor loss_sum(const std::vector<int64_t>& examples) override;
  bool has(Split split) const override { return data(split).size() > 0; }
  Scores evaluate(Split split, const Processes& processes) override;
  Headline headline() const override;
  void save(const std::filesystem::path& folder) const override;
  nlohmann::json summary() const override;
  std::string title() const override;
  RunIdentity identity() const override;

 private:
  const LanguageTest& data(Split split) const { return split == Split::Test ? data_.test : data_.validation; }

  RunOptions options_;
  LanguageData data_;
  LengthBuckets buckets_;
  std::shared_ptr<LanguageModel> model_;
  RunIdentity base_;
};

/// Everything from the run's folders and files. Errors as make_workload's.
std::unique_ptr<Workload> load_language_workload(const RunOptions& options, const Processes& processes);

}  // namespace finetune
