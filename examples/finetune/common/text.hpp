#pragma once

#include <iomanip>
#include <sstream>
#include <string>

namespace finetune {

/// All arguments in a row, each as `<<` prints it.
template <class... Args>
std::string concat(const Args&... args) {
  std::ostringstream stream;
  (stream << ... << args);
  return stream.str();
}

/// A number with `digits` digits after the point.
inline std::string fixed(double value, int digits) {
  std::ostringstream stream;
  stream << std::fixed << std::setprecision(digits) << value;
  return stream.str();
}

/// Whether a text ends in `ending`.
inline bool ends_with(const std::string& text, const std::string& ending) {
  return text.size() >= ending.size() && text.compare(text.size() - ending.size(), ending.size(), ending) == 0;
}

/// The elements in a row, "a, b, c".
template <class List>
std::string join(const List& list) {
  std::ostringstream stream;
  const char* separator = "";
  for (const auto& element : list) {
    stream << separator << element;
    separator = ", ";
  }
  return stream.str();
}

}  // namespace finetune
