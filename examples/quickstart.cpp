// Fits a LoRA pair to a rank-4 change of a weight matrix, without data.
#include <torch/torch.h>
#include <lora_rite/lora_rite.hpp>

#include <iostream>

int main() {
  torch::manual_seed(0);
  const auto change = torch::matmul(torch::randn({64, 4}), torch::randn({4, 48}));  // the ΔW to be learned
  auto a = torch::randn({8, 48}).div_(7).requires_grad_();                          // lora_A [r, in]
  auto b = torch::zeros({64, 8}).requires_grad_();                                  // lora_B [out, r]

  const auto options = lora_rite::LoraRiteOptions(1e-1).max_relative_change(0.3);
  lora_rite::LoraRite<> optimizer({lora_rite::FactorPair{"layer", a, b}}, options);
  lora_rite::WarmupCosine scheduler(optimizer, /*warmup_steps=*/20, /*total_steps=*/400);

  for (int step = 1; step <= 400; ++step) {
    optimizer.zero_grad();
    const auto loss = (torch::matmul(b, a) - change).square().mean();
    loss.backward();
    optimizer.step();
    scheduler.step();
    if (step % 100 == 0) std::cout << "step " << step << "  loss " << loss.item<float>() << '\n';
  }
}
