// A translation unit that includes the header and hands an optimizer on.

#include <torch/torch.h>
#include <lora_rite/lora_rite.hpp>

double train(lora_rite::LoraRite<>& optimizer, const torch::Tensor& data);

double train(lora_rite::LoraRite<>& optimizer) { return train(optimizer, torch::randn({4, 8})); }
