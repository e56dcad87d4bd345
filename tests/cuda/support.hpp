#pragma once

#include <lora_rite/factor_pair.hpp>

#include <cstdint>
#include <vector>

#include "support/torch.hpp"

/// What the tests on a GPU share.
namespace lora_rite::test {

using Pairs = std::vector<FactorPair>;

inline Pairs on(torch::Device device, const Pairs& pairs) {
  Pairs copies;
  for (const auto& pair : pairs) {
    copies.push_back({pair.name, pair.a.detach().clone().to(device).requires_grad_(),
                      pair.b.detach().clone().to(device).requires_grad_()});
  }
  return copies;
}

/// The gradients of set_gradients, wherever the factors are: drawn on the CPU, so that they are the same everywhere.
inline void give_gradients(const Pairs& pairs, int64_t number, double scale = 1) {
  torch::manual_seed(static_cast<uint64_t>(1000 + number));
  for (const auto& pair : pairs) {
    for (torch::Tensor factor : {pair.a, pair.b}) {
      const torch::Tensor drawn = (scale * torch::randn(factor.sizes(), torch::kDouble)).to(factor.scalar_type());
      if (factor.grad().defined()) {
        factor.mutable_grad().copy_(drawn);  // a recorded step reads it where it lay
      } else {
        factor.mutable_grad() = drawn.to(factor.device());
      }
    }
  }
}

inline void train(torch::optim::Optimizer& optimizer, const Pairs& pairs, int64_t first, int64_t last) {
  for (int64_t number = first; number < last; ++number) {
    give_gradients(pairs, number);
    optimizer.step();
  }
}

}  // namespace lora_rite::test
