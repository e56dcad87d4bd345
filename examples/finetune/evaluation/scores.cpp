#include "evaluation/scores.hpp"

#include <algorithm>
#include <cmath>

#include "evaluation/lower_case.hpp"

namespace finetune {
namespace {

// ASCII alone, whatever the locale.
bool is_digit(char32_t character) { return character >= '0' && character <= '9'; }
bool is_letter(char32_t character) {
  return (character >= 'a' && character <= 'z') || (character >= 'A' && character <= 'Z');
}
bool is_punctuation(char32_t character) {
  return character > ' ' && character < '\x7f' && !is_digit(character) && !is_letter(character);
}

std::vector<std::u32string> words(std::string_view text) {
  std::vector<std::u32string> result;
  bool inside = false;
  for (const char32_t character : lower_case(text)) {
    const bool part = is_letter(character) || is_digit(character);
    if (part && !inside) result.emplace_back();
    if (part) result.back() += character;
    inside = part;
  }
  return result;
}

size_t longest_common_subsequence(const std::vector<std::u32string>& left, const std::vector<std::u32string>& right) {
  // lengths[j]: of the left words so far and the first j right words
  std::vector<size_t> lengths(right.size() + 1, 0);
  for (const std::u32string& word : left) {
    size_t diagonal = 0;
    for (size_t j = 1; j <= right.size(); ++j) {
      const size_t above = lengths[j];
      lengths[j] = word == right[j - 1] ? diagonal + 1 : std::max(above, lengths[j - 1]);
      diagonal = above;
    }
  }
  return lengths.back();
}

std::u32string normalise(std::string_view text) {
  std::u32string result;
  bool space = false;
  for (const char32_t character : lower_case(text)) {
    if (is_space(character)) {
      space = true;
    } else if (!is_punctuation(character)) {
      if (space && !result.empty()) result += ' ';
      result += character;
      space = false;
    }
  }
  return result;
}

// What the harness removes from predictions and references before it compares them.
std::string bare_number(std::string_view text) {
  std::string result;
  for (const char character : text) {
    if (character != ',' && character != '$') result += character;
  }
  if (!result.empty() && result.back() == '.') result.pop_back();
  return result;
}

constexpr std::string_view kAnswerMark = "#### ";

bool is_strict(char character) { return is_digit(character) || character == '.' || character == ','; }
bool is_flexible(char character) { return is_strict(character) || character == '$'; }

// Where the run of characters that `fits` ends.
template <class Fits>
size_t run_end(std::string_view text, size_t begin, Fits fits) {
  while (begin < text.size() && fits(text[begin])) ++begin;
  return begin;
}

// #### (\-?[0-9\.\,]+)
std::string_view strict_number(std::string_view text) {
  for (size_t mark = text.find(kAnswerMark); mark != text.npos; mark = text.find(kAnswerMark, mark + 1)) {
    const size_t begin = mark + kAnswerMark.size();
    const size_t digits = begin + (begin < text.size() && text[begin] == '-');
    const size_t end = run_end(text, digits, is_strict);
    if (end > digits) return text.substr(begin, end - begin);
  }
  return {};
}

// The last of (-?[$0-9.,]{2,})|(-?[0-9]+), found from left to right without overlap.
std::string_view flexible_number(std::string_view text) {
  std::string_view last;
  for (size_t begin = 0; begin < text.size();) {
    const size_t first = begin + (text[begin] == '-');
    size_t end = run_end(text, first, is_flexible);
    if (end < first + 2) end = run_end(text, first, is_digit);
    if (end > first) {
      last = text.substr(begin, end - begin);
      begin = end;
    } else {
      ++begin;
    }
  }
  return last;
}

}  // namespace

double rouge_l(std::string_view prediction, std::string_view reference) {
  const std::vector<std::u32string> left = words(prediction);
  const std::vector<std::u32string> right = words(reference);
  const auto common = static_cast<double>(longest_common_subsequence(left, right));
  if (common == 0) return 0;
  const double precision = common / static_cast<double>(left.size());
  const double recall = common / static_cast<double>(right.size());
  return 2 * precision * recall / (precision + recall);
}

double rouge_l(std::string_view prediction, const std::vector<std::string>& references) {
  double best = 0;
  for (const std::string& reference : references) best = std::max(best, rouge_l(prediction, reference));
  return best;
}

bool exact_match(std::string_view prediction, const std::vector<std::string>& references) {
  const std::u32string wanted = normalise(prediction);
  return std::any_of(references.begin(), references.end(),
                     [&](const std::string& reference) { return normalise(reference) == wanted; });
}

std::string find_number(std::string_view text, NumberRule rule) {
  return bare_number(rule == NumberRule::Strict ? strict_number(text) : flexible_number(text));
}

bool number_match(std::string_view prediction, const std::vector<std::string>& references, NumberRule rule) {
  const std::string found = find_number(prediction, rule);
  return !found.empty() && std::any_of(references.begin(), references.end(), [&](std::string_view reference) {
    const size_t mark = reference.rfind(kAnswerMark);
    if (mark != reference.npos) reference.remove_prefix(mark + kAnswerMark.size());
    return bare_number(reference) == found;
  });
}

double standard_error(double share, int64_t count) {
  return std::sqrt(share * (1 - share) / static_cast<double>(count));
}

std::string cut_at(std::string_view text, const std::vector<std::string>& stops) {
  for (const std::string& stop : stops) text = text.substr(0, text.find(stop));
  return std::string(text);
}

}  // namespace finetune
