// The rivals that step pairs (baselines/polora.hpp, lora_muon.hpp, lora_tsd.hpp, alt_lora.hpp) against a second
// implementation by other means (tests/golden/generate_pair_baselines.py), and what a factorisation (TA, BT⁻¹) does to
// them: what their papers claim, in numbers.

#include <gtest/gtest.h>
#include <lora_rite/baselines/registry.hpp>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "support/pairs.hpp"

namespace lora_rite::test {
namespace {

using baselines::AltLora;
using baselines::AltLoraOptions;
using baselines::LoraMuon;
using baselines::LoraMuonOptions;
using baselines::LoraTsd;
using baselines::LoraTsdOptions;
using baselines::PoLora;
using baselines::PoLoraOptions;

using Pairs = std::vector<FactorPair>;
using Make = std::function<std::unique_ptr<torch::optim::Optimizer>(const Pairs&)>;

template <class Optimizer, class Options>
Make with(const Options& options) {
  return [options](const Pairs& pairs) { return std::make_unique<Optimizer>(pairs, options); };
}
Make with(const PoLoraOptions& options) { return with<PoLora>(options); }
Make with(const LoraMuonOptions& options) { return with<LoraMuon>(options); }
Make with(const LoraTsdOptions& options) { return with<LoraTsd>(options); }
Make with(const AltLoraOptions& options) { return with<AltLora>(options); }

/// ∂L/∂A = BᵀG and ∂L/∂B = GAᵀ of a gradient G [m, n] of the weight.
void give_gradient(const FactorPair& pair, const torch::Tensor& g) {
  const torch::NoGradGuard no_grad;
  torch::Tensor(pair.a).mutable_grad() = pair.b.t().matmul(g);
  torch::Tensor(pair.b).mutable_grad() = g.matmul(pair.a.t());
}

// --- The second implementation --------------------------------------------------------------------------------------

const std::map<std::string, Make>& golden_cases() {
  static const std::map<std::string, Make> cases = {
      {"polora", with(PoLoraOptions(0.05))},
      {"polora_options", with(PoLoraOptions(0.02).betas({0.8, 0.9}).damping(1e-3).eps(1e-10).steps(11).power_steps(3))},
      {"polora_exact", with(PoLoraOptions(0.05).exact(true))},
      {"lora_muon", with(LoraMuonOptions(0.1))},
      {"lora_muon_options",
       with(LoraMuonOptions(0.02).momentum(0.5).weight_decay(0.3).damping(1e-3).steps(7).root_steps(6))},
      {"lora_muon_exact", with(LoraMuonOptions(0.1).exact(true))},
      {"lora_tsd", with(LoraTsdOptions(0.005))},
      {"lora_tsd_options",
       with(LoraTsdOptions(0.02).momentum(0.5).iterations(2).steps(7).ridge(1e-3).balance_interval(2))},
      {"lora_tsd_exact", with(LoraTsdOptions(0.05).iterations(3).exact(true))},
      {"altlora", with(AltLoraOptions(0.05))},
      {"altlora_options", with(AltLoraOptions(0.02).momentum(0.5).weight_decay(0.1).damping(1e-2).alternating(false))},
  };
  return cases;
}

class PairBaselineGolden : public testing::TestWithParam<std::string> {};

TEST_P(PairBaselineGolden, FollowsASecondImplementation) {
  std::ifstream file(std::string(LORA_RITE_TEST_DATA_DIR) + "/golden/pair_baselines.json");
  const nlohmann::json golden = nlohmann::json::parse(file);
  const auto& shapes = golden["shapes"];
  const auto tensor = [](const nlohmann::json& numbers, at::IntArrayRef sizes) {
    return torch::tensor(numbers.get<std::vector<double>>(), torch::kDouble).view(sizes);
  };
  const auto factor = [&](const nlohmann::json& of_pairs, size_t pair, const char* which) {
    return tensor(of_pairs[pair][which], shapes[pair][which].get<std::vector<int64_t>>());
  };
  Pairs pairs;
  for (size_t i = 0; i < shapes.size(); ++i) {
    pairs.push_back(
        {"", factor(golden["start"], i, "a").requires_grad_(), factor(golden["start"], i, "b").requires_grad_()});
  }
  const auto optimizer = golden_cases().at(GetParam())(pairs);
  const auto& checkpoints = golden["cases"][GetParam()];
  if (checkpoints["from_zero"]) pairs.back().b.detach().zero_();
  size_t seen = 0;
  double worst = 0;
  for (size_t step = 1; step <= golden["gradients"].size(); ++step) {
    for (size_t i = 0; i < pairs.size(); ++i)
      give_gradient(pairs[i], tensor(golden["gradients"][step - 1][i], {pairs[i].b.size(0), pairs[i].a.size(1)}));
    optimizer->step();
    if (!checkpoints.contains(std::to_string(step))) continue;
    ++seen;
    const auto& of_step = checkpoints[std::to_string(step)];
    for (size_t i = 0; i < pairs.size(); ++i) {
      for (const auto& [which, found] : {std::pair("a", pairs[i].a), std::pair("b", pairs[i].b)}) {
        const torch::Tensor expected = factor(of_step, i, which);
        const double error = (found - expected).norm().item<double>() / (expected.norm().item<double>() + 1e-6);
        worst = std::max(worst, error);
        EXPECT_LT(error, 1e-9) << which << " of pair " << i << ", step " << step;
      }
    }
  }
  EXPECT_EQ(seen, 3U);
  RecordProperty("largest_error", c10::str(worst));
}

std::vector<std::string> names_of_cases() {
  std::vector<std::string> names;
  for (const auto& [name, make] : golden_cases()) names.push_back(name);
  return names;
}

INSTANTIATE_TEST_SUITE_P(Cases, PairBaselineGolden, testing::ValuesIn(names_of_cases()),
                         [](const auto& info) { return info.param; });

// --- What they promise beside the formulas --------------------------------------------------------------------------

TEST(PairBaselines, PolynomialsComeNearTheExactFunctions) {
  const auto distance = [](const Make& usual, const Make& exact) {
    torch::manual_seed(5);
    const Pairs pairs = {random_pair("q", 4, 40, 30)}, others = clone_pairs(pairs), start = clone_pairs(pairs);
    const torch::Tensor g = torch::randn({30, 40}, torch::kDouble);
    give_gradient(pairs[0], g);
    give_gradient(others[0], g);
    usual(pairs)->step();
    exact(others)->step();
    return ((pairs[0].a - others[0].a).norm() / (others[0].a - start[0].a).norm()).item<double>();
  };
  EXPECT_LT(distance(with(PoLoraOptions()), with(PoLoraOptions().exact(true))), 5e-2);  // the norms are cold
  EXPECT_LT(distance(with(LoraMuonOptions()), with(LoraMuonOptions().exact(true))), 2e-2);
  // Muon's iteration does not converge: it leaves singular values between 0.7 and 1.2.
  EXPECT_LT(distance(with(LoraTsdOptions()), with(LoraTsdOptions().exact(true))), 0.3);
}

TEST(PairBaselines, AStepHasTheLengthThatTheRateSays) {
  torch::manual_seed(6);
  const Pairs start = {random_pair("q", 4, 40, 30)};
  const torch::Tensor g = torch::randn({30, 40}, torch::kDouble);
  const double lr = 1e-4;  // the second-order term dB·dA is far below
  const auto norm_of_change = [&](const Make& make) {
    const Pairs pairs = clone_pairs(start);
    give_gradient(pairs[0], g);
    make(pairs)->step();
    const torch::NoGradGuard no_grad;
    const torch::Tensor change = pairs[0].b.matmul(pairs[0].a) - start[0].b.matmul(start[0].a);
    return torch::linalg_matrix_norm(change, 2).item<double>() / lr;
  };
  EXPECT_LE(norm_of_change(with(PoLoraOptions(lr).exact(true))), 1.001);
  const double of_muon = norm_of_change(with(LoraMuonOptions(lr).exact(true)));
  EXPECT_GT(of_muon, 0.5);
  EXPECT_LE(of_muon, 1.001);
  EXPECT_NEAR(norm_of_change(with(LoraTsdOptions(lr).exact(true))), 1, 0.1);
}

TEST(PairBaselines, TheWeightDecayOfLoraMuonIsThatOfTheProduct) {
  torch::manual_seed(7);
  const Pairs pairs = {random_pair("q", 4, 12, 10)}, start = clone_pairs(pairs);
  give_gradient(pairs[0], torch::zeros({10, 12}, torch::kDouble));
  LoraMuon(pairs, LoraMuonOptions(0.1).weight_decay(0.5)).step();
  const torch::Tensor before = start[0].b.matmul(start[0].a), after = pairs[0].b.matmul(pairs[0].a);
  EXPECT_LT((after - 0.95 * before).norm().item<double>(), 1e-12 * before.norm().item<double>());
}

TEST(PairBaselines, BalancingKeepsTheProductAndTheStepsAfterIt) {
  torch::manual_seed(8);
  const Pairs start = {random_pair("q", 4, 12, 10)};
  const auto run = [&](int64_t interval) {
    const Pairs pairs = clone_pairs(start);
    LoraTsd optimizer(pairs, LoraTsdOptions(0.05).balance_interval(interval).ridge(1e-30).exact(true));
    torch::manual_seed(9);
    for (int step = 0; step < 6; ++step) {
      give_gradient(pairs[0], torch::randn({10, 12}, torch::kDouble));
      optimizer.step();
    }
    return pairs;
  };
  const Pairs balanced = run(3), free = run(0);
  const torch::NoGradGuard no_grad;
  const torch::Tensor product = free[0].b.matmul(free[0].a);
  EXPECT_LT((balanced[0].b.matmul(balanced[0].a) - product).norm().item<double>(),
            1e-9 * product.norm().item<double>());
  EXPECT_NEAR((balanced[0].a.norm() / balanced[0].b.norm()).item<double>(), 1, 1e-9);
  EXPECT_GT(std::abs((free[0].a.norm() / free[0].b.norm()).item<double>() - 1), 0.1);
}

TEST(PairBaselines, AltLoraStepsOneFactorAtATime) {
  torch::manual_seed(10);
  const Pairs pairs = {random_pair("q", 4, 12, 10)};
  AltLora optimizer(pairs);
  for (int step = 0; step < 4; ++step) {
    const Pairs before = clone_pairs(pairs);
    give_gradient(pairs[0], torch::randn({10, 12}, torch::kDouble));
    optimizer.step();
    EXPECT_EQ(torch::equal(pairs[0].a, before[0].a), step % 2 == 1);
    EXPECT_EQ(torch::equal(pairs[0].b, before[0].b), step % 2 == 0);
  }
}

class EveryPairBaseline : public testing::TestWithParam<std::string> {};

/// Of a 1×1 convolution's factors, and of a matrix's: the same numbers.
TEST_P(EveryPairBaseline, FactorsOfAConvolutionAreSteppedAsMatrices) {
  torch::manual_seed(11);
  const Pairs flat = {random_pair("q", 4, 18, 10)};
  Pairs convolution = clone_pairs(flat);
  convolution[0].a = convolution[0].a.detach().view({4, 2, 3, 3}).clone().requires_grad_();
  convolution[0].b = convolution[0].b.detach().view({10, 4, 1, 1}).clone().requires_grad_();
  const auto first = make_optimizer(GetParam(), flat, 0.02), second = make_optimizer(GetParam(), convolution, 0.02);
  for (int step = 0; step < 3; ++step) {
    give_gradient(flat[0], torch::randn({10, 18}, torch::kDouble));
    convolution[0].a.mutable_grad() = flat[0].a.grad().view({4, 2, 3, 3});
    convolution[0].b.mutable_grad() = flat[0].b.grad().view({10, 4, 1, 1});
    first->step();
    second->step();
  }
  EXPECT_TRUE(torch::equal(flat[0].a, convolution[0].a.view({4, 18})));
  EXPECT_TRUE(torch::equal(flat[0].b, convolution[0].b.view({10, 4})));
}

TEST_P(EveryPairBaseline, FromZeroBAndInHalfTypesFactorsStayFiniteAndMove) {
  for (const auto dtype : {torch::kDouble, torch::kFloat, torch::kBFloat16, torch::kHalf}) {
    torch::manual_seed(12);
    const Pairs pairs = {random_pair("q", 4, 12, 10, dtype), random_pair("k", 4, 12, 10, dtype)};
    const Pairs start = clone_pairs(pairs);
    for (const auto& pair : pairs) torch::Tensor(pair.b).detach().zero_();
    const auto optimizer = make_optimizer(GetParam(), pairs, 0.02);
    for (int step = 0; step < 4; ++step) {
      for (const auto& pair : pairs) give_gradient(pair, torch::randn({10, 12}, torch::kDouble).to(dtype));
      optimizer->step();
    }
    for (const auto& pair : pairs) {
      EXPECT_TRUE(pair.a.isfinite().all().item<bool>()) << dtype;
      EXPECT_TRUE(pair.b.isfinite().all().item<bool>()) << dtype;
      EXPECT_GT(pair.b.norm().item<double>(), 0) << dtype;
    }
    EXPECT_FALSE(torch::equal(pairs[0].a, start[0].a)) << dtype;
  }
}

/// ATen operator calls of a step.
int64_t operator_calls(torch::optim::Optimizer& optimizer) {
  static int64_t calls;
  calls = 0;
  const auto handle = at::addGlobalCallback(
      at::RecordFunctionCallback([](const at::RecordFunction&) -> std::unique_ptr<at::ObserverContext> {
        ++calls;
        return nullptr;
      }).scopes({at::RecordScope::FUNCTION}));
  optimizer.step();
  at::removeCallback(handle);
  return calls;
}

/// What differs is what gathers and hands out: stack, unbind, and the foreach operators' loops on a CPU.
TEST_P(EveryPairBaseline, PairsOfOneShapeAreSteppedTogether) {
  const auto calls = [&](int64_t count) {
    torch::manual_seed(13);
    Pairs pairs;
    for (int64_t i = 0; i < count; ++i) pairs.push_back(random_pair("", 4, 12, 10, torch::kFloat));
    const auto optimizer = make_optimizer(GetParam(), pairs, 0.01);
    run_steps(*optimizer, pairs, 0, 2);
    set_gradients(pairs, 3);
    return operator_calls(*optimizer);
  };
  const int64_t of_one = calls(1), of_many = calls(20);
  EXPECT_LT(of_many - of_one, 19 * 14) << of_one << " for one";
  EXPECT_GT(of_one, 50);
}

TEST_P(EveryPairBaseline, APairRestsWithoutBothGradientsAndGoesOnAlone) {
  torch::manual_seed(14);
  const Pairs pairs = {random_pair("q", 4, 12, 10), random_pair("k", 4, 12, 10)}, alone = {clone_pairs(pairs)[1]};
  const auto optimizer = make_optimizer(GetParam(), pairs, 0.01), other = make_optimizer(GetParam(), alone, 0.01);
  const auto step = [&](bool both) {
    const torch::Tensor g = torch::randn({10, 12}, torch::kDouble);
    give_gradient(pairs[0], torch::randn({10, 12}, torch::kDouble));
    give_gradient(pairs[1], g);
    if (both) {
      give_gradient(alone[0], g);
      other->step();
    } else {
      torch::Tensor(pairs[1].b).mutable_grad() = torch::Tensor();
    }
    optimizer->step();
  };
  for (const bool both : {true, false, true, true}) step(both);
  EXPECT_LT((pairs[1].a - alone[0].a).norm().item<double>(), 1e-12);
  EXPECT_LT((pairs[1].b - alone[0].b).norm().item<double>(), 1e-12);
}

TEST_P(EveryPairBaseline, RefusesAGroupThatIsNoListOfPairs) {
  torch::manual_seed(15);
  const Pairs pairs = {random_pair("q", 4, 12, 10), random_pair("k", 4, 12, 10)};
  const auto optimizer = make_optimizer(GetParam(), {pairs[0]}, 0.01);
  optimizer->add_param_group(torch::optim::OptimizerParamGroup({pairs[1].a}));
  torch::Tensor(pairs[1].a).mutable_grad() = torch::ones_like(pairs[1].a);
  EXPECT_TRUE(mentions(error_of([&] { optimizer->step(); }), ": a param group has 1 tensors"));
  optimizer->param_groups()[1].params().push_back(torch::zeros({3, 10}, torch::kDouble).t().requires_grad_());
  EXPECT_TRUE(mentions(error_of([&] { optimizer->step(); }), ": tensors 0 and 1 of a param group: the ranks differ"));
  const Pairs swapped = {{"q", pairs[0].b, pairs[0].a}};
  EXPECT_TRUE(mentions(error_of([&] { make_optimizer(GetParam(), swapped, 0.01); }), "pair 'q': the ranks differ"));
}

INSTANTIATE_TEST_SUITE_P(Names, EveryPairBaseline, testing::Values("polora", "lora-muon", "lora-tsd", "altlora"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

template <class Optimizer, class Options>
Options reloaded(const Options& options) {
  torch::manual_seed(16);
  const Pairs pairs = {random_pair("q", 4, 12, 10)};
  Optimizer loaded(pairs);
  load_bytes(loaded, saved_bytes(Optimizer(pairs, options)));
  return static_cast<const Options&>(loaded.param_groups()[0].options());
}

TEST(PairBaselines, OptionsAreSaved) {
  const auto polora = reloaded<PoLora>(
      PoLoraOptions(0.5).betas({0.25, 0.75}).damping(1e-3).eps(1e-5).steps(3).power_steps(2).exact(true));
  EXPECT_EQ(polora.lr(), 0.5);
  EXPECT_EQ(polora.betas(), std::make_tuple(0.25, 0.75));
  EXPECT_EQ(polora.damping(), 1e-3);
  EXPECT_EQ(polora.eps(), 1e-5);
  EXPECT_EQ(polora.steps(), 3);
  EXPECT_EQ(polora.power_steps(), 2);
  EXPECT_TRUE(polora.exact());
  const auto muon = reloaded<LoraMuon>(
      LoraMuonOptions(0.5).momentum(0.25).weight_decay(0.125).damping(1e-3).steps(3).root_steps(2).exact(true));
  EXPECT_EQ(muon.lr(), 0.5);
  EXPECT_EQ(muon.momentum(), 0.25);
  EXPECT_EQ(muon.weight_decay(), 0.125);
  EXPECT_EQ(muon.damping(), 1e-3);
  EXPECT_EQ(muon.steps(), 3);
  EXPECT_EQ(muon.root_steps(), 2);
  EXPECT_TRUE(muon.exact());
  const auto tsd = reloaded<LoraTsd>(
      LoraTsdOptions(0.5).momentum(0.25).iterations(4).steps(3).ridge(1e-3).balance_interval(7).exact(true));
  EXPECT_EQ(tsd.lr(), 0.5);
  EXPECT_EQ(tsd.momentum(), 0.25);
  EXPECT_EQ(tsd.iterations(), 4);
  EXPECT_EQ(tsd.steps(), 3);
  EXPECT_EQ(tsd.ridge(), 1e-3);
  EXPECT_EQ(tsd.balance_interval(), 7);
  EXPECT_TRUE(tsd.exact());
  const auto alt =
      reloaded<AltLora>(AltLoraOptions(0.5).momentum(0.25).weight_decay(0.125).damping(1e-3).alternating(false));
  EXPECT_EQ(alt.lr(), 0.5);
  EXPECT_EQ(alt.momentum(), 0.25);
  EXPECT_EQ(alt.weight_decay(), 0.125);
  EXPECT_EQ(alt.damping(), 1e-3);
  EXPECT_FALSE(alt.alternating());
}

TEST(PairBaselines, OptionsOutOfRangeAreNamed) {
  const auto refused = [](const auto& options, const std::string& message) {
    torch::manual_seed(17);
    const Pairs pairs = {random_pair("q", 4, 12, 10)};
    EXPECT_TRUE(mentions(error_of([&] { with(options)(pairs); }), message));
  };
  refused(PoLoraOptions(-1), "lr is -1");
  refused(PoLoraOptions().betas({1, 0.5}), "betas[0] is 1");
  refused(PoLoraOptions().betas({0.5, 1}), "betas[1] is 1");
  refused(PoLoraOptions().damping(0), "damping is 0");
  refused(PoLoraOptions().eps(0), "eps is 0");
  refused(PoLoraOptions().steps(0), "steps is 0");
  refused(PoLoraOptions().power_steps(0), "power_steps is 0");
  refused(LoraMuonOptions(-1), "lr is -1");
  refused(LoraMuonOptions().momentum(1), "momentum is 1");
  refused(LoraMuonOptions().weight_decay(-1), "weight_decay is -1");
  refused(LoraMuonOptions(0.5).weight_decay(2), "lr times weight_decay is 1, expected less than 1");
  refused(LoraMuonOptions().damping(0), "damping is 0");
  refused(LoraMuonOptions().steps(9), "steps is 9, expected 1 to 8");
  refused(LoraMuonOptions().root_steps(8), "root_steps is 8, expected 1 to 7");
  refused(LoraTsdOptions(-1), "lr is -1");
  refused(LoraTsdOptions().momentum(1), "momentum is 1");
  refused(LoraTsdOptions().iterations(0), "iterations is 0");
  refused(LoraTsdOptions().steps(0), "steps is 0");
  refused(LoraTsdOptions().ridge(0), "ridge is 0");
  refused(LoraTsdOptions().balance_interval(-1), "balance_interval is -1");
  refused(AltLoraOptions(-1), "lr is -1");
  refused(AltLoraOptions().momentum(1), "momentum is 1");
  refused(AltLoraOptions().weight_decay(-1), "weight_decay is -1");
  refused(AltLoraOptions().damping(0), "damping is 0");
}

// --- Invariance -----------------------------------------------------------------------------------------------------

/// ‖ΔW − ΔW'‖ / way of ΔW after one step and after 25, W' having started at (TA, BT⁻¹), T general with κ = 100. The
/// gradient of the weight is another one at every step, and the same for both.
struct Difference {
  double first, last;
};

Difference difference(const Make& make) {
  torch::manual_seed(18);
  const Pairs pairs = {random_pair("q", 4, 30, 40)};
  Pairs others = clone_pairs(pairs);
  const auto rotation = [] { return std::get<0>(torch::linalg_qr(torch::randn({4, 4}, torch::kDouble))); };
  const torch::Tensor spread = torch::logspace(-1, 1, 4, 10.0, torch::kDouble).diag();
  const torch::Tensor t = rotation().matmul(spread).matmul(rotation());
  others[0].a = t.matmul(pairs[0].a.detach()).requires_grad_();
  others[0].b = pairs[0].b.detach().matmul(t.inverse()).requires_grad_();
  const auto optimizer = make(pairs), other = make(others);
  const auto product = [](const Pairs& of) { return of[0].b.detach().matmul(of[0].a.detach()); };
  const torch::Tensor start = product(pairs);
  Difference result = {};
  for (int step = 0; step < 25; ++step) {
    const torch::Tensor g = torch::randn({40, 30}, torch::kDouble);
    give_gradient(pairs[0], g);
    give_gradient(others[0], g);
    optimizer->step();
    other->step();
    const torch::Tensor now = product(pairs);
    result.last = ((now - product(others)).norm() / (now - start).norm()).item<double>();
    if (step == 0) result.first = result.last;
  }
  testing::Test::RecordProperty("after_one_step", c10::str(result.first));
  testing::Test::RecordProperty("after_25_steps", c10::str(result.last));
  return result;
}

// κ(T) = 100 costs u κ(T) at the start and as much in every step; Gram matrices square condition numbers of 100 and of
// the factors' own. What is below is round-off.
constexpr double kRoundOff = 1e-9;

TEST(PairBaselinesInvariance, LoraMuonIsInvariantMomentumIncludedButForItsDampingAndItsPolynomials) {
  const Difference pure = difference(with(LoraMuonOptions(0.02).exact(true).damping(1e-30)));
  EXPECT_LT(pure.first, kRoundOff);
  EXPECT_LT(pure.last, kRoundOff);
  const Difference damped = difference(with(LoraMuonOptions(0.02).exact(true)));
  EXPECT_GT(damped.first, 1e-3);
  EXPECT_LT(damped.last, 0.5);
  const Difference usual = difference(with(LoraMuonOptions(0.02)));
  EXPECT_GT(usual.first, 1e-3);
  EXPECT_LT(usual.last, 0.5);
}

TEST(PairBaselinesInvariance, LoraTsdIsInvariantMomentumIncludedButForItsRidge) {
  const Difference pure = difference(with(LoraTsdOptions(0.02).ridge(1e-30)));
  EXPECT_LT(pure.first, kRoundOff);
  EXPECT_LT(pure.last, kRoundOff);
  const Difference usual = difference(with(LoraTsdOptions(0.02)));
  EXPECT_LT(usual.first, 1e-3);
  EXPECT_LT(usual.last, 1e-3);
  EXPECT_GT(usual.last, kRoundOff);
}

TEST(PairBaselinesInvariance, AltLoraIsInvariantMomentumIncludedButForItsDamping) {
  const Difference pure = difference(with(AltLoraOptions(0.02).damping(1e-30)));
  EXPECT_LT(pure.first, kRoundOff);
  EXPECT_LT(pure.last, kRoundOff);
  const Difference usual = difference(with(AltLoraOptions(0.02)));
  EXPECT_LT(usual.last, 1e-3);
  EXPECT_GT(usual.last, kRoundOff);
}

TEST(PairBaselinesInvariance, PoLoraIsNotByItsStepLengths) {
  for (const auto& options : {PoLoraOptions(0.02), PoLoraOptions(0.02).exact(true).damping(1e-14)}) {
    const Difference found = difference(with(options));
    EXPECT_GT(found.first, 0.1);
    EXPECT_GT(found.last, 0.1);
  }
}

/// B dA of either start, each by its own length: the direction before ρ / ‖D‖₂ makes a step of it.
TEST(PairBaselinesInvariance, PoLorasDirectionsAreInvariantButForTheDamping) {
  const auto cosine = [](double damping) {
    torch::manual_seed(19);
    const Pairs pairs = {random_pair("q", 4, 30, 40)};
    Pairs others = clone_pairs(pairs);
    const torch::Tensor t = torch::randn({4, 4}, torch::kDouble);
    others[0].a = t.matmul(pairs[0].a.detach()).requires_grad_();
    others[0].b = pairs[0].b.detach().matmul(t.inverse()).requires_grad_();
    const Pairs start = clone_pairs(pairs), others_start = clone_pairs(others);
    const torch::Tensor g = torch::randn({40, 30}, torch::kDouble);
    give_gradient(pairs[0], g);
    give_gradient(others[0], g);
    const PoLoraOptions options = PoLoraOptions(0.02).exact(true).damping(damping);
    PoLora(pairs, options).step();
    PoLora(others, options).step();
    const torch::NoGradGuard no_grad;
    const torch::Tensor change = start[0].b.matmul(pairs[0].a - start[0].a);
    const torch::Tensor other = others_start[0].b.matmul(others[0].a - others_start[0].a);
    return (1 - (change * other).sum() / (change.norm() * other.norm())).item<double>();
  };
  EXPECT_LT(cosine(1e-14), kRoundOff);
  EXPECT_GT(cosine(1e-4), kRoundOff);
}

}  // namespace
}  // namespace lora_rite::test
