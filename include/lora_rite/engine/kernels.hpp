#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "lora_rite/engine/kernels/types.hpp"
#if !LORA_RITE_VECTOR_EXTENSIONS
#include "lora_rite/engine/kernels/plain.hpp"
#endif

/// The loops of the host engine, on plain arrays: no tensors, no allocation, no dispatch inside.
///
/// They are written once, on the vector extensions of GCC and Clang, and on x86 compiled three times: for the
/// instruction set that the user's flags allow, for AVX2 with FMA, and for AVX-512. `best()` chooses at run time. Other
/// compilers take Eigen's.
namespace lora_rite::engine::kernels {

#if LORA_RITE_VECTOR_EXTENSIONS
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a call

namespace baseline {
#include "lora_rite/engine/kernels/tall.inc"
// After it, for it uses its loads, stores and roots.
#include "lora_rite/engine/kernels/lanes.inc"
inline constexpr Table table = {"baseline", gram, remember, apply, update_gram, multiply, eigh};
}  // namespace baseline

#if defined(__x86_64__)
#define LORA_RITE_AVX2  // GCC's target pragma defines no __AVX2__
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#include "lora_rite/engine/kernels/tall.inc"
// After it, for it uses its loads, stores and roots.
#include "lora_rite/engine/kernels/lanes.inc"
inline constexpr Table table = {"avx2", gram, remember, apply, update_gram, multiply, eigh};
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef LORA_RITE_AVX2

#define LORA_RITE_AVX512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx2,fma")
#endif
namespace avx512 {
#include "lora_rite/engine/kernels/tall.inc"
// After it, for it uses its loads, stores and roots.
#include "lora_rite/engine/kernels/lanes.inc"
inline constexpr Table table = {"avx512", gram, remember, apply, update_gram, multiply, eigh};
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef LORA_RITE_AVX512
#endif

#pragma GCC diagnostic pop
#else
namespace baseline {
using plain::table;
}
#endif

/// The loops that this machine runs, the fastest first.
inline std::vector<const Table*> available() {
  std::vector<const Table*> tables;
#if LORA_RITE_VECTOR_EXTENSIONS && defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      tables.push_back(&avx512::table);
    tables.push_back(&avx2::table);
  }
#endif
  tables.push_back(&baseline::table);
  return tables;
}

/// The fastest loops that this machine runs.
inline const Table& best() {
  static const Table& table = *available().front();
  return table;
}

}  // namespace lora_rite::engine::kernels
