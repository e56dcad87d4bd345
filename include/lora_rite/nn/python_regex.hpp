#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstddef>
#include <string>
#include <utility>

#include "lora_rite/nn/python_regex/characters.hpp"
#include "lora_rite/nn/python_regex/matcher.hpp"
#include "lora_rite/nn/python_regex/parser.hpp"
#include "lora_rite/nn/python_regex/tree.hpp"

/// Regular expressions as Python's `re` reads them, which is what PEFT matches the names of modules with.
namespace lora_rite::nn::detail {

/// A regular expression in the dialect of Python's `re` (3.11): what matches here matches there, and what is an error
/// there is one here. Look-ahead and look-behind, named groups, inline flags (a, i, m, s, u) and every escape but
/// \N{…} are there. Refused by name is what no set of places can tell: back-references, conditions, atomic groups and
/// possessive quantifiers; and the flag x. Beyond ASCII every character counts as a letter but for spaces, and case is
/// not ignored there.
///
/// Whether a text matches does not depend on the order in which a matcher tries things. So all places where a match can
/// have got to are followed at once: no recursion but that of the brackets, no exponential time.
class PythonRegex {
 public:
  /// Throws c10::Error naming the field and `shown`, the pattern as the user wrote it, if `pattern` is no regular
  /// expression, uses what is refused, or is one that only a hostile file would have.
  PythonRegex(std::string field, std::string shown, const std::string& pattern)
      : source_{std::move(field), std::move(shown)} {
    constexpr size_t kMostCharacters = 65536, kMostBrackets = 100;
    TORCH_CHECK(pattern.size() <= kMostCharacters, "LoraConfig: ", source_.field, " is a pattern of ", pattern.size(),
                " characters, expected at most ", kMostCharacters);
    const auto brackets = static_cast<size_t>(std::count(pattern.begin(), pattern.end(), '('));
    TORCH_CHECK(brackets <= kMostBrackets, "LoraConfig: ", source_.field, " is a pattern with ", brackets,
                " opening brackets, expected at most ", kMostBrackets);
    tree_ = regex::Parser(source_, code_points(pattern)).parse();
  }

  PythonRegex(const std::string& field, const std::string& pattern) : PythonRegex(field, pattern, pattern) {}

  /// re.fullmatch: the whole text.
  bool full_match(const std::string& text) const { return ends(text).back() != 0; }

  /// re.match: a beginning of the text.
  bool match(const std::string& text) const { return regex::any(ends(text)); }

 private:
  regex::Places ends(const std::string& text) const {
    const std::u32string points = code_points(text);
    return regex::Matcher(source_, tree_, points).ends();
  }

  regex::Source source_;
  regex::Tree tree_;
};

}  // namespace lora_rite::nn::detail
