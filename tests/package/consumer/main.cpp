// A program outside the library: some steps on a pair, which must lower the loss and move both factors.
#include <lora_rite/lora_rite.hpp>

#include <iostream>

int main() {
  at::manual_seed(0);
  lora_rite::FactorPair pair{"layer", torch::randn({4, 12}), torch::zeros({8, 4})};
  pair.a.requires_grad_();
  pair.b.requires_grad_();
  const torch::Tensor a = pair.a.detach().clone(), b = pair.b.detach().clone();
  const torch::Tensor target = torch::randn({8, 12});
  const auto loss = [&] { return (torch::mm(pair.b, pair.a) - target).square().mean(); };

  lora_rite::LoraRite<> optimizer({pair}, lora_rite::LoraRiteOptions(1e-2));
  const double before = loss().item<double>();
  for (int step = 0; step < 10; ++step) {
    optimizer.zero_grad();
    loss().backward();
    optimizer.step();
  }
  const double after = loss().item<double>();
  std::cout << "loss " << before << " -> " << after << "\n";
  return after < before && !torch::equal(a, pair.a) && !torch::equal(b, pair.b) ? 0 : 1;
}
