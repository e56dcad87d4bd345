#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "lora_rite/nn/lora_config.hpp"
#include "lora_rite/nn/python_regex.hpp"

/// PEFT's rules for which module a name or a pattern means. Pure functions of names.
namespace lora_rite::nn::detail {

/// `name` is `ending`, or ends in "." and `ending`.
inline bool is_or_ends_in(const std::string& name, const std::string& ending) {
  if (name.size() <= ending.size()) return name == ending;
  const size_t at = name.size() - ending.size();
  return name[at - 1] == '.' && name.compare(at, ending.size(), ending) == 0;
}

inline bool is_or_ends_in_any(const std::string& name, const std::vector<std::string>& endings) {
  return std::any_of(endings.begin(), endings.end(), [&](const auto& ending) { return is_or_ends_in(name, ending); });
}

/// Whether a pattern of rank_pattern or alpha_pattern means a module: from its name's start or from behind a dot, to
/// its end. The expression is put together as PEFT does it.
inline bool pattern_means(const std::string& field, const std::string& pattern, const std::string& name) {
  return PythonRegex(field, pattern, "(.*\\.)?(" + pattern + ")$").match(name);
}

/// The value of the first pattern that means the module.
template <class Value>
Value pattern_value(const std::string& field, const std::vector<std::pair<std::string, Value>>& patterns,
                    const std::string& name, Value otherwise) {
  for (const auto& [pattern, value] : patterns) {
    if (pattern_means(field, pattern, name)) return value;
  }
  return otherwise;
}

/// The patterns that mean none of the modules.
template <class Patterns>
std::vector<std::string> idle_patterns(const std::string& field, const Patterns& patterns,
                                       const std::vector<std::string>& modules) {
  std::vector<std::string> idle;
  for (const auto& [pattern, value] : patterns) {
    const bool means_one = std::any_of(modules.begin(), modules.end(), [&, &text = pattern](const std::string& module) {
      return pattern_means(field, text, module);
    });
    if (!means_one) idle.push_back(pattern);
  }
  return idle;
}

/// One text of layers_pattern: what the list of layers is called in a name. Mostly a word ("layers", "h"); PEFT takes
/// it for a part of a regular expression.
class LayersPattern {
 public:
  explicit LayersPattern(const std::string& pattern)
      : pattern_(pattern),
        is_plain_(std::all_of(pattern.begin(), pattern.end(),
                              [](unsigned char c) { return std::isalnum(c) != 0 || c == '_' || c == '-'; })),
        expression_("layers_pattern", pattern, "(?:^|.*?\\.)" + pattern + R"(\.(?P<idx>\d+)\.)") {
    // In PEFT's expression it would end what belongs to the pattern.
    TORCH_CHECK(pattern.find('|') == std::string::npos, "LoraConfig: layers_pattern is '", pattern,
                "', expected one without '|'; several are a list");
  }

  /// The digits of the layer's number in a module's name, empty if there is none.
  std::string number_in(const std::string& name) const {
    std::string found;
    for_each_number(name, [&](size_t begin, const std::string& digits) {
      if (!expression_.full_match(name.substr(0, begin + digits.size() + 1))) return true;
      TORCH_CHECK(found.empty(), "LoraConfig: layers_pattern is '", pattern_, "', which finds both ", found, " and ",
                  digits, " in '", name, "', expected a pattern that finds one number");
      found = digits;
      return !is_plain_;  // of a plain word the first one counts
    });
    return found;
  }

  /// Calls visit(begin, digits) for every component of the name that is a number and not the last, until that is false.
  template <class Visit>
  static void for_each_number(const std::string& name, const Visit& visit) {
    for (size_t begin = 0, end = 0; (end = name.find('.', begin)) != std::string::npos; begin = end + 1) {
      const std::string part = name.substr(begin, end - begin);
      const bool is_number = !part.empty() && part.find_first_not_of("0123456789") == std::string::npos;
      if (is_number && !visit(begin, part)) return;
    }
  }

 private:
  std::string pattern_;
  bool is_plain_;
  PythonRegex expression_;
};

/// A LoraConfig's names and patterns, ready to be asked. Throws c10::Error naming the field that is no regular
/// expression.
class ModuleMatcher {
 public:
  explicit ModuleMatcher(const LoraConfig& config)
      : targets_("target_modules", config.target_modules),
        exclusions_("exclude_modules", config.exclude_modules),
        layers_(config.layers_to_transform) {
    if (layers_.empty()) return;
    for (const auto& pattern : config.layers_pattern) layer_patterns_.emplace_back(pattern);
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
      if (const auto* text = std::get_if<std::string>(&names)) pattern.emplace(field, *text);
      if (const auto* list = std::get_if<std::vector<std::string>>(&names)) endings = *list;
    }

    bool match(const std::string& name) const {
      return pattern ? pattern->full_match(name) : is_or_ends_in_any(name, endings);
    }

    std::optional<PythonRegex> pattern;
    std::vector<std::string> endings;
  };

  bool is_in_layers(const std::string& name) const {
    std::string digits = layer_number(name);
    if (digits.empty()) return false;
    digits.erase(0, std::min(digits.find_first_not_of('0'), digits.size() - 1));
    return std::any_of(layers_.begin(), layers_.end(), [&](int64_t layer) { return digits == std::to_string(layer); });
  }

  std::string layer_number(const std::string& name) const {
    std::string found;
    for (const auto& pattern : layer_patterns_) {
      if (!(found = pattern.number_in(name)).empty()) return found;
    }
    if (!layer_patterns_.empty()) return {};
    // Without a pattern: the first number that has two components before it.
    const size_t first = name.find('.');
    LayersPattern::for_each_number(name, [&](size_t begin, const std::string& digits) {
      if (begin <= first + 1) return true;
      found = digits;
      return false;
    });
    return found;
  }

  Names targets_, exclusions_;
  std::vector<int64_t> layers_;
  std::vector<LayersPattern> layer_patterns_;
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
