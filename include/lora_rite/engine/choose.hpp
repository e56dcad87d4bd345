#pragma once

#include <ATen/ATen.h>

/// Elementwise choices made on the device. They exist because some of ATen's own have no kernel for `meta` tensors, and
/// a step must run on those: that is the proof that nothing is read back.
namespace lora_rite {

/// `condition ? yes : no`, broadcast. (`at::where`, which C++ LibTorch lacks on `meta`: there only shape and dtype
/// count.)
inline at::Tensor choose(const at::Tensor& condition, const at::Tensor& yes, const at::Tensor& no) {
  return condition.is_meta() ? yes + no + at::zeros_like(condition) : at::where(condition, yes, no);
}
inline at::Tensor choose(const at::Tensor& condition, const at::Tensor& yes, double no) {
  return choose(condition, yes, at::scalar_tensor(no, yes.options()));
}

/// Not `flag`. (`at::logical_not`, also lacking on `meta`.)
inline at::Tensor negated(const at::Tensor& flag) { return flag.eq(0); }

/// Elementwise: neither NaN nor infinite? x − x is 0 for finite numbers only. (`at::isfinite`, also lacking on `meta`.)
inline at::Tensor is_finite(const at::Tensor& tensor) { return (tensor - tensor).eq(0); }

}  // namespace lora_rite
