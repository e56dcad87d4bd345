#include <lora_rite/lora_rite.hpp>

#include <cstdio>

std::unique_ptr<torch::optim::Optimizer> make_polar(std::vector<lora_rite::FactorPair> pairs);  // one.cpp

int main() {
  const auto factor = [](std::vector<int64_t> shape) { return torch::ones(shape).requires_grad_(); };
  const lora_rite::FactorPair first{"first", factor({2, 3}), factor({4, 2})};
  const lora_rite::FactorPair second{"second", factor({2, 3}), factor({4, 2})};
  const auto polar = make_polar({first});
  lora_rite::LoraRite<lora_rite::PolarBasis> polar_too({second});  // the same instantiation as in one.cpp
  lora_rite::LoraRite<lora_rite::QrBasis> qr({first});
  const bool all = polar->parameters().size() == 2 && polar_too.parameters().size() == 2 && qr.parameters().size() == 2;
  std::puts(all ? "every optimizer holds its two factors" : "an optimizer lost a factor");
  return all ? 0 : 1;
}
