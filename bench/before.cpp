// Compiled with the headers of another revision, whose namespace gets another name: both then live in one program.

#include <torch/torch.h>

#define lora_rite lora_rite_before
#include <lora_rite/lora_rite.hpp>
#undef lora_rite

#include "before.hpp"

#include <memory>

namespace bench {

std::function<void()> step_before(const std::vector<std::pair<torch::Tensor, torch::Tensor>>& pairs, double lr) {
  std::vector<lora_rite_before::FactorPair> own;
  for (const auto& [a, b] : pairs) own.push_back({"", a, b});
  const auto optimizer = std::make_shared<lora_rite_before::LoraRite<>>(own, lora_rite_before::LoraRiteOptions(lr));
  return [optimizer] { optimizer->step(); };
}

}  // namespace bench
