#pragma once

#include <cstdint>

#include "lora_rite/engine/cuda/arguments.hpp"

/// Between the front, which speaks torch, and the kernels, which nvcc compiles without a torch header.
namespace lora_rite::cuda {

/// A set of compiled kernels. Each function queues its launches on the device's current stream and returns at once:
/// null, or what CUDA has to say against it. `src/cuda` has those of a GPU.
struct Kernels {
  bool on_gpu;  ///< for tensors on CUDA devices; else on the CPU, as the tests run them
  /// Can factors of this rank be stepped on this device?
  bool (*takes)(int device, int64_t rank);
  /// Doubles that act 2 needs as `Set::spill`.
  int64_t (*spill)(int device, int64_t rank, int64_t factors);
  const char* (*observe)(const Arguments&, const AllPointers&, int device);
  const char* (*unmagnify)(const Arguments&, const AllPointers&, int device);
  const char* (*decide)(const Arguments&, const AllPointers&, int device);
  const char* (*apply)(const Arguments&, const AllPointers&, int device);
  const char* (*remember)(const Arguments&, const AllPointers&, int device);
};

}  // namespace lora_rite::cuda
