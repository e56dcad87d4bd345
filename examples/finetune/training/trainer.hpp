#pragma once

#include <functional>
#include <ostream>

#include "reports/step_record.hpp"
#include "training/process_group.hpp"
#include "training/run_options.hpp"
#include "workloads/workload.hpp"

namespace finetune {

enum class Outcome {
  Finished,     ///< after all steps, or because nothing improved any more (options.patience)
  Interrupted,  ///< by Ctrl-C or SIGTERM; the checkpoint is written
};

/// How a run shows itself while it trains.
struct Display {
  std::ostream& out;
  bool is_terminal = false;
  std::function<void(const StepRecord&)> after_step = nullptr;  ///< for whoever wants to watch
};

/// Trains and measures. Writes metrics.jsonl, the adapter of the last step, that of the best measurement (best/) and
/// the checkpoint to options.out; resumed, goes on from the checkpoint there, exactly as if the run had never
/// stopped, or to round-off if the number of processes is another. Throws Error if that run was begun with other data,
/// another base or another tokenizer (Start::ResumeAnyway says so and goes on); a checkpoint of before that were
/// remembered is taken, and said to be one. Several processes divide every batch, so that losses are those of one
/// process; the first one writes. All of them stop after the same step when one is interrupted, and throw c10::Error if
/// their data, weights or steps differ.
Outcome run_training(const RunOptions& options, Workload& workload, Start start, const Display& display,
                     const Processes& processes = {});

}  // namespace finetune
