#pragma once

#include <cstdint>
#include <cstring>

#include "lora_rite/rule/vocabulary.hpp"

/// Elements of factors and gradients in memory, and as the doubles that everything is computed in.
namespace lora_rite::cuda {

/// The dtypes of factors that this engine takes.
enum class Dtype : int32_t { Float, Half, BFloat16 };

/// The largest number that is finite in a dtype. What is larger is held there: an infinity would be in the model for
/// good. Floats are not held, as in the other engines.
LORA_RITE_FUNCTION inline double most_of(Dtype dtype) {
  return dtype == Dtype::Half ? 65504.0 : dtype == Dtype::BFloat16 ? 3.3895313892515355e38 : 1e300;
}

/// The distance from 1 to the next number.
LORA_RITE_FUNCTION inline double epsilon_of(Dtype dtype) {
  return dtype == Dtype::Half ? 0x1p-10 : dtype == Dtype::BFloat16 ? 0x1p-7 : 0x1p-23;
}

namespace bits {

LORA_RITE_FUNCTION inline uint32_t of(float x) {
  uint32_t result;
  std::memcpy(&result, &x, sizeof(x));
  return result;
}
LORA_RITE_FUNCTION inline float as_float(uint32_t x) {
  float result;
  std::memcpy(&result, &x, sizeof(x));
  return result;
}

/// Half: one bit of sign, five of exponent (bias 15), ten of fraction.
LORA_RITE_FUNCTION inline float from_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000U) << 16, exponent = half >> 10 & 31U,
                 fraction = half & 1023U;
  if (exponent == 0) {
    const float small = static_cast<float>(fraction) * 0x1p-24F;
    return sign != 0 ? -small : small;
  }
  const uint32_t wide = exponent == 31 ? 255U : exponent + 112U;
  return as_float(sign | wide << 23 | fraction << 13);
}
/// To the nearest, ties to even.
LORA_RITE_FUNCTION inline uint16_t to_half(float x) {
  const uint32_t all = of(x), sign = all >> 16 & 0x8000U, magnitude = all & 0x7FFFFFFFU;
  if (magnitude > 0x7F800000U) return static_cast<uint16_t>(sign | 0x7E00U);   // NaN
  if (magnitude >= 0x477FF000U) return static_cast<uint16_t>(sign | 0x7C00U);  // beyond the largest
  if (magnitude < 0x38800000U) {
    // Below 2^-14 halves lie 2^-24 apart, as floats do from ½ on.
    return static_cast<uint16_t>(sign | (of(as_float(magnitude) + 0.5F) - of(0.5F)));
  }
  const uint32_t nearest = magnitude + 0xFFFU + (magnitude >> 13 & 1U);
  return static_cast<uint16_t>(sign | ((nearest >> 13) - (112U << 10)));
}

/// The upper half of a float.
LORA_RITE_FUNCTION inline float from_bfloat16(uint16_t x) { return as_float(static_cast<uint32_t>(x) << 16); }
LORA_RITE_FUNCTION inline uint16_t to_bfloat16(float x) {
  const uint32_t all = of(x);
  if ((all & 0x7FFFFFFFU) > 0x7F800000U) return static_cast<uint16_t>(0x7FC0U);  // NaN
  return static_cast<uint16_t>((all + 0x7FFFU + (all >> 16 & 1U)) >> 16);
}

}  // namespace bits

/// What a number becomes when it is stored.
LORA_RITE_FUNCTION inline double rounded(double x, Dtype dtype) {
  const double most = most_of(dtype);
  const auto held = static_cast<float>(x > most ? most : x < -most ? -most : x);
  if (dtype == Dtype::Half) return bits::from_half(bits::to_half(held));
  if (dtype == Dtype::BFloat16) return bits::from_bfloat16(bits::to_bfloat16(held));
  return held;
}

/// Numbers of a dtype that is known when the kernel runs: every thread takes the same branch.
struct Elements {
  void* data;
  Dtype dtype;

  LORA_RITE_FUNCTION double load(int64_t index) const {
    if (dtype == Dtype::Float) return static_cast<const float*>(data)[index];
    const uint16_t stored = static_cast<const uint16_t*>(data)[index];
    return dtype == Dtype::Half ? bits::from_half(stored) : bits::from_bfloat16(stored);
  }
  /// x must be `rounded`.
  LORA_RITE_FUNCTION void store(int64_t index, double x) const {
    const auto narrow = static_cast<float>(x);
    if (dtype == Dtype::Float) {
      static_cast<float*>(data)[index] = narrow;
    } else {
      static_cast<uint16_t*>(data)[index] = dtype == Dtype::Half ? bits::to_half(narrow) : bits::to_bfloat16(narrow);
    }
  }
};

}  // namespace lora_rite::cuda
