// A factor that someone else changes between two steps. The documented rule: the edit is noticed, the
// second moments of the partner keep their place in the basis (P = I), momenta stay as they are. The
// oracle does that by explicit formulas and is told of each edit.

#include "support/duel.hpp"

#include <gtest/gtest.h>

#include <vector>

namespace lora_rite::test {
namespace {

/// Errors of 10 steps, amplified by condition numbers of about 1e2: 10 · 1e-16 · 1e4.
constexpr double kTolerance = 1e-11;

template <class Basis>
class ExternalEdit : public testing::Test {
 protected:
  static Duel<Basis> make_duel(LoraRiteOptions options = LoraRiteOptions(0.05).betas({0.9, 0.9})) {
    torch::manual_seed(41);
    return Duel<Basis>(torch::randn({3, 9}, torch::kDouble), torch::randn({8, 3}, torch::kDouble), options);
  }

  /// Some steps, an edit of B (and of A, if `both`) that is announced to the oracle, more steps.
  static void expect_rule(void (*edit)(torch::Tensor&), bool of_a, bool of_b) {
    auto duel = make_duel();
    duel.random_steps(5);
    ASSERT_LT(duel.disagreement(), kTolerance) << "before the edit";
    torch::NoGradGuard no_grad;
    if (of_a) {
      edit(duel.a);
      duel.announce_edit_of_a();
    }
    if (of_b) {
      edit(duel.b);
      duel.announce_edit_of_b();
    }
    ASSERT_LT(duel.disagreement(), kTolerance) << "the edit itself";
    for (int step = 1; step <= 5; ++step) {
      duel.random_steps(1);
      ASSERT_LT(duel.disagreement(), kTolerance) << "step " << step << " after the edit";
    }
  }

