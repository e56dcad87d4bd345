#pragma once

// One optimizer with several groups, batches and kinds of parameters, for tests of a whole step.

#include <lora_rite/lora_rite.hpp>

#include <memory>
#include <vector>

#include "support/torch.hpp"

namespace lora_rite::test {

/// Two groups of pairs (two of the same shape, so that they share a batch, and another) and a head that
/// AdamW steps, of a float and a half parameter.
template <class Basis>
struct MixedGroups {
  std::vector<FactorPair> first, second;
  torch::Tensor head, half_head;
  std::unique_ptr<LoraRite<Basis>> optimizer;

  MixedGroups(torch::ScalarType dtype, const LoraRiteOptions& options) {
    torch::manual_seed(67);
    const auto add = [&](std::vector<FactorPair>& group, int64_t out, int64_t in, int64_t rank) {
      group.push_back({"pair", torch::randn({rank, in}).to(dtype).requires_grad_(),
                       torch::randn({out, rank}).to(dtype).requires_grad_()});
    };
    add(first, 8, 6, 3);
    add(first, 8, 6, 3);
    add(first, 5, 9, 2);
    add(second, 8, 6, 3);
    add(second, 7, 7, 4);
    head = torch::randn({5}).requires_grad_();
    half_head = torch::randn({4}).to(torch::kHalf).requires_grad_();
    optimizer = std::make_unique<LoraRite<Basis>>(first, options);
    optimizer->add_pairs(second, LoraRiteOptions(0.03).escape(false));
    optimizer->add_parameters({head, half_head}, torch::optim::AdamWOptions(0.01));
  }

  std::vector<torch::Tensor> parameters() const {
    std::vector<torch::Tensor> result;
    for (const auto* group : {&first, &second}) {
      for (const auto& pair : *group) result.insert(result.end(), {pair.a, pair.b});
    }
    result.insert(result.end(), {head, half_head});
    return result;
  }

  /// Random gradients of that number for all.
  void set_gradients(int number) {
    torch::manual_seed(1000 + number);
    for (auto& parameter : parameters()) {
      parameter.mutable_grad() = torch::randn(parameter.sizes()).to(parameter.scalar_type());
    }
  }

  /// A good step with the random gradients of that number.
  void step(int number) {
    set_gradients(number);
    optimizer->step();
  }

  /// A step with `value` in one element of the gradient of parameter `place`.
  void bad_step(size_t place, double value) {
    set_gradients(-1);
    parameters()[place].mutable_grad().view(-1)[2] = value;
    optimizer->step();
  }
};

}  // namespace lora_rite::test
