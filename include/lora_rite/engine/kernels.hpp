#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "lora_rite/engine/kernels/types.hpp"
#if !LORA_RITE_VECTOR_EXTENSIONS
#include "lora_rite/engine/kernels/plain.hpp"
#endif

/// The loops of the host engine, on plain arrays: no tensors, no allocation, no dispatch inside.
///
/// They are written once, on the vector extensions of GCC and Clang, and on x86 compiled twice: for the instruction set
/// that the user's flags allow, and for AVX2 with FMA. `best()` chooses at run time. Other compilers take Eigen's.
namespace lora_rite::engine::kernels {

#if LORA_RITE_VECTOR_EXTENSIONS
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a call

namespace baseline {
#include "lora_rite/engine/kernels/tall.inc"
// After it, for it uses its loads and stores.
#include "lora_rite/engine/kernels/lanes.inc"
inline constexpr Table table = {"baseline", gram, remember, apply, update_gram, multiply, eigh};
}  // namespace baseline

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define LORA_RITE_AVX2  // GCC's target pragma defines no __AVX2__
namespace avx2 {
#include "lora_rite/engine/kernels/tall.inc"
// After it, for it uses its loads and stores.
#include "lora_rite/engine/kernels/lanes.inc"
inline constexpr Table table = {"avx2", gram, remember, apply, update_gram, multiply, eigh};
}  // namespace avx2
#undef LORA_RITE_AVX2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#pragma GCC diagnostic pop
#else
namespace baseline {
using plain::table;
}
#endif

/// The fastest loops that this machine runs.
inline const Table& best() {
#if LORA_RITE_VECTOR_EXTENSIONS && defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2) return avx2::table;
#endif
  return baseline::table;
}

}  // namespace lora_rite::engine::kernels
