#pragma once

#include <cmath>

#include "lora_rite/rule/vocabulary.hpp"

namespace lora_rite::cuda {

/// Neither NaN nor infinite.
LORA_RITE_FUNCTION inline bool is_finite(double x) { return x - x == 0; }

/// x^{-1/2}, which a GPU has an instruction to begin with.
LORA_RITE_FUNCTION inline double reciprocal_root(double x) {
#ifdef __CUDA_ARCH__
  return ::rsqrt(x);
#else
  return 1 / std::sqrt(x);
#endif
}

/// A double for the rule: argument-dependent lookup finds `choose`, `at_least` and the like of this namespace for it.
/// All threads of a team have the same.
struct Number {
  double value = 0;
  Number() = default;
  LORA_RITE_FUNCTION Number(double x) : value(x) {}
};

#define LORA_RITE_NUMBER_OPERATOR(op)                                                               \
  LORA_RITE_FUNCTION inline Number operator op(Number a, Number b) { return {a.value op b.value}; } \
  LORA_RITE_FUNCTION inline Number operator op(double a, Number b) { return {a op b.value}; }       \
  LORA_RITE_FUNCTION inline Number operator op(Number a, double b) { return {a.value op b}; }
LORA_RITE_NUMBER_OPERATOR(+)
LORA_RITE_NUMBER_OPERATOR(-)
LORA_RITE_NUMBER_OPERATOR(*)
LORA_RITE_NUMBER_OPERATOR(/)
#undef LORA_RITE_NUMBER_OPERATOR

/// 1 or 0.
LORA_RITE_FUNCTION inline Number operator>(Number a, Number b) { return {a.value > b.value ? 1.0 : 0.0}; }
LORA_RITE_FUNCTION inline Number operator>(Number a, double b) { return {a.value > b ? 1.0 : 0.0}; }

LORA_RITE_FUNCTION inline Number sqrt(Number x) { return {std::sqrt(x.value)}; }
LORA_RITE_FUNCTION inline Number square_root(Number x) { return sqrt(x); }
LORA_RITE_FUNCTION inline Number rsqrt(Number x) { return {reciprocal_root(x.value)}; }
LORA_RITE_FUNCTION inline Number reciprocal(Number x) { return {1.0 / x.value}; }
LORA_RITE_FUNCTION inline Number pow(double x, Number y) { return {std::pow(x, y.value)}; }
LORA_RITE_FUNCTION inline Number pow(Number x, double y) { return {std::pow(x.value, y)}; }
LORA_RITE_FUNCTION inline Number at_least(Number x, Number y) { return x.value > y.value ? x : y; }
LORA_RITE_FUNCTION inline Number at_most(Number x, Number y) { return x.value < y.value ? x : y; }
LORA_RITE_FUNCTION inline Number choose(Number condition, Number yes, Number no) {
  return condition.value != 0 ? yes : no;
}

}  // namespace lora_rite::cuda
