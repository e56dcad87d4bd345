#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "lora_rite/engine/host/kernels/types.hpp"
#if !LORA_RITE_VECTOR_EXTENSIONS
#include "lora_rite/engine/host/kernels/plain.hpp"
#endif

/// The loops of the host engine, on plain arrays: no tensors, no allocation, no dispatch inside.
///
/// They are written once, on the vector extensions of GCC and Clang. On x86 they are compiled three times: for the
/// instruction set that the user's flags allow, for AVX2 with FMA, and for AVX-512. `best()` chooses at run time. Other
/// compilers take the formulas of `plain.hpp`, in Eigen.
namespace lora_rite::host::kernels {

#if LORA_RITE_VECTOR_EXTENSIONS
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a call

#define LORA_RITE_TARGET baseline
#include "lora_rite/engine/host/kernels/target.inc"
#if defined(__x86_64__)
#define LORA_RITE_TARGET avx2
#define LORA_RITE_AVX2
#include "lora_rite/engine/host/kernels/target.inc"
#define LORA_RITE_TARGET avx512
#define LORA_RITE_AVX512
#include "lora_rite/engine/host/kernels/target.inc"
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

}  // namespace lora_rite::host::kernels
