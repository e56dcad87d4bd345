#pragma once

#include <nlohmann/json.hpp>
#include <ostream>
#include <vector>

#include "reports/step_record.hpp"
#include "training/process_group.hpp"
#include "training/run_options.hpp"
#include "workloads/workload.hpp"

namespace finetune {

/// The last line of metrics.jsonl, but for what the trainer alone knows: the run's options, times, memory, and facts
/// about model and data. `records` are all its steps, at least one.
nlohmann::ordered_json summarize(const RunOptions& options, Workload& workload, const std::vector<StepRecord>& records,
                                 const Processes& processes);

/// Says in a few lines how the finished run went, out of its complete summary.
void show_result(const nlohmann::ordered_json& summary, const RunOptions& options, const Headline& headline,
                 const Scores& test, std::ostream& out);

}  // namespace finetune
