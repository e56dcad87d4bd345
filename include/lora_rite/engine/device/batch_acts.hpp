#pragma once

#include <ATen/ATen.h>

#include <limits>

#include "lora_rite/engine/choose.hpp"
#include "lora_rite/engine/device/pending_writes.hpp"
#include "lora_rite/engine/device/tensor_algebra.hpp"
#include "lora_rite/engine/layout.hpp"
#include "lora_rite/engine/pair_state.hpp"
#include "lora_rite/rule/side.hpp"
#include "lora_rite/rule/types.hpp"

/// What the acts of the device engine hand to each other, of one batch of k pairs.
namespace lora_rite::device {

using engine::inner_products;
using engine::stacked;
using engine::tall;
using engine::wide;

/// R⁺ of a root of Gram matrices, by the basis and for the kind of step that is taken.
using InverseRoot = at::Tensor (*)(const at::Tensor& gram, double cutoff);

/// The distance from 1 to the next number.
inline double epsilon_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return std::numeric_limits<double>::epsilon();
    case at::kFloat:
      return std::numeric_limits<float>::epsilon();
    case at::kHalf:
      return 0x1p-10;
    default:
      return 0x1p-7;  // bfloat16
  }
}

/// In a dtype of a factor, within its range.
inline at::Tensor rounded(const at::Tensor& x, at::ScalarType dtype) {
  const double most = engine::largest_of(dtype);
  return (most < std::numeric_limits<double>::infinity() ? x.clamp(-most, most) : x).to(dtype);
}

/// row^{-1/2} [k, n, 1], and `unseen` for rows that never had a gradient.
inline at::Tensor row_scale(const at::Tensor& row_moments, double unseen) {
  const at::Tensor r = wide(row_moments).unsqueeze(-1);
  return choose(r > 0, r.rsqrt(), unseen);
}

/// One batch in one step, after act 1.
struct BatchObservation {
  PerSide<at::Tensor> factors;              ///< stacked, in the dtype that is stepped (float for a master copy)
  PerSide<at::Tensor> gradients;            ///< stacked, undefined where no pair has one
  PerSide<at::Tensor> edited;               ///< [k, 1, 1]
  at::Tensor has_gradient;                  ///< [2, k, 1, 1]
  rule::Statistics<at::Tensor> statistics;  ///< [2, k, r, r]

  /// With a master copy a half factor is known to float precision.
  double factor_epsilon() const { return epsilon_of(factors.a.scalar_type()); }
};

/// One batch in one step, after act 2.
struct BatchPlan {
  PairState next;  ///< the state's tensors, and new ones among them
  PendingWrites writes;
};

}  // namespace lora_rite::device
