#pragma once

#include <algorithm>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

/// The characters that a regular expression speaks of: code points, classes and sets of them.
namespace lora_rite::nn::detail {

/// The code points of UTF-8; a byte that is none stands for itself.
inline std::u32string code_points(const std::string& text) {
  std::u32string points;
  for (size_t at = 0; at < text.size();) {
    const auto byte = [&](size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0U; };
    const unsigned first = byte(at);
    const size_t more = first >= 0xF0 ? 3 : first >= 0xE0 ? 2 : first >= 0xC0 ? 1 : 0;
    char32_t point = more == 0 ? first : first & (0x3FU >> more);
    bool whole = first < 0xF8;
    for (size_t i = 1; i <= more; ++i) {
      whole = whole && (byte(at + i) & 0xC0U) == 0x80;
      point = (point << 6) | (byte(at + i) & 0x3FU);
    }
    points += whole ? point : first;
    at += whole ? more + 1 : 1;
  }
  return points;
}

namespace regex {

/// The flags a (ascii; u is its contrary), i, m and s.
struct Flags {
  bool ascii = false, ignore_case = false, multi_line = false, dot_all = false;
};

inline char32_t lower(char32_t c) { return c >= 'A' && c <= 'Z' ? c + 32 : c; }
inline char32_t upper(char32_t c) { return c >= 'a' && c <= 'z' ? c - 32 : c; }
inline bool is_digit(char32_t c) { return c >= '0' && c <= '9'; }
inline bool is_octal(char32_t c) { return c >= '0' && c <= '7'; }
inline bool is_letter(char32_t c) { return lower(c) >= 'a' && lower(c) <= 'z'; }

inline bool is_space(char32_t c, bool ascii) {
  if ((c >= 9 && c <= 13) || c == ' ') return true;
  if (ascii) return false;
  return (c >= 0x1C && c <= 0x1F) || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
         c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

inline bool is_word(char32_t c, bool ascii) {
  if (c < 128) return is_letter(c) || is_digit(c) || c == '_';
  return !ascii && !is_space(c, false);
}

inline bool is_in_class(char letter, char32_t c, bool ascii) {
  switch (letter) {
    case 'd':
      return is_digit(c);
    case 'D':
      return !is_digit(c);
    case 's':
      return is_space(c, ascii);
    case 'S':
      return !is_space(c, ascii);
    case 'w':
      return is_word(c, ascii);
    default:
      return !is_word(c, ascii);
  }
}

inline char class_letter(char32_t letter) {
  const std::string known = "dDsSwW";
  return letter < 128 && known.find(static_cast<char>(letter)) != std::string::npos ? static_cast<char>(letter) : 0;
}

/// One kind of characters: ranges, and classes by their letters (d, D, s, S, w, W).
struct Characters {
  std::vector<std::pair<char32_t, char32_t>> ranges;
  std::string classes;
  bool negated = false;
  Flags flags;

  bool contains(char32_t character) const {
    bool found = holds(character);
    if (!found && flags.ignore_case && character < 128) found = holds(lower(character)) || holds(upper(character));
    return found != negated;
  }

 private:
  bool holds(char32_t character) const {
    for (const auto& [first, last] : ranges) {
      if (first <= character && character <= last) return true;
    }
    return std::any_of(classes.begin(), classes.end(),
                       [&](char letter) { return is_in_class(letter, character, flags.ascii); });
  }
};

}  // namespace regex

}  // namespace lora_rite::nn::detail
