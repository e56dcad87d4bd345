// Engine::Cuda beside Engine::Device: its kernels' source, run on a CPU.

#include <gtest/gtest.h>

#include <functional>
#include <tuple>

#include "engine/cuda/emulated.hpp"
#include "support/operators.hpp"
#include "support/pairs.hpp"

namespace lora_rite::test {
namespace {

using emulated::Emulation;

/// Drops gradients alike in two runs.
void drop_gradients(const std::vector<const std::vector<FactorPair>*>& runs,
                    const std::function<bool(size_t pair, Side side)>& has_gradient) {
  for (const auto* pairs : runs)
    for (size_t i = 0; i < pairs->size(); ++i)
      for (const Side side : kSides)
        if (!has_gradient(i, side)) torch::Tensor((*pairs)[i].factor(side)).mutable_grad() = torch::Tensor();
}

struct Setting {
  const char* name;
  std::function<LoraRiteOptions()> options;
};
const Setting kSettings[] = {
    {"defaults", [] { return LoraRiteOptions(1e-2); }},
    {"no_escape_decay", [] { return LoraRiteOptions(1e-2).escape(false).weight_decay(0.5); }},
    {"ascent", [] { return LoraRiteOptions(1e-2).maximize(true).clip_unmagnified_norm(0.1).lr_ratio_b(3); }},
    {"bounded_change",
     [] { return LoraRiteOptions(1e-2).max_relative_change(0.05).lr_ratio_b(2).clip_unmagnified_norm(0); }},
    {"exponent", [] { return LoraRiteOptions(1e-2).preconditioner_exponent(0.25).eps(1e-3).eps_root(1e-9); }},
    // Engine::Device's options, in between and back.
    {"balanced", [] { return LoraRiteOptions(1e-2).balance(true); }},
    {"bounded_updates_and_rows", [] { return LoraRiteOptions(1e-2).max_update_rms(0.3).row_equilibration(true); }},
};

class CudaEngine : public testing::TestWithParam<std::tuple<int64_t, Setting>> {};

TEST_P(CudaEngine, AgreesWithTheDeviceEngine) {
  const Emulation emulation;
  const auto& [rank, setting] = GetParam();
  torch::manual_seed(51);
  std::vector<FactorPair> cuda;
  for (int64_t i = 0; i < 6; ++i) {  // two shapes, one with sides of several tiles, a zero factor
    const bool is_long = i == 5 && rank <= 16;
    cuda.push_back(random_pair("pair" + std::to_string(i), rank, is_long ? 1100 : 2 * rank + 37 + i % 2,
                               is_long ? 513 : 3 * rank + 29, torch::kFloat));
  }
  {
    torch::NoGradGuard no_grad;
    cuda[3].b.zero_();
  }
  const auto device = clone_pairs(cuda), start = clone_pairs(cuda);
  LoraRite<> on_cuda(cuda, setting.options().engine(Engine::Cuda));
  LoraRite<> on_device(device, setting.options().engine(Engine::Device));
  const int64_t steps = rank <= 32 ? 10 : 7;
  for (int64_t step = 0; step < steps; ++step) {
    set_gradients(cuda, 60 + static_cast<uint64_t>(step));
    set_gradients(device, 60 + static_cast<uint64_t>(step));
    drop_gradients({&cuda, &device}, [&](size_t pair, Side side) {
      return !(step % 3 == 2 && pair == 1 && side == Side::A) && !(step % 4 == 3 && pair == 4);
    });
    if (step == 6) {  // an edit that keeps every column norm
      torch::NoGradGuard no_grad;
      cuda[2].b.neg_(), device[2].b.neg_();
    }
    on_cuda.step();
    on_device.step();
    // Round-off of float, over ten steps and condition numbers of about ten.
    ASSERT_LT(distance(cuda, device), 1e-6) << "step " << step;
  }
  EXPECT_GT(distance(start, cuda), 1e-3) << "the factors moved";
}

INSTANTIATE_TEST_SUITE_P(Ranks, CudaEngine,
                         testing::Combine(testing::Values(1, 4, 7, 8, 13, 16, 32, 64), testing::ValuesIn(kSettings)),
                         [](const auto& info) {
                           return "rank" + std::to_string(std::get<0>(info.param)) + "_" + std::get<1>(info.param).name;
                         });

/// A loss scaler leaves float gradients of half factors, of which half would make zero.
TEST(CudaEngineTest, FloatGradientsOfHalfFactorsAreNotRounded) {
  const Emulation emulation;
  torch::manual_seed(63);
  const std::vector<FactorPair> cuda = {random_pair("", 4, 10, 12, torch::kHalf)};
  const auto device = clone_pairs(cuda), start = clone_pairs(cuda);
  LoraRite<> on_cuda(cuda, LoraRiteOptions(1e-1).engine(Engine::Cuda));
  LoraRite<> on_device(device, LoraRiteOptions(1e-1).engine(Engine::Device));
  for (uint64_t step = 0; step < 4; ++step) {
    for (const auto* pairs : {&cuda, &device}) {
      torch::manual_seed(70 + step);
      for (const Side side : kSides) {
        const torch::Tensor& factor = (*pairs)[0].factor(side);
        torch::Tensor(factor).mutable_grad() =
            torch::randn(factor.sizes()) * (step == 2 ? 1e6 : 1e-9);  // in half: infinite, and zero
      }
    }
    on_cuda.step();
    on_device.step();
    EXPECT_EQ(distance(cuda, device), 0) << "step " << step;
  }
  EXPECT_EQ(on_cuda.skipped_steps(), 0);
  EXPECT_GT(distance(start, cuda), 1e-3) << "the factors moved";
}

/// Which engine steps: the kernels count their launches.
TEST(CudaEngineTest, StepsByItsOwnKernels) {
  const Emulation emulation;
  const uint64_t before = emulated::seed;
  const std::vector<FactorPair> pairs = {random_pair("", 4, 10, 12, torch::kFloat)};
  LoraRite<> optimizer(pairs, LoraRiteOptions(1e-2).engine(Engine::Cuda));
  run_steps(optimizer, pairs, 0, 2);
  EXPECT_EQ(emulated::seed - before, 10U) << "five launches a step";
}

/// Where one set of pairs is all that is stepped, nothing but the kernels runs, and memory is asked for.
TEST(CudaEngineTest, NoOperatorRunsBetweenTheActs) {
  const Emulation emulation;
  std::vector<FactorPair> pairs = {random_pair("0", 4, 10, 12, torch::kFloat),
                                   random_pair("1", 4, 20, 12, torch::kFloat)};
  LoraRite<> optimizer(pairs, LoraRiteOptions(1e-2).engine(Engine::Cuda));
  run_steps(optimizer, pairs, 0, 2);
  set_gradients(pairs, 5);
  for (const auto& [name, times] : operators_of([&] { optimizer.step(); }))
    EXPECT_EQ(name.rfind("aten::empty", 0), 0U) << name << " ran " << times << " times";
}

/// With another group the norm of all gradients is not the kernels' to know.
TEST(CudaEngineTest, AloneItStepsAsBesideOthers) {
  const Emulation emulation;
  torch::manual_seed(62);
  const std::vector<FactorPair> pairs = {random_pair("0", 8, 700, 20, torch::kFloat),
                                         random_pair("1", 8, 20, 30, torch::kFloat)};
  const auto other = clone_pairs(pairs);
  const torch::Tensor head = torch::randn({5}).requires_grad_();
  for (const double bound : {0.0, 0.3}) {
    const auto options = LoraRiteOptions(1e-2).engine(Engine::Cuda).clip_unmagnified_norm(bound);
    LoraRite<> alone(pairs, options), beside(other, options);
    beside.add_parameters({head}, torch::optim::AdamWOptions(1e-3));
    run_steps(alone, pairs, 0, 5);
    run_steps(beside, other, 0, 5);
    EXPECT_LT(distance(pairs, other), 1e-6);
    EXPECT_NEAR(alone.diagnostics()[0].clip_factor, beside.diagnostics()[0].clip_factor, 1e-6);
    // A gradient that is not finite is noticed either way.
    for (LoraRite<>* optimizer : {&alone, &beside}) {
      const auto& of_it = optimizer == &alone ? pairs : other;
      const auto before = clone_pairs(of_it);
      set_gradients(of_it, 9);
      torch::Tensor(of_it[1].b).mutable_grad().view(-1)[3] = INFINITY;
      optimizer->step();
      EXPECT_TRUE(equal_factors(before, of_it));
      EXPECT_EQ(optimizer->skipped_steps(), 1);
    }
  }
}

/// What act 2 costs on a GPU is the latency of its barriers: some 25 ns, and the work between two.
TEST(CudaEngineTest, BarriersOfActTwoAreCounted) {
  const Emulation emulation;
  for (const auto& [rank, unmagnify, decide] :
       std::vector<std::tuple<int64_t, int64_t, int64_t>>{{8, 140, 260}, {16, 290, 560}, {32, 620, 1220}}) {
    torch::manual_seed(64);
    const std::vector<FactorPair> pairs = {random_pair("", rank, 200, 300, torch::kFloat)};
    LoraRite<> optimizer(pairs, LoraRiteOptions(1e-2).engine(Engine::Cuda));
    run_steps(optimizer, pairs, 0, 5);
    EXPECT_LE(emulated::barriers.unmagnify, unmagnify) << rank;
    EXPECT_LE(emulated::barriers.decide, decide) << rank;
  }
}

TEST(CudaEngineTest, NoMoreMatricesThanThePoolHas) {
  const Emulation emulation;
  emulated::peak = 0;
  for (const bool qr : {false, true}) {
    const auto options = LoraRiteOptions(1e-2).max_relative_change(0.1).preconditioner_exponent(0.25);
    const std::vector<FactorPair> pairs = {random_pair("", 4, 10, 12, torch::kFloat)};
    std::unique_ptr<torch::optim::Optimizer> optimizer;
    if (qr) {
      optimizer = std::make_unique<LoraRite<QrBasis>>(pairs, LoraRiteOptions(options).engine(Engine::Cuda));
    } else {
      optimizer = std::make_unique<LoraRite<>>(pairs, LoraRiteOptions(options).engine(Engine::Cuda));
    }
    run_steps(*optimizer, pairs, 0, 3);
  }
  EXPECT_EQ(emulated::peak, 8) << "Pool::kMatrices; one more would abort";
}

TEST(CudaEngineTest, AgreesInTheQrBasisAndForRanksAboveASide) {
  const Emulation emulation;
  for (const auto& [in, out] : std::vector<std::pair<int64_t, int64_t>>{{40, 50}, {300, 15}, {12, 200}, {1, 20}}) {
    torch::manual_seed(52);
    const std::vector<FactorPair> cuda = {random_pair("", 16, in, out, torch::kFloat)};
    const auto device = clone_pairs(cuda);
    LoraRite<QrBasis> on_cuda(cuda, LoraRiteOptions(1e-2).engine(Engine::Cuda));
    LoraRite<QrBasis> on_device(device, LoraRiteOptions(1e-2).engine(Engine::Device));
    run_steps(on_cuda, cuda, 0, 6);
    run_steps(on_device, device, 0, 6);
    EXPECT_LT(distance(cuda, device), 1e-6) << in << ", " << out;
  }
}

/// Half types, with and without master copies. A result next to a half's rounding may fall to either side of it.
TEST(CudaEngineTest, AgreesForHalfTypes) {
  const Emulation emulation;
  for (const auto dtype : {torch::kHalf, torch::kBFloat16}) {
    for (const bool master : {false, true}) {
      torch::manual_seed(53);
      const std::vector<FactorPair> cuda = {random_pair("0", 8, 70, 50, dtype), random_pair("1", 8, 33, 50, dtype)};
      {
        torch::NoGradGuard no_grad;  // a direction that only floats tell from round-off
        cuda[1].b.select(1, 0).mul_(1e-4);
      }
      const auto device = clone_pairs(cuda);
      const auto options = LoraRiteOptions(1e-2).master_weights(master).weight_decay(0.1);
      LoraRite<> on_cuda(cuda, LoraRiteOptions(options).engine(Engine::Cuda));
      LoraRite<> on_device(device, LoraRiteOptions(options).engine(Engine::Device));
      for (int64_t step = 0; step < 6; ++step) {
        run_steps(on_cuda, cuda, step, step + 1);
        run_steps(on_device, device, step, step + 1);
        const double most = dtype == torch::kHalf ? 1e-4 : 1e-3;  // some elements in a thousand
        ASSERT_LT(distance(cuda, device), most) << dtype << ", master " << master << ", step " << step;
        if (step == 0) {
          EXPECT_EQ(distance(cuda, device), 0) << "one step, one rounding";
        }
      }
    }
  }
}

TEST(CudaEngineTest, ANaNStepChangesNothing) {
  const Emulation emulation;
  for (const auto& poisoned : {Side::A, Side::B}) {
    torch::manual_seed(54);
    const std::vector<FactorPair> pairs = {random_pair("0", 8, 30, 20, torch::kFloat),
                                           random_pair("1", 8, 30, 700, torch::kFloat)};
    LoraRite<> optimizer(pairs, LoraRiteOptions(1e-2).engine(Engine::Cuda));
    run_steps(optimizer, pairs, 0, 3);
    const auto before = clone_pairs(pairs);
    const std::string state = saved_bytes(optimizer);
    set_gradients(pairs, 77);
    torch::Tensor(pairs[1].factor(poisoned)).mutable_grad().view(-1)[-1] = std::numeric_limits<double>::quiet_NaN();
    optimizer.step();
    EXPECT_TRUE(equal_factors(before, pairs));
    EXPECT_EQ(saved_bytes(optimizer).size(), state.size());
    EXPECT_EQ(optimizer.skipped_steps(), 1);
    // The next step is that of a run without the skipped one.
    const auto other = clone_pairs(before);
    LoraRite<> resumed(other, LoraRiteOptions(1e-2).engine(Engine::Cuda));
    load_bytes(resumed, state);
    run_steps(optimizer, pairs, 3, 5);
    run_steps(resumed, other, 3, 5);
    EXPECT_TRUE(equal_factors(pairs, other));
  }
}

/// Other orders of threads and blocks, the same bits.
TEST(CudaEngineTest, TwoRunsGiveTheSameBits) {
  const Emulation emulation;
  torch::manual_seed(55);
  const std::vector<FactorPair> one = {random_pair("0", 16, 700, 90, torch::kFloat),
                                       random_pair("1", 16, 40, 1500, torch::kFloat)};
  const auto two = clone_pairs(one);
  const auto options = LoraRiteOptions(1e-2).max_relative_change(0.1).engine(Engine::Cuda);
  LoraRite<> first(one, options), second(two, options);
  run_steps(first, one, 0, 6);
  emulated::seed += 12345;
  run_steps(second, two, 0, 6);
  EXPECT_TRUE(equal_factors(one, two));
}

TEST(CudaEngineTest, AResumedRunIsTheRunThatWentOn) {
  const Emulation emulation;
  for (const auto dtype : {torch::kFloat, torch::kBFloat16}) {
    torch::manual_seed(56);
    const std::vector<FactorPair> pairs = {random_pair("0", 8, 600, 90, dtype), random_pair("1", 8, 40, 90, dtype)};
    const auto options = LoraRiteOptions(1e-2).master_weights(true).engine(Engine::Cuda);
    LoraRite<> optimizer(pairs, options);
    run_steps(optimizer, pairs, 0, 4);
    const auto other = clone_pairs(pairs);
    LoraRite<> resumed(other, options);
    load_bytes(resumed, saved_bytes(optimizer));
    run_steps(optimizer, pairs, 4, 8);
    run_steps(resumed, other, 4, 8);
    EXPECT_TRUE(equal_factors(pairs, other)) << dtype;
  }
}

/// A state is no engine's own.
TEST(CudaEngineTest, StatesGoFromEngineToEngine) {
  const Emulation emulation;
  torch::manual_seed(57);
  const std::vector<FactorPair> pairs = {random_pair("0", 8, 1200, 90, torch::kFloat)};
  const auto other = clone_pairs(pairs);
  const auto options = [](Engine engine) { return LoraRiteOptions(0.3).engine(engine); };
  LoraRite<> on_device(pairs, options(Engine::Device));
  LoraRite<> changing(other, options(Engine::Host));
  run_steps(on_device, pairs, 0, 3);
  run_steps(changing, other, 0, 3);
  LoraRite<> on_cuda(other, options(Engine::Cuda));
  load_bytes(on_cuda, saved_bytes(changing));
  run_steps(on_device, pairs, 3, 6);
  run_steps(on_cuda, other, 3, 6);
  LoraRite<> back(other, options(Engine::Device));
  load_bytes(back, saved_bytes(on_cuda));
  run_steps(on_device, pairs, 6, 9);
  run_steps(back, other, 6, 9);
  EXPECT_LT(distance(other, pairs), 1e-6);
}

/// Options that the kernels lack are Engine::Device's, from one step to the next.
TEST(CudaEngineTest, OptionsMayChangeTheEngineWithinARun) {
  const Emulation emulation;
  torch::manual_seed(58);
  const std::vector<FactorPair> pairs = {random_pair("0", 8, 60, 90, torch::kFloat)};
  const auto other = clone_pairs(pairs);
  LoraRite<> on_cuda(pairs, LoraRiteOptions(1e-2).engine(Engine::Cuda));
  LoraRite<> on_device(other, LoraRiteOptions(1e-2).engine(Engine::Device));
  for (int64_t step = 0; step < 9; ++step) {
    for (LoraRite<>* optimizer : {&on_cuda, &on_device}) {
      auto& options = static_cast<LoraRiteOptions&>(optimizer->param_groups()[0].options());
      options.balance(step % 3 == 1).lr(1e-2 / static_cast<double>(1 + step));
    }
    for (LoraRite<>* optimizer : {&on_cuda, &on_device}) {
      const auto& of_it = optimizer == &on_cuda ? pairs : other;
      set_gradients(of_it, static_cast<uint64_t>(step));
      // A factor that rests in the other engine's step keeps its values, and its momentum turns.
      if (step % 3 == 1) torch::Tensor(of_it[0].a).mutable_grad() = torch::Tensor();
      optimizer->step();
    }
    ASSERT_LT(distance(pairs, other), 1e-6) << step;
  }
}

/// Edits of any kind, also those that no version counter sees.
TEST(CudaEngineTest, NoticesEdits) {
  const Emulation emulation;
  const std::function<void(const torch::Tensor&)> edits[] = {
      [](const torch::Tensor& x) { x.mul_(-1); },
      [](const torch::Tensor& x) { x.data_ptr<float>()[x.numel() - 1] += 0.5F; },
      [](const torch::Tensor& x) { torch::Tensor(x).set_data(x.detach() * 2); },
  };
  for (const auto& edit : edits) {
    torch::manual_seed(59);
    const std::vector<FactorPair> pairs = {random_pair("0", 8, 900, 90, torch::kFloat)};
    const auto other = clone_pairs(pairs);
    LoraRite<> on_cuda(pairs, LoraRiteOptions(1e-2).engine(Engine::Cuda));
    LoraRite<> on_device(other, LoraRiteOptions(1e-2).engine(Engine::Device));
    run_steps(on_cuda, pairs, 0, 3);
    run_steps(on_device, other, 0, 3);
    {
      torch::NoGradGuard no_grad;
      edit(pairs[0].a), edit(other[0].a);
    }
    run_steps(on_cuda, pairs, 3, 5);
    run_steps(on_device, other, 3, 5);
    EXPECT_LT(distance(pairs, other), 1e-6);
  }
}

/// A pair that rests in the first step after a load has the state that was loaded, and not what memory held.
TEST(CudaEngineTest, APairMayRestInTheFirstStepAfterALoad) {
  const Emulation emulation;
  torch::manual_seed(65);
  const std::vector<FactorPair> pairs = {random_pair("0", 8, 90, 70, torch::kFloat),
                                         random_pair("1", 8, 90, 70, torch::kFloat)};
  const auto options = LoraRiteOptions(3e-2).engine(Engine::Cuda).betas({0.9, 0.5});
  LoraRite<> optimizer(pairs, options);
  run_steps(optimizer, pairs, 0, 3);
  const auto other = clone_pairs(pairs);
  const std::string bytes = saved_bytes(optimizer);
  const auto go_on = [](LoraRite<>& of, const std::vector<FactorPair>& its) {
    set_gradients(its, 31);
    for (const Side side : kSides) torch::Tensor(its[1].factor(side)).mutable_grad() = torch::Tensor();
    of.step();
    run_steps(of, its, 5, 8);
  };
  go_on(optimizer, pairs);
  // The memory of the second optimizer holds what another run left there.
  LoraRite<> resumed(other, options);
  const auto start = clone_pairs(other);
  run_steps(resumed, other, 10, 14);
  {
    torch::NoGradGuard no_grad;
    for (size_t i = 0; i < other.size(); ++i)
      for (const Side side : kSides) torch::Tensor(other[i].factor(side)).copy_(start[i].factor(side));
  }
  load_bytes(resumed, bytes);
  go_on(resumed, other);
  EXPECT_TRUE(equal_factors(pairs, other));
}

/// The bound on one factor's change is about its own faint directions, which its partner's option must not hide.
TEST(CudaEngineTest, MasterCopiesCountForAFrozenPartner) {
  const Emulation emulation;
  torch::manual_seed(66);
  const std::vector<FactorPair> pairs = {random_pair("0", 8, 70, 60, torch::kBFloat16)};
  {
    torch::NoGradGuard no_grad;
    pairs[0].b.select(1, 0).mul_(1e-3);
  }
  const auto other = clone_pairs(pairs);
  const auto options = LoraRiteOptions(1e-2).master_weights(true).max_relative_change(0.05);
  LoraRite<> on_cuda(pairs, LoraRiteOptions(options).engine(Engine::Cuda));
  LoraRite<> on_device(other, LoraRiteOptions(options).engine(Engine::Device));
  for (int64_t step = 0; step < 4; ++step) {
    set_gradients(pairs, 40 + static_cast<uint64_t>(step)), set_gradients(other, 40 + static_cast<uint64_t>(step));
    drop_gradients({&pairs, &other}, [](size_t, Side side) { return side == Side::B; });
    on_cuda.step(), on_device.step();
  }
  EXPECT_LT(distance(pairs, other), 1e-3);
}

/// An infinity in a factor that has no momentum yet, of a dtype whose sums are held at its largest number.
TEST(CudaEngineTest, AnInfiniteFactorIsNoticed) {
  const Emulation emulation;
  const std::vector<FactorPair> pairs = {random_pair("0", 4, 20, 30, torch::kHalf)};
  LoraRite<> optimizer(pairs, LoraRiteOptions(1e-2).engine(Engine::Cuda));
  {
    torch::NoGradGuard no_grad;
    pairs[0].a.view(-1)[3] = INFINITY;
  }
  set_gradients(pairs, 1);
  drop_gradients({&pairs}, [](size_t, Side side) { return side == Side::B; });
  const auto before = clone_pairs(pairs);
  optimizer.step();
  EXPECT_EQ(optimizer.skipped_steps(), 1);
  EXPECT_TRUE(torch::equal(before[0].b, pairs[0].b));
}

/// What is forgotten of a pair is forgotten of its tiles, too, though its factors are as they were.
TEST(CudaEngineTest, AResetPairStartsAnew) {
  const Emulation emulation;
  torch::manual_seed(63);
  const std::vector<FactorPair> pairs = {random_pair("0", 8, 90, 70, torch::kFloat)};
  const auto other = clone_pairs(pairs);
  LoraRite<> on_cuda(pairs, LoraRiteOptions(1e-2).engine(Engine::Cuda));
  LoraRite<> on_device(other, LoraRiteOptions(1e-2).engine(Engine::Device));
  for (LoraRite<>* optimizer : {&on_cuda, &on_device}) {
    const auto& of_it = optimizer == &on_cuda ? pairs : other;
    run_steps(*optimizer, of_it, 0, 3);
    optimizer->reset_state(0, 0);
    optimizer->reset_state(0, 0);  // the memory of before may come back
    run_steps(*optimizer, of_it, 3, 6);
  }
  EXPECT_LT(distance(pairs, other), 1e-6);
}

/// More factors than one kernel takes pointers of.
TEST(CudaEngineTest, ManyPairsGoInParts) {
  const Emulation emulation;
  torch::manual_seed(60);
  std::vector<FactorPair> pairs;
  for (int64_t i = 0; i < cuda::kMostFactors / 2 + 3; ++i)
    pairs.push_back(random_pair(std::to_string(i), 2, 5 + i % 2, 6, torch::kFloat));
  const auto other = clone_pairs(pairs);
  LoraRite<> on_cuda(pairs, LoraRiteOptions(1e-2).engine(Engine::Cuda));
  LoraRite<> on_device(other, LoraRiteOptions(1e-2).engine(Engine::Device));
  run_steps(on_cuda, pairs, 0, 2);
  run_steps(on_device, other, 0, 2);
  EXPECT_LT(distance(pairs, other), 1e-6);
}

/// Double factors, ranks above 64 and B with the rank in the middle are stepped by Engine::Device.
TEST(CudaEngineTest, WhatTheKernelsDoNotTakeIsTheDeviceEngines) {
  const Emulation emulation;
  const uint64_t before = emulated::seed;
  for (const auto& pair :
       {random_pair("double", 4, 10, 12, torch::kDouble), random_pair("wide", 65, 70, 80, torch::kFloat),
        FactorPair{"convolution", torch::randn({4, 10}).requires_grad_(), torch::randn({12, 4, 3}).requires_grad_()}}) {
    const std::vector<FactorPair> pairs = {pair};
    const auto other = clone_pairs(pairs);
    LoraRite<> on_cuda(pairs, LoraRiteOptions(1e-2).engine(Engine::Cuda));
    LoraRite<> on_device(other, LoraRiteOptions(1e-2).engine(Engine::Device));
    run_steps(on_cuda, pairs, 0, 2);
    run_steps(on_device, other, 0, 2);
    EXPECT_TRUE(equal_factors(pairs, other)) << pair.name;
  }
  EXPECT_EQ(emulated::seed, before) << "no launch";
}

/// `capturable` needs no second mathematics: the step is the same.
TEST(CudaEngineTest, ACapturableStepIsTheUsualOne) {
  const Emulation emulation;
  torch::manual_seed(61);
  const std::vector<FactorPair> pairs = {random_pair("0", 8, 60, 5, torch::kFloat)};
  const auto other = clone_pairs(pairs);
  LoraRite<> recorded(pairs, LoraRiteOptions(1e-2).engine(Engine::Cuda).capturable(true));
  LoraRite<> usual(other, LoraRiteOptions(1e-2).engine(Engine::Cuda));
  run_steps(recorded, pairs, 0, 5);
  run_steps(usual, other, 0, 5);
  EXPECT_TRUE(equal_factors(pairs, other));
}

TEST(CudaEngineTest, RefusesWhereItIsNotLinkedOrNotOnItsDevice) {
  const std::vector<FactorPair> pairs = {random_pair("layer", 4, 10, 12, torch::kFloat)};
  LoraRite<> optimizer(pairs, LoraRiteOptions(1e-2).engine(Engine::Cuda));
  set_gradients(pairs, 1);
  const std::string message = error_of([&] { optimizer.step(); });
  for (const char* word : {"'layer'", "Engine::Cuda", "lora_rite::cuda"}) EXPECT_TRUE(mentions(message, word));
}

}  // namespace
}  // namespace lora_rite::test
