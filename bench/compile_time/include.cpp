// A translation unit that includes the header and constructs no optimizer.

#include <lora_rite/lora_rite.hpp>
#include <torch/torch.h>

void step(lora_rite::LoraRite<>& optimizer) { optimizer.step(); }
