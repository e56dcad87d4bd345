// bfloat16 and half factors, with and without a float master copy.

#include <gtest/gtest.h>
#include <lora_rite/lora_rite.hpp>

#include <tuple>
#include <utility>
#include <vector>

#include "support/batches.hpp"
#include "support/pairs.hpp"
#include "support/tensors.hpp"

namespace lora_rite::test {
namespace {

/// Distance of 1 to the next larger number.
double resolution(torch::ScalarType dtype) { return dtype == torch::kHalf ? 0x1p-10 : 0x1p-7; }

struct Factors {
  torch::Tensor a, b;
};

/// Factors of ±1: rows and columns of Hadamard matrices, so R = √n I on both sides.
Factors sign_factors(torch::ScalarType dtype) {
  auto hadamard = torch::ones({1, 1});
  while (hadamard.size(0) < 16) {
    hadamard = torch::cat({torch::cat({hadamard, hadamard}, 1), torch::cat({hadamard, -hadamard}, 1)});
  }
  return {hadamard.slice(0, 0, 4).contiguous().to(dtype).requires_grad_(),
          hadamard.slice(1, 4, 8).contiguous().to(dtype).requires_grad_()};
}

/// The same rounded gradients for every dtype: a constant direction and little noise.
std::vector<Factors> gradients(int steps) {
  torch::manual_seed(71);
  const auto direction_a = torch::randn({4, 16}), direction_b = torch::randn({16, 4});
  std::vector<Factors> result;
  for (int i = 0; i < steps; ++i) {
    const auto noisy = [](const torch::Tensor& direction) {
      // Eight significant bits, which all four dtypes hold.
      return (direction + 0.1 * torch::randn_like(direction)).to(torch::kBFloat16);
    };
    result.push_back({noisy(direction_a), noisy(direction_b)});
  }
  return result;
}

template <class Basis>
Factors run(torch::ScalarType dtype, int steps, const LoraRiteOptions& options) {
  Factors factors = sign_factors(dtype);
  LoraRite<Basis> optimizer({FactorPair{"pair", factors.a, factors.b}}, options);
  for (const auto& gradient : gradients(steps)) {
    factors.a.mutable_grad() = gradient.a.to(dtype);
    factors.b.mutable_grad() = gradient.b.to(dtype);
    optimizer.step();
  }
  EXPECT_EQ(optimizer.skipped_steps(), 0);
  EXPECT_EQ(factors.a.scalar_type(), dtype);
  return {factors.a.detach(), factors.b.detach()};
}

template <class Basis>
class HalfPrecision : public testing::Test {};
using Bases = testing::Types<PolarBasis, QrBasis>;
TYPED_TEST_SUITE(HalfPrecision, Bases);

/// An infinity in a factor would be in the model for good.
TYPED_TEST(HalfPrecision, AFactorThatOutgrowsItsTypeIsHeldAtTheLargestNumber) {
  for (const bool master : {false, true}) {
    Factors factors = sign_factors(torch::kHalf);
    {
      torch::NoGradGuard no_grad;
      factors.b.mul_(6e4);
    }
    LoraRite<TypeParam> optimizer({FactorPair{"pair", factors.a, factors.b}},
                                  LoraRiteOptions(1e5).master_weights(master));
    for (int step = 0; step < 3; ++step) {
      factors.a.mutable_grad() = torch::zeros_like(factors.a);
      factors.b.mutable_grad() = -factors.b.detach().sign();  // away from zero
      optimizer.step();
      EXPECT_TRUE(torch::isfinite(factors.b).all().template item<bool>()) << "master " << master << ", step " << step;
      EXPECT_EQ(factors.b.abs().max().template item<float>(), 65504.0F);
    }
    EXPECT_EQ(optimizer.skipped_steps(), 0);
    bool came_back = false;
    const torch::Tensor sign = factors.b.detach().sign();
    for (int step = 0; step < 20 && !came_back; ++step) {
      factors.b.mutable_grad() = sign;
      optimizer.step();
      came_back = factors.b.abs().max().template item<float>() < 65504.0F;
    }
    EXPECT_TRUE(came_back) << "master " << master;
  }
}

TYPED_TEST(HalfPrecision, FactorsMoveAndStayCloseToTheFloatRun) {
  const int steps = 20;
  for (const auto dtype : {torch::kBFloat16, torch::kHalf}) {
    for (const bool master : {false, true}) {
      const auto options = LoraRiteOptions(0.05).master_weights(master);
      const Factors start = sign_factors(dtype);
      const Factors wide = run<TypeParam>(torch::kFloat, steps, options);
      const Factors narrow = run<TypeParam>(dtype, steps, options);
      for (const auto& [actual, expected, initial] :
           {std::tie(narrow.a, wide.a, start.a), std::tie(narrow.b, wide.b, start.b)}) {
        ASSERT_TRUE(all_finite(actual));
        EXPECT_GT(relative_difference(actual, initial, frobenius(initial)), 0.1);
        // Each step rounds the factor by half a unit at most; with a master copy only the last does.
        const double rounding = resolution(dtype) / 2 * (master ? 1 : steps);
        EXPECT_LT(relative_difference(actual, expected, frobenius(expected)), rounding);
      }
    }
  }
}

TYPED_TEST(HalfPrecision, MasterCopyAddsUpStepsBelowTheResolution) {
  for (const auto dtype : {torch::kBFloat16, torch::kHalf}) {
    // M has an RMS near 1 and R = 4 I: a step is about lr / 4 = u / 16, lost beside entries of ±1.
    const auto options = LoraRiteOptions(resolution(dtype) / 4);
    const Factors start = sign_factors(dtype);
    const int steps = 100;

    const Factors lost = run<TypeParam>(dtype, steps, options);
    EXPECT_TRUE(same_bits(lost.a, start.a) && same_bits(lost.b, start.b))
        << "the steps are not small enough for this test to mean something";

    auto with_master = options;
    const Factors kept = run<TypeParam>(dtype, steps, with_master.master_weights(true));
    const Factors wide = run<TypeParam>(torch::kFloat, steps, options);
    for (const auto& [actual, expected, initial] :
         {std::tie(kept.a, wide.a, start.a), std::tie(kept.b, wide.b, start.b)}) {
      EXPECT_GT(relative_difference(actual, initial, frobenius(initial)), 2 * resolution(dtype));
      // The rounded master copy is the float run's, each entry within a unit.
      const auto error = (actual.to(torch::kFloat) - expected).abs().max().template item<double>();
      EXPECT_LE(error, resolution(dtype));
    }
  }
}

/// States of two processes come together in one batch: the pair whose A had no gradient so far has no copy of it.
TYPED_TEST(HalfPrecision, AMissingMasterCopyIsMadeAnewBesideOthers) {
  torch::manual_seed(31);
  const auto options = LoraRiteOptions(1e-2).master_weights(true).clip_unmagnified_norm(0);
  const auto placed = [](const std::vector<FactorPair>& pairs) {
    return lora_rite::test::place<TypeParam>(pairs, Engine::Device);
  };
  const auto act = [&](engine::Batches& batches) { lora_rite::test::act(batches, options); };
  const auto state_of = [](const engine::Batches& batches) { return batches.all[0].batch->state(); };
  std::vector<FactorPair> apart;
  for (const char* name : {"p", "q"}) {
    apart.push_back(lora_rite::test::random_pair(name, 2, 6, 5, torch::kBFloat16));
  }
  auto first = placed({apart[0]}), second = placed({apart[1]});
  lora_rite::test::set_gradients(apart, 7);
  apart[1].a.mutable_grad() = torch::Tensor();
  for (auto* batches : {&first, &second}) act(*batches);
  ASSERT_TRUE(state_of(first).master.a.defined() && !state_of(second).master.a.defined());

  const auto together = lora_rite::test::clone_pairs(apart);
  auto joined = placed(together);
  {
    const torch::NoGradGuard no_grad;
    joined.all[0].batch->restore({first.all[0].batch->pick(0), second.all[0].batch->pick(0)});
  }
  lora_rite::test::set_gradients(apart, 8);
  lora_rite::test::set_gradients(together, 8);
  for (auto* batches : {&first, &second, &joined}) act(*batches);
  EXPECT_TRUE(lora_rite::test::equal_factors(together, apart));
}

TYPED_TEST(HalfPrecision, ZeroAndDeficientFactorsStayFinite) {
  for (const auto dtype : {torch::kBFloat16, torch::kHalf}) {
    for (const bool master : {false, true}) {
      torch::manual_seed(73);
      auto a = torch::randn({4, 16}), b = torch::zeros({12, 4});
      a[3].copy_(a[0]);
      a = a.to(dtype).requires_grad_();
      b = b.to(dtype).requires_grad_();
      const auto start = b.detach().clone();
      LoraRite<TypeParam> optimizer({FactorPair{"pair", a, b}}, LoraRiteOptions(0.01).master_weights(master));
      for (int step = 0; step < 10; ++step) {
        a.mutable_grad() = torch::randn({4, 16}).to(dtype);
        b.mutable_grad() = torch::randn({12, 4}).to(dtype);
        optimizer.step();
        ASSERT_TRUE(all_finite(a) && all_finite(b)) << dtype << " step " << step;
      }
      EXPECT_GT(relative_difference(b, start, 1), 1e-3);
    }
  }
}

TYPED_TEST(HalfPrecision, GradientsOfAnyRepresentableScaleStayFinite) {
  for (const auto dtype : {torch::kBFloat16, torch::kHalf}) {
    // half ends at 6.5e4 above and 6e-8 below.
    const std::vector<double> scales =
        dtype == torch::kHalf ? std::vector<double>{1e-6, 1e4} : std::vector<double>{1e-30, 1e30};
    for (const double scale : scales) {
      torch::manual_seed(79);
      auto a = torch::randn({4, 16}).to(dtype).requires_grad_();
      auto b = torch::randn({12, 4}).to(dtype).requires_grad_();
      const auto start = a.detach().clone();
      LoraRite<TypeParam> optimizer({FactorPair{"pair", a, b}}, LoraRiteOptions(0.05).eps(0));
      for (int step = 0; step < 5; ++step) {
        a.mutable_grad() = (torch::randn({4, 16}, torch::kDouble) * scale).to(dtype);
        b.mutable_grad() = (torch::randn({12, 4}, torch::kDouble) * scale).to(dtype);
        optimizer.step();
        ASSERT_TRUE(all_finite(a) && all_finite(b)) << dtype << " scale " << scale;
      }
      EXPECT_GT(relative_difference(a, start, 1), 1e-2);
      EXPECT_LT(relative_difference(a, start, 1), 10);
    }
  }
}

}  // namespace
}  // namespace lora_rite::test
