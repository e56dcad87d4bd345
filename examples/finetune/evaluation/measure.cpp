#include "evaluation/measure.hpp"

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <utility>

#include "common/error.hpp"
#include "evaluation/evaluate.hpp"
#include "evaluation/scores.hpp"

namespace finetune {
namespace {

// What the file says it holds; a file that says nothing is left to its reader's errors.
bool holds_choices(const std::filesystem::path& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  const auto header = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
  return header.is_object() && header.value("kind", nlohmann::json()) == "choices";
}

// Every size-th record: the parts of all processes are alike.
template <class Record>
std::vector<Record> own_part(const std::vector<Record>& records, const Processes& processes) {
  std::vector<Record> part;
  for (size_t index = processes.rank; index < records.size(); index += processes.size) part.push_back(records[index]);
  return part;
}

// Means over all records of scores that are means over this process's; `own` is their names and values.
Scores combine(Scores own, size_t own_count, size_t count, const Processes& processes) {
  std::vector<double> sums;
  for (const auto& [name, mean] : own) sums.push_back(mean * static_cast<double>(own_count));
  sums = processes.sum(sums);
  for (size_t index = 0; index < own.size(); ++index) own[index].second = sums[index] / static_cast<double>(count);
  return own;
}

// Shares of `count` records, each with its standard error behind it.
Scores with_errors(const Scores& shares, int64_t count) {
  Scores result;
  for (const auto& [name, share] : shares) {
    result.emplace_back(name, share);
    result.emplace_back(name + "_error", standard_error(share, count));
  }
  return result;
}

Scores measure_choices(LanguageModel& model, const std::vector<ChoiceRecord>& records, int64_t batch,
                       const Processes& processes) {
  const std::vector<ChoiceRecord> own = own_part(records, processes);
  ChoiceScores scores;
  if (!own.empty()) scores = score_choices(own, choice_log_likelihoods(model, own, batch));
  const Scores shares = combine({{"acc", scores.acc}, {"acc_norm", scores.acc_norm}, {"acc_bytes", scores.acc_bytes}},
                                own.size(), records.size(), processes);
  return with_errors(shares, static_cast<int64_t>(records.size()));
}

}  // namespace

LanguageTest read_language_test(const std::filesystem::path& path, const TaskReading& reading) {
  if (holds_choices(path)) {
    auto file = read_choice_records(path, reading);
    return {file.task, {}, std::move(file.records)};
  }
  auto file = read_text_records(path, reading);
  return {file.task, std::move(file.records), {}};
}

Scores measure(LanguageModel& model, const LanguageTest& test, int64_t batch, const Processes& processes) {
  if (test.has_choices()) return measure_choices(model, test.choices, batch, processes);
  const std::vector<TextRecord> own = own_part(test.texts, processes);
  CompletionLoss part;
  if (!own.empty()) part = evaluate_completions(model, own, batch);
  const auto tokens = static_cast<double>(part.tokens);
  const std::vector<double> sums = processes.sum({part.loss * tokens, tokens});
  const double loss = sums[0] / sums[1];
  return {{"loss", loss}, {"perplexity", std::exp(loss)}};
}

Scores measure_generation(LanguageModel& model, const LanguageTest& test, int64_t batch, int64_t max_new_tokens,
                          const TokenizerOptions& tokenizer, const std::filesystem::path& scratch,
                          const Processes& processes, std::vector<std::string>* texts) {
  if (test.has_choices()) {
    fail("there is nothing to generate: the test file has choices; make it anew with prepare_tasks.py --for train");
  }
  const std::vector<TextRecord> own = own_part(test.texts, processes);
  TextScores scores;
  if (!own.empty()) {
    const auto ids = generate_completions(model, own, batch, max_new_tokens);
    std::filesystem::path own_scratch = scratch;
    own_scratch += "." + std::to_string(processes.rank);
    const std::vector<std::string> written = decode_tokens(ids, tokenizer, own_scratch);
    scores = score_texts(own, written, stops_of(test.task));
    if (texts != nullptr) *texts = written;
  }
  Scores means = {{"rouge_l", scores.rouge_l}, {"exact_match", scores.exact_match}};
  if (test.task == "gsm8k") {
    means.emplace_back("strict_number", scores.strict_number);
    means.emplace_back("flexible_number", scores.flexible_number);
  }
  means = combine(means, own.size(), test.texts.size(), processes);
  // ROUGE-L is no share: its error would need its spread over the records.
  Scores result = {means.front()};
  means.erase(means.begin());
  for (auto& score : with_errors(means, test.size())) result.push_back(std::move(score));
  return result;
}

}  // namespace finetune
