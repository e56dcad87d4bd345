#pragma once

#include <ATen/core/grad_mode.h>
#include <torch/optim/optimizer.h>

namespace lora_rite::detail {

/// The loss that a closure of `step` returns, which it computes with gradients enabled; undefined without a closure.
inline torch::Tensor loss_of(const torch::optim::Optimizer::LossClosure& closure) {
  if (!closure) return {};
  at::AutoGradMode enable_grad(true);
  return closure();
}

}  // namespace lora_rite::detail
