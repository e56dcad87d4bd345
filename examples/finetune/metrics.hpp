#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <nlohmann/json_fwd.hpp>
#include <vector>

#include "classifier.hpp"
#include "dataset.hpp"
#include "process_group.hpp"
#include "step_record.hpp"

namespace finetune {

/// The run's log: one JSON object a step, then a final one. Lines reach the disk as they are written.
class MetricsLog {
 public:
  /// Starts a log anew, or goes on after `keep_steps` steps of the one that is there.
  MetricsLog(const std::filesystem::path& path, int64_t keep_steps);

  void write(const StepRecord& record);
  void write_final(const nlohmann::json& summary);

  /// All steps so far, those of an interrupted run included.
  const std::vector<StepRecord>& records() const { return records_; }

 private:
  void write_line(const nlohmann::json& line);

  std::filesystem::path path_;
  std::ofstream file_;
  std::vector<StepRecord> records_;
};

/// Accuracy and loss over a data set, without dropout and gradients; the processes divide the work. The model is left
/// in the mode it was in.
Evaluation evaluate(SentenceClassifier& model, const Dataset& data, const Processes& processes = {});

}  // namespace finetune
