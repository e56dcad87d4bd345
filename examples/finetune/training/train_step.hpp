#pragma once

#include <cstdint>
#include <vector>

#include "reports/step_record.hpp"
#include "training/optimizers.hpp"
#include "training/process_group.hpp"
#include "training/run_options.hpp"
#include "workloads/workload.hpp"

namespace finetune {

/// One step on `examples`: forward and backward in micro-batches, gradients averaged over the processes and clipped,
/// the optimizers' steps. Returns loss, rate, tokens and times; the caller knows the step's number.
StepRecord train_step(const RunOptions& options, Workload& workload, const TrainingOptimizer& training,
                      const std::vector<int64_t>& examples, const Processes& processes);

/// The seed of a step's dropout. A function of seed, step and process, so that resumed runs need no state of it;
/// examples of different processes get masks of their own.
uint64_t dropout_seed(uint64_t seed, int64_t step, int rank);

}  // namespace finetune
