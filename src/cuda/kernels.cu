// The kernels of Engine::Cuda for a GPU: blocks around the functions of engine/cuda, and their launches. No header of
// LibTorch is included: nvcc compiles this by itself, for any of LibTorch's releases.

#include "launches.hpp"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "lora_rite/engine/cuda/decide.hpp"
#include "lora_rite/engine/cuda/kernels.hpp"
#include "lora_rite/engine/cuda/rank_class.hpp"
#include "lora_rite/engine/cuda/team.hpp"

namespace lora_rite::cuda {
namespace {

/// Two blocks a multiprocessor, so that one loads while the other computes.
template <int R>
__global__ void __launch_bounds__(Tall<R>::kThreads, R <= 32 ? 2 : 1)
    observe_tiles(const __grid_constant__ Arguments step, const __grid_constant__ AllPointers pointers) {
  BlockTeam<Tall<R>::kThreads> team;
  observe<R>(team, step, pointers, static_cast<int>(blockIdx.x));
}

template <int R>
__global__ void __launch_bounds__(Tall<R>::kThreads, R <= 32 ? 2 : 1)
    apply_tiles(const __grid_constant__ Arguments step, const __grid_constant__ AllPointers pointers) {
  BlockTeam<Tall<R>::kThreads> team;
  apply<R>(team, step, pointers, static_cast<int>(blockIdx.x));
}

template <int R>
using BlockPool = Pool<BlockTeam<ActTwo<R>::kThreads>, R>;

/// f(pool, factor) for every factor: a block for each, or as many blocks as there are areas of spilled matrices.
template <int R, class Function>
__device__ void for_factors(const Set& set, int shared_matrices, const Function& function) {
  BlockTeam<ActTwo<R>::kThreads> team;
  double* spill = set.spill + static_cast<int64_t>(blockIdx.x) * BlockPool<R>::global_size(shared_matrices);
  for (int factor = static_cast<int>(blockIdx.x); factor < set.factor_count; factor += static_cast<int>(gridDim.x)) {
    BlockPool<R> pool(team, set.rank, shared_matrices, spill);
    function(pool, factor);
  }
}

template <int R, class Basis>
__global__ void __launch_bounds__(ActTwo<R>::kThreads, 512 / ActTwo<R>::kThreads)
    unmagnify_factors(const __grid_constant__ Arguments step, const __grid_constant__ AllPointers pointers,
                      int shared_matrices) {
  for_factors<R>(step.set, shared_matrices,
                 [&](BlockPool<R>& pool, int factor) { unmagnify<Basis>(pool, step, pointers, factor); });
}

template <int R>
__global__ void __launch_bounds__(ActTwo<R>::kThreads, 512 / ActTwo<R>::kThreads)
    decide_factors(const __grid_constant__ Arguments step, const __grid_constant__ AllPointers pointers,
                   int shared_matrices) {
  for_factors<R>(step.set, shared_matrices,
                 [&](BlockPool<R>& pool, int factor) { decide(pool, step, pointers, factor); });
}

/// It makes no matrix, and needs no memory.
template <int R>
__global__ void __launch_bounds__(ActTwo<R>::kThreads, 512 / ActTwo<R>::kThreads)
    remember_factors(const __grid_constant__ Arguments step, const __grid_constant__ AllPointers pointers) {
  BlockTeam<ActTwo<R>::kThreads> team;
  BlockPool<R> pool(team, step.set.rank, 0, nullptr);
  remember(pool, step, pointers, static_cast<int>(blockIdx.x));
}

/// What CUDA says, or null.
const char* message_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

/// 0 if CUDA has no answer, whose error is forgotten.
int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  if (cudaDeviceGetAttribute(&value, which, device) == cudaSuccess) return value;
  cudaGetLastError();
  return 0;
}

int64_t shared_bytes(int device) { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device); }

/// How many of the rule's matrices lie in shared memory.
template <int R>
int shared_matrices(int device) {
  const int64_t left = shared_bytes(device) / 8 - BlockPool<R>::shared_size(0);
  return static_cast<int>(std::clamp<int64_t>(left / BlockPool<R>::kMatrix, 0, BlockPool<R>::kMatrices));
}

