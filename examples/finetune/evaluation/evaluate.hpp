#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "data/records.hpp"
#include "data/tokenize.hpp"
#include "models/language_model.hpp"

namespace finetune {

/// How often the choice with the greatest log-likelihood is the right one. A tie is the first's.
struct ChoiceScores {
  int64_t count = 0;
  double acc = 0;
  double acc_norm = 0;   ///< after dividing by a choice's length in characters
  double acc_bytes = 0;  ///< after dividing by its length in bytes of UTF-8
  double acc_error = 0;  ///< standard errors, from the number of records
  double acc_norm_error = 0;
  double acc_bytes_error = 0;
};

/// log p(choice | prompt) of every choice of every record, in natural logarithms, summed over the choice's tokens in
/// float32. `batch` rows at a time, alike in length. Choices that differ in their last token alone share a row.
std::vector<std::vector<double>> choice_log_likelihoods(LanguageModel& model, const std::vector<ChoiceRecord>& records,
                                                        int64_t batch);

/// What they are worth; `log_likelihoods` as choice_log_likelihoods gives them.
ChoiceScores score_choices(const std::vector<ChoiceRecord>& records,
                           const std::vector<std::vector<double>>& log_likelihoods);

/// The cross-entropy of completions.
struct CompletionLoss {
  int64_t tokens = 0;
  double loss = 0;        ///< mean over the tokens, the end token's included
  double perplexity = 0;  ///< exp(loss)
};

/// Over all records, without dropout and gradients. The model is left in the mode it was in.
CompletionLoss evaluate_completions(LanguageModel& model, const std::vector<TextRecord>& records, int64_t batch);

/// What the model writes after each prompt, greedily: ids up to its end token, which is left out.
std::vector<std::vector<int64_t>> generate_completions(LanguageModel& model, const std::vector<TextRecord>& records,
                                                       int64_t batch, int64_t max_new_tokens);

/// Turns ids into texts, without special tokens. The work is done by decode_tokens.py, with `scratch` for its files,
/// which are removed. Throws Error where that fails.
std::vector<std::string> decode_tokens(const std::vector<std::vector<int64_t>>& ids, const TokenizerOptions& options,
                                       const std::filesystem::path& scratch);

/// Mean scores of generated texts against the records' references, each in [0, 1].
struct TextScores {
  int64_t count = 0;
  double rouge_l = 0;
  double exact_match = 0;
  double strict_number = 0;    ///< number_match by NumberRule::Strict
  double flexible_number = 0;  ///< by NumberRule::Flexible
};

/// `stops` end a text, as far as they occur in it.
TextScores score_texts(const std::vector<TextRecord>& records, const std::vector<std::string>& texts,
                       const std::vector<std::string>& stops = {});

/// The stops of a task: "Question:", "</s>" and "<|im_end|>" for gsm8k, as in the usual evaluation harness; none for
/// others.
std::vector<std::string> stops_of(const std::string& task);

}  // namespace finetune
