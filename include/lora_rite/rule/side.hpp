#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace lora_rite {

/// Which factor of a pair ΔW = BA. Where tensors or arrays have a dimension of size 2 for it, A comes first.
enum class Side : uint8_t { A, B };

/// Both, to loop over.
inline constexpr std::array<Side, 2> kSides = {Side::A, Side::B};

/// The side of the other factor of the pair: act 2 sees each gradient in the partner's basis.
constexpr Side partner_of(Side side) { return side == Side::A ? Side::B : Side::A; }

/// 0 for A and 1 for B: an index into a dimension of size 2.
constexpr int64_t index_of(Side side) { return static_cast<int64_t>(side); }

/// "a" or "b", as messages call the factors.
constexpr const char* name_of(Side side) { return side == Side::A ? "a" : "b"; }

/// Something of each factor.
template <class T>
struct PerSide {
  T a{};  ///< of the factor A
  T b{};  ///< of the factor B

  /// `a` or `b`.
  T& operator[](Side side) { return side == Side::A ? a : b; }
  /// The same, to read.
  const T& operator[](Side side) const { return side == Side::A ? a : b; }
};

}  // namespace lora_rite
