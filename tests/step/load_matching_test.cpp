// load_matching: what of a checkpoint is this optimizer's too. Strict loading is in serialization_test.cpp.

#include <gtest/gtest.h>

#include "support/pairs.hpp"

namespace lora_rite::test {
namespace {

std::vector<FactorPair> some_pairs(torch::Dtype dtype = torch::kFloat) {
  torch::manual_seed(51);
  return {random_pair("q", 3, 8, 6, dtype), random_pair("k", 3, 8, 6, dtype), random_pair("v", 2, 5, 7, dtype)};
}

LoadReport load_matching(LoraRite<>& optimizer, const std::string& bytes, const LoadOptions& options = {}) {
  std::stringstream stream(bytes);
  torch::serialize::InputArchive archive;
  archive.load_from(stream);
  return optimizer.load_matching(archive, options);
}

using Names = std::vector<std::string>;

/// Pairs and an optimizer that stepped them three times.
struct Stepped {
  std::vector<FactorPair> pairs;
  LoraRite<> optimizer;

  explicit Stepped(std::vector<FactorPair> of, LoraRiteOptions options = LoraRiteOptions(1e-2))
      : pairs(std::move(of)), optimizer(pairs, options) {
    run_steps(optimizer, pairs, 0, 3);
  }
};

TEST(LoadMatching, TakesEverythingOfTheSameOptimizerLikeLoad) {
  Stepped source(some_pairs());
  const auto pairs = clone_pairs(source.pairs);
  LoraRite<> resumed(pairs, LoraRiteOptions(1e-2));
  const LoadReport report = load_matching(resumed, saved_bytes(source.optimizer));
  EXPECT_EQ(report.loaded, (Names{"q", "k", "v"}));
  EXPECT_TRUE(report.kept.empty());
  EXPECT_TRUE(report.unused.empty());
  EXPECT_EQ(saved_bytes(resumed), saved_bytes(source.optimizer));
  run_steps(source.optimizer, source.pairs, 3, 6);
  run_steps(resumed, pairs, 3, 6);
  EXPECT_TRUE(equal_factors(pairs, source.pairs));
}

TEST(LoadMatching, FindsPairsUnderOtherPrefixesAndInOtherGroups) {
  Stepped source(some_pairs());
  auto pairs = clone_pairs(source.pairs);
  for (auto& pair : pairs) pair.name = "model." + pair.name;
  std::swap(pairs[0], pairs[2]);
  LoraRite<> resumed({pairs[0]}, LoraRiteOptions(1e-2));
  resumed.add_pairs({pairs[1], pairs[2]}, LoraRiteOptions(3e-3));
  LoadOptions options;
  options.rename = [](const std::string& name) { return name == "v" ? "" : "model." + name; };
  const LoadReport report = load_matching(resumed, saved_bytes(source.optimizer), options);
  EXPECT_EQ(report.loaded, (Names{"model.k", "model.q"}));
  EXPECT_EQ(report.kept, (Names{"model.v"}));
  EXPECT_EQ(report.unused, (Names{"v"}));
  EXPECT_EQ(resumed.param_groups()[1].options().get_lr(), 3e-3) << "options are this optimizer's";
  EXPECT_FALSE(resumed.state_of("model.v"));
  for (const char* name : {"q", "k"}) {
    const auto found = resumed.state_of("model." + std::string(name)), expected = source.optimizer.state_of(name);
    EXPECT_TRUE(torch::equal(found->a.momentum, expected->a.momentum));
    EXPECT_TRUE(torch::equal(found->b.second_moment, expected->b.second_moment));
    EXPECT_EQ(found->b.steps, 3);
  }
}

TEST(LoadMatching, LeavesWhatTheArchiveLacksAsItIs) {
  Stepped source({some_pairs()[1]});
  Stepped target(some_pairs());
  run_steps(target.optimizer, target.pairs, 3, 5);
  const auto before = target.optimizer.state_of("v");
  const LoadReport report = load_matching(target.optimizer, saved_bytes(source.optimizer));
  EXPECT_EQ(report.loaded, (Names{"k"}));
  EXPECT_EQ(report.kept, (Names{"q", "v"}));
  EXPECT_EQ(target.optimizer.state_of("k")->a.steps, 3);
  EXPECT_EQ(target.optimizer.state_of("q")->a.steps, 5);
  EXPECT_TRUE(torch::equal(target.optimizer.state_of("v")->a.momentum, before->a.momentum));
}

TEST(LoadMatching, ConvertsMomenta) {
  const auto as = [](const std::vector<FactorPair>& pairs, torch::Dtype dtype) {
    std::vector<FactorPair> result;
    for (const auto& pair : pairs)
      result.push_back({pair.name, pair.a.detach().to(dtype).clone().requires_grad_(),
                        pair.b.detach().to(dtype).clone().requires_grad_()});
    return result;
  };
  for (const auto& [from, to] : {std::pair{torch::kFloat, torch::kDouble}, std::pair{torch::kDouble, torch::kFloat},
                                 std::pair{torch::kBFloat16, torch::kDouble}, std::pair{torch::kHalf, torch::kFloat}}) {
    const auto options = LoraRiteOptions(1e-2).row_equilibration(true).master_weights(true);
    Stepped source(some_pairs(from), options);
    const auto pairs = as(source.pairs, to);
    LoraRite<> resumed(pairs, options);
    EXPECT_EQ(load_matching(resumed, saved_bytes(source.optimizer)).loaded.size(), 3U);
    const auto found = resumed.state_of("q"), expected = source.optimizer.state_of("q");
    EXPECT_EQ(found->a.momentum.scalar_type(), to);
    EXPECT_TRUE(torch::equal(found->a.momentum, expected->a.momentum.to(to)));
    EXPECT_TRUE(torch::equal(found->a.rows, expected->a.rows.to(to)));
    EXPECT_FALSE(found->a.master.defined());
    if (from == torch::kHalf || from == torch::kBFloat16) continue;  // the source has its master copies to step
    // The same step but for round-off, if rounding its factors is an edit for the source as well.
    for (size_t i = 0; i < pairs.size(); ++i) {
      source.pairs[i].a.data().copy_(pairs[i].a.data());
      source.pairs[i].b.data().copy_(pairs[i].b.data());
    }
    const auto before = clone_pairs(pairs);
    run_steps(source.optimizer, source.pairs, 3, 4);
    run_steps(resumed, pairs, 3, 4);
    const double moved = (pairs[0].a - before[0].a).norm().item<double>();
    const double apart = (pairs[0].a.to(torch::kDouble) - source.pairs[0].a.to(torch::kDouble)).norm().item<double>();
    EXPECT_GT(moved, 1e-3);
    EXPECT_LT(apart, 1e-4 * moved);
  }
}

TEST(LoadMatching, RefusesTwoPairsOfOneNameWhichTheArchiveHas) {
  Stepped source(some_pairs());
  auto pairs = clone_pairs(source.pairs);
  pairs[1].name = "q";
  LoraRite<> resumed(pairs, LoraRiteOptions(1e-2));
  run_steps(resumed, pairs, 0, 1);
  const std::string before = saved_bytes(resumed);
  EXPECT_TRUE(mentions(error_of([&] { load_matching(resumed, saved_bytes(source.optimizer)); }),
                       "two pairs of this optimizer are called 'q'"));
  EXPECT_EQ(saved_bytes(resumed), before);
}

TEST(LoadMatching, FindsPairsWithoutNamesByTheirPlaces) {
  auto nameless = some_pairs();
  for (auto& pair : nameless) pair.name = "";
  Stepped source(nameless);
  const auto pairs = clone_pairs(source.pairs);
  LoraRite<> resumed({{"first", pairs[1].a, pairs[1].b}}, LoraRiteOptions(1e-2));
  LoadOptions options;
  options.rename = [](const std::string& name) { return name == "pair 1 of group 0" ? "first" : name; };
  const LoadReport report = load_matching(resumed, saved_bytes(source.optimizer), options);
  EXPECT_EQ(report.loaded, (Names{"first"}));
  EXPECT_EQ(report.unused, (Names{"pair 0 of group 0", "pair 2 of group 0"}));
  EXPECT_TRUE(torch::equal(resumed.state_of("first")->a.momentum, source.optimizer.state_of(0, 1)->a.momentum));
}

TEST(LoadMatching, TakesOtherParametersByTheirGroups) {
  const auto build = [](int64_t heads, bool maximize = true) {
    auto optimizer = std::make_unique<LoraRite<>>(some_pairs(), LoraRiteOptions(1e-2));
    std::vector<torch::Tensor> parameters;
    for (int64_t i = 0; i < heads; ++i) parameters.push_back(torch::ones({3}).requires_grad_());
    optimizer->add_parameters(parameters, torch::optim::AdamWOptions(1e-2), maximize);
    for (auto& parameter : parameters) parameter.mutable_grad() = torch::ones({3});
    return optimizer;
  };
  const auto source = build(1), same = build(1), longer = build(2);
  source->step();
  const std::string bytes = saved_bytes(*source);
  EXPECT_EQ(load_matching(*same, bytes).loaded, (Names{"q", "k", "v", "group 1"}));
  EXPECT_EQ(saved_bytes(*same), bytes);
  const auto descending = build(1, false);  // all but its direction, which is an option and stays
  load_matching(*descending, bytes);
  EXPECT_TRUE(saved_bytes(*descending) != bytes);
  LoadReport report = load_matching(*longer, bytes);
  EXPECT_EQ(report.kept, (Names{"group 1"}));
  EXPECT_EQ(report.unused, (Names{"group 1"}));
  LoadOptions options;
  options.other_parameters = false;
  report = load_matching(*build(1), bytes, options);
  EXPECT_EQ(report.kept, (Names{"group 1"}));
  EXPECT_EQ(report.unused, (Names{"group 1"}));
}

TEST(LoadMatching, NamesWhatDoesNotFitAndChangesNothing) {
  Stepped source(some_pairs());
  const std::string bytes = saved_bytes(source.optimizer);
  auto pairs = some_pairs();
  pairs[2] = random_pair("v", 2, 5, 8, torch::kFloat);
  Stepped target(pairs);
  const std::string before = saved_bytes(target.optimizer);
  const auto expect_error = [&](const std::string& words, const LoadOptions& options) {
    EXPECT_TRUE(mentions(error_of([&] { load_matching(target.optimizer, bytes, options); }), words));
    EXPECT_EQ(saved_bytes(target.optimizer), before);
  };
  expect_error("pair 'v': entry 'momentum_b' has shape [1, 7, 2]", {});
  LoadOptions options;
  options.rename = [](const std::string& name) { return "model." + name; };
  expect_error("nothing of the archive is here: its pairs are 'q', 'k', 'v', expected some of 'q', 'k', 'v'", options);
  options.rename = [](const std::string&) { return "q"; };
  expect_error("the archive's pairs 'q' and 'k' are both 'q' here", options);
  EXPECT_TRUE(mentions(error_of([&] {
                         torch::optim::Adam adam({torch::zeros({2})});
                         load_matching(target.optimizer, saved_bytes(adam));
                       }),
                       "holds no LoraRite optimizer"));
  EXPECT_EQ(saved_bytes(target.optimizer), before);
}

TEST(LoadMatching, LeavesStrictLoadingStrict) {
  Stepped source({some_pairs()[0]}), target(some_pairs());
  EXPECT_TRUE(mentions(error_of([&] { load_bytes(target.optimizer, saved_bytes(source.optimizer)); }),
                       "group 0 has 2 parameters in the archive, expected 6"));
}

}  // namespace
}  // namespace lora_rite::test
