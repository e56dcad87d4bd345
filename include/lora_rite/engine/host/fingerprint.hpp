#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>

namespace lora_rite::host {

/// A hash of up to 64 elements of a factor. It is taken in every step to notice cheaply that someone wrote to the
/// factor; where it differs from the last one, all elements are read again.
class Fingerprint {
 public:
  /// How far apart the elements lie in a factor of `size` elements. It has no common divisor with the size, hence with
  /// neither dimension; otherwise all of them could be of one column.
  static int64_t stride_of(int64_t size) {
    int64_t stride = std::max<int64_t>(1, size / 64);
    while (std::gcd(stride, size) != 1) ++stride;
    return stride;
  }

  Fingerprint() = default;
  Fingerprint(const float* values, int64_t size, int64_t stride) : is_known_(true) {
    const auto take = [values](uint64_t& bits, int64_t place) {
      uint32_t element;
      std::memcpy(&element, values + place, sizeof(element));
      bits = bits * kFactor + element;
    };
    uint64_t second = 0, third = 0, fourth = 0;  // four chains, because a product takes longer than a load
    int64_t e = 0;
    for (; e + 3 * stride < size; e += 4 * stride) {
      take(bits_, e);
      take(second, e + stride);
      take(third, e + 2 * stride);
      take(fourth, e + 3 * stride);
    }
    for (; e < size; e += stride) take(bits_, e);
    for (const uint64_t other : {second, third, fourth}) bits_ = bits_ * kFactor + other;
  }

  /// One that was default-constructed is equal to none.
  bool operator==(const Fingerprint& other) const { return is_known_ && other.is_known_ && bits_ == other.bits_; }
  bool operator!=(const Fingerprint& other) const { return !(*this == other); }

 private:
  static constexpr uint64_t kFactor = 0x9E3779B97F4A7C15U;

  bool is_known_ = false;
  uint64_t bits_ = 0;
};

}  // namespace lora_rite::host
