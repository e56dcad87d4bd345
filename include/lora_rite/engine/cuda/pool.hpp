#pragma once

#include <cstdint>
#include <cstdlib>

#include "lora_rite/rule/vocabulary.hpp"

namespace lora_rite::cuda {

/// Before what is long and called more than once: its code is there once, and stays in the cache of instructions.
#if defined(__CUDACC__) && defined(LORA_RITE_DEVICE_RULE)
#define LORA_RITE_OUT_OF_LINE __noinline__
#else
#define LORA_RITE_OUT_OF_LINE
#endif

/// An r×r matrix to be read.
struct View {
  const double* data;
  int row, column;  ///< strides

  LORA_RITE_FUNCTION double at(int i, int j) const { return data[i * row + j * column]; }
};

/// Which of up to 16 slots are taken, and by how many owners. Every thread keeps these books for itself, identically:
/// no atomics, no barrier. A slot that is given up rests until the next barrier, for other threads may still read it.
class Slots {
 public:
  /// A slot that was free, with one owner. More than `count` at once is a fault of this engine.
  LORA_RITE_FUNCTION int acquire(int count) {
    for (int slot = 0; slot < count; ++slot) {
      if (owners(slot) != 0 || (resting_ >> slot & 1U) != 0) continue;
      share(slot);
      if (slot >= peak_) peak_ = slot + 1;
      return slot;
    }
#ifdef __CUDA_ARCH__
    __trap();
    return 0;
#else
    std::abort();  // a test counts them
#endif
  }
  LORA_RITE_FUNCTION void share(int slot) { owners_ += uint64_t{1} << (4 * slot); }
  LORA_RITE_FUNCTION void release(int slot) {
    owners_ -= uint64_t{1} << (4 * slot);
    if (owners(slot) == 0) resting_ |= 1U << slot;
  }
  LORA_RITE_FUNCTION void barrier_passed() { resting_ = 0; }

  /// The most slots that were taken or resting at once.
  LORA_RITE_FUNCTION int peak() const { return peak_; }

 private:
  LORA_RITE_FUNCTION int owners(int slot) const { return static_cast<int>(owners_ >> (4 * slot) & 15U); }

  uint64_t owners_ = 0;  ///< four bits a slot
  uint32_t resting_ = 0;
  int peak_ = 0;
};

/// Memory of a team for r×r matrices and rows of r numbers, r ≤ R. Rows of matrices lie R + 1 apart, so that neither a
/// row's nor a column's elements share a memory bank. Two matrices are kept for the eigensolver.
template <class TeamType, int R>
class Pool {
 public:
  using Team = TeamType;
  static constexpr int kRank = R;
  static constexpr int kStride = R + 1;
  static constexpr int kMatrices = 8;  ///< of the rule at once; a test counts them
  static constexpr int kWork = 2;      ///< of the eigensolver
  static constexpr int kVectors = 6;
  static constexpr int kMatrix = R * kStride;  ///< doubles of a matrix

  /// Doubles in shared memory, if `matrices` of the rule's lie there, too.
  LORA_RITE_FUNCTION static constexpr int shared_size(int matrices) {
    return kVectors * R + (kWork + matrices) * kMatrix;
  }
  /// Doubles in global memory for the others.
  LORA_RITE_FUNCTION static constexpr int global_size(int matrices) { return (kMatrices - matrices) * kMatrix; }

  /// `rank` is r. team.shared() has shared_size(shared_matrices) doubles, `global` global_size(shared_matrices).
  LORA_RITE_FUNCTION Pool(Team& team, int rank, int shared_matrices, double* global)
      : team_(team), rank_(rank), global_(global), shared_matrices_(shared_matrices) {}
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  LORA_RITE_FUNCTION int rank() const { return rank_; }

  template <class Function>
  LORA_RITE_FUNCTION void for_each(int count, const Function& function) {
    team_.for_each(count, function);
    matrices.barrier_passed();
    vectors.barrier_passed();
  }
  /// f(i, j) for every element of an r×r matrix.
  template <class Function>
  LORA_RITE_FUNCTION void for_elements(const Function& function) {
    const int rank = rank_;
    for_each(R * R, [&](int e) {
      const int i = e / R, j = e % R;
      if (i < rank && j < rank) function(i, j);
    });
  }

  LORA_RITE_FUNCTION double* vector(int slot) const { return team_.shared() + slot * R; }
  LORA_RITE_FUNCTION double* work(int which) const { return team_.shared() + kVectors * R + which * kMatrix; }
  LORA_RITE_FUNCTION double* matrix(int slot) const {
    return slot < shared_matrices_ ? work(kWork + slot) : global_ + int64_t{slot - shared_matrices_} * kMatrix;
  }

  Slots matrices, vectors;

 private:
  Team& team_;
  int rank_;
  double* global_;
  int shared_matrices_;
};

}  // namespace lora_rite::cuda
