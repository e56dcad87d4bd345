#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <optional>
#include <regex>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "lora_rite/nn/lora_config.hpp"

/// PEFT's rules for which module a name or a pattern means. Pure functions of names.
namespace lora_rite::nn::detail {

// libstdc++ can match in polynomial time, at the price of back-references, which PEFT's users have no use for.
#ifdef __GLIBCXX__
inline constexpr auto kPolynomial = std::regex_constants::__polynomial;
#else
inline constexpr std::regex::flag_type kPolynomial = {};
#endif

/// A regular expression; throws c10::Error naming the field if it is none, or one that only a hostile file would have:
/// the standard library compiles them by recursion, whose depth grows with their length and their brackets.
inline std::regex to_regex(const std::string& field, const std::string& pattern,
                           std::regex::flag_type more = kPolynomial) {
  constexpr size_t kMostCharacters = 8192, kMostBrackets = 100;
  TORCH_CHECK(pattern.size() <= kMostCharacters, "LoraConfig: ", field, " is a pattern of ", pattern.size(),
              " characters, expected at most ", kMostCharacters);
  const auto brackets = static_cast<size_t>(std::count(pattern.begin(), pattern.end(), '('));
  TORCH_CHECK(brackets <= kMostBrackets, "LoraConfig: ", field, " is a pattern with ", brackets,
              " opening brackets, expected at most ", kMostBrackets);
  std::regex result;
  try {
    result.assign(pattern, std::regex::ECMAScript | more);
  } catch (const std::regex_error& error) {
    TORCH_CHECK(false, "LoraConfig: ", field, " is '", pattern, "', expected a regular expression (ECMAScript's: no ",
                "look-behind, no named groups, no inline flags): ", error.what());
  }
  return result;
}

/// `name` is `ending`, or ends in "." and `ending`.
inline bool is_or_ends_in(const std::string& name, const std::string& ending) {
  if (name.size() <= ending.size()) return name == ending;
  const size_t at = name.size() - ending.size();
  return name[at - 1] == '.' && name.compare(at, ending.size(), ending) == 0;
}

inline bool is_or_ends_in_any(const std::string& name, const std::vector<std::string>& endings) {
  return std::any_of(endings.begin(), endings.end(), [&](const auto& ending) { return is_or_ends_in(name, ending); });
}

/// The value of the first pattern that matches `name`, from its start or from behind a dot, to its end.
template <class Value>
Value pattern_value(const std::string& field, const std::vector<std::pair<std::string, Value>>& patterns,
                    const std::string& name, Value otherwise) {
  for (const auto& [pattern, value] : patterns) {
    if (std::regex_match(name, to_regex(field, "(.*\\.)?(" + pattern + ")"))) return value;
  }
  return otherwise;
}

/// A LoraConfig's names and patterns, ready to be asked. Throws c10::Error naming the field that is no regular
/// expression.
class ModuleMatcher {
 public:
  explicit ModuleMatcher(const LoraConfig& config)
      : targets_("target_modules", config.target_modules),
        exclusions_("exclude_modules", config.exclude_modules),
        layers_(config.layers_to_transform) {
    if (layers_.empty()) return;
    // The first number in the name that has something before it, or the one behind the list's name.
    if (config.layers_pattern.empty()) layer_numbers_ = {std::regex(R"(.*?\.[^.]*\.(\d+)\.)")};
    for (const auto& pattern : config.layers_pattern) {
      layer_numbers_.push_back(to_regex("layers_pattern", R"((?:^|.*?\.)(?:)" + pattern + R"()\.(\d+)\.)", {}));
    }
  }

  bool excludes(const std::string& name) const { return exclusions_.match(name); }

  /// Whether the name is a target; exclusions come before this.
  bool targets(const std::string& name) const {
    if (!targets_.match(name)) return false;
    if (layers_.empty()) return true;
    // What is listed by its full name is meant whatever its layer.
    const auto& listed = targets_.endings;
    return std::find(listed.begin(), listed.end(), name) != listed.end() || is_in_layers(name);
  }

 private:
  /// A ModuleNames with its pattern compiled.
  struct Names {
    Names(const std::string& field, const ModuleNames& names) {
      if (const auto* text = std::get_if<std::string>(&names)) pattern = to_regex(field, *text);
      if (const auto* list = std::get_if<std::vector<std::string>>(&names)) endings = *list;
    }

    bool match(const std::string& name) const {
      return pattern ? std::regex_match(name, *pattern) : is_or_ends_in_any(name, endings);
    }

    std::optional<std::regex> pattern;
    std::vector<std::string> endings;
  };

  bool is_in_layers(const std::string& name) const {
    for (const auto& number : layer_numbers_) {
      std::smatch found;
      if (!std::regex_search(name, found, number, std::regex_constants::match_continuous)) continue;
      std::string digits = found[found.size() - 1].str();
      digits.erase(0, std::min(digits.find_first_not_of('0'), digits.size() - 1));
      return std::any_of(layers_.begin(), layers_.end(),
                         [&](int64_t layer) { return digits == std::to_string(layer); });
    }
    return false;
  }

  Names targets_, exclusions_;
  std::vector<int64_t> layers_;
  std::vector<std::regex> layer_numbers_;
};

/// target_modules is "all-linear", in letters of any case.
inline bool is_all_linear(const ModuleNames& names) {
  const auto* text = std::get_if<std::string>(&names);
  if (text == nullptr) return false;
  std::string lower = *text;
  std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) { return std::tolower(c); });
  return lower == "all-linear";
}

}  // namespace lora_rite::nn::detail
