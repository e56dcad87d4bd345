#pragma once

#include <c10/util/Exception.h>

#include <cstddef>
#include <string>
#include <utility>

#include "lora_rite/nn/python_regex/characters.hpp"
#include "lora_rite/nn/python_regex/tree.hpp"

/// How a regular expression is read, as far as that concerns single characters and sets of them.
namespace lora_rite::nn::detail::regex {

/// A pattern and the place up to which it is read. What stands there is taken from it, or refused by an error.
class Reader {
 protected:
  Reader(const Source& source, std::u32string pattern) : source_(source), pattern_(std::move(pattern)) {}

  [[noreturn]] void refuse(const std::string& why) const {
    TORCH_CHECK(false, source_.label(), "of Python's re without back-references, conditions, atomic groups, ",
                "possessive quantifiers and the flag x: ", why);
  }

  bool is_next(char32_t character) const { return at_ < pattern_.size() && pattern_[at_] == character; }

  bool take(char32_t character) {
    if (!is_next(character)) return false;
    ++at_;
    return true;
  }

  char32_t take_any(const char* missing) {
    if (at_ >= pattern_.size()) refuse(missing);
    return pattern_[at_++];
  }

  /// Whether a repetition stands here; a brace that is none is a character like others.
  bool is_repetition() const {
    if (is_next('*') || is_next('+') || is_next('?')) return true;
    if (!is_next('{') || at_ + 1 >= pattern_.size() || pattern_[at_ + 1] == '}') return false;
    size_t at = at_ + 1;
    const auto digits = [&] {
      while (at < pattern_.size() && is_digit(pattern_[at])) ++at;
    };
    digits();
    if (at < pattern_.size() && pattern_[at] == ',') {
      ++at;
      digits();
    }
    return at < pattern_.size() && pattern_[at] == '}';
  }

  /// The character that an escape stands for, whose first letter is read, in a set or outside of one.
  char32_t escaped(char32_t letter) {
    switch (letter) {
      case 'a':
        return '\a';
      case 'f':
        return '\f';
      case 'n':
        return '\n';
      case 'r':
        return '\r';
      case 't':
        return '\t';
      case 'v':
        return '\v';
      case 'x':
        return hexadecimal(2);
      case 'u':
        return hexadecimal(4);
      case 'U':
        return hexadecimal(8);
      case 'N':
        refuse("a character by its name (\\N{…})");
      default:
        break;
    }
    if (is_octal(letter)) {
      char32_t value = letter - '0';
      for (int i = 0; i < 2 && at_ < pattern_.size() && is_octal(pattern_[at_]); ++i) {
        value = value * 8 + (pattern_[at_++] - '0');
      }
      if (value > 0377) refuse("an octal escape above \\377");
      return value;
    }
    if (is_letter(letter) || is_digit(letter)) refuse("an escape that Python does not know");
    return letter;
  }

  /// What stands behind the opening bracket of a set.
  Characters read_set(const Flags& flags) {
    Characters set;
    set.flags = flags;
    set.negated = take('^');
    const char* open = "a set without its ]";
    // One character of a set, or a class: then its letter is in `cls`.
    const auto element = [&](char32_t character, char& cls) {
      cls = 0;
      if (character != '\\') return character;
      const char32_t letter = take_any(open);
      if (letter == 'b') return char32_t{'\b'};
      cls = class_letter(letter);
      return cls != 0 ? letter : escaped(letter);
    };
    for (bool first = true;; first = false) {
      const char32_t begin = take_any(open);
      if (begin == ']' && !first) break;
      char cls = 0;
      const char32_t low = element(begin, cls);
      char32_t high = low;
      bool ends = false;
      if (take('-')) {
        const char32_t end = take_any(open);
        if (end == ']') {
          set.ranges.emplace_back('-', '-');
          ends = true;
        } else {
          char other = 0;
          high = element(end, other);
          if (cls != 0 || other != 0) refuse("a range from or to a class");
          if (high < low) refuse("a range that ends before it begins");
        }
      }
      if (cls != 0) {
        set.classes += cls;
      } else {
        if (high >= 128 && flags.ignore_case) refuse("a character beyond ASCII under the flag i");
        set.ranges.emplace_back(low, high);
      }
      if (ends) break;
    }
    return set;
  }

  const Source& source_;
  std::u32string pattern_;
  size_t at_ = 0;

 private:
  char32_t hexadecimal(int digits) {
    char32_t value = 0;
    for (int i = 0; i < digits; ++i) {
      const char32_t digit = lower(take_any("an escape that is not whole"));
      if (!is_digit(digit) && !(digit >= 'a' && digit <= 'f')) refuse("an escape that is not whole");
      value = value * 16 + (is_digit(digit) ? digit - '0' : digit - 'a' + 10);
    }
    if (value > 0x10FFFF) refuse("an escape beyond Unicode");
    return value;
  }
};

}  // namespace lora_rite::nn::detail::regex
