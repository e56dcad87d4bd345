// Several optimizers in several threads of one process. Under the `tsan` preset this is also the test that no two of
// them touch the same memory.

#include <gtest/gtest.h>

#include <functional>
#include <thread>
#include <vector>

#include "support/pairs.hpp"

namespace lora_rite::test {
namespace {

constexpr int64_t kOptimizers = 3, kSteps = 8;

/// Trains on gradients that come from the factors themselves: LibTorch's generator, which threads share, is not needed.
void train(const std::vector<FactorPair>& pairs, const LoraRiteOptions& options) {
  LoraRite<> optimizer(pairs, options);
  for (int64_t step = 0; step < kSteps; ++step) {
    for (const FactorPair& pair : pairs) {
      torch::Tensor a = pair.a, b = pair.b;
      a.mutable_grad() = torch::sin(a.detach() * (3.0 + static_cast<double>(step)));
      b.mutable_grad() = torch::cos(b.detach() * (2.0 + static_cast<double>(step)));
    }
    optimizer.step();
  }
}

class Threads : public testing::TestWithParam<std::tuple<Engine, torch::Dtype>> {
 protected:
  LoraRiteOptions options() const { return LoraRiteOptions(1e-2).engine(std::get<0>(GetParam())); }

  /// Large enough for several threads, of two shapes.
  std::vector<FactorPair> pairs(uint64_t seed) const {
    torch::manual_seed(seed);
    std::vector<FactorPair> pairs;
    for (int64_t i = 0; i < 4; ++i) pairs.push_back(random_pair("pair", 8, 700 + i % 2, 900, std::get<1>(GetParam())));
    return pairs;
  }
};

TEST_P(Threads, OptimizersInSeveralThreadsDoAsTheyWouldAlone) {
  std::vector<std::vector<FactorPair>> alone, together;
  for (int64_t i = 0; i < kOptimizers; ++i) {
    alone.push_back(pairs(static_cast<uint64_t>(i)));
    together.push_back(clone_pairs(alone.back()));
    train(alone.back(), options());
  }
  std::vector<std::thread> threads;
  for (const auto& own : together) threads.emplace_back([&own, this] { train(own, options()); });
  for (std::thread& thread : threads) thread.join();
  for (size_t i = 0; i < alone.size(); ++i) {
    EXPECT_TRUE(equal_factors(alone[i], together[i]));
    EXPECT_FALSE(equal_factors(together[i], pairs(i))) << "nothing moved";
  }
}

TEST_P(Threads, AnOptimizerGoesOnInAnotherThread) {
  const auto alone = pairs(7), moved = clone_pairs(alone);
  LoraRite<> stays(alone, options()), moves(moved, options());
  for (int64_t step = 0; step < kSteps; ++step) {
    const auto one_step = [&](LoraRite<>& optimizer, const std::vector<FactorPair>& own) {
      for (const FactorPair& pair : own) {
        torch::Tensor a = pair.a, b = pair.b;
        a.mutable_grad() = torch::sin(a.detach() * 5);
        b.mutable_grad() = torch::cos(b.detach() * 3);
      }
      optimizer.step();
    };
    one_step(stays, alone);
    std::thread(one_step, std::ref(moves), std::cref(moved)).join();
    ASSERT_TRUE(equal_factors(alone, moved)) << "step " << step;
  }
}

INSTANTIATE_TEST_SUITE_P(Engines, Threads,
                         testing::Values(std::tuple(Engine::Host, torch::kFloat),
                                         std::tuple(Engine::Device, torch::kFloat),
                                         std::tuple(Engine::Device, torch::kDouble)),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param) == Engine::Host ? "Host" : "Device") +
                                  (std::get<1>(info.param) == torch::kFloat ? "Float" : "Double");
                         });

}  // namespace
}  // namespace lora_rite::test
