#pragma once

#include <torch/nn/module.h>

#include <cstdint>
#include <lora_rite/nn/lora_config.hpp>
#include <vector>

#include "memory_plan/plan.hpp"
#include "memory_plan/sizes.hpp"

namespace finetune {

/// A pair of factors by their shapes: A [r, in], B [out, r].
struct FactorShapes {
  std::vector<int64_t> a, b;

  double rank() const { return as_double(a.front()); }
  double size() const { return count(a) + count(b); }
};

/// The factors that inject_lora would add to `model`. Throws as it does.
std::vector<FactorShapes> plan_factors(torch::nn::Module& model, const lora_rite::nn::LoraConfig& config);

/// The bytes that the optimizer of `question` remembers of a pair between steps. Throws Error for an unknown one.
double state_bytes(const MemoryQuestion& question, const FactorShapes& pair);

}  // namespace finetune
