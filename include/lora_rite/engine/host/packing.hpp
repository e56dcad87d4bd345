#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "lora_rite/engine/host/threads.hpp"

namespace lora_rite::host {

/// Packed copies [n, r] of factors whose elements lie apart, as those of experts that share one tensor
/// (`expert_pairs`). Experts that lie beside each other are copied together, so that a cache line is read or written
/// once. `reserve` asks for all memory; the rest asks for none.
class Packing {
 public:
  /// Elements (row, column) of a matrix [n, r] at begin + row · row_stride + column · column_stride.
  struct Matrix {
    float* begin;
    int64_t row_stride, column_stride;
  };

  /// For at most `matrices` copies between two calls of `pack` or `write_back`.
  void reserve(size_t matrices, int64_t rows, int64_t rank) {
    rows_ = rows;
    rank_ = rank;
    slots_.reserve(matrices);
  }

  /// What the next `pack` copies to `packed`, or the next `write_back` from there.
  void add(const Matrix& matrix, float* packed) { slots_.push_back({packed, matrix}); }

  void pack(Threads& threads) {
    move(threads, [](float* packed, float* element) { *packed = *element; });
  }
  void write_back(Threads& threads) {
    move(threads, [](float* packed, float* element) { *element = *packed; });
  }

 private:
  static constexpr int64_t kTogether = 16;     ///< matrices: the floats of a cache line
  static constexpr int64_t kRows = 8;          ///< of one matrix before the next one's
  static constexpr int64_t kElements = 32768;  ///< of all of these, for one thread at a time

  struct Slot {
    float* packed;
    Matrix matrix;
  };

  template <class Copy>
  void move(Threads& threads, const Copy& copy) {
    const int64_t count = static_cast<int64_t>(slots_.size());
    const int64_t tiles = (count + kTogether - 1) / kTogether;
    const int64_t chunk = std::max<int64_t>(1, kElements / (kTogether * std::max<int64_t>(1, rank_)));
    const int64_t chunks = (rows_ + chunk - 1) / chunk;
    threads.for_each(tiles * chunks, [&](int64_t task, int64_t) {
      const int64_t first = task / chunks * kTogether, last = std::min(first + kTogether, count);
      const int64_t begin = task % chunks * chunk, end = std::min(begin + chunk, rows_);
      for (int64_t top = begin; top < end; top += kRows) {
        for (int64_t s = first; s < last; ++s) {
          const auto& [packed, matrix] = slots_[static_cast<size_t>(s)];
          for (int64_t row = top; row < std::min(top + kRows, end); ++row) {
            float *to = packed + row * rank_, *from = matrix.begin + row * matrix.row_stride;
            for (int64_t j = 0; j < rank_; ++j) copy(to + j, from + j * matrix.column_stride);
          }
        }
      }
    });
    slots_.clear();
  }

  int64_t rows_ = 0, rank_ = 0;
  std::vector<Slot> slots_;
};

}  // namespace lora_rite::host
