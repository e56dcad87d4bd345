#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "lora_rite/engine/parallel.hpp"
#include "lora_rite/leaf.hpp"

namespace lora_rite::engine {

/// For B factors whose elements lie apart, as those of experts that share one tensor (`expert_pairs`): copies [n, r] of
/// them and of their gradients, packed as the kernels want them. Experts that lie beside each other are copied
/// together, so that a line of memory is read or written once. All memory is asked for in the constructor.
class ExpertPacking {
 public:
  /// Is the factor one that is to be packed: a part of a leaf, float on a CPU, [n, r] and not contiguous?
  static bool packs(const at::Tensor& factor) {
    return lora_rite::detail::is_part(factor) && factor.is_cpu() && factor.scalar_type() == at::kFloat &&
           factor.dim() == 2 && factor.numel() > 0 && !factor.is_contiguous();
  }

  /// Of all factors of a side, of one shape, those that `packs`.
  explicit ExpertPacking(const std::vector<at::Tensor>& factors)
      : rows_(factors[0].size(0)), rank_(factors[0].numel() / rows_), is_packed_(factors.size()) {
    bool any = false;
    for (size_t i = 0; i < factors.size(); ++i) any = (is_packed_[i] = packs(factors[i])) || any;
    if (!any) return;
    values_.resize(factors.size() * size());
    gradients_.resize(values_.size());
    places_.reserve(factors.size());
  }

  bool is_packed(size_t i) const { return is_packed_[i] != 0; }
  float* values(size_t i) { return values_.data() + i * size(); }
  float* gradient(size_t i) { return gradients_.data() + i * size(); }

  /// Copies are made, and written back, of what was added since the last time.
  void add_values(size_t i, const at::Tensor& factor) { add(factor, values(i)); }
  void add_gradient(size_t i, const at::Tensor& gradient) { add(gradient, this->gradient(i)); }
  void pack() {
    move([](float* packed, float* element) { *packed = *element; });
  }
  void write_back() {
    move([](float* packed, float* element) { *element = *packed; });
  }

 private:
  static constexpr int64_t kTogether = 16;     ///< factors: the floats of a line of memory
  static constexpr int64_t kRows = 8;          ///< of one factor before the next one's
  static constexpr int64_t kElements = 32768;  ///< of all of these, for one thread at a time

  struct Place {
    float* packed;
    float* begin;
    int64_t row, column;  ///< strides
  };

  size_t size() const { return static_cast<size_t>(rows_ * rank_); }

  void add(const at::Tensor& tensor, float* packed) {
    places_.push_back({packed, static_cast<float*>(tensor.unsafeGetTensorImpl()->mutable_data()), tensor.stride(0),
                       tensor.stride(1)});
  }

  template <class Copy>
  void move(const Copy& copy) {
    const int64_t count = static_cast<int64_t>(places_.size());
    const int64_t tiles = (count + kTogether - 1) / kTogether;
    const int64_t chunk = std::max<int64_t>(1, kElements / (kTogether * rank_));
    const int64_t chunks = (rows_ + chunk - 1) / chunk;
    parallel_tasks(tiles * chunks, [&](int64_t task) {
      const int64_t first = task / chunks * kTogether, last = std::min(first + kTogether, count);
      const int64_t begin = task % chunks * chunk, end = std::min(begin + chunk, rows_);
      for (int64_t top = begin; top < end; top += kRows) {
        for (int64_t p = first; p < last; ++p) {
          const Place place = places_[static_cast<size_t>(p)];
          for (int64_t row = top; row < std::min(top + kRows, end); ++row) {
            float *packed = place.packed + row * rank_, *element = place.begin + row * place.row;
            for (int64_t j = 0; j < rank_; ++j) copy(packed + j, element + j * place.column);
          }
        }
      }
    });
    places_.clear();
  }

  int64_t rows_, rank_;
  std::vector<char> is_packed_;
  std::vector<float> values_, gradients_;  ///< [k, n, r]
  std::vector<Place> places_;              ///< to be copied next
};

}  // namespace lora_rite::engine
