// What lora_rite.cpp is compared with.

#include <torch/torch.h>

int main() {
  const auto parameter = torch::randn({4, 8}).requires_grad_();
  torch::optim::AdamW optimizer({parameter}, torch::optim::AdamWOptions(1e-3));
  parameter.sum().backward();
  optimizer.step();
}
