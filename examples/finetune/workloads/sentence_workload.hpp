#pragma once

#include <memory>
#include <string>
#include <vector>

#include "data/dataset.hpp"
#include "data/tokenize.hpp"
#include "models/classifier.hpp"
#include "workloads/workload.hpp"

namespace finetune {

/// The data of a classifier's run, ready for the model.
struct TaskData {
  Dataset train;
  Dataset validation;  ///< may be empty
  Dataset test;
  std::vector<std::string> classes;  ///< sorted; a label's index is its class
};

/// Throws Error if the model has not so many positions.
void check_max_length(int64_t max_length, const BertConfig& config);

/// Rows of the TSV file `path` as tokens and classes; errors as index_labels and tokenize, which keeps the tokens in
/// `cache`.
Dataset tokenize_rows(const std::vector<LabelledText>& rows, const std::vector<std::string>& classes,
                      const std::filesystem::path& path, const TokenizerOptions& tokenizer, const BertConfig& config,
                      const std::filesystem::path& cache);

/// Reads and tokenises the run's TSV files; the tokens are cached in the output folder.
TaskData load_task(const RunOptions& options, const BertConfig& config);

/// Accuracy, its standard error and the mean loss (cross-entropy) over a data set, without dropout and gradients; the
/// processes divide the work. The model is left in the mode it was in.
Scores evaluate(SentenceClassifier& model, const Dataset& data, const Processes& processes = {});

/// Writes the classifier head: `weight` [classes, hidden], `bias` [classes], and the class names as a JSON list in the
/// metadata's `labels`.
void save_head(const std::filesystem::path& path, const torch::nn::LinearImpl& head,
               const std::vector<std::string>& classes);

/// A BERT encoder that learns to sort sentences into classes.
class SentenceWorkload : public Workload {
 public:
  /// At its start: fresh adapters for `base`, and a fresh head. Throws Error for options that a classifier has not.
  SentenceWorkload(RunOptions options, std::shared_ptr<BertModel> base, TaskData task);

  SentenceClassifier& model() override { return *model_; }
  std::vector<int64_t> examples_of(int64_t step) override { return order_.indices(step); }
  double weight(const std::vector<int64_t>& examples) const override { return static_cast<double>(examples.size()); }
  int64_t tokens(const std::vector<int64_t>& examples) const override;
  torch::Tensor loss_sum(const std::vector<int64_t>& examples) override;
  bool has(Split split) const override { return data(split).size() > 0; }
  Scores evaluate(Split split, const Processes& processes) override;
  Headline headline() const override { return {"accuracy", /*higher_is_better=*/true}; }
  void save(const std::filesystem::path& folder) const override;
  nlohmann::json summary() const override;
  std::string title() const override;
  RunIdentity identity() const override;

 private:
  const Dataset& data(Split split) const { return split == Split::Test ? task_.test : task_.validation; }

  RunOptions options_;
  TaskData task_;
  BatchOrder order_;
  RunIdentity base_;
  std::shared_ptr<SentenceClassifier> model_;
};

/// Everything from the run's folders and files. Errors as make_workload's.
std::unique_ptr<Workload> load_sentence_workload(const RunOptions& options, const Processes& processes);

}  // namespace finetune