/// Blocks of act 2. Where matrices are spilled no more than run at once.
template <int R>
int act_two_blocks(int device, int factors) {
  const bool spills = shared_matrices<R>(device) < BlockPool<R>::kMatrices;
  return spills ? std::min(factors, std::max(1, attribute(cudaDevAttrMultiProcessorCount, device))) : factors;
}

template <class Kernel, class... Parameters>
const char* launch(Kernel kernel, int blocks, int threads, int64_t doubles, cudaStream_t stream,
                   const Parameters&... parameters) {
  const auto bytes = static_cast<size_t>(8 * doubles);
  // Above 48 KB a kernel must ask. It may do so again and again, also while a graph is recorded.
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) {
    cudaGetLastError();  // told here, and not once more by the next who asks
    return message_of(error);
  }
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), bytes, stream>>>(parameters...);
  return message_of(cudaGetLastError());
}

template <class Choose>
const char* launch_tiles(const Arguments& step, const AllPointers& pointers, cudaStream_t stream,
                         const Choose& choose) {
  return with_rank_class(step.set.rank, [&](auto rank) {
    using T = Tall<rank()>;
    return launch(choose(rank), step.set.tile_count, T::kThreads, T::kShared, stream, step, pointers);
  });
}

template <class Choose>
const char* launch_factors(const Arguments& step, const AllPointers& pointers, int device, cudaStream_t stream,
                           const Choose& choose) {
  return with_rank_class(step.set.rank, [&](auto rank) {
    constexpr int R = rank();
    const int matrices = shared_matrices<R>(device);
    return launch(choose(rank), act_two_blocks<R>(device, step.set.factor_count), ActTwo<R>::kThreads,
                  BlockPool<R>::shared_size(matrices), stream, step, pointers, matrices);
  });
}

}  // namespace

namespace gpu {

bool takes(int device, int64_t rank) {
  constexpr int kLargeParameters = 12010;  // CUDA 12.1: kernels with 32 KB of parameters
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver < kLargeParameters) return false;
  // All sums are double. Where those are 32 times as slow as float, ATen's operators are no worse.
  if (rank > kMostRank || attribute(cudaDevAttrComputeCapabilityMajor, device) < 8 ||
      attribute(cudaDevAttrSingleToDoublePrecisionPerfRatio, device) >= 32)
    return false;
  const int64_t needed = with_rank_class(
      rank, [](auto r) { return 8 * std::max<int64_t>(Tall<r()>::kShared, BlockPool<r()>::shared_size(0)); });
  return needed <= shared_bytes(device);
}

int64_t spill(int device, int64_t rank, int64_t factors) {
  return with_rank_class(rank, [&](auto r) {
    constexpr int R = r();
    return int64_t{act_two_blocks<R>(device, static_cast<int>(factors))} *
           BlockPool<R>::global_size(shared_matrices<R>(device));
  });
}

const char* observe(const Arguments& step, const AllPointers& pointers, cudaStream_t stream) {
  return launch_tiles(step, pointers, stream, [](auto rank) { return &observe_tiles<rank()>; });
}

const char* unmagnify(const Arguments& step, const AllPointers& pointers, int device, cudaStream_t stream) {
  return launch_factors(step, pointers, device, stream, [&](auto rank) {
    return step.qr_basis ? &unmagnify_factors<rank(), QrBasis> : &unmagnify_factors<rank(), PolarBasis>;
  });
}

const char* decide(const Arguments& step, const AllPointers& pointers, int device, cudaStream_t stream) {
  return launch_factors(step, pointers, device, stream, [](auto rank) { return &decide_factors<rank()>; });
}

const char* apply(const Arguments& step, const AllPointers& pointers, cudaStream_t stream) {
  return launch_tiles(step, pointers, stream, [](auto rank) { return &apply_tiles<rank()>; });
}

const char* remember(const Arguments& step, const AllPointers& pointers, cudaStream_t stream) {
  return with_rank_class(step.set.rank, [&](auto rank) {
    return launch(&remember_factors<rank()>, step.set.factor_count, ActTwo<rank()>::kThreads, 0, stream, step,
                  pointers);
  });
}

}  // namespace gpu
}  // namespace lora_rite::cuda
