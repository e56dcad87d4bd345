// A gradient that is NaN or infinite, anywhere: the whole step is skipped, counted, and leaves no trace.
// A run with such a step put in between equals the run without it bit for bit.

#include "support/mixed_groups.hpp"
#include "support/tensors.hpp"

#include <gtest/gtest.h>
#include <lora_rite/lora_rite.hpp>

#include <functional>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

namespace lora_rite::test {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

/// Runs 8 good steps, `bad` steps put in before step `when`, and compares with the run without.
template <class Basis>
void expect_no_trace(torch::ScalarType dtype, const LoraRiteOptions& options, int when,
                     const std::function<int(MixedGroups<Basis>&)>& bad) {
  MixedGroups<Basis> clean(dtype, options), hit(dtype, options);
  for (int step = 0; step < 8; ++step) {
    if (step == when) {
      std::vector<torch::Tensor> before;
      for (const auto& parameter : hit.parameters()) before.push_back(parameter.detach().clone());
      const int count = bad(hit);
      const auto after = hit.parameters();
      for (size_t i = 0; i < after.size(); ++i) {
        EXPECT_TRUE(same_bits(after[i], before[i])) << "parameter " << i << " in the skipped step";
      }
      EXPECT_EQ(hit.optimizer->skipped_steps(), count);
    }
    clean.step(step);
    hit.step(step);
  }
  const auto expected = clean.parameters(), actual = hit.parameters();
  for (size_t i = 0; i < actual.size(); ++i) {
    EXPECT_TRUE(all_finite(actual[i]));
    EXPECT_TRUE(same_bits(actual[i], expected[i])) << "parameter " << i << " at the end";
  }
  EXPECT_EQ(clean.optimizer->skipped_steps(), 0);
}

template <class Basis>
class SkippedStep : public testing::Test {};
using Bases = testing::Types<PolarBasis, QrBasis>;
TYPED_TEST_SUITE(SkippedStep, Bases);

TYPED_TEST(SkippedStep, BadValueInAnyParameterSkipsTheWholeStep) {
  // Ten factors and the two parameters of AdamW, each in its turn.
  for (size_t place = 0; place < 12; ++place) {
    SCOPED_TRACE("parameter " + std::to_string(place));
    expect_no_trace<TypeParam>(torch::kFloat, LoraRiteOptions(0.02), 4, [&](MixedGroups<TypeParam>& setup) {
      setup.bad_step(place, kNaN);
      return 1;
    });
  }
}

TYPED_TEST(SkippedStep, InfinitiesOfEitherSignAreBadToo) {
  for (const double value : {kInf, -kInf}) {
    expect_no_trace<TypeParam>(torch::kDouble, LoraRiteOptions(0.02), 3, [&](MixedGroups<TypeParam>& setup) {
      setup.bad_step(1, value);
      return 1;
    });
  }
}

TYPED_TEST(SkippedStep, BadFirstStepLeavesAFreshOptimizer) {
  for (const auto dtype : {torch::kFloat, torch::kDouble}) {
    expect_no_trace<TypeParam>(dtype, LoraRiteOptions(0.02), 0, [](MixedGroups<TypeParam>& setup) {
      setup.bad_step(8, kNaN);
      return 1;
    });
  }
}

TYPED_TEST(SkippedStep, ManyBadStepsAreCounted) {
  expect_no_trace<TypeParam>(torch::kFloat, LoraRiteOptions(0.02), 5, [](MixedGroups<TypeParam>& setup) {
    for (int i = 0; i < 7; ++i) setup.bad_step(i, i % 2 == 0 ? kNaN : kInf);
    return 7;
  });
}

TYPED_TEST(SkippedStep, LeavesMasterCopiesAlone) {
  for (const auto dtype : {torch::kBFloat16, torch::kHalf}) {
    for (const int when : {0, 4}) {
      expect_no_trace<TypeParam>(dtype, LoraRiteOptions(0.02).master_weights(true), when,
                                 [](MixedGroups<TypeParam>& setup) {
                                   setup.bad_step(3, kNaN);
                                   return 1;
                                 });
    }
  }
}

TYPED_TEST(SkippedStep, WithEveryOptionOnLeavesNoTrace) {
  const auto options = LoraRiteOptions(0.02)
                           .weight_decay(0.1)
                           .max_update_rms(0.5)
                           .balance(true)
                           .lr_ratio_b(2)
                           .maximize(true)
                           .clip_unmagnified_norm(0.5);
  expect_no_trace<TypeParam>(torch::kFloat, options, 2, [](MixedGroups<TypeParam>& setup) {
    setup.bad_step(9, kNaN);
    return 1;
  });
}

TYPED_TEST(SkippedStep, SavedStateDiffersOnlyInTheCount) {
  // The state after a skipped step, written and read by another optimizer, goes on like the clean one.
  MixedGroups<TypeParam> clean(torch::kFloat, LoraRiteOptions(0.02));
  MixedGroups<TypeParam> hit(torch::kFloat, LoraRiteOptions(0.02));
  MixedGroups<TypeParam> resumed(torch::kFloat, LoraRiteOptions(0.02));
  for (int step = 0; step < 3; ++step) {
    clean.step(step);
    hit.step(step);
  }
  hit.bad_step(4, kNaN);
  std::stringstream archive;
  torch::save(*hit.optimizer, archive);
  torch::load(*resumed.optimizer, archive);
  EXPECT_EQ(resumed.optimizer->skipped_steps(), 1);
  {
    torch::NoGradGuard no_grad;
    const auto from = hit.parameters(), to = resumed.parameters();
    for (size_t i = 0; i < to.size(); ++i) to[i].copy_(from[i]);
  }
  for (int step = 3; step < 6; ++step) {
    clean.step(step);
    resumed.step(step);
  }
  const auto expected = clean.parameters(), actual = resumed.parameters();
  for (size_t i = 0; i < actual.size(); ++i) {
    EXPECT_TRUE(same_bits(actual[i], expected[i])) << "parameter " << i;
  }
}

TEST(SkippedStepOfHalf, LeavesAnInfinityWhereItWas) {
  const auto head = torch::tensor({1.0F, static_cast<float>(kInf)}).to(torch::kHalf).requires_grad_();
  const auto a = torch::randn({2, 4}).requires_grad_(), b = torch::randn({4, 2}).requires_grad_();
  LoraRite<> optimizer({{"q", a, b}});
  optimizer.add_parameters({head}, torch::optim::AdamWOptions(1e-2));
  head.mutable_grad() = torch::full({2}, kNaN).to(torch::kHalf);
  optimizer.step();
  EXPECT_EQ(optimizer.skipped_steps(), 1);
  EXPECT_EQ(head[1].item<double>(), kInf);
}

TYPED_TEST(SkippedStep, GoodStepsAreNotSkipped) {
  MixedGroups<TypeParam> setup(torch::kFloat, LoraRiteOptions(0.02));
  const auto before = setup.parameters()[0].detach().clone();
  setup.step(0);
  EXPECT_EQ(setup.optimizer->skipped_steps(), 0);
  EXPECT_GT(relative_difference(setup.parameters()[0], before, 1), 1e-3);
}

}  // namespace
}  // namespace lora_rite::test
