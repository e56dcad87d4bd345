// What an optimizer remembers of a pair: told, forgotten, and taken out.

#include <gtest/gtest.h>

#include <limits>

#include "support/pairs.hpp"

namespace lora_rite::test {
namespace {

/// Two pairs that share a batch and one that does not.
std::vector<FactorPair> three_pairs(torch::Dtype dtype = torch::kFloat) {
  torch::manual_seed(31);
  return {random_pair("q", 3, 8, 6, dtype), random_pair("k", 3, 8, 6, dtype), random_pair("v", 2, 5, 7, dtype)};
}

class OnEngine : public testing::TestWithParam<Engine> {
 protected:
  static LoraRiteOptions options() {
    return LoraRiteOptions(1e-2).weight_decay(0.01).row_equilibration(true).engine(GetParam());
  }
};

INSTANTIATE_TEST_SUITE_P(Engines, OnEngine, testing::Values(Engine::Host, Engine::Device),
                         [](const auto& info) { return info.param == Engine::Host ? "Host" : "Device"; });

TEST_P(OnEngine, StateIsWhatTheStepsLeftAndACopy) {
  const auto pairs = three_pairs();
  LoraRite<> optimizer(pairs, options().weight_decay(0).clip_unmagnified_norm(0));
  EXPECT_FALSE(optimizer.state_of("k"));
  set_gradients(pairs, 1);
  torch::Tensor(pairs[1].b).mutable_grad() = torch::Tensor();
  const auto before = clone_pairs(pairs);
  optimizer.step();
  const auto state = optimizer.state_of("k");
  ASSERT_TRUE(state);
  EXPECT_EQ(state->a.steps, 1);
  EXPECT_EQ(state->b.steps, 0);
  EXPECT_FALSE(state->b.momentum.defined());
  // A step of rate 1 subtracts the momentum; two roundings of numbers of size 1 divided by the rate.
  EXPECT_LT(((before[1].a - pairs[1].a) / 1e-2 - state->a.momentum).abs().max().item<double>(), 1e-4);
  EXPECT_GT(state->a.momentum.abs().max().item<double>(), 0.1);
  EXPECT_EQ(state->a.second_moment.sizes(), (std::vector<int64_t>{3, 3}));
  EXPECT_EQ(state->a.rows.sizes(), (std::vector<int64_t>{8}));
  EXPECT_FALSE(state->a.master.defined());
  // R⁺ of B: the basis B R⁺ is orthonormal.
  const auto basis = torch::matmul(before[1].b.detach().to(torch::kDouble), state->a.inverse_root);
  EXPECT_LT((torch::matmul(basis.t(), basis) - torch::eye(3, torch::kDouble)).norm().item<double>(), 1e-9);
  EXPECT_GT(state->a.second_moment.trace().item<double>(), 0);
  EXPECT_EQ(state->a.escaped_mass, 0);

  const std::string saved = saved_bytes(optimizer);
  state->a.momentum.zero_();
  state->a.second_moment.zero_();
  EXPECT_EQ(saved_bytes(optimizer), saved);
  EXPECT_TRUE(torch::equal(optimizer.state_of(0, 1)->b.second_moment, state->b.second_moment));
}

TEST_P(OnEngine, AResetPairStepsAsInANewOptimizerAndTheOthersGoOn) {
  const auto pairs = three_pairs(), others = clone_pairs(pairs);
  // The clip would couple the pairs, and so a pair's past with the others' future.
  LoraRite<> optimizer(pairs, options().clip_unmagnified_norm(0)), unreset(others, options().clip_unmagnified_norm(0));
  run_steps(optimizer, pairs, 0, 4);
  run_steps(unreset, others, 0, 4);
  optimizer.reset_state("k");
  EXPECT_FALSE(optimizer.state_of("k"));
  EXPECT_GT(optimizer.diagnostics()[0].a.unmagnified_gradient_norm, 0);
  EXPECT_EQ(optimizer.diagnostics()[1].a.unmagnified_gradient_norm, 0);
  EXPECT_TRUE(optimizer.state_of("q"));
  const auto fresh = clone_pairs(pairs);
  LoraRite<> anew(fresh, options().clip_unmagnified_norm(0));
  for (int i = 4; i < 7; ++i) {
    run_steps(optimizer, pairs, i, i + 1);
    run_steps(unreset, others, i, i + 1);
    run_steps(anew, fresh, i, i + 1);
    EXPECT_TRUE(equal_factors({pairs[1]}, {fresh[1]})) << i;
    EXPECT_FALSE(equal_factors({pairs[1]}, {others[1]})) << i;
    EXPECT_TRUE(equal_factors({pairs[0], pairs[2]}, {others[0], others[2]})) << i;
  }
}

TEST_P(OnEngine, AResetOptimizerIsANewOne) {
  const auto pairs = three_pairs();
  const auto head = torch::ones({3}).requires_grad_();
  const auto build = [&](const std::vector<FactorPair>& of, const torch::Tensor& other) {
    LoraRite<> result(of, options());
    result.add_parameters({other}, torch::optim::AdamWOptions(1e-2));
    return result;
  };
  auto optimizer = build(pairs, head);
  torch::Tensor(head).mutable_grad() = torch::ones({3});
  run_steps(optimizer, pairs, 0, 3);
  set_gradients(pairs, 1, std::numeric_limits<double>::quiet_NaN());
  optimizer.step();
  EXPECT_EQ(optimizer.skipped_steps(), 1);
  optimizer.reset_state();
  EXPECT_EQ(optimizer.skipped_steps(), 0);
  const auto fresh = clone_pairs(pairs);
  const auto fresh_head = head.detach().clone().requires_grad_();
  auto anew = build(fresh, fresh_head);
  EXPECT_EQ(saved_bytes(optimizer), saved_bytes(anew));
  torch::Tensor(fresh_head).mutable_grad() = torch::ones({3});
  run_steps(optimizer, pairs, 3, 5);
  run_steps(anew, fresh, 3, 5);
  EXPECT_TRUE(equal_factors(pairs, fresh));
  EXPECT_TRUE(torch::equal(head, fresh_head));
  EXPECT_EQ(saved_bytes(optimizer), saved_bytes(anew));
}

TEST_P(OnEngine, OthersGoOnBitForBitWithoutAPairThatWasTakenOut) {
  for (const size_t removed : {0, 1, 2}) {
    const auto pairs = three_pairs(), others = clone_pairs(pairs);
    torch::manual_seed(32);
    const std::vector<FactorPair> second = {random_pair("o", 3, 8, 6, torch::kFloat)},
                                  second_others = clone_pairs(second);
    LoraRite<> optimizer(pairs, options()), whole(others, options());
    optimizer.add_pairs(second, options());
    whole.add_pairs(second_others, options());
    std::vector<FactorPair> all = pairs, all_others = others;
    all.push_back(second[0]);
    all_others.push_back(second_others[0]);
    run_steps(optimizer, all, 0, 3);
    run_steps(whole, all_others, 0, 3);
    const auto told = [](const LoraRite<>& of) {
      std::map<std::string, std::pair<double, double>> norms;
      for (const PairDiagnostics& pair : of.diagnostics())
        norms[pair.name] = {pair.a.unmagnified_gradient_norm, pair.clip_factor};
      return norms;
    };
    auto expected = told(optimizer);
    expected.erase(pairs[removed].name);
    optimizer.remove_pair(pairs[removed].name);
    EXPECT_EQ(told(optimizer), expected) << "of the last step";
    EXPECT_GT(expected.begin()->second.first, 0);
    EXPECT_EQ(optimizer.param_groups()[0].params().size(), 4U);
    EXPECT_FALSE(optimizer.param_groups()[0].params()[2 * (removed % 2)].is_same(pairs[removed].a));
    EXPECT_TRUE(mentions(error_of([&] { optimizer.state_of(pairs[removed].name); }),
                         "LoraRite has no pair '" + pairs[removed].name + "', expected one of '"));
    for (int i = 3; i < 6; ++i) {
      set_gradients(all, static_cast<uint64_t>(i));
      set_gradients(all_others, static_cast<uint64_t>(i));
      for (torch::Tensor factor : {others[removed].a, others[removed].b}) factor.mutable_grad() = torch::Tensor();
      optimizer.step();
      whole.step();
    }
    for (size_t p = 0; p < 4; ++p)
      EXPECT_EQ(equal_factors({all[p]}, {all_others[p]}), true) << pairs[removed].name << " " << all[p].name;
    EXPECT_EQ(optimizer.diagnostics().size(), 3U);

    std::vector<FactorPair> left = clone_pairs(pairs);  // and a checkpoint is one of the pairs that are left
    left.erase(left.begin() + static_cast<std::ptrdiff_t>(removed));
    LoraRite<> resumed(left, options());
    resumed.add_pairs(clone_pairs(second), options());
    load_bytes(resumed, saved_bytes(optimizer));
    EXPECT_EQ(saved_bytes(resumed), saved_bytes(optimizer));
    optimizer.add_pairs({pairs[removed]}, options());  // it is nobody's now
  }
}

TEST(RemovePair, LeavesAnEmptyGroupInItsPlace) {
  const auto pairs = three_pairs();
  LoraRite<> optimizer({pairs[0]}, LoraRiteOptions(1e-2));
  optimizer.add_pairs({pairs[1], pairs[2]}, LoraRiteOptions(2e-2));
  WarmupLinear scheduler(optimizer, 2, 10);
  run_steps(optimizer, pairs, 0, 2);
  optimizer.remove_pair(0, 0);
  ASSERT_EQ(optimizer.param_groups().size(), 2U);
  EXPECT_TRUE(optimizer.param_groups()[0].params().empty());
  scheduler.step();
  const auto before = clone_pairs(pairs);
  run_steps(optimizer, pairs, 2, 4);
  EXPECT_TRUE(equal_factors({pairs[0]}, {before[0]}));
  EXPECT_FALSE(equal_factors({pairs[1]}, {before[1]}));
  EXPECT_EQ(optimizer.param_groups()[1].options().get_lr(), 2e-2);
  load_bytes(optimizer, saved_bytes(optimizer));
}

TEST(Pairs, ThatAreNotThereAreNamedAndNothingChanges) {
  auto pairs = three_pairs();
  pairs[2].name = "q";
  LoraRite<> optimizer(pairs);
  run_steps(optimizer, pairs, 0, 1);
  const std::string saved = saved_bytes(optimizer);
  EXPECT_TRUE(mentions(error_of([&] { optimizer.reset_state("x"); }), "no pair 'x', expected one of 'q', 'k', 'q'"));
  EXPECT_TRUE(mentions(error_of([&] { optimizer.remove_pair("q"); }), "has 2 pairs 'q', expected one"));
  EXPECT_TRUE(mentions(error_of([&] { optimizer.state_of(1, 0); }), "no group 1, expected a number below 1"));
  EXPECT_TRUE(mentions(error_of([&] { optimizer.remove_pair(0, 3); }), "group 0 has no pair 3"));
  EXPECT_EQ(saved_bytes(optimizer), saved);
  optimizer.remove_pair(0, 2);
  EXPECT_TRUE(optimizer.state_of("q"));
}

}  // namespace
}  // namespace lora_rite::test
