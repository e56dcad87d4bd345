#pragma once

#include <torch/types.h>

#include <cstdint>
#include <lora_rite/nn/lora_linear.hpp>
#include <memory>

namespace finetune {

/// The linear layer that the models of this folder are built of: plain, with frozen `weight` [out, in] and maybe `bias`
/// [out], until lora_rite::nn::inject_lora gives it an adapter.
using Linear = lora_rite::nn::LoraLinearImpl;

/// A linear layer without memory of its own, to be filled by load_model: every weight is one zero, seen many times.
std::shared_ptr<Linear> make_linear(int64_t in_features, int64_t out_features, bool bias);

/// A linear layer without bias whose weight is the very tensor `weight` [out, in], which may be tied.
std::shared_ptr<Linear> make_linear(const torch::Tensor& weight);

}  // namespace finetune
