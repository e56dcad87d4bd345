#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "support/counting_allocator.hpp"
#include "support/operators.hpp"
#include "support/pairs.hpp"

namespace lora_rite::test {
namespace {

/// Number of ATen operator calls, nested ones included, while `function` runs.
template <class Function>
int64_t operator_calls(const Function& function) {
  int64_t calls = 0;
  for (const auto& [name, times] : operators_of(function)) calls += times;
  return calls;
}

int64_t calls_of_a_step(int64_t pair_count, int64_t shape_count, torch::Device device = torch::kCPU,
                        bool capturable = false) {
  std::vector<FactorPair> pairs;
  for (int64_t i = 0; i < pair_count; ++i) {
    const int64_t shape = i % shape_count;
    const auto options = torch::TensorOptions().device(device);
    FactorPair pair = {"", torch::ones({4, 16 + shape}, options).requires_grad_(),
                       torch::ones({8, 4}, options).requires_grad_()};
    pair.a.mutable_grad() = torch::ones_like(pair.a);
    pair.b.mutable_grad() = torch::ones_like(pair.b);
    pairs.push_back(pair);
  }
  LoraRite<> optimizer(pairs, LoraRiteOptions().engine(Engine::Device).capturable(capturable));
  optimizer.step();  // allocates the momenta
  return operator_calls([&] { optimizer.step(); });
}

TEST(DeviceEngine, CallsGrowWithTheShapesAndNotWithThePairs) {
  const int64_t few = calls_of_a_step(2, 1);
  EXPECT_GT(few, 20) << "the counter counts nothing";
  EXPECT_EQ(calls_of_a_step(64, 1), few);
  EXPECT_EQ(calls_of_a_step(64, 1, torch::kMeta), calls_of_a_step(2, 1, torch::kMeta));
}

TEST(DeviceEngine, ActTwoIsOneForAllShapesOfARank) {
  for (const bool capturable : {false, true}) {
    const int64_t one = calls_of_a_step(8, 1, torch::kCPU, capturable);
    const int64_t two = calls_of_a_step(8, 2, torch::kCPU, capturable);
    const int64_t four = calls_of_a_step(8, 4, torch::kCPU, capturable);
    // What each further shape adds are acts 1 and 3, and little to put act 2 together.
    EXPECT_LT(two - one, (capturable ? 0.4 : 0.75) * one);
    EXPECT_LT(four - two, 2.1 * (two - one));
  }
}

/// Of each shape its own statistics and its own decision, also where some batches have no gradient in a step.
TEST(DeviceEngine, ShapesOfARankStepAsEachAlone) {
  const auto options = LoraRiteOptions(1e-2)
                           .engine(Engine::Device)
                           .clip_unmagnified_norm(0)  // whose norm would be one for all
                           .preconditioner_exponent(0.25)
                           .max_relative_change(0.3)
                           .row_equilibration(true);
  for (const auto dtype : {torch::kDouble, torch::kFloat}) {
    torch::manual_seed(91);
    const std::vector<FactorPair> together = {random_pair("0", 3, 9, 8, dtype), random_pair("1", 3, 5, 12, dtype),
                                              random_pair("2", 3, 9, 8, dtype), random_pair("3", 3, 20, 4, dtype)};
    const auto alone = clone_pairs(together);
    LoraRite<> optimizer(together, options);
    std::vector<std::unique_ptr<LoraRite<>>> optimizers;
    for (const auto& pair : alone) {
      optimizers.push_back(std::make_unique<LoraRite<>>(std::vector<FactorPair>{pair}, options));
    }
    for (uint64_t step = 0; step < 8; ++step) {
      for (const auto* pairs : {&together, &alone}) {
        set_gradients(*pairs, step);
        const FactorPair& resting = (*pairs)[step % 4];
        torch::Tensor(resting.a).mutable_grad() = torch::Tensor();
        if (step % 2 == 0) torch::Tensor(resting.b).mutable_grad() = torch::Tensor();
      }
      optimizer.step();
      for (const auto& each : optimizers) each->step();
    }
    for (size_t i = 0; i < together.size(); ++i) {
      const double tolerance = dtype == torch::kDouble ? 1e-12 : 1e-6;
      EXPECT_LT(((together[i].a - alone[i].a).norm() / alone[i].a.norm()).item<double>(), tolerance) << i;
      EXPECT_LT(((together[i].b - alone[i].b).norm() / alone[i].b.norm()).item<double>(), tolerance) << i;
    }
  }
}

/// Bytes an element of the factors that a step takes at its peak, above what stays.
double peak_of_a_step(torch::Dtype dtype, const LoraRiteOptions& options) {
  constexpr int64_t kRows = 4096, kRank = 16;
  const FactorPair pair = {"", torch::ones({kRank, kRows}, dtype).requires_grad_(),
                           torch::ones({kRows, kRank}, dtype).requires_grad_()};
  pair.a.mutable_grad() = torch::ones_like(pair.a);
  pair.b.mutable_grad() = torch::ones_like(pair.b);
  LoraRite<> optimizer({pair}, LoraRiteOptions(options).engine(Engine::Device));
  optimizer.step();  // allocates the momenta
  return CountingAllocator::instance().peak_of([&] { optimizer.step(); }) / (2 * kRank * kRows);
}

TEST(DeviceEngine, HoldsTheDoublesOfOneSideAtATime) {
  EXPECT_LT(peak_of_a_step(torch::kBFloat16, {}), 20);
  EXPECT_LT(peak_of_a_step(torch::kFloat, {}), 26);
  EXPECT_LT(peak_of_a_step(torch::kBFloat16, LoraRiteOptions().weight_decay(0.1)), 20);
  EXPECT_LT(peak_of_a_step(torch::kBFloat16, LoraRiteOptions().master_weights(true)), 28);
  EXPECT_GT(peak_of_a_step(torch::kBFloat16, LoraRiteOptions().balance(true)), 24) << "balance needs both sides";
}

TEST(DeviceEngine, StepsMetaTensorsSoNothingIsReadBack) {
  for (const auto dtype : {torch::kFloat, torch::kDouble, torch::kBFloat16}) {
    const auto options = torch::TensorOptions().device(torch::kMeta).dtype(dtype);
    torch::nn::Module module("m");
    module.register_parameter("lora_A", torch::empty({4, 3, 3, 5}, options));
    module.register_parameter("lora_B", torch::empty({8, 4, 1, 1}, options));
    module.register_parameter("head", torch::empty({8}, options));
    LoraRite<> optimizer(module, LoraRiteOptions(1e-2)
                                     .balance(true)
                                     .max_update_rms(1)
                                     .weight_decay(0.1)
                                     .max_relative_change(0.3)
                                     .row_equilibration(true)
                                     .master_weights(dtype == torch::kBFloat16)
                                     .engine(Engine::Device));
    for (int i = 0; i < 3; ++i) {
      for (auto& parameter : module.parameters()) parameter.mutable_grad() = torch::empty_like(parameter);
      optimizer.step();
    }
    LoraRite<QrBasis> qr(module);
    qr.step();
  }
}

}  // namespace
}  // namespace lora_rite::test
