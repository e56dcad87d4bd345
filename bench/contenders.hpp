// What the benchmarks set beside each other: optimizers on LoRA pairs of given shapes.
#pragma once

#include <torch/torch.h>
#include <lora_rite/baselines/registry.hpp>
#include <lora_rite/lora_rite.hpp>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#ifdef LORA_RITE_HAS_CUDA_GRAPHS
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>
#endif

#ifdef LORA_RITE_HAS_BEFORE
#include "before.hpp"
#endif

namespace bench {

using lora_rite::FactorPair;
using lora_rite::LoraRiteOptions;

/// `pairs` LoRA pairs on matrices in → out.
struct Shape {
  int64_t pairs, in, out, rank;
  double target = 0;  ///< of LoRA-RITE's time to AdamW's; 0: none

  int64_t parameters() const { return pairs * (in + out) * rank; }
  std::string name() const {
    return std::to_string(pairs) + "x" + std::to_string(in) + "x" + std::to_string(out) + "x" + std::to_string(rank);
  }
};

inline std::vector<FactorPair> make_pairs(const std::vector<Shape>& shapes, torch::ScalarType dtype,
                                          torch::Device device = torch::kCPU) {
  torch::manual_seed(0);
  std::vector<FactorPair> pairs;
  const auto factor = [&](int64_t rows, int64_t columns) {
    torch::Tensor x = torch::randn({rows, columns}).mul_(0.02).to(device, dtype).requires_grad_();
    x.mutable_grad() = torch::randn({rows, columns}).mul_(1e-3).to(device, dtype);
    return x;
  };
  for (const Shape& shape : shapes)
    for (int64_t i = 0; i < shape.pairs; ++i)
      pairs.push_back({"", factor(shape.rank, shape.in), factor(shape.out, shape.rank)});
  return pairs;
}

/// AdamW in one ATen call for all tensors, as torch.optim.AdamW(fused=True) makes it; LibTorch has no optimizer for it.
struct FusedAdamW {
  std::vector<torch::Tensor> parameters, gradients, means, squares, steps;

  explicit FusedAdamW(const std::vector<FactorPair>& pairs)
      : parameters(lora_rite::detail::alternating_factors(pairs)) {
    for (const auto& parameter : parameters) {
      gradients.push_back(parameter.grad());
      means.push_back(torch::zeros_like(parameter));
      squares.push_back(torch::zeros_like(parameter));
      steps.push_back(torch::zeros({}, parameter.options().dtype(torch::kFloat)));
    }
  }
  void step() {
    torch::NoGradGuard guard;
    at::_foreach_add_(steps, 1);
    at::_fused_adamw_(parameters, gradients, means, squares, {}, steps, 1e-4, 0.9, 0.999, 1e-2, 1e-8, false, false);
  }
};

using Step = std::function<void()>;
using Make = std::function<Step(std::vector<FactorPair>)>;

/// A contender's state lives as long as its step.
template <class Optimizer>
Step step_of(std::shared_ptr<Optimizer> optimizer) {
  return [optimizer] { optimizer->step(); };
}

template <class Basis = lora_rite::PolarBasis>
Make rite(LoraRiteOptions options = LoraRiteOptions(1e-4)) {
  return [options](std::vector<FactorPair> pairs) {
    return step_of(std::make_shared<lora_rite::LoraRite<Basis>>(std::move(pairs), options));
  };
}
/// By its name in the registry.
inline Make named(const std::string& name) {
  return [name](std::vector<FactorPair> pairs) {
    return step_of(std::shared_ptr<torch::optim::Optimizer>(lora_rite::make_optimizer(name, std::move(pairs), 1e-4)));
  };
}
#ifdef LORA_RITE_HAS_CUDA_GRAPHS
/// LoRA-RITE's step recorded as a CUDA graph and replayed, which one call of the driver starts.
inline Make rite_graph(lora_rite::Engine engine) {
  return [engine](std::vector<FactorPair> pairs) -> Step {
    const auto optimizer = std::make_shared<lora_rite::LoraRite<>>(
        std::move(pairs), LoraRiteOptions(1e-4).capturable(true).engine(engine));
    const auto graph = std::make_shared<at::cuda::CUDAGraph>();
    const c10::cuda::CUDAStreamGuard on_own_stream(c10::cuda::getStreamFromPool());
    for (int i = 0; i < 3; ++i) optimizer->step();  // allocates the state
    torch::cuda::synchronize();
    graph->capture_begin();
    optimizer->step();
    graph->capture_end();
    return [optimizer, graph] { graph->replay(); };
  };
}
#endif
#ifdef LORA_RITE_HAS_BEFORE
inline Step rite_before(const std::vector<FactorPair>& pairs) {
  std::vector<std::pair<torch::Tensor, torch::Tensor>> factors;
  for (const FactorPair& pair : pairs) factors.emplace_back(pair.a, pair.b);
  return step_before(factors, 1e-4);
}
#endif
inline Step fused_adamw(const std::vector<FactorPair>& pairs) { return step_of(std::make_shared<FusedAdamW>(pairs)); }

}  // namespace bench
