#pragma once

#include <string>
#include <vector>

namespace finetune {

/// A table for people to read: the first column is flush left, all others flush right.
class Table {
 public:
  explicit Table(std::vector<std::string> header) : rows_{std::move(header)} {}

  /// As many cells as the header has.
  void add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }

  /// Lines that end in line breaks; columns as wide as they need to be.
  std::string text() const;

 private:
  std::vector<std::vector<std::string>> rows_;
};

/// Three significant digits: "0.0123", "1.2e-05", "inf".
std::string short_number(double value);

}  // namespace finetune
