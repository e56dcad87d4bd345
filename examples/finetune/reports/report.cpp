#include "reports/report.hpp"

#include <ATen/Parallel.h>

#include <algorithm>
#include <filesystem>
#include <lora_rite/nn/adapters.hpp>
#include <string>

#include "common/text.hpp"
#include "memory_plan/machine.hpp"
#include "reports/metrics.hpp"

namespace finetune {
namespace {

// The median is not moved by the first steps, which warm up caches, nor by other programs' bursts.
template <class Value>
double median(const std::vector<StepRecord>& records, const Value& value) {
  std::vector<double> values;
  for (const StepRecord& record : records) values.push_back(value(record));
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace

nlohmann::ordered_json summarize(const RunOptions& options, Workload& workload, const std::vector<StepRecord>& records,
                                 const Processes& processes) {
  const double ms_step = median(records, [](const StepRecord& record) { return record.ms_step; });
  const double ms_optimizer = median(records, [](const StepRecord& record) { return record.ms_optimizer; });
  const double tokens_per_second = median(
      records, [](const StepRecord& record) { return 1000 * static_cast<double>(record.tokens) / record.ms_step; });
  nlohmann::ordered_json summary = {
      {"final", true},
      {"optimizer", options.optimizer},
      {"lr", options.lr},
      {"schedule", options.schedule},
      {"init_scale", options.init_scale},
      {"rank", options.rank},
      {"alpha", options.alpha},
      {"seed", options.seed},
      {"steps", options.steps},
      {"finished_steps", records.size()},
      {"batch", options.batch},
      {"threads", at::get_num_threads()},
      {"processes", processes.size},
      {"trainable_parameters", lora_rite::nn::trainable_parameters(workload.model()).trainable},
      {"ms_per_step", ms_step},
      {"ms_optimizer", ms_optimizer},
      {"optimizer_share", ms_optimizer / ms_step},
      {"tokens_per_second", tokens_per_second},
      {"peak_memory_mb", peak_memory() / 1e6}};
  if (options.device == "cuda") summary["peak_gpu_memory_mb"] = peak_gpu_memory() / 1e6;
  const nlohmann::json facts = workload.summary();
  for (const auto& [name, value] : facts.items()) summary[name] = value;
  add_scores(summary, "validation", records.back().validation);
  return summary;
}

void show_result(const nlohmann::ordered_json& summary, const RunOptions& options, const Headline& headline,
                 const Scores& test, std::ostream& out) {
  if (summary.value("stopped_early", false)) {
    out << "ended after step " << summary["finished_steps"] << ": the last " << options.patience
        << " measurements were no better than the best\n";
  }
  if (summary.value("best_step", int64_t{0}) > 0) {
    out << "best of the validation: " << headline.score << ' ' << fixed(summary["best_validation_" + headline.score], 4)
        << " after step " << summary["best_step"] << ", in " << (std::filesystem::path(options.out) / "best").string()
        << '\n';
  }
  if (!test.empty()) out << "test " << show(test) << '\n';
  out << fixed(summary["ms_per_step"], 0) << " ms/step, of which the optimizer " << fixed(summary["ms_optimizer"], 1)
      << " ms; " << fixed(summary["tokens_per_second"], 0) << " tokens/s; optimizer state "
      << fixed(summary["optimizer_state_mb"], 2) << " MB; peak memory " << fixed(summary["peak_memory_mb"], 0) << " MB";
  if (options.device == "cuda") out << ", on the GPU " << fixed(summary["peak_gpu_memory_mb"], 0) << " MB";
  out << '\n';
}

}  // namespace finetune
