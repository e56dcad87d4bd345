#include "evaluation/lower_case.hpp"

#include <algorithm>
#include <iterator>

#include "evaluation/lower_case_table.hpp"

namespace finetune {
namespace {

constexpr char32_t kDottedI = 0x130, kDotAbove = 0x307, kCapitalSigma = 0x3A3, kFinalSigma = 0x3C2;
constexpr char32_t kNoCharacter = 0x110000;  // the first number that is none

bool holds(const LowerCaseRange& range, char32_t character) {
  return range.first <= character && character <= range.last &&
         (character - range.first) % static_cast<char32_t>(range.stride) == 0;
}

char32_t lower(char32_t character) {
  const auto* behind = std::upper_bound(std::begin(kLowerCase), std::end(kLowerCase), character,
                                        [](char32_t each, const LowerCaseRange& range) { return each < range.first; });
  if (behind == std::begin(kLowerCase) || !holds(behind[-1], character)) return character;
  return character + static_cast<char32_t>(behind[-1].shift);
}

bool has_case(char32_t character) {
  return std::any_of(std::begin(kLowerCase), std::end(kLowerCase), [&](const LowerCaseRange& each) {
    return holds(each, character) || holds(each, character - static_cast<char32_t>(each.shift));
  });
}

// The code point at `begin`, which moves behind it.
char32_t next_character(std::string_view text, size_t& begin) {
  const auto byte_at = [&](size_t index) { return static_cast<unsigned char>(text[index]); };
  const unsigned char first = byte_at(begin);
  const size_t length = first < 0x80   ? 1
                        : first < 0xC2 ? 0
                        : first < 0xE0 ? 2
                        : first < 0xF0 ? 3
                        : first < 0xF5 ? 4
                                       : 0;
  char32_t character = length < 2 ? first : first & (0x7F >> length);
  bool is_valid = length > 0 && begin + length <= text.size();
  for (size_t i = 1; is_valid && i < length; ++i) {
    is_valid = (byte_at(begin + i) & 0xC0) == 0x80;
    character = character << 6 | (byte_at(begin + i) & 0x3F);
  }
  begin += is_valid ? length : 1;
  return is_valid ? character : kNoCharacter + first;
}

}  // namespace

std::u32string lower_case(std::string_view text) {
  std::u32string characters;
  for (size_t begin = 0; begin < text.size();) characters += next_character(text, begin);
  std::u32string result;
  for (size_t i = 0; i < characters.size(); ++i) {
    const char32_t character = characters[i];
    if (character == kDottedI) {
      result += {U'i', kDotAbove};
    } else if (character == kCapitalSigma && i > 0 && has_case(characters[i - 1]) &&
               (i + 1 == characters.size() || !has_case(characters[i + 1]))) {
      result += kFinalSigma;
    } else {
      result += lower(character);
    }
  }
  return result;
}

bool is_space(char32_t character) { return std::binary_search(std::begin(kSpaces), std::end(kSpaces), character); }

}  // namespace finetune
