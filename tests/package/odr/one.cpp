// One of two translation units that include the library: a function that is not inline would be defined twice.
#include <lora_rite/lora_rite.hpp>

std::unique_ptr<torch::optim::Optimizer> make_polar(std::vector<lora_rite::FactorPair> pairs);

std::unique_ptr<torch::optim::Optimizer> make_polar(std::vector<lora_rite::FactorPair> pairs) {
  return std::make_unique<lora_rite::LoraRite<lora_rite::PolarBasis>>(std::move(pairs));
}
