#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace finetune {

/// ROUGE-L: the F-measure of the longest common subsequence of words, in [0, 1]. Words are runs of a–z and 0–9 after
/// lower_case, as in Google's rouge_score without its stemmer; 0 where one side has none.
double rouge_l(std::string_view prediction, std::string_view reference);

/// The best of the references.
double rouge_l(std::string_view prediction, const std::vector<std::string>& references);

/// Whether the prediction is one of the references but for case (lower_case), ASCII punctuation and spaces.
bool exact_match(std::string_view prediction, const std::vector<std::string>& references);

/// Which number of a text is its answer.
enum class NumberRule {
  Strict,    ///< the first that follows "#### "
  Flexible,  ///< the last in the text
};

/// The answer of a GSM8K text as the usual evaluation harness finds it, without commas, $ and a dot at the end; empty
/// if there is none. What it takes for a number is any run of digits, dots and commas (Flexible: and $), with or
/// without a minus before it.
std::string find_number(std::string_view text, NumberRule rule);

/// Whether the prediction's number is that after the last "#### " of one of the references.
bool number_match(std::string_view prediction, const std::vector<std::string>& references, NumberRule rule);

/// The standard error of a share that was found over `count` examples: √(p (1 − p) / n).
double standard_error(double share, int64_t count);

/// The text up to the first of `stops`.
std::string cut_at(std::string_view text, const std::vector<std::string>& stops);

}  // namespace finetune
