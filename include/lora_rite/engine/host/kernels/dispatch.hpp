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
/// They are written once, on the vector extensions of GCC and Clang. On x86-64 they are compiled twice, for AVX2 with
/// FMA and for AVX-512, whatever the user's flags are, and `best()` chooses at run time. (A processor without AVX2,
/// from before 2013, is left to the device engine.) On other processors they are compiled for what the user's flags
/// allow. Other compilers take the formulas of `plain.hpp`, in Eigen.
namespace lora_rite::host::kernels {

#if LORA_RITE_VECTOR_EXTENSIONS
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a call

#if defined(__x86_64__)
#define LORA_RITE_TARGET avx2
#define LORA_RITE_AVX2
#include "lora_rite/engine/host/kernels/target.inc"
#define LORA_RITE_TARGET avx512
#define LORA_RITE_AVX512
#include "lora_rite/engine/host/kernels/target.inc"
#else
#define LORA_RITE_TARGET baseline
#include "lora_rite/engine/host/kernels/target.inc"
#endif

#pragma GCC diagnostic pop
#else
namespace baseline {
using plain::table;
}
#endif

/// The loops that this machine runs, the fastest first; none on an x86-64 processor without AVX2.
inline std::vector<const Table*> available() {
#if LORA_RITE_VECTOR_EXTENSIONS && defined(__x86_64__)
  std::vector<const Table*> tables;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      tables.push_back(&avx512::table);
    tables.push_back(&avx2::table);
  }
  return tables;
#else
  return {&baseline::table};
#endif
}

/// Does this machine run any? If not, nothing here must be called.
inline bool is_supported() {
  static const bool any = !available().empty();
  return any;
}

/// The fastest loops that this machine runs.
inline const Table& best() {
  static const Table& table = *available().front();
  return table;
}

}  // namespace lora_rite::host::kernels
