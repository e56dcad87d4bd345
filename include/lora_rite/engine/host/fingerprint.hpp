#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>

namespace lora_rite::host {

/// A hash of up to 64 elements of a factor, four neighbours at each of 16 places. It is taken in every step to notice
/// cheaply that someone wrote to the factor; where it differs from the last one, all elements are read again.
class Fingerprint {
 public:
  /// How far apart the places lie in a factor of `size` elements. It has no common divisor with the size, hence with
  /// neither dimension; otherwise all of them could be of a few columns. A small factor is taken whole.
  static int64_t stride_of(int64_t size) {
    if (size <= kPlaces * kNeighbours) return kNeighbours;
    int64_t stride = (size + kPlaces - 1) / kPlaces;
    while (std::gcd(stride, size) != 1) ++stride;
    return stride;
  }

  Fingerprint() = default;
  Fingerprint(const float* values, int64_t size, int64_t stride) : is_known_(true) {
    std::array<uint64_t, kNeighbours> chains = {};  // side by side, because a product takes longer than a load
    for (int64_t e = 0; e < size; e += stride) {
      for (int64_t k = 0; k < std::min(kNeighbours, size - e); ++k) {
        uint32_t element;
        std::memcpy(&element, values + e + k, sizeof(element));
        uint64_t& chain = chains[static_cast<size_t>(k)];
        chain = chain * kFactor + element;
      }
    }
    for (const uint64_t chain : chains) bits_ = bits_ * kFactor + chain;
  }

  /// One that was default-constructed is equal to none.
  bool operator==(const Fingerprint& other) const { return is_known_ && other.is_known_ && bits_ == other.bits_; }
  bool operator!=(const Fingerprint& other) const { return !(*this == other); }

 private:
  static constexpr int64_t kPlaces = 16, kNeighbours = 4;
  static constexpr uint64_t kFactor = 0x9E3779B97F4A7C15U;

  bool is_known_ = false;
  uint64_t bits_ = 0;
};

}  // namespace lora_rite::host
