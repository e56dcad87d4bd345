#include "metrics.hpp"

#include <ATen/core/grad_mode.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>

#include "error.hpp"
#include "files.hpp"

namespace finetune {
namespace {

// Large enough for full speed on a CPU, small enough for little padding.
constexpr int64_t kEvaluationBatch = 64;

// A loss that is not finite is null in JSON.
double number(const nlohmann::json& value) {
  return value.is_null() ? std::numeric_limits<double>::quiet_NaN() : value.get<double>();
}

std::vector<StepRecord> read_records(const std::filesystem::path& path, int64_t count) {
  std::vector<StepRecord> records;
  std::istringstream lines(read_file(path));
  std::string line;
  while (static_cast<int64_t>(records.size()) < count && std::getline(lines, line)) {
    const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    const auto next = static_cast<int64_t>(records.size()) + 1;
    if (!json.is_object() || json.value("step", int64_t{0}) != next) {
      fail(path.string(), ":", next, ": is not the record of step ", next, "; start the run anew in another --out");
    }
    records.push_back(
        {next, number(json["loss"]), number(json["lr"]), number(json["ms_step"]), number(json["ms_optimizer"]), {}});
    if (json.contains("test_loss")) {
      records.back().test = {number(json["test_accuracy"]), number(json["test_accuracy_error"]),
                             number(json["test_loss"])};
    }
  }
  if (static_cast<int64_t>(records.size()) != count) {
    fail(path.string(), ": holds ", records.size(), " steps, but the checkpoint is at step ", count,
         "; start the run anew in another --out");
  }
  return records;
}

}  // namespace

MetricsLog::MetricsLog(const std::filesystem::path& path, int64_t keep_steps) : path_(path) {
  const std::vector<StepRecord> kept = keep_steps > 0 ? read_records(path, keep_steps) : std::vector<StepRecord>();
  file_.open(path, std::ios::trunc);
  for (const StepRecord& record : kept) write(record);
}

void MetricsLog::write(const StepRecord& record) {
  nlohmann::json line = {{"step", record.step},
                         {"loss", record.loss},
                         {"lr", record.lr},
                         {"ms_step", record.ms_step},
                         {"ms_optimizer", record.ms_optimizer}};
  if (record.test) {
    line["test_accuracy"] = record.test->accuracy;
    line["test_accuracy_error"] = record.test->accuracy_error;
    line["test_loss"] = record.test->loss;
  }
  write_line(line);
  records_.push_back(record);
}

void MetricsLog::write_final(const nlohmann::json& summary) { write_line(summary); }

void MetricsLog::write_line(const nlohmann::json& line) {
  file_ << line.dump() << '\n' << std::flush;
  if (!file_) fail(path_.string(), ": cannot be written; check that the folder is writable and has space");
}

Evaluation evaluate(SentenceClassifier& model, const Dataset& data, const Processes& processes) {
  const at::NoGradGuard no_grad;
  const bool was_training = model.is_training();
  model.eval();
  double loss = 0;
  int64_t correct = 0;
  const auto batches = batches_by_length(data, kEvaluationBatch);
  // One after another, because batches of long sentences take longer.
  for (auto index = static_cast<size_t>(processes.rank); index < batches.size(); index += processes.size) {
    const Batch batch = make_batch(data, batches[index], model.bert().config().pad_token_id);
    const torch::Tensor logits = model.forward(batch.tokens, batch.mask);  // [batch, classes]
    loss += at::cross_entropy_loss(logits, batch.labels, {}, at::Reduction::Sum).item<double>();
    correct += logits.argmax(1).eq(batch.labels).sum().item<int64_t>();
  }
  model.train(was_training);
  const std::vector<double> sums = processes.sum({loss, static_cast<double>(correct)});
  const auto count = static_cast<double>(data.size());
  const double accuracy = sums[1] / count;
  return {accuracy, std::sqrt(accuracy * (1 - accuracy) / count), sums[0] / count};
}

}  // namespace finetune
