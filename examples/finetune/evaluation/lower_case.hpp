#pragma once

#include <string>
#include <string_view>

namespace finetune {

/// The code points of a UTF-8 text in lower case, as Python's str.lower() has them: É becomes é, the Kelvin sign k, and
/// İ two, i and a dot above. A Greek capital sigma becomes ς right behind a letter that has a case and not before one.
/// Bytes that are no UTF-8 stay apart from all characters.
std::u32string lower_case(std::string_view text);

/// Whether Python's str.split() splits there.
bool is_space(char32_t character);

}  // namespace finetune
