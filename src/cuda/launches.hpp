#pragma once

// What kernels.cu has for engine.cpp: launches on a stream. Null is returned, or CUDA's message.

#include "lora_rite/engine/cuda/arguments.hpp"

struct CUstream_st;

namespace lora_rite::cuda::gpu {

using Stream = CUstream_st*;

bool takes(int device, int64_t rank);
int64_t spill(int device, int64_t rank, int64_t factors);
const char* observe(const Arguments& step, const AllPointers& pointers, Stream stream);
const char* unmagnify(const Arguments& step, const AllPointers& pointers, int device, Stream stream);
const char* decide(const Arguments& step, const AllPointers& pointers, int device, Stream stream);
const char* apply(const Arguments& step, const AllPointers& pointers, Stream stream);
const char* remember(const Arguments& step, const AllPointers& pointers, Stream stream);

}  // namespace lora_rite::cuda::gpu
