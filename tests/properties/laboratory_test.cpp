// What bench/laboratory.hpp claims of each optimizer, and that its experiments can tell them apart.

#include "../../bench/laboratory.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

namespace lora_rite::test {
using namespace laboratory;
namespace {

constexpr Kind kKinds[] = {Kind::Scaling, Kind::Diagonal, Kind::Rotation, Kind::General};

/// The rounding of 20 steps, in factors with condition κ(T) and bases with some 1e2: as derived in invariance_test.cpp,
/// with less in hand, so that an error that grows with κ² is seen at κ = 1e6 in float too.
double tolerance(torch::ScalarType dtype, Kind kind, double magnitude) {
  const double condition = kind == Kind::Scaling ? 1 : magnitude;
  return 8 * (dtype == torch::kDouble ? 0x1p-53 : 0x1p-24) * (condition + 100);
}

void expect_invariant(const std::string& optimizer) {
  for (const auto dtype : {torch::kDouble, torch::kFloat}) {
    for (const Kind kind : kKinds) {
      for (double magnitude = 1; magnitude <= (kind == Kind::Rotation ? 1 : 1e6); magnitude *= 100) {
        const Invariance found = invariance(optimizer, kind, magnitude, dtype);
        EXPECT_LT(found.after_all_steps, tolerance(dtype, kind, magnitude))
            << optimizer << ", kind " << static_cast<int>(kind) << ", " << magnitude << ", " << dtype;
        EXPECT_LT(found.after_first_step, tolerance(dtype, kind, magnitude));
      }
    }
  }
}

TEST(LaboratoryInvariance, LoraRiteMovesTheProductAlikeFromEveryFactorisation) {
  expect_invariant("rite");
  expect_invariant("rite-qr");
}

TEST(LaboratoryInvariance, ScaledGradientDescentDoesSoToo) { expect_invariant("scaled-gd"); }

TEST(LaboratoryInvariance, EveryOtherOptimizerDependsOnTheFactorisation) {
  for (const std::string& optimizer : contenders()) {
    if (optimizer == "rite" || optimizer == "rite-qr" || optimizer == "scaled-gd") continue;
    if (optimizer == "lora-muon" || optimizer == "lora-tsd" || optimizer == "altlora") continue;  // see below
    const auto difference = [&](Kind kind, double magnitude) {
      return invariance(optimizer, kind, magnitude, torch::kDouble).after_all_steps;
    };
    EXPECT_GT(difference(Kind::General, 100), 1e-3) << optimizer;
    EXPECT_GT(difference(Kind::Diagonal, 100), 1e-3) << optimizer;
    if (optimizer != "lamb") {
      EXPECT_GT(difference(Kind::Scaling, 100), 1e-3) << optimizer;
    }
    if (optimizer != "sgd" && optimizer != "muon" && optimizer != "polora") {
      EXPECT_GT(difference(Kind::Rotation, 1), 1e-3) << optimizer;
    }
  }
}

TEST(LaboratoryInvariance, SgdAndMuonAreInvariantUnderRotations) {
  for (const auto dtype : {torch::kDouble, torch::kFloat}) {
    for (const char* optimizer : {"sgd", "muon"}) {
      EXPECT_LT(invariance(optimizer, Kind::Rotation, 1, dtype).after_all_steps, tolerance(dtype, Kind::Rotation, 1))
          << optimizer;
    }
  }
}

TEST(LaboratoryInvariance, LambIsInvariantUnderScalingButForItsEpsilon) {
  // Its ε = 1e-6 stands beside gradients of about 1e-1 and, after scaling by s, 1e-1/s: a relative change of 1e-5 s.
  for (const double number : {10., 100.}) {
    const double found = invariance("lamb", Kind::Scaling, number, torch::kDouble).after_all_steps;
    EXPECT_LT(found, 1e-4 * number);
    EXPECT_GT(found, 1e-7 * number);
  }
}

// Their damping is in the way: LoRA-Muon's and LoRA-TSD's relative to BᵀB, which a scaling leaves alone, AltLoRA's not.
// What they are without it says pair_baselines_test.cpp.
TEST(LaboratoryInvariance, LoraMuonLoraTsdAndAltLoraAreInvariantButForTheirDamping) {
  struct Bound {
    const char* optimizer;
    double scaling, general, least;  ///< at 100, and what is above round-off at least
  };
  const double round_off = tolerance(torch::kDouble, Kind::Rotation, 1);
  for (const Bound& bound : {Bound{"lora-muon", round_off, 0.1, 1e-3}, Bound{"lora-tsd", round_off, 1e-3, 1e-6},
                             Bound{"altlora", 0.1, 1e-2, 1e-6}}) {
    const auto difference = [&](Kind kind, double magnitude) {
      return invariance(bound.optimizer, kind, magnitude, torch::kDouble).after_all_steps;
    };
    EXPECT_LT(difference(Kind::Rotation, 1), round_off) << bound.optimizer;
    EXPECT_LT(difference(Kind::Scaling, 100), bound.scaling) << bound.optimizer;
    const double general = difference(Kind::General, 100);
    EXPECT_LT(general, bound.general) << bound.optimizer;
    EXPECT_GT(general, bound.least) << bound.optimizer;
  }
}

TEST(LaboratoryInvariance, PoLoraIsInvariantUnderRotationsButForItsPowerIterations) {
  const double found = invariance("polora", Kind::Rotation, 1, torch::kDouble).after_all_steps;
  EXPECT_LT(found, 1e-5);
  EXPECT_GT(found, tolerance(torch::kDouble, Kind::Rotation, 1));
}

TEST(LaboratoryInvariance, ARunThatDivergesCountsAsInfinitelyFar) {
  EXPECT_EQ(invariance("sgd", Kind::Scaling, 100, torch::kDouble).after_all_steps, INFINITY);
}

TEST(LaboratoryInvariance, EveryContenderLearns) {
  for (const std::string& optimizer : contenders()) {
    const Invariance found = invariance(optimizer, Kind::Scaling, 1, torch::kDouble);
    EXPECT_LT(found.loss_ratio, 0.9) << optimizer;
    EXPECT_GT(found.way, 0.25) << optimizer << ": a product that rests would be invariant too";
    EXPECT_EQ(found.after_all_steps, 0) << optimizer << ": the same start must give the same run";
  }
}

TEST(LaboratoryInvariance, ATransformationHasItsConditionAndKeepsTheProduct) {
  for (const Kind kind : kKinds) {
    torch::manual_seed(1);
    const double magnitude = kind == Kind::Rotation ? 1 : 100;
    const auto t = transformation(kind, magnitude), values = torch::linalg_svdvals(t);
    EXPECT_NEAR((values[0] / values[-1]).item<double>(), kind == Kind::Scaling ? 1 : magnitude, 1e-9);
    const bool is_diagonal = torch::equal(t, t.diag().diag());
    EXPECT_EQ(is_diagonal, kind == Kind::Scaling || kind == Kind::Diagonal);
    const Network original(torch::kDouble);
    Network transformed(torch::kDouble);
    transformed.transform(kind, magnitude);
    for (size_t pair = 0; pair < original.pairs.size(); ++pair) {
      const auto before = original.products()[pair], after = transformed.products()[pair];
      EXPECT_LT((before - after).norm().item<double>(), 1e-12 * before.norm().item<double>());
      EXPECT_GT((original.pairs[pair].a - transformed.pairs[pair].a).norm().item<double>(), 0.1);
    }
  }
}

/// Of the contributions on log-log axes.
struct Slopes {
  double of_a, of_b, ratio, features;
};

Slopes slopes(const Setting& setting) {
  std::vector<double> widths, of_a, of_b, ratio, features;
  for (const int64_t width : {64, 512, 4096}) {
    const Contributions c = contributions(setting, width);
    widths.push_back(c.width);
    of_a.push_back(c.of_a);
    of_b.push_back(c.of_b);
    ratio.push_back(c.of_a / c.of_b);
    features.push_back(c.features);
  }
  return {slope(widths, of_a), slope(widths, of_b), slope(widths, ratio), slope(widths, features)};
}

// A contribution is a root mean square over products of 4 ranks and 8 inputs, and fluctuates by some 32^{-1/2} = 18 %
// at either end of a 64-fold width: 0.18 √2 / ln 64 = 0.06 in a slope, of which twice and a little is allowed.
constexpr double kSlopeError = 0.15;

TEST(LaboratoryFeatureLearning, LoraRiteLearnsByBothFactorsAtOneRateFromEitherStart) {
  for (const Start start : {Start::RandomA, Start::RandomB}) {
    for (const char* optimizer : {"rite", "rite-qr"}) {
      const Slopes found = slopes({optimizer, start, 0.5});
      EXPECT_NEAR(found.of_a, 0, kSlopeError) << optimizer;
      EXPECT_NEAR(found.of_b, 0, kSlopeError) << optimizer;
      EXPECT_NEAR(found.ratio, 0, kSlopeError) << optimizer;
    }
  }
}

TEST(LaboratoryFeatureLearning, AdamFromRandomAMakesTheInnerFeaturesGrow) {
  // At n^{-1/2} both contributions last, but A x grows like n^{1/2}; at 1/n it does not, and both vanish.
  const Slopes root = slopes({"adam", Start::RandomA, 0.5}), inverse = slopes({"adam", Start::RandomA, 1});
  EXPECT_NEAR(root.of_a, 0, kSlopeError);
  EXPECT_NEAR(root.of_b, 0, kSlopeError);
  EXPECT_NEAR(root.features, 0.5, kSlopeError);
  EXPECT_NEAR(inverse.of_a, -1, kSlopeError);
  EXPECT_NEAR(inverse.of_b, -1, kSlopeError);
  EXPECT_NEAR(inverse.features, 0, kSlopeError);
}

TEST(LaboratoryFeatureLearning, AdamFromRandomBLearnsByBothFactorsAtNoRate) {
  // A's contribution goes like n^{1−c}, B's like n^{1−2c}: one of them lasts at c = 1/2 and the other at c = 1.
  const Slopes root = slopes({"adam", Start::RandomB, 0.5}), inverse = slopes({"adam", Start::RandomB, 1});
  EXPECT_NEAR(root.of_a, 0.5, kSlopeError);
  EXPECT_NEAR(root.of_b, 0, kSlopeError);
  EXPECT_NEAR(root.ratio, 0.5, kSlopeError);
  EXPECT_NEAR(inverse.of_a, 0, kSlopeError);
  EXPECT_NEAR(inverse.of_b, -1, kSlopeError);
  EXPECT_NEAR(inverse.ratio, 1, kSlopeError);
}

TEST(LaboratoryFeatureLearning, LoraPlusLearnsByBothFactorsWithTwoRates) {
  for (const Start start : {Start::RandomA, Start::RandomB}) {
    const Slopes found = slopes({"lora+", start, 1});
    EXPECT_NEAR(found.of_a, 0, kSlopeError);
    EXPECT_NEAR(found.of_b, 0, kSlopeError);
    EXPECT_NEAR(found.features, 0, kSlopeError);
  }
}

TEST(LaboratoryFeatureLearning, TheSlopeOfAPowerIsItsExponent) {
  EXPECT_NEAR(slope({1, 2, 4, 8}, {3, 3 * std::pow(2, -0.5), 1.5, 3 * std::pow(8, -0.5)}), -0.5, 1e-12);
}

}  // namespace
}  // namespace lora_rite::test
