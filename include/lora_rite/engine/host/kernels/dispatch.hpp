#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/engine/host/kernels/types.hpp"
#if !LORA_RITE_VECTOR_EXTENSIONS
#include "lora_rite/engine/host/kernels/plain.hpp"
#endif

/// The loops of the host engine, on plain arrays: no tensors, no allocation, no dispatch inside.
///
/// They are written once, on the vector extensions of GCC and Clang. On x86-64 they are compiled twice, for AVX2 with
/// FMA and for AVX-512, whatever the user's flags are, and `chosen()` says at run time which are used. (A processor
/// without AVX2, from before 2013, is left to the device engine.) On other processors they are compiled for what the
/// user's flags allow. Clang and GCC from 12 have them; other compilers take the formulas of `plain.hpp`, in Eigen.
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

/// The first of these loops, or those that `wanted` names if it is not null or empty; null for "none" and where there
/// are none. Throws std::invalid_argument if `wanted` names others.
inline const Table* choose(const std::vector<const Table*>& tables, const char* wanted) {
  const std::string name = wanted == nullptr ? "" : wanted;
  if (name.empty()) return tables.empty() ? nullptr : tables.front();
  if (name == "none") return nullptr;
  std::string expected;
  for (const Table* table : tables) {
    if (name == table->name) return table;
    expected += std::string(table->name) + ", ";
  }
  throw std::invalid_argument("LORA_RITE_KERNELS is '" + name + "', expected one of " + expected +
                              "none: what this machine runs");
}

/// The loops that are used: what the environment variable LORA_RITE_KERNELS names, or else the fastest; null if there
/// are none, and then nothing of `best()` must be called. The variable is read once.
inline const Table* chosen() {
  static const Table* const table = choose(available(), std::getenv("LORA_RITE_KERNELS"));
  return table;
}
inline const Table& best() { return *chosen(); }

}  // namespace lora_rite::host::kernels
