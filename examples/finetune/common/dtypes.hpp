#pragma once

#include <c10/core/ScalarType.h>

#include <string>
#include <utility>
#include <vector>

#include "common/error.hpp"

namespace finetune {

/// The floating dtypes by the names that options and config.json have.
inline const std::vector<std::pair<std::string, c10::ScalarType>>& named_dtypes() {
  static const std::vector<std::pair<std::string, c10::ScalarType>> dtypes = {
      {"float32", c10::kFloat}, {"bfloat16", c10::kBFloat16}, {"float16", c10::kHalf}};
  return dtypes;
}

/// Their names.
inline std::vector<std::string> dtype_names() {
  std::vector<std::string> names;
  for (const auto& dtype : named_dtypes()) names.push_back(dtype.first);
  return names;
}

/// A dtype's name among them, or LibTorch's for any other.
inline std::string dtype_name(c10::ScalarType dtype) {
  for (const auto& [name, known] : named_dtypes()) {
    if (known == dtype) return name;
  }
  return c10::toString(dtype);
}

/// The dtype that an option names. Throws Error with the option's name for any other text.
inline c10::ScalarType parse_dtype(const std::string& option, const std::string& name) {
  for (const auto& [known, dtype] : named_dtypes()) {
    if (known == name) return dtype;
  }
  fail(option, " ", name, ": expected one of ", join(dtype_names()));
}

}  // namespace finetune
