#pragma once

#include <torch/types.h>

#include <functional>
#include <vector>

namespace finetune {

/// A part of a network: tensors that may carry gradients → one tensor. What else it needs it captures by value; it must
/// change nothing outside, because it runs twice.
using Recomputable = std::function<torch::Tensor(const std::vector<torch::Tensor>&)>;

/// part(inputs), keeping only the inputs for the backward pass, which computes everything in between a second time
/// (gradient checkpointing; Chen et al., 2016).
///
/// `parameters` are the trainable tensors that `part` reads: their gradients flow even where no input needs one. The
/// random numbers of the second run (dropout) and autocasting are those of the first. Gradients equal those without
/// recomputing; gradients of gradients are not available. Without gradient mode it is just part(inputs).
torch::Tensor recompute(const Recomputable& part, const std::vector<torch::Tensor>& inputs,
                        const std::vector<torch::Tensor>& parameters);

}  // namespace finetune
