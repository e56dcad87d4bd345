#pragma once

#include <ATen/ATen.h>

#include <cstring>
#include <limits>
#include <vector>

#include "lora_rite/rule/side.hpp"

/// How factors lie in memory, and as what the acts see them. Shapes: k pairs, a factor of n rows. "Stacked" is
/// [k, factor shape] as the user has it, "tall" [k, n, r] with the rank last.
namespace lora_rite::engine {

/// Stacked [k, r, in...] or [k, out, r, ...] as tall [k, n, r]; a view where the memory allows.
inline at::Tensor tall(const at::Tensor& stacked, Side side) {
  if (side == Side::A) return stacked.flatten(2).mT();
  return stacked.dim() == 3 ? stacked : stacked.movedim(2, -1).flatten(1, -2);
}

/// The way back from tall [k, n, r] to stacked [k, shape].
inline at::Tensor stacked(const at::Tensor& tall, Side side, at::IntArrayRef shape) {
  std::vector<int64_t> sizes(shape.begin(), shape.end());
  sizes.insert(sizes.begin(), tall.size(0));
  if (side == Side::A) return tall.mT().reshape(sizes);
  if (sizes.size() == 3) return tall;
  const int64_t rank = sizes[2];
  sizes.erase(sizes.begin() + 2);
  sizes.push_back(rank);
  return tall.reshape(sizes).movedim(-1, 2);
}

/// The largest number that a half type holds. What is larger is held there: an infinity would be in the model for good.
/// Infinite for the other dtypes.
inline double largest_of(at::ScalarType dtype) {
  if (dtype == at::kHalf) return 65504;
  if (dtype == at::kBFloat16) return 3.3895313892515355e38;
  return std::numeric_limits<double>::infinity();
}

/// In which dtype the moments of a parameter are kept.
inline at::ScalarType wide_dtype(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

inline at::Tensor wide(const at::Tensor& tensor) { return tensor.to(at::kDouble); }

/// `rule::column_weight` of rows from `begin` on [n].
inline at::Tensor column_weights(int64_t rows, const at::TensorOptions& options, int64_t begin) {
  return (at::arange(begin, begin + rows, options) * 0.61803398874989485).frac() + 0.5;
}

/// XᵀY [k, r, r] of tall X and Y.
inline at::Tensor inner_products(const at::Tensor& x, const at::Tensor& y) { return at::matmul(x.mT(), y); }

/// old ← fresh, both contiguous and of one shape and dtype. On a CPU without an operator, which could ask for memory.
inline void overwrite(const at::Tensor& old, const at::Tensor& fresh) {
  if (old.is_cpu() && old.is_contiguous() && fresh.is_contiguous() && old.scalar_type() == fresh.scalar_type()) {
    std::memcpy(old.data_ptr(), fresh.const_data_ptr(), old.nbytes());
  } else {
    old.copy_(fresh);
  }
}

/// Bytes that lie without gaps → elements that lie by `sizes` and `strides` from `to` on. Asks for no memory.
inline const char* scatter(const char* from, size_t element, at::IntArrayRef sizes, at::IntArrayRef strides, char* to) {
  if (sizes.empty()) {
    std::memcpy(to, from, element);
    return from + element;
  }
  for (int64_t i = 0; i < sizes[0]; ++i)
    from =
        scatter(from, element, sizes.slice(1), strides.slice(1), to + i * strides[0] * static_cast<int64_t>(element));
  return from;
}

/// Copies slice i of `batch` [k, shape] to destinations[i]. One operator call for an accelerator; on a CPU, where such
/// a call would dispatch for each tensor and ask for memory, the bytes of a batch that is contiguous are moved here.
/// Tensors on `meta` have none.
inline void write_slices(const at::Tensor& batch, const std::vector<at::Tensor>& destinations) {
  if (!batch.is_cpu() && !batch.is_meta()) {
    at::_foreach_copy_(destinations, batch.contiguous().unbind(0));
    return;
  }
  const at::Tensor source = batch.contiguous();
  const size_t bytes = batch.numel() / destinations.size() * batch.element_size();
  for (size_t i = 0; i < destinations.size(); ++i) {
    const at::Tensor& destination = destinations[i];
    if (batch.is_cpu()) {
      const char* from = static_cast<const char*>(source.const_data_ptr()) + i * bytes;
      char* to = static_cast<char*>(destination.data_ptr());
      if (destination.is_contiguous()) {
        std::memcpy(to, from, bytes);
      } else {
        scatter(from, batch.element_size(), destination.sizes(), destination.strides(), to);
      }
    }
    destinations[i].unsafeGetTensorImpl()->bump_version();  // autograd must notice, as it would an in-place operator
  }
}

}  // namespace lora_rite::engine
