// The claim of the project: the trajectory of ΔW = BA does not depend on the factorisation (TA, BT⁻¹)
// that training happens to hold. And the control: torch::optim's optimizers fail the same harness.
//
// Tolerances, relative to how far ΔW moved. The transformed start is rounded once, which changes ΔW by
// u κ(T), u the unit round-off, and every step rounds the transformed factors again, by as much: the sum
// of the 20 is about 20^{1/2} u κ(T) to 20 u κ(T). The network's own bases and preconditioners, with
// condition numbers of about 1e2, amplify round-off in both runs. Hence 50 u (κ(T) + 100), and never more
// than what the project promises: 1e-10 in double up to κ = 1e4, 1e-4 in float up to κ = 1e2.

#include "support/networks.hpp"

#include <gtest/gtest.h>
#include <torch/optim/adagrad.h>
#include <torch/optim/rmsprop.h>
#include <lora_rite/lora_rite.hpp>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace lora_rite::test {
namespace {

constexpr int kSteps = 20;

struct Transformation {
  const char* name;
  double condition;                                       ///< κ(T)
  torch::Tensor (*make)(int64_t rank, double condition);  ///< T [r, r], double
};

torch::Tensor random_rotation(int64_t rank) {
  return std::get<0>(torch::linalg_qr(torch::randn({rank, rank}, torch::kDouble)));
}

torch::Tensor spread(int64_t rank, double condition) {
  const double half = std::log10(condition) / 2;
  return torch::logspace(-half, half, rank, 10.0, torch::kDouble).diag();
}

torch::Tensor general(int64_t rank, double condition) {
  return random_rotation(rank).matmul(spread(rank, condition)).matmul(random_rotation(rank));
}

torch::Tensor scaling_up(int64_t rank, double) { return 1e3 * torch::eye(rank, torch::kDouble); }
torch::Tensor scaling_down(int64_t rank, double) { return torch::eye(rank, torch::kDouble) / 700; }
torch::Tensor rotation(int64_t rank, double) { return random_rotation(rank); }

const Transformation kScalingUp = {"scaling_up", 1, scaling_up};
const Transformation kScalingDown = {"scaling_down", 1, scaling_down};
const Transformation kRotation = {"rotation", 1, rotation};
const Transformation kGeneral1 = {"general_1e0", 1, general};
const Transformation kGeneral2 = {"general_1e2", 1e2, general};
const Transformation kGeneral4 = {"general_1e4", 1e4, general};
const Transformation kGeneral6 = {"general_1e6", 1e6, general};
const Transformation kDiagonal4 = {"diagonal_1e4", 1e4, spread};
const Transformation kDiagonal6 = {"diagonal_1e6", 1e6, spread};

struct Setting {
  const char* name;
  void (*change)(LoraRiteOptions&);
};

const Setting kDefaults = {"defaults", [](LoraRiteOptions&) {}};
const Setting kNoEscape = {"no_escape", [](LoraRiteOptions& o) { o.escape(false); }};
const Setting kWeightDecay = {"weight_decay", [](LoraRiteOptions& o) { o.weight_decay(1); }};
const Setting kClipActive = {"clip_active", [](LoraRiteOptions& o) { o.clip_unmagnified_norm(0.02); }};
const Setting kNoClip = {"no_clip", [](LoraRiteOptions& o) { o.clip_unmagnified_norm(0); }};
const Setting kBounded = {"max_relative_change", [](LoraRiteOptions& o) { o.max_relative_change(0.05); }};
const Setting kExponent = {"preconditioner_exponent", [](LoraRiteOptions& o) { o.preconditioner_exponent(0.25); }};
const Setting kRows = {"row_equilibration",
                       [](LoraRiteOptions& o) { o.row_equilibration(true).clip_unmagnified_norm(0.02); }};
const Setting kTogether = {"together", [](LoraRiteOptions& o) {
                             o.weight_decay(0.5).clip_unmagnified_norm(0.05).max_update_rms(0.6);
                             o.lr_ratio_b(2).betas({0.8, 0.95}).eps(1e-6).eps_root(1e-10);
                           }};

struct Trial {
  torch::ScalarType dtype;
  int64_t rank;
  Begin begin;
  const Setting* setting;
  const Transformation* transformation;
};

/// Every transformation once; then ranks, starts and settings with demanding ones.
std::vector<Trial> trials() {
  const auto dbl = torch::kDouble, flt = torch::kFloat;
  std::vector<Trial> result;
  for (const auto* t : {&kScalingUp, &kScalingDown, &kRotation, &kGeneral1, &kGeneral2, &kGeneral4, &kGeneral6,
                        &kDiagonal4, &kDiagonal6}) {
    result.push_back({dbl, 4, Begin::NonZero, &kDefaults, t});
    if (t->condition > 1) result.push_back({dbl, 4, Begin::ZeroB, &kDefaults, t});
  }
  for (const auto* t : {&kGeneral4, &kDiagonal6}) {
    result.push_back({dbl, 16, Begin::NonZero, &kDefaults, t});
    result.push_back({dbl, 16, Begin::ZeroB, &kDefaults, t});
  }
  for (const auto* s : {&kNoEscape, &kWeightDecay, &kClipActive, &kNoClip, &kBounded, &kExponent, &kRows, &kTogether}) {
    result.push_back({dbl, 4, Begin::NonZero, s, &kGeneral4});
    result.push_back({dbl, 4, Begin::ZeroB, s, &kGeneral4});
    result.push_back({flt, 4, Begin::NonZero, s, &kGeneral2});
  }
  for (const auto* t : {&kScalingUp, &kScalingDown, &kRotation, &kGeneral2, &kGeneral4}) {
    result.push_back({flt, 4, Begin::NonZero, &kDefaults, t});
    result.push_back({flt, 4, Begin::ZeroB, &kDefaults, t});
  }
  result.push_back({flt, 16, Begin::NonZero, &kDefaults, &kGeneral2});
  result.push_back({flt, 16, Begin::ZeroB, &kDefaults, &kGeneral2});
  return result;
}

std::string name_of(const Trial& trial) {
  return std::string(trial.dtype == torch::kDouble ? "double" : "float") + "_rank" + std::to_string(trial.rank) +
         (trial.begin == Begin::ZeroB ? "_from_zero_" : "_") + trial.setting->name + "_" + trial.transformation->name;
}

double tolerance(torch::ScalarType dtype, double condition) {
  const bool is_double = dtype == torch::kDouble;
  const double derived = 50 * (is_double ? 0x1p-53 : 0x1p-24) * (condition + 100);
  const double promised = is_double ? 1e-10 : 1e-4;
  return condition <= (is_double ? 1e4 : 1e2) ? std::min(promised, derived) : derived;
}

template <class Basis>
MakeOptimizer make_rite(const LoraRiteOptions& options) {
  return [options](const Pairs& pairs) { return std::make_unique<LoraRite<Basis>>(pairs, options); };
}

LoraRiteOptions options_of(const Trial& trial) {
  auto options = LoraRiteOptions(0.01);
  trial.setting->change(options);
  return options;
}

template <class Basis>
void expect_invariant(const Trial& trial) {
  // Untransformed trajectories serve many transformations.
  static std::map<std::string, Trajectory> known;
  const auto make = make_rite<Basis>(options_of(trial));
  Trial original = trial;
  original.transformation = &kScalingUp;
  Trajectory& expected = known[name_of(original)];
  if (expected.empty()) {
    LogisticNetwork network(trial.rank, trial.begin, trial.dtype);
    expected = train(network, make, kSteps);
  }
  ASSERT_GT(movement(expected), 0.1) << "ΔW hardly moved: invariance would mean nothing";

  LogisticNetwork network(trial.rank, trial.begin, trial.dtype);
  torch::manual_seed(29);
  network.transform(trial.transformation->make(trial.rank, trial.transformation->condition));
  const Trajectory actual = train(network, make, kSteps);
  const double error = difference(expected, actual);
  EXPECT_LT(error, tolerance(trial.dtype, trial.transformation->condition));
}

class Invariance : public testing::TestWithParam<Trial> {};

TEST_P(Invariance, OfThePolarBasis) { expect_invariant<PolarBasis>(GetParam()); }
TEST_P(Invariance, OfTheQrBasis) { expect_invariant<QrBasis>(GetParam()); }

INSTANTIATE_TEST_SUITE_P(Trials, Invariance, testing::ValuesIn(trials()),
                         [](const auto& info) { return name_of(info.param); });

// Settings that do nothing would make their trials repetitions of the default.
TEST(InvarianceSettings, EachChangesTheTrajectory) {
  Trial trial = {torch::kDouble, 4, Begin::NonZero, &kDefaults, &kRotation};
  std::vector<Trajectory> trajectories;
  for (const auto* s :
       {&kDefaults, &kNoEscape, &kWeightDecay, &kClipActive, &kBounded, &kExponent, &kRows, &kTogether}) {
    trial.setting = s;
    LogisticNetwork network(trial.rank, trial.begin, trial.dtype);
    trajectories.push_back(train(network, make_rite<PolarBasis>(options_of(trial)), kSteps));
    for (size_t i = 0; i + 1 < trajectories.size(); ++i) {
      EXPECT_GT(difference(trajectories[i], trajectories.back()), 1e-6) << s->name << " and " << i;
    }
  }
}

template <class Basis>
class InvarianceOfShapes : public testing::Test {};
using Bases = testing::Types<PolarBasis, QrBasis>;
TYPED_TEST_SUITE(InvarianceOfShapes, Bases);

TYPED_TEST(InvarianceOfShapes, ConvolutionAndEmbeddingPairsAreInvariant) {
  for (const auto* t : {&kScalingDown, &kRotation, &kGeneral4}) {
    const auto make = make_rite<TypeParam>(LoraRiteOptions(0.01));
    ImageNetwork original(torch::kDouble), transformed(torch::kDouble);
    transformed.transform(t->make(3, t->condition));
    const Trajectory expected = train(original, make, kSteps);
    ASSERT_GT(movement(expected), 0.1);
    const double error = difference(expected, train(transformed, make, kSteps));
    EXPECT_LT(error, tolerance(torch::kDouble, t->condition)) << t->name;
  }
}

TYPED_TEST(InvarianceOfShapes, PairsOfDifferentFactorisationsAreInvariantTogether) {
  // Each pair has its own T: neither the clip nor the batching may mix them up.
  const auto make = make_rite<TypeParam>(LoraRiteOptions(0.01).clip_unmagnified_norm(0.02));
  LogisticNetwork original(4, Begin::NonZero, torch::kDouble);
  LogisticNetwork transformed(4, Begin::NonZero, torch::kDouble);
  torch::manual_seed(31);
  const Pairs both = transformed.pairs;
  transformed.pairs = {both[0]};
  transformed.transform(general(4, 1e3));
  transformed.pairs = {both[1]};
  transformed.transform(general(4, 10) * 50);
  transformed.pairs = both;
  const Trajectory expected = train(original, make, kSteps);
  ASSERT_GT(movement(expected), 0.1);
  EXPECT_LT(difference(expected, train(transformed, make, kSteps)), 1e-10);
}

// The control: what is called invariant above must be able to fail, and does for torch::optim.
template <class Optimizer, class Options>
double difference_of_torch_optimizer(const Options& options, const Transformation& t) {
  const MakeOptimizer make = [&](const Pairs& pairs) {
    std::vector<torch::Tensor> factors;
    for (const auto& pair : pairs) factors.insert(factors.end(), {pair.a, pair.b});
    return std::make_unique<Optimizer>(factors, options);
  };
  LogisticNetwork original(4, Begin::NonZero, torch::kDouble);
  LogisticNetwork transformed(4, Begin::NonZero, torch::kDouble);
  torch::manual_seed(37);
  transformed.transform(t.make(4, t.condition));
  const Trajectory expected = train(original, make, kSteps);
  EXPECT_GT(movement(expected), 0.01);
  return difference(expected, train(transformed, make, kSteps));
}

TEST(InvarianceControl, AdamIsNotInvariant) {
  for (const auto* t : {&kScalingDown, &kRotation, &kGeneral2}) {
    EXPECT_GT(difference_of_torch_optimizer<torch::optim::Adam>(torch::optim::AdamOptions(0.01), *t), 1e-3) << t->name;
  }
}

TEST(InvarianceControl, SgdIsNotInvariant) {
  // SGD is invariant under rotations, and only under these.
  EXPECT_LT(difference_of_torch_optimizer<torch::optim::SGD>(torch::optim::SGDOptions(0.5), kRotation), 1e-10);
  for (const auto* t : {&kScalingDown, &kGeneral2}) {
    EXPECT_GT(difference_of_torch_optimizer<torch::optim::SGD>(torch::optim::SGDOptions(0.5), *t), 1e-3) << t->name;
  }
}

TEST(InvarianceControl, AdagradIsNotInvariant) {
  EXPECT_GT(difference_of_torch_optimizer<torch::optim::Adagrad>(torch::optim::AdagradOptions(0.01), kGeneral2), 1e-3);
}

TEST(InvarianceControl, RmspropIsNotInvariant) {
  EXPECT_GT(difference_of_torch_optimizer<torch::optim::RMSprop>(torch::optim::RMSpropOptions(0.01), kGeneral2), 1e-3);
}

}  // namespace
}  // namespace lora_rite::test
