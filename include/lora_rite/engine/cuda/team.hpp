#pragma once

#include "lora_rite/rule/vocabulary.hpp"

/// How the kernels of this engine are written: bulk-synchronously, for a team of threads that shares memory.
///
///     team.for_each(n, f)                f(0) … f(n−1), shared out over the threads; then a barrier
///     Team::PerThread<T, n> x; x[i]      a T for each index of loops up to n, which lives from one loop to the next
///     team.shared()                      memory that all threads share, of doubles
///
/// Within a loop an index may only write what no other index of it reads or writes. What stands outside of the loops is
/// done by every thread for itself and must be the same in all: it depends on arguments, and on memory that was written
/// before the last barrier and that no later loop overwrites until the next one.
///
/// `BlockTeam` is a block of a GPU. The tests have a team that runs the same source on a CPU, indices and blocks in
/// shuffled order, so that whoever relies on an order is found out.
namespace lora_rite::cuda {

#ifdef __CUDACC__

/// The threads of a block, kThreads of them.
template <int kThreads>
class BlockTeam {
 public:
  static constexpr int kSize = kThreads;

  template <class T, int kMost>
  struct PerThread {
    static_assert(kMost <= kThreads, "one index for each thread");
    T value{};
    __device__ T& operator[](int) { return value; }
  };

  /// The launch says how much. By the symbol itself, for of a pointer that was stored the compiler forgets that it is
  /// shared memory, and loads take longer.
  __device__ static double* shared() {
    extern __shared__ double shared_memory[];
    return shared_memory;
  }

  template <class Function>
  __device__ void for_each(int count, const Function& function) {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) function(i);
    __syncthreads();
  }
};

#endif

}  // namespace lora_rite::cuda
