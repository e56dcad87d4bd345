#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "data/records.hpp"
#include "data/tokenize.hpp"
#include "models/language_model.hpp"
#include "reports/step_record.hpp"
#include "training/process_group.hpp"

namespace finetune {

/// Records to measure a language model on: texts to be continued, or questions with choices; the other list is empty.
struct LanguageTest {
  std::string task;  ///< "gsm8k", "arc", …
  std::vector<TextRecord> texts;
  std::vector<ChoiceRecord> choices;

  bool has_choices() const { return !choices.empty(); }
  int64_t size() const { return static_cast<int64_t>(texts.size() + choices.size()); }
};

/// Reads a file of prepare_tasks.py of either kind; errors as read_text_records.
LanguageTest read_language_test(const std::filesystem::path& path, const TaskReading& reading);

/// Texts: loss (mean over the completions' tokens) and perplexity. Choices: acc, acc_norm and acc_bytes (ChoiceScores)
/// with their standard errors. `batch` rows at a time; the processes divide the records and have the same result.
Scores measure(LanguageModel& model, const LanguageTest& test, int64_t batch, const Processes& processes = {});

/// Writes up to `max_new_tokens` after each prompt and compares with the references: rouge_l and exact_match, for gsm8k
/// strict_number and flexible_number as well (TextScores), all but rouge_l with their standard errors. `scratch` is the
/// beginning of names for files that are removed again. `texts` receives what this process's part of the records
/// became, if it is not null. Throws Error if the test has choices, or decoding fails.
Scores measure_generation(LanguageModel& model, const LanguageTest& test, int64_t batch, int64_t max_new_tokens,
                          const TokenizerOptions& tokenizer, const std::filesystem::path& scratch,
                          const Processes& processes = {}, std::vector<std::string>* texts = nullptr);

}  // namespace finetune
