#include <gtest/gtest.h>

#include "support/operators.hpp"
#include "support/pairs.hpp"

namespace lora_rite {
namespace {

/// Number of ATen operator calls, nested ones included, while `function` runs.
template <class Function>
int64_t operator_calls(const Function& function) {
  int64_t calls = 0;
  for (const auto& [name, times] : testing::operators_of(function)) calls += times;
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
}  // namespace lora_rite
