// The baselines against other people's implementations of them (tests/golden/generate_baselines.py), and what all of
// them must do as torch::optim::Optimizers.

#include <gtest/gtest.h>
#include <lora_rite/baselines/registry.hpp>

#include <fstream>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>

#include "support/pairs.hpp"

namespace lora_rite::test {
namespace {

using baselines::Lamb;
using baselines::LambOptions;
using baselines::LoraPlus;
using baselines::Muon;
using baselines::MuonOptions;
using baselines::ScaledAdam;
using baselines::ScaledAdamOptions;
using baselines::Shampoo;
using baselines::ShampooOptions;
using baselines::Soap;
using baselines::SoapOptions;

using Factors = std::vector<torch::Tensor>;
using Make = std::function<std::unique_ptr<torch::optim::Optimizer>(const Factors&)>;

const std::map<std::string, Make>& golden_cases() {
  static const std::map<std::string, Make> cases = {
      {"lamb",
       [](const Factors& x) {
         return std::make_unique<Lamb>(x, LambOptions(0.02).betas({0.9, 0.99}).eps(1e-6).weight_decay(0.1));
       }},
      {"lamb_no_decay", [](const Factors& x) { return std::make_unique<Lamb>(x, LambOptions(0.02)); }},
      {"muon", [](const Factors& x) { return std::make_unique<Muon>(x, MuonOptions(0.02)); }},
      {"muon_plain",
       [](const Factors& x) {
         return std::make_unique<Muon>(x, MuonOptions(0.02).momentum(0.8).nesterov(false).weight_decay(0).steps(3));
       }},
      {"shampoo",
       [](const Factors& x) {
         return std::make_unique<Shampoo>(
             x, ShampooOptions(0.1).betas({0.0, 1.0}).eps(1e-6).interval(1).graft_adam(false));
       }},
      {"soap",
       [](const Factors& x) {
         return std::make_unique<Soap>(x, SoapOptions(0.02).shampoo_beta(0.9).weight_decay(0.1).interval(4));
       }},
      {"scaled_adam",
       [](const Factors& x) {
         return std::make_unique<ScaledAdam>(std::vector<FactorPair>{{"", x[0], x[1]}},
                                             ScaledAdamOptions(0.02).weight_decay(0.1).damping(1e-2));
       }},
  };
  return cases;
}

class BaselineGolden : public testing::TestWithParam<std::string> {};

nlohmann::json read_golden() {
  std::ifstream file(std::string(LORA_RITE_TEST_DATA_DIR) + "/golden/baselines.json");
  return nlohmann::json::parse(file);
}

// What a user who comes from there gets without asking, and what the headers and docs/baselines.md call different.
TEST(BaselineDefaults, AreThoseOfTheOtherImplementationButWhereTheHeaderSaysSo) {
  const nlohmann::json defaults = read_golden()["defaults"];
  const nlohmann::json &muon = defaults["muon"], &lamb = defaults["lamb"], &soap = defaults["soap"];
  EXPECT_EQ(MuonOptions().lr(), muon["lr"]);
  EXPECT_EQ(MuonOptions().momentum(), muon["momentum"]);
  EXPECT_EQ(MuonOptions().nesterov(), muon["nesterov"]);
  EXPECT_EQ(MuonOptions().weight_decay(), muon["weight_decay"]);
  EXPECT_EQ(MuonOptions().steps(), muon["ns_steps"]);
  // No options here; BaselineGolden's "muon" follows them.
  EXPECT_EQ(muon["ns_coefficients"], nlohmann::json({3.4445, -4.775, 2.0315}));
  EXPECT_EQ(muon["eps"], 1e-7);
  EXPECT_TRUE(muon["adjust_lr_fn"].is_null());

  EXPECT_EQ(LambOptions().lr(), lamb["lr"]);
  EXPECT_EQ(LambOptions().betas(), (lamb["betas"].get<std::tuple<double, double>>()));
  EXPECT_EQ(LambOptions().eps(), lamb["eps"]);
  EXPECT_EQ(LambOptions().weight_decay(), 0);
  EXPECT_EQ(lamb["weight_decay"], 0.01);

  EXPECT_EQ(SoapOptions().lr(), soap["lr"]);
  EXPECT_EQ(SoapOptions().betas(), (soap["betas"].get<std::tuple<double, double>>()));
  EXPECT_TRUE(soap["shampoo_beta"].is_null()) << "which means β₂";
  EXPECT_EQ(SoapOptions().shampoo_beta(), soap["betas"][1]);
  EXPECT_EQ(SoapOptions().eps(), soap["eps"]);
  EXPECT_EQ(SoapOptions().interval(), soap["precondition_frequency"]);
  EXPECT_EQ(SoapOptions().weight_decay(), 0);
  EXPECT_EQ(soap["weight_decay"], 0.01);
  EXPECT_EQ(SoapOptions().max_preconditioner_dim(), 1024);
  EXPECT_EQ(soap["max_precondition_dim"], 10000);

  EXPECT_EQ(ScaledAdamOptions().damping(), 1e-6);
  EXPECT_EQ(defaults["scaled_adam"]["reg"], 1e-2);
}

TEST_P(BaselineGolden, FollowsTheOtherImplementation) {
  const nlohmann::json golden = read_golden();
  const auto tensors = [&](const nlohmann::json& numbers) {
    Factors result;
    for (size_t i = 0; i < numbers.size(); ++i)
      result.push_back(torch::tensor(numbers[i].get<std::vector<double>>(), torch::kDouble)
                           .view(golden["shapes"][i].get<std::vector<int64_t>>()));
    return result;
  };
  Factors factors = tensors(golden["start"]);
  for (auto& factor : factors) factor.requires_grad_();
  const auto optimizer = golden_cases().at(GetParam())(factors);
  const auto& checkpoints = golden["cases"][GetParam()];
  size_t seen = 0;
  for (size_t step = 1; step <= golden["gradients"].size(); ++step) {
    const Factors gradients = tensors(golden["gradients"][step - 1]);
    for (size_t i = 0; i < factors.size(); ++i) factors[i].mutable_grad() = gradients[i];
    optimizer->step();
    if (!checkpoints.contains(std::to_string(step))) continue;
    ++seen;
    const Factors expected = tensors(checkpoints[std::to_string(step)]);
    for (size_t i = 0; i < factors.size(); ++i) {
      EXPECT_LT((factors[i] - expected[i]).norm().item<double>(), 1e-9 * expected[i].norm().item<double>())
          << "factor " << i << ", step " << step;
    }
  }
  EXPECT_EQ(seen, 5U);
}

INSTANTIATE_TEST_SUITE_P(Cases, BaselineGolden,
                         testing::Values("lamb", "lamb_no_decay", "muon", "muon_plain", "shampoo", "soap",
                                         "scaled_adam"),
                         [](const auto& info) { return info.param; });

class EveryOptimizer : public testing::TestWithParam<std::string> {};

std::vector<FactorPair> some_pairs(torch::Dtype dtype = torch::kFloat) {
  torch::manual_seed(81);
  std::vector<FactorPair> pairs;
  for (int i = 0; i < 3; ++i) pairs.push_back(random_pair("pair" + std::to_string(i), 4, 12 + i / 2, 10, dtype));
  return pairs;
}

/// Least squares on ΔW: every optimizer must get somewhere.
TEST_P(EveryOptimizer, LowersALoss) {
  torch::manual_seed(82);
  std::vector<FactorPair> pairs = {random_pair("pair", 4, 12, 10, torch::kFloat)};
  const torch::Tensor target = torch::randn({10, 12});
  static const std::map<std::string, double> rates = {{"sgd", 0.1}, {"altlora", 1}, {"polora", 0.05}};
  const auto rate = rates.find(GetParam());
  const auto optimizer = make_optimizer(GetParam(), pairs, rate == rates.end() ? 0.01 : rate->second);
  const auto loss = [&] { return (torch::matmul(pairs[0].b, pairs[0].a) - target).square().mean(); };
  const double before = loss().item<double>();
  for (int step = 0; step < 200; ++step) {
    optimizer->zero_grad();
    loss().backward();
    optimizer->step();
  }
  EXPECT_LT(loss().item<double>(), 0.8 * before);
}

TEST_P(EveryOptimizer, ResumesFromItsCheckpoint) {
  const auto straight = some_pairs(), interrupted = clone_pairs(straight);
  const auto first = make_optimizer(GetParam(), straight, 0.01), second = make_optimizer(GetParam(), interrupted, 0.01);
  run_steps(*first, straight, 0, 14);
  run_steps(*second, interrupted, 0, 7);
  const auto resumed = make_optimizer(GetParam(), interrupted, 0.5);
  load_bytes(*resumed, saved_bytes(*second));
  run_steps(*resumed, interrupted, 7, 14);
  EXPECT_TRUE(equal_factors(straight, interrupted));
}

TEST_P(EveryOptimizer, CallsAClosureWithGradientsAndReturnsItsLoss) {
  const auto called = some_pairs(), by_hand = clone_pairs(called);
  const auto first = make_optimizer(GetParam(), called, 0.01), second = make_optimizer(GetParam(), by_hand, 0.01);
  const auto loss = [](const std::vector<FactorPair>& pairs) {
    return torch::matmul(pairs[0].b, pairs[0].a).square().mean() + torch::matmul(pairs[1].b, pairs[1].a).sum();
  };
  for (int step = 0; step < 2; ++step) {  // SOAP's first one moves nothing
    first->zero_grad();
    second->zero_grad();
    const torch::Tensor expected = loss(by_hand);
    expected.backward();
    second->step();
    const torch::NoGradGuard no_grad;
    const torch::Tensor found = first->step([&] {
      const torch::Tensor result = loss(called);
      result.backward();
      return result;
    });
    EXPECT_TRUE(torch::equal(found, expected));
  }
  EXPECT_TRUE(equal_factors(called, by_hand));
  EXPECT_FALSE(equal_factors(called, some_pairs()));
}

TEST_P(EveryOptimizer, FollowsAScheduler) {
  const auto scheduled = some_pairs(), constant = clone_pairs(scheduled);
  const auto first = make_optimizer(GetParam(), scheduled, 0.5), second = make_optimizer(GetParam(), constant, 0.01);
  for (size_t g = 0; g < first->param_groups().size(); ++g)
    first->param_groups()[g].options().set_lr(second->param_groups()[g].options().get_lr());
  run_steps(*first, scheduled, 0, 3);
  run_steps(*second, constant, 0, 3);
  EXPECT_TRUE(equal_factors(scheduled, constant));
}

TEST_P(EveryOptimizer, AFactorWithoutAGradientRests) {
  const auto pairs = some_pairs();
  const auto optimizer = make_optimizer(GetParam(), pairs, 0.01);
  run_steps(*optimizer, pairs, 0, 2);
  const torch::Tensor before = pairs[1].a.detach().clone(), other = pairs[0].a.detach().clone();
  set_gradients(pairs, 5);
  torch::Tensor(pairs[1].a).mutable_grad() = torch::Tensor();
  optimizer->step();
  EXPECT_TRUE(torch::equal(pairs[1].a, before));
  EXPECT_FALSE(torch::equal(pairs[0].a, other));
}

INSTANTIATE_TEST_SUITE_P(Names, EveryOptimizer, testing::ValuesIn(optimizer_names()), [](const auto& info) {
  std::string name = info.param;
  for (char& c : name) c = c == '-' ? '_' : c == '+' ? 'p' : c;
  return name;
});

TEST(Baselines, TheRegistryHasTheNames) {
  EXPECT_EQ(optimizer_names(), (std::vector<std::string>{"rite", "rite-qr", "adam", "adamw", "adagrad", "rmsprop",
                                                         "sgd", "shampoo", "lamb", "lora+", "scaled-adam", "muon",
                                                         "soap", "polora", "lora-muon", "lora-tsd", "altlora"}));
  const std::string message = error_of([] { make_optimizer("adamm", some_pairs(), 1e-3); });
  EXPECT_TRUE(mentions(message, "'adamm'"));
  for (const std::string& name : optimizer_names()) EXPECT_TRUE(mentions(message, name));
}

TEST(Baselines, OptionsAreSavedAndThoseOfAnotherOptimizerAreRefused) {
  const auto pairs = some_pairs();
  const Factors factors = {pairs[0].a, pairs[0].b};
  const Shampoo saved(factors, ShampooOptions(0.5)
                                   .betas({0.25, 0.75})
                                   .eps(1e-3)
                                   .weight_decay(0.125)
                                   .max_preconditioner_dim(7)
                                   .interval(3)
                                   .graft_adam(false)
                                   .graft_eps(1e-4));
  Shampoo loaded(factors, ShampooOptions());
  load_bytes(loaded, saved_bytes(saved));
  const auto& options = static_cast<const ShampooOptions&>(loaded.param_groups()[0].options());
  EXPECT_EQ(options.lr(), 0.5);
  EXPECT_EQ(options.betas(), std::make_tuple(0.25, 0.75));
  EXPECT_EQ(options.eps(), 1e-3);
  EXPECT_EQ(options.weight_decay(), 0.125);
  EXPECT_EQ(options.max_preconditioner_dim(), 7);
  EXPECT_EQ(options.interval(), 3);
  EXPECT_FALSE(options.graft_adam());
  EXPECT_EQ(options.graft_eps(), 1e-4);

  Lamb other(factors, LambOptions(0.1));
  const std::string message = error_of([&] { load_bytes(loaded, saved_bytes(other)); });
  EXPECT_TRUE(mentions(message, "the saved options have no max_preconditioner_dim"));
  EXPECT_TRUE(mentions(message, "ShampooOptions"));
}

TEST(Baselines, AGraftedShampooStepHasTheNormOfAdams) {
  const auto grafted = some_pairs(torch::kDouble), adam = clone_pairs(grafted), plain = clone_pairs(grafted);
  const auto start = clone_pairs(grafted);
  const auto factors = [](const std::vector<FactorPair>& pairs) { return Factors{pairs[0].a, pairs[0].b}; };
  Shampoo with(factors(grafted), ShampooOptions(0.01).interval(1));
  Shampoo without(factors(plain), ShampooOptions(0.01).interval(1).graft_adam(false));
  torch::optim::Adam reference(factors(adam), torch::optim::AdamOptions(0.01));
  run_steps(with, grafted, 0, 1);
  run_steps(without, plain, 0, 1);
  run_steps(reference, adam, 0, 1);
  for (const bool of_a : {true, false}) {
    const auto step = [&](const std::vector<FactorPair>& pairs) {
      return of_a ? pairs[0].a - start[0].a : pairs[0].b - start[0].b;
    };
    EXPECT_NEAR((step(grafted).norm() / step(adam).norm()).item<double>(), 1, 1e-9);
    const auto cosine = (step(grafted) * step(plain)).sum() / (step(grafted).norm() * step(plain).norm());
    EXPECT_NEAR(cosine.item<double>(), 1, 1e-9);
  }
}

TEST(Baselines, LongSidesGoWithoutAPreconditioner) {
  const auto one_sided = some_pairs(torch::kDouble), by_hand = clone_pairs(one_sided);
  Shampoo optimizer(
      {one_sided[0].a},
      ShampooOptions(0.1).betas({0.0, 1.0}).eps(1e-6).interval(1).graft_adam(false).max_preconditioner_dim(4));
  set_gradients(one_sided, 3);
  const torch::Tensor g = one_sided[0].a.grad();
  optimizer.step();
  const auto [values, vectors] = torch::linalg_eigh(torch::matmul(g, g.t()) + 1e-6 * torch::eye(4, torch::kDouble));
  const torch::Tensor root = torch::matmul(vectors * values.rsqrt(), vectors.t());
  EXPECT_LT((one_sided[0].a - (by_hand[0].a - 0.1 * torch::matmul(root, g))).norm().item<double>(), 1e-12);
}

TEST(Baselines, WhereBothSidesAreLongItIsAdam) {
  const auto long_sided = some_pairs(torch::kDouble), adam = clone_pairs(long_sided);
  const auto start = clone_pairs(long_sided);
  const auto factors = [](const std::vector<FactorPair>& pairs) { return Factors{pairs[0].a, pairs[0].b}; };
  Shampoo optimizer(factors(long_sided), ShampooOptions(0.1).graft_adam(false).max_preconditioner_dim(1));
  torch::optim::Adam reference(factors(adam), torch::optim::AdamOptions(0.1));
  run_steps(optimizer, long_sided, 0, 3);
  run_steps(reference, adam, 0, 3);
  EXPECT_LT((long_sided[0].a - adam[0].a).norm().item<double>(), 1e-12);
  EXPECT_LT((long_sided[0].b - adam[0].b).norm().item<double>(), 1e-12);
  EXPECT_GT((long_sided[0].a - start[0].a).norm().item<double>(), 0.1);
}

TEST(Baselines, ShampoosAdamForgetsAsSlowlyAsTheOptionsSay) {
  const auto long_sided = some_pairs(torch::kDouble), adam = clone_pairs(long_sided);
  Shampoo optimizer({long_sided[0].a}, ShampooOptions(0.1).betas({0.9, 0.9999}).max_preconditioner_dim(1));
  torch::optim::Adam reference({adam[0].a}, torch::optim::AdamOptions(0.1).betas({0.9, 0.9999}));
  for (int64_t i = 0; i < 20; ++i) {
    const double scale = i < 10 ? 1 : 0.1;  // the longer memory is felt where gradients change
    run_steps(optimizer, long_sided, i, i + 1, scale);
    run_steps(reference, adam, i, i + 1, scale);
  }
  EXPECT_LT((long_sided[0].a - adam[0].a).norm().item<double>(), 1e-12);
}

/// Square roots, products and the state are rounded to the half type, decompositions are not.
TEST(Baselines, SoapStepsHalfFactors) {
  for (const auto dtype : {torch::kBFloat16, torch::kHalf}) {
    const auto halves = some_pairs(dtype), start = clone_pairs(halves);
    std::vector<FactorPair> floats;
    for (const auto& pair : halves)
      floats.push_back({pair.name, pair.a.detach().to(torch::kFloat).requires_grad_(),
                        pair.b.detach().to(torch::kFloat).requires_grad_()});
    const auto factors = [](const std::vector<FactorPair>& pairs) { return Factors{pairs[0].a, pairs[0].b}; };
    Soap optimizer(factors(halves), SoapOptions(1e-2).eps(1e-3).interval(2));
    Soap reference(factors(floats), SoapOptions(1e-2).eps(1e-3).interval(2));
    run_steps(optimizer, halves, 0, 8);
    run_steps(reference, floats, 0, 8);
    for (const Side side : kSides) {
      const torch::Tensor moved = floats[0].factor(side) - start[0].factor(side).to(torch::kFloat);
      const torch::Tensor apart = floats[0].factor(side) - halves[0].factor(side).to(torch::kFloat);
      EXPECT_GT(moved.norm().item<double>(), 0.1);
      // A step moves an element by about 1e-2 and rounds a bfloat16 of 1 by up to 2⁻⁸, two fifths of that, this way or
      // the other.
      EXPECT_LT(apart.norm().item<double>(), 0.5 * moved.norm().item<double>()) << dtype;
    }
  }
}

/// LibTorch looks at no shape when it loads.
TEST(Baselines, AStateOfAnotherShapeIsRefusedByNameWhereItIsUsed) {
  torch::manual_seed(83);
  const auto refusal = [](at::IntArrayRef saved_sizes, at::IntArrayRef sizes, int64_t count) {
    const auto stepped = [](Factors& factors, Lamb& optimizer) {
      for (auto& factor : factors) factor.mutable_grad() = torch::randn_like(factor.detach());
      optimizer.step();
    };
    Factors saved, loaded, before;
    for (int64_t i = 0; i < count; ++i) {
      saved.push_back(torch::randn(saved_sizes).requires_grad_());
      loaded.push_back(torch::randn(sizes).requires_grad_());
      before.push_back(loaded.back().detach().clone());
    }
    Lamb first(saved), second(loaded);
    stepped(saved, first);
    load_bytes(second, saved_bytes(first));
    const std::string message = error_of([&] { stepped(loaded, second); });
    for (size_t i = 0; i < loaded.size(); ++i) EXPECT_TRUE(torch::equal(loaded[i], before[i]));
    return message;
  };
  EXPECT_TRUE(mentions(refusal({8, 64}, {4, 64}, 1),
                       "lora_rite::baselines::Lamb: the state 'exp_avg' of a parameter [4, 64] is [8, 64], expected "
                       "[4, 64]"));
  EXPECT_TRUE(mentions(refusal({64, 8}, {8, 64}, 1), "is [64, 8], expected [8, 64]"));
  EXPECT_TRUE(mentions(refusal({1, 8}, {4, 8}, 2), "is [1, 8], expected [4, 8]"));  // it could be broadcast
}

TEST(Baselines, LoraPlusIsAdamWithTwoRates) {
  const auto plus = some_pairs(), a_only = clone_pairs(plus), b_only = clone_pairs(plus);
  LoraPlus optimizer(plus, torch::optim::AdamOptions(1e-3), 8);
  const auto slow = make_optimizer("adam", a_only, 1e-3), fast = make_optimizer("adam", b_only, 8e-3);
  run_steps(optimizer, plus, 0, 3);
  run_steps(*slow, a_only, 0, 3);
  run_steps(*fast, b_only, 0, 3);
  for (size_t i = 0; i < plus.size(); ++i) {
    EXPECT_TRUE(torch::equal(plus[i].a, a_only[i].a));
    EXPECT_TRUE(torch::equal(plus[i].b, b_only[i].b));
  }
  EXPECT_TRUE(mentions(error_of([&] { LoraPlus(plus, torch::optim::AdamOptions(1e-3), 0); }), "ratio is 0"));

  // LibTorch takes a rate of 1e-3, the default of its options, for one that was not given.
  const LoraPlus meeting_the_default(plus, torch::optim::AdamOptions(1e-3 / 16));
  EXPECT_EQ(meeting_the_default.param_groups()[0].options().get_lr(), 1e-3 / 16);
  EXPECT_EQ(meeting_the_default.param_groups()[1].options().get_lr(), 1e-3);
}

TEST(Baselines, ScaledAdamRefusesAGroupThatIsNoListOfPairs) {
  const auto pairs = some_pairs();
  ScaledAdam optimizer({pairs[0]});
  optimizer.add_param_group(torch::optim::OptimizerParamGroup({pairs[1].a}));
  pairs[1].a.mutable_grad() = torch::ones_like(pairs[1].a);
  EXPECT_TRUE(mentions(error_of([&] { optimizer.step(); }), "a param group has 1 tensors"));
  optimizer.param_groups()[1].params().push_back(pairs[1].a.t());
  EXPECT_TRUE(mentions(error_of([&] { optimizer.step(); }), "tensors 0 and 1 of a param group"));
}

TEST(Baselines, OptionsOutOfRangeAreNamed) {
  const Factors x = {some_pairs()[0].a};
  EXPECT_TRUE(mentions(error_of([&] { Lamb(x, LambOptions(-1)); }), "lr is -1"));
  EXPECT_TRUE(mentions(error_of([&] { Muon(x, MuonOptions().momentum(1)); }), "momentum is 1"));
  EXPECT_TRUE(mentions(error_of([&] { Shampoo(x, ShampooOptions().interval(0)); }), "interval is 0"));
  EXPECT_TRUE(mentions(error_of([&] { Soap(x, SoapOptions().shampoo_beta(2)); }), "shampoo_beta is 2"));
  EXPECT_TRUE(mentions(error_of([&] { ScaledAdam(some_pairs(), ScaledAdamOptions().damping(0)); }), "damping is 0"));
}

}  // namespace
}  // namespace lora_rite::test
