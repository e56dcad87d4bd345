#include <gtest/gtest.h>
#include <torch/optim/schedulers/reduce_on_plateau_scheduler.h>
#include <torch/optim/schedulers/step_lr.h>

#include "support/pairs.hpp"

namespace lora_rite::test {
namespace {

/// Two groups with rates 1 and 0.1.
LoraRite<> two_groups() {
  LoraRite<> optimizer({random_pair("q", 2, 4, 4)}, LoraRiteOptions(1.0));
  optimizer.add_parameters({torch::zeros({3}).requires_grad_()}, torch::optim::AdamWOptions(0.1));
  return optimizer;
}

double rate(torch::optim::Optimizer& optimizer, size_t group = 0) {
  return optimizer.param_groups()[group].options().get_lr();
}

TEST(WarmupLinear, RisesThenFallsOnAStraightLineInEveryGroup) {
  auto optimizer = two_groups();
  WarmupLinear scheduler(optimizer, 4, 12);
  const std::vector<double> expected = {0.25, 0.5, 0.75, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0, 0};
  for (size_t k = 0; k < expected.size(); ++k) {
    EXPECT_NEAR(rate(optimizer, 0), expected[k], 1e-15) << k;
    EXPECT_NEAR(rate(optimizer, 1), 0.1 * expected[k], 1e-15) << k;
    scheduler.step();
  }
}

TEST(WarmupCosine, RisesThenFallsOnHalfACosineToItsMinimum) {
  auto optimizer = two_groups();
  WarmupCosine scheduler(optimizer, 2, 10, 0.2);
  for (int k = 0; k < 13; ++k) {
    const double p = std::min(1.0, (k - 2) / 8.0);
    const double expected = k < 2 ? (k + 1) / 2.0 : 0.2 + 0.8 * (1 + std::cos(M_PI * p)) / 2;
    EXPECT_NEAR(rate(optimizer), expected, 1e-14) << k;
    scheduler.step();
  }
}

TEST(WarmupLinear, WithoutWarmupStartsAtTheBaseRate) {
  auto optimizer = two_groups();
  WarmupLinear scheduler(optimizer, 0, 2);
  EXPECT_EQ(rate(optimizer), 1.0);
  scheduler.step();
  EXPECT_EQ(rate(optimizer), 0.5);
}

TEST(WarmupSchedulers, ResumeWhereTheyStopped) {
  auto optimizer = two_groups();
  WarmupCosine scheduler(optimizer, 3, 20);
  for (int i = 0; i < 7; ++i) scheduler.step();
  torch::serialize::OutputArchive out;
  scheduler.save(out);

  auto resumed_optimizer = two_groups();
  WarmupCosine resumed(resumed_optimizer, 3, 20);
  torch::serialize::InputArchive in = reopened(out);
  resumed.load(in);
  for (int i = 0; i < 15; ++i) {
    EXPECT_EQ(rate(resumed_optimizer, 1), rate(optimizer, 1));
    scheduler.step();
    resumed.step();
  }
}

TEST(WarmupSchedulers, ThatRefuseToLoadKeepTheirPosition) {
  auto optimizer = two_groups();
  WarmupCosine scheduler(optimizer, 3, 20);
  torch::serialize::OutputArchive out;
  scheduler.save(out);
  scheduler.step();
  optimizer.add_parameters({torch::zeros({3}).requires_grad_()}, torch::optim::AdamWOptions(0.1));
  torch::serialize::InputArchive in = reopened(out);
  EXPECT_TRUE(mentions(error_of([&] { scheduler.load(in); }), "the archive has 2 param groups, expected 3"));
  EXPECT_EQ(scheduler.finished_steps(), 1);
}

TEST(WarmupSchedulers, ScaleAGroupThatWasAddedLaterByItsOwnRate) {
  auto optimizer = two_groups(), other = two_groups();
  WarmupLinear scheduler(optimizer, 4, 12), at_once(other, 4, 12);
  scheduler.step();
  at_once.step();
  for (auto* o : {&optimizer, &other}) {
    o->add_pairs({random_pair("k", 2, 4, 4)}, LoraRiteOptions(0.2));
  }
  at_once.include_new_groups();
  EXPECT_EQ(rate(optimizer, 2), 0.2);
  EXPECT_NEAR(rate(other, 2), 0.5 * 0.2, 1e-15);
  for (const double expected : {0.75, 1.0, 1.0, 0.875}) {
    scheduler.step();
    at_once.step();
    for (auto* o : {&optimizer, &other}) {
      EXPECT_NEAR(rate(*o, 0), expected, 1e-15);
      EXPECT_NEAR(rate(*o, 1), 0.1 * expected, 1e-15);
      EXPECT_NEAR(rate(*o, 2), 0.2 * expected, 1e-15);
    }
  }
  optimizer.param_groups().pop_back();
  EXPECT_TRUE(mentions(error_of([&] { scheduler.step(); }), "the optimizer has 2 param groups, expected 3 or more"));
}

TEST(WarmupSchedulers, RefuseImpossibleSchedules) {
  auto optimizer = two_groups();
  EXPECT_TRUE(mentions(error_of([&] { WarmupLinear(optimizer, 5, 4); }), "warmup_steps is 5"));
  EXPECT_TRUE(mentions(error_of([&] { WarmupLinear(optimizer, -1, 4); }), "warmup_steps is -1"));
  EXPECT_TRUE(mentions(error_of([&] { WarmupLinear(optimizer, 0, 0); }), "total_steps is 0"));
  EXPECT_TRUE(mentions(error_of([&] { WarmupCosine(optimizer, 0, 4, 2); }), "min_ratio is 2"));
}

TEST(LibTorchSchedulers, StepLrDrivesEveryGroup) {
  auto optimizer = two_groups();
  torch::optim::StepLR scheduler(optimizer, 2, 0.5);
  for (int i = 0; i < 4; ++i) scheduler.step();
  EXPECT_NEAR(rate(optimizer, 0), 0.5, 1e-15);
  EXPECT_NEAR(rate(optimizer, 1), 0.05, 1e-15);
}

TEST(LibTorchSchedulers, ReduceLrOnPlateauDrivesEveryGroup) {
  auto optimizer = two_groups();
  torch::optim::ReduceLROnPlateauScheduler scheduler(optimizer, torch::optim::ReduceLROnPlateauScheduler::min,
                                                     /*factor=*/0.1, /*patience=*/1);
  for (int i = 0; i < 4; ++i) scheduler.step(1.0f);
  EXPECT_NEAR(rate(optimizer, 0), 0.1, 1e-7);
  EXPECT_NEAR(rate(optimizer, 1), 0.01, 1e-8);
}

TEST(Rate, ZeroLeavesTheFactorsAndASmallerOneMovesThemLess) {
  const std::vector<FactorPair> start = {random_pair("q", 2, 6, 5)};
  std::vector<double> distance;
  for (const double lr : {0.0, 1e-3, 1e-2}) {
    const auto pairs = clone_pairs(start);
    LoraRite<> optimizer(pairs, LoraRiteOptions(lr));
    run_steps(optimizer, pairs, 0, 1);
    distance.push_back((pairs[0].b - start[0].b).norm().item<double>());
  }
  EXPECT_EQ(distance[0], 0);
  EXPECT_GT(distance[1], 0);
  EXPECT_NEAR(distance[2] / distance[1], 10, 1e-9);
}

}  // namespace
}  // namespace lora_rite::test
