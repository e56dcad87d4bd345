#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace lora_rite::host {

/// Sums over the rows of k factors, `size` numbers each. Several threads read the rows in chunks. Each chunk leaves a
/// part, and a factor's total is the sum of its parts in a fixed order, so it does not depend on the number of threads.
///
/// A part is emptied before it is added to, and `add_up` overwrites the total: nothing is ever added twice, and a
/// factor that nobody touches keeps its total.
class ChunkedSums {
 public:
  ChunkedSums() = default;
  ChunkedSums(int64_t factors, int64_t chunks, int64_t size)
      : chunks_(static_cast<size_t>(chunks)),
        size_(static_cast<size_t>(size)),
        parts_(static_cast<size_t>(factors) * chunks_ * size_),
        totals_(chunks > 1 ? static_cast<size_t>(factors) * size_ : 0) {}

  bool is_empty() const { return size_ == 0; }

  /// The part of one chunk of one factor, emptied.
  double* emptied_part(size_t factor, int64_t chunk) {
    double* part = parts_.data() + (factor * chunks_ + static_cast<size_t>(chunk)) * size_;
    std::fill(part, part + size_, 0.0);
    return part;
  }

  /// Forms a factor's total from its parts.
  void add_up(size_t factor) {
    if (chunks_ == 1) return;
    double* total = totals_.data() + factor * size_;
    const double* part = parts_.data() + factor * chunks_ * size_;
    std::copy(part, part + size_, total);
    for (size_t chunk = 1; chunk < chunks_; ++chunk) {
      part += size_;
      for (size_t e = 0; e < size_; ++e) total[e] += part[e];
    }
  }

  /// What `add_up` formed.
  const double* total(size_t factor) const { return (chunks_ == 1 ? parts_.data() : totals_.data()) + factor * size_; }

 private:
  size_t chunks_ = 1, size_ = 0;
  std::vector<double> parts_;   ///< [k, chunks, size]
  std::vector<double> totals_;  ///< [k, size]; none where a factor is one chunk, whose part is the total
};

}  // namespace lora_rite::host
