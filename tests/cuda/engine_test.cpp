// Engine::Cuda on a GPU. Its source is tested on a CPU in tests/engine/cuda; here it is the GPU's turn. Without one all
// of it is skipped; it is compiled where lora_rite::cuda is built.

#include <gtest/gtest.h>
#include <torch/cuda.h>

#include <lora_rite/lora_rite.hpp>

#include "cuda/support.hpp"
#include "support/pairs.hpp"

#ifdef LORA_RITE_HAS_CUDA_GRAPHS
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>
#endif

namespace lora_rite::test {
namespace {

class CudaKernels : public testing::Test {
 protected:
  void SetUp() override {
    if (!torch::cuda::is_available()) GTEST_SKIP() << "LibTorch finds no GPU";
  }
};

TEST_F(CudaKernels, AgreeWithTheDeviceEngine) {
  for (const int64_t rank : {1, 4, 7, 8, 13, 16, 32, 64}) {
    for (const auto dtype : {torch::kFloat, torch::kBFloat16}) {
      torch::manual_seed(71);
      const Pairs start = {random_pair("0", rank, 2 * rank + 37, 3 * rank + 29, dtype),
                           random_pair("1", rank, 1100, 513, dtype), random_pair("2", rank, rank + 3, 700, dtype)};
      const Pairs cuda = on(torch::kCUDA, start), device = on(torch::kCUDA, start);
      const auto options = LoraRiteOptions(1e-2).master_weights(true).max_relative_change(0.3);
      LoraRite<> on_cuda(cuda, LoraRiteOptions(options).engine(Engine::Cuda));
      LoraRite<> on_device(device, LoraRiteOptions(options).engine(Engine::Device));
      train(on_cuda, cuda, 0, 6);
      train(on_device, device, 0, 6);
      EXPECT_LT(distance(cuda, device), dtype == torch::kFloat ? 1e-6 : 1e-3) << rank << dtype;
    }
  }
}

TEST_F(CudaKernels, TwoRunsGiveTheSameBitsAndAResumedOne) {
  torch::manual_seed(72);
  const Pairs start = {random_pair("0", 16, 1100, 90, torch::kFloat), random_pair("1", 16, 40, 3000, torch::kFloat)};
  const Pairs one = on(torch::kCUDA, start), two = on(torch::kCUDA, start);
  const auto options = LoraRiteOptions(1e-2).engine(Engine::Cuda);
  LoraRite<> first(one, options), second(two, options);
  train(first, one, 0, 4);
  train(second, two, 0, 4);
  EXPECT_TRUE(equal_factors(one, two));
  const Pairs three = on(torch::kCUDA, one);
  LoraRite<> resumed(three, options);
  load_bytes(resumed, saved_bytes(first));
  train(first, one, 4, 7);
  train(resumed, three, 4, 7);
  EXPECT_TRUE(equal_factors(one, three));
}

#ifdef LORA_RITE_HAS_CUDA_GRAPHS
TEST_F(CudaKernels, AReplayIsAStep) {
  const c10::cuda::CUDAStreamGuard stream(c10::cuda::getStreamFromPool());
  torch::manual_seed(73);
  const Pairs start = {random_pair("0", 16, 700, 90, torch::kFloat), random_pair("1", 16, 40, 300, torch::kFloat)};
  const Pairs recorded = on(torch::kCUDA, start), usual = on(torch::kCUDA, start);
  const auto options = LoraRiteOptions(1e-2).engine(Engine::Cuda).capturable(true);
  LoraRite<> replayed(recorded, options), stepped(usual, options);
  train(replayed, recorded, 0, 3);
  train(stepped, usual, 0, 3);
  at::cuda::CUDAGraph graph;
  graph.capture_begin();
  replayed.step();
  graph.capture_end();
  for (int64_t number = 3; number < 8; ++number) {
    give_gradients(recorded, number);
    graph.replay();
  }
  train(stepped, usual, 3, 8);
  torch::cuda::synchronize();
  EXPECT_TRUE(equal_factors(recorded, usual));
}
#endif

}  // namespace
}  // namespace lora_rite::test
