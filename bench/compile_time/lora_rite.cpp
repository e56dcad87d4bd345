// A translation unit that constructs the optimizer and steps with it.

#include <torch/torch.h>
#include <lora_rite/lora_rite.hpp>

int main() {
  const auto a = torch::randn({4, 8}).requires_grad_(), b = torch::zeros({6, 4}).requires_grad_();
  lora_rite::LoraRite<> optimizer({{"q", a, b}}, lora_rite::LoraRiteOptions(1e-3));
  torch::matmul(b, a).sum().backward();
  optimizer.step();
}
