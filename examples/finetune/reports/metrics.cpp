#include "reports/metrics.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <limits>
#include <sstream>
#include <string>

#include "common/error.hpp"
#include "common/files.hpp"

namespace finetune {
namespace {

// A loss that is not finite is null in JSON.
double number(const nlohmann::ordered_json& value) {
  return value.is_null() ? std::numeric_limits<double>::quiet_NaN() : value.get<double>();
}

// What add_scores added.
Scores read_scores(const nlohmann::ordered_json& line, const std::string& prefix) {
  Scores scores;
  for (const auto& [name, value] : line.items()) {
    if (name.compare(0, prefix.size() + 1, prefix + "_") == 0) {
      scores.emplace_back(name.substr(prefix.size() + 1), number(value));
    }
  }
  return scores;
}

std::vector<StepRecord> read_records(const std::filesystem::path& path, int64_t count) {
  std::vector<StepRecord> records;
  std::istringstream lines(read_file(path));
  std::string line;
  while (static_cast<int64_t>(records.size()) < count && std::getline(lines, line)) {
    const auto json = nlohmann::ordered_json::parse(line, nullptr, /*allow_exceptions=*/false);
    const auto next = static_cast<int64_t>(records.size()) + 1;
    if (!json.is_object() || json.value("step", int64_t{0}) != next) {
      fail(path.string(), ":", next, ": is not the record of step ", next, "; start the run anew in another --out");
    }
    try {
      records.push_back({next, number(json.at("loss")), number(json.at("lr")), number(json.at("ms_step")),
                         number(json.at("ms_optimizer")), json.at("tokens").get<int64_t>(),
                         read_scores(json, "validation"), read_scores(json, "test")});
    } catch (const nlohmann::json::exception& error) {
      fail(path.string(), ":", next, ": is not a step of this version (", error.what(),
           "); start the run anew in another --out");
    }
  }
  if (static_cast<int64_t>(records.size()) != count) {
    fail(path.string(), ": holds ", records.size(), " steps, but the checkpoint is at step ", count,
         "; start the run anew in another --out");
  }
  return records;
}

nlohmann::ordered_json line_of(const StepRecord& record) {
  nlohmann::ordered_json line = {{"step", record.step},
                                 {"loss", record.loss},
                                 {"lr", record.lr},
                                 {"ms_step", record.ms_step},
                                 {"ms_optimizer", record.ms_optimizer},
                                 {"tokens", record.tokens}};
  add_scores(line, "validation", record.validation);
  add_scores(line, "test", record.test);
  return line;
}

}  // namespace

MetricsLog::MetricsLog(const std::filesystem::path& path, int64_t keep_steps) : path_(path) {
  if (keep_steps > 0) records_ = read_records(path, keep_steps);
  replace_file(path, [&](std::ostream& file) {  // whole or not at all: the checkpoint needs these lines
    for (const StepRecord& record : records_) file << line_of(record).dump() << '\n';
  });
  file_.open(path, std::ios::app);
}

void MetricsLog::write(const StepRecord& record) {
  write_line(line_of(record));
  records_.push_back(record);
}

void MetricsLog::sync() const {
  const int descriptor = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) return;  // nothing that can be helped here; the next line will say so
  ::fsync(descriptor);
  ::close(descriptor);
}

void MetricsLog::write_final(const nlohmann::ordered_json& summary) { write_line(summary); }

void MetricsLog::write_line(const nlohmann::ordered_json& line) {
  file_ << line.dump() << '\n' << std::flush;
  if (!file_) fail(path_.string(), ": cannot be written; check that the folder is writable and has space");
}

void add_scores(nlohmann::ordered_json& line, const std::string& prefix, const Scores& scores) {
  for (const auto& [name, value] : scores) line[prefix + "_" + name] = value;
}

}  // namespace finetune
