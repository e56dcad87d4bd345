#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <vector>

#include "reports/step_record.hpp"

namespace finetune {

/// The run's log: one JSON object a step, then a final one. Lines reach the file as they are written.
class MetricsLog {
 public:
  /// Starts a log anew, or goes on after `keep_steps` steps of the one that is there.
  MetricsLog(const std::filesystem::path& path, int64_t keep_steps);

  void write(const StepRecord& record);
  void write_final(const nlohmann::ordered_json& summary);

  /// Brings what was written to the disk.
  void sync() const;

  /// All steps so far, those of an interrupted run included.
  const std::vector<StepRecord>& records() const { return records_; }

 private:
  void write_line(const nlohmann::ordered_json& line);

  std::filesystem::path path_;
  std::ofstream file_;
  std::vector<StepRecord> records_;
};

/// Adds scores to a line of the log as "test_loss", …, of which "test" is the prefix.
void add_scores(nlohmann::ordered_json& line, const std::string& prefix, const Scores& scores);

}  // namespace finetune