  static void expect_rule_for_each_side(void (*edit)(torch::Tensor&)) {
    expect_rule(edit, false, true);
    expect_rule(edit, true, false);
    expect_rule(edit, true, true);
  }
};

using Bases = testing::Types<PolarBasis, QrBasis>;
TYPED_TEST_SUITE(ExternalEdit, Bases);

TYPED_TEST(ExternalEdit, CopyIntoAFactorIsNoticed) {
  this->expect_rule_for_each_side([](torch::Tensor& x) { x.copy_(torch::randn_like(x)); });
}

TYPED_TEST(ExternalEdit, ScalingInPlaceIsNoticed) {
  this->expect_rule_for_each_side([](torch::Tensor& x) { x.mul_(2); });
}

TYPED_TEST(ExternalEdit, WriteThroughDataIsNoticed) {
  // Version counters do not see this one.
  this->expect_rule_for_each_side([](torch::Tensor& x) { x.data().add_(0.1); });
}

TYPED_TEST(ExternalEdit, WriteThroughAPointerIsNoticed) {
  this->expect_rule_for_each_side([](torch::Tensor& x) { x.data_ptr<double>()[4] += 1e-3; });
}

TYPED_TEST(ExternalEdit, SetDataIsNoticed) {
  this->expect_rule_for_each_side([](torch::Tensor& x) { x.set_data(1.5 * torch::randn(x.sizes(), torch::kDouble)); });
}

// The edits below leave every column norm of the tall factor as it was.

TYPED_TEST(ExternalEdit, ChangeOfSignIsNoticed) {
  this->expect_rule_for_each_side([](torch::Tensor& x) { x.neg_(); });
}

TYPED_TEST(ExternalEdit, PermutedRowsOfBAreNoticed) {
  this->expect_rule([](torch::Tensor& b) { b.copy_(b.flip(0).clone()); }, false, true);
}

TYPED_TEST(ExternalEdit, ColumnsOfBPermutedEachInItselfAreNoticed) {
  this->expect_rule(
      [](torch::Tensor& b) {
        for (int64_t j = 0; j < b.size(1); ++j) b.select(1, j).copy_(b.select(1, j).roll(j + 1));
      },
      false, true);
}

TYPED_TEST(ExternalEdit, SwappingAwayAndBackIsNoEdit) {
  // As when averaged weights are tried out between two steps.
  auto duel = this->make_duel();
  duel.random_steps(5);
  {
    torch::NoGradGuard no_grad;
    const auto kept = duel.b.clone();
    duel.b.copy_(torch::randn_like(duel.b));
    duel.b.copy_(kept);
  }
  duel.random_steps(5);
  EXPECT_LT(duel.disagreement(), kTolerance);
}

TYPED_TEST(ExternalEdit, SetToZeroIsSurvivedAndTrainingGoesOn) {
  auto duel = this->make_duel();
  duel.random_steps(5);
  {
    torch::NoGradGuard no_grad;
    duel.b.zero_();
  }
  duel.announce_edit_of_b();
  duel.random_steps(1);
  EXPECT_GT(frobenius(duel.b), 0);
  EXPECT_LT(duel.disagreement(), kTolerance);
  duel.random_steps(4);
  EXPECT_TRUE(all_finite(duel.a) && all_finite(duel.b));
}

TYPED_TEST(ExternalEdit, BetweenConstructionAndFirstStepIsJustAStart) {
  auto duel = this->make_duel();
  {
    torch::NoGradGuard no_grad;
    duel.a.mul_(3);
    duel.b.copy_(torch::randn_like(duel.b));
  }
  duel.announce_edit_of_a();
  duel.announce_edit_of_b();
  duel.random_steps(6);
  EXPECT_LT(duel.disagreement(), kTolerance);
}

TYPED_TEST(ExternalEdit, WorksTogetherWithWeightDecayAndCap) {
  auto duel = this->make_duel(LoraRiteOptions(0.05).weight_decay(0.5).max_update_rms(0.5));
  duel.random_steps(4);
  {
    torch::NoGradGuard no_grad;
    duel.b.mul_(0.25);
  }
  duel.announce_edit_of_b();
  duel.random_steps(4);
  EXPECT_LT(duel.disagreement(), kTolerance);
}

TYPED_TEST(ExternalEdit, OfOnePairLeavesItsNeighboursInTheBatchAlone) {
  const auto last_of_three = [](bool edit_first) {
    torch::manual_seed(43);
    std::vector<FactorPair> pairs;
    for (int i = 0; i < 3; ++i) {
      pairs.push_back({"p" + std::to_string(i), torch::randn({3, 9}, torch::kDouble).requires_grad_(),
                       torch::randn({8, 3}, torch::kDouble).requires_grad_()});
    }
    LoraRite<TypeParam> optimizer(pairs, LoraRiteOptions(0.05).clip_unmagnified_norm(0));
    for (int step = 0; step < 6; ++step) {
      for (auto& pair : pairs) {
        pair.a.mutable_grad() = torch::randn_like(pair.a).detach();
        pair.b.mutable_grad() = torch::randn_like(pair.b).detach();
      }
      torch::NoGradGuard no_grad;
      if (edit_first && step == 3) pairs[0].b.mul_(7);
      optimizer.step();
    }
    return torch::cat({pairs[2].a.detach().flatten(), pairs[2].b.detach().flatten()});
  };
  EXPECT_LT(relative_difference(last_of_three(true), last_of_three(false), 1), 1e-13);
}

TYPED_TEST(ExternalEdit, OfABfloat16FactorReplacesItsMasterCopy) {
  torch::manual_seed(47);
  auto a = torch::randn({4, 16}).to(torch::kBFloat16).requires_grad_();
  auto b = torch::randn({12, 4}).to(torch::kBFloat16).requires_grad_();
  LoraRite<TypeParam> optimizer({FactorPair{"pair", a, b}}, LoraRiteOptions(0.01).master_weights(true));
  const auto step = [&] {
    a.mutable_grad() = torch::randn({4, 16}).to(torch::kBFloat16);
    b.mutable_grad() = torch::randn({12, 4}).to(torch::kBFloat16);
    optimizer.step();
  };
  for (int i = 0; i < 3; ++i) step();
  torch::Tensor edited;
  {
    torch::NoGradGuard no_grad;
    b.neg_();
    edited = b.detach().clone();
  }
  static_cast<LoraRiteOptions&>(optimizer.param_groups()[0].options()).set_lr(0);
  step();
  EXPECT_TRUE(same_bits(b, edited)) << "a step of length zero undid the edit";
}

}  // namespace
}  // namespace lora_rite::test
