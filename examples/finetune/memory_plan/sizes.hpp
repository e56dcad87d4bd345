#pragma once

#include <cstdint>
#include <numeric>
#include <vector>

namespace finetune {

// Numbers of elements and bytes are doubles: no product of sizes overflows one.

constexpr double kFloatBytes = 4;
constexpr double kDoubleBytes = 8;

inline double as_double(int64_t value) { return static_cast<double>(value); }

/// The elements of a tensor of this shape.
inline double count(const std::vector<int64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), 1.0,
                         [](double product, int64_t side) { return product * as_double(side); });
}

}  // namespace finetune
