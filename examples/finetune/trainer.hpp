#pragma once

#include <functional>
#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "classifier.hpp"
#include "dataset.hpp"
#include "metrics.hpp"
#include "process_group.hpp"
#include "run_options.hpp"

namespace finetune {

/// The data of a run, ready for the model.
struct TaskData {
  Dataset train;
  Dataset test;
  std::vector<std::string> classes;  ///< sorted; a label's index is its class
};

/// Reads and tokenises the run's two TSV files; the tokens are cached in the output folder.
TaskData load_task(const RunOptions& options, const BertConfig& config);

/// The run's model at its start: the base from `base`, fresh adapters (A scaled by init_scale) and head, drawn from
/// the run's seed.
std::shared_ptr<SentenceClassifier> make_classifier(const RunOptions& options, std::shared_ptr<BertModel> base,
                                                    int64_t classes);

enum class Outcome {
  Finished,
  Interrupted,  ///< by Ctrl-C or SIGTERM; the checkpoint is written
};

/// How a run shows itself while it trains.
struct Display {
  std::ostream& out;
  bool is_terminal = false;
  std::function<void(const StepRecord&)> after_step = nullptr;  ///< for whoever wants to watch
};

/// Trains and evaluates. Writes metrics.jsonl, the adapter, the head and the checkpoint to options.out; with `resume`
/// goes on from the checkpoint there, exactly as if the run had never stopped, or to round-off if the number of
/// processes is another. Several processes divide every batch, so that losses are those of one process; the first one
/// writes. All of them stop after the same step when one is interrupted, and throw c10::Error if their data, weights or
/// steps differ.
Outcome run_training(const RunOptions& options, SentenceClassifier& model, const TaskData& task, bool resume,
                     const Display& display, const Processes& processes = {});

}  // namespace finetune
