// A step recorded as a CUDA graph and replayed: without the host's work for each operator, and to the same factors as
// steps that are called. Without a GPU, or built without CUDA, it says so and ends.
#include <torch/torch.h>
#include <lora_rite/lora_rite.hpp>

#include <iostream>

#ifdef LORA_RITE_HAS_CUDA_GRAPHS  // set by CMakeLists.txt where LibTorch has CUDA
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>

struct Run {
  torch::Tensor a, b;
  lora_rite::LoraRite<> optimizer;
  lora_rite::WarmupCosine scheduler{optimizer, /*warmup_steps=*/10, /*total_steps=*/100};

  Run(const torch::Tensor& start_a, const torch::Tensor& start_b)
      : a(start_a.clone().requires_grad_()),
        b(start_b.clone().requires_grad_()),
        optimizer({lora_rite::FactorPair{"layer", a, b}}, lora_rite::LoraRiteOptions(1e-2).capturable(true)) {}
  void backward(const torch::Tensor& change) {
    optimizer.zero_grad(/*set_to_none=*/false);  // a graph reads the gradients where they were
    (torch::matmul(b, a) - change).square().mean().backward();
  }
};

int main() {
  if (!torch::cuda::is_available()) {
    std::cout << "LibTorch finds no GPU here: nothing to show\n";
    return 0;
  }
  torch::manual_seed(0);
  const c10::cuda::CUDAStreamGuard side_stream(c10::cuda::getStreamFromPool());  // as CUDA asks for a capture
  const auto change = torch::matmul(torch::randn({64, 4}, torch::kCUDA), torch::randn({4, 48}, torch::kCUDA));
  const auto a = torch::randn({8, 48}, torch::kCUDA).div_(7), b = torch::zeros({64, 8}, torch::kCUDA);
  Run called(a, b), replayed(a, b);
  at::cuda::CUDAGraph graph;
  for (int step = 0; step < 100; ++step) {
    called.backward(change);
    called.optimizer.step();
    called.scheduler.step();
    replayed.backward(change);
    if (step == 3) graph.capture_begin();
    if (step <= 3) replayed.optimizer.step();  // the first three allocate state and gradients; the fourth is recorded
    if (step == 3) graph.capture_end();
    if (step >= 3) {
      replayed.optimizer.upload_rates();
      graph.replay();
    }
    replayed.scheduler.step();
  }
  const auto product = torch::matmul(called.b, called.a);
  const float difference = ((torch::matmul(replayed.b, replayed.a) - product).norm() / product.norm()).item<float>();
  std::cout << "3 steps and 97 replays: ΔW differs from that of 100 steps by " << difference << " of its norm\n";
  return difference < 1e-4 ? 0 : 1;
}
#else
int main() { std::cout << "built without CUDA's graphs: nothing to show\n"; }
#endif
