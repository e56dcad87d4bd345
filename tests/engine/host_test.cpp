#include <gtest/gtest.h>
#include <lora_rite/engine/host/buffer_pool.hpp>
#include <lora_rite/engine/host/lane_algebra.hpp>
#include <lora_rite/engine/host/torch_threads.hpp>

#include <array>
#include <functional>
#include <iterator>
#include <random>
#include <thread>

#include "support/pairs.hpp"

namespace lora_rite::test {
namespace {

LoraRiteOptions with_engine(LoraRiteOptions options, Engine engine) { return options.engine(engine); }

struct Setting {
  const char* name;
  std::function<LoraRiteOptions()> options;
};
const Setting kSettings[] = {
    {"defaults", [] { return LoraRiteOptions(1e-2); }},
    {"no_escape_decay", [] { return LoraRiteOptions(1e-2).escape(false).weight_decay(0.5); }},
    {"bounded_updates", [] { return LoraRiteOptions(1e-2).max_update_rms(0.3).lr_ratio_b(3); }},
    {"balanced", [] { return LoraRiteOptions(1e-2).balance(true).clip_unmagnified_norm(0); }},
    {"ascent", [] { return LoraRiteOptions(1e-2).maximize(true).clip_unmagnified_norm(0.1); }},
    {"bounded_change", [] { return LoraRiteOptions(1e-2).max_relative_change(0.05).lr_ratio_b(2); }},
    {"exponent", [] { return LoraRiteOptions(1e-2).preconditioner_exponent(0.25); }},
    {"rows",
     [] {
       return LoraRiteOptions(1e-2).row_equilibration(true).betas({0.9, 0.9});
     }},
    {"rows_and_all",
     [] {
       return LoraRiteOptions(1e-2)
           .row_equilibration(true)
           .max_relative_change(0.1)
           .max_update_rms(0.3)
           .balance(true)
           .weight_decay(0.5)
           .betas({0.8, 0.9});
     }},
};

class HostEngine : public testing::TestWithParam<std::tuple<int64_t, Setting>> {};

TEST_P(HostEngine, AgreesWithTheDeviceEngine) {
  const auto& [rank, setting] = GetParam();
  torch::manual_seed(51);
  std::vector<FactorPair> host;
  for (int64_t i = 0; i < 6; ++i) {  // two shapes, a zero factor, rows that fill no block
    host.push_back(random_pair("pair" + std::to_string(i), rank, 2 * rank + 37 + i % 2, 3 * rank + 29, torch::kFloat));
  }
  {
    torch::NoGradGuard no_grad;
    host[3].b.zero_();
  }
  const auto device = clone_pairs(host), start = clone_pairs(host);
  LoraRite<> on_host(host, with_engine(setting.options(), Engine::Host));
  LoraRite<> on_device(device, with_engine(setting.options(), Engine::Device));
  for (int64_t step = 0; step < 10; ++step) {
    set_gradients(host, 60 + step);
    set_gradients(device, 60 + step);
    if (step % 3 == 2) {  // a factor without a gradient
      host[1].a.mutable_grad() = torch::Tensor();
      device[1].a.mutable_grad() = torch::Tensor();
    }
    if (step == 6) {  // an edit that keeps every column norm
      torch::NoGradGuard no_grad;
      host[2].b.neg_();
      device[2].b.neg_();
    }
    on_host.step();
    on_device.step();
    // Round-off of float, over ten steps and condition numbers of about ten.
    ASSERT_LT(distance(host, device), 3e-6) << "step " << step;
  }
  EXPECT_GT(distance(start, host), 1e-3) << "the factors moved";
}

INSTANTIATE_TEST_SUITE_P(Ranks, HostEngine,
                         testing::Combine(testing::Values(1, 2, 3, 4, 7, 8, 12, 16, 33, 64),
                                          testing::ValuesIn(kSettings)),
                         [](const auto& info) {
                           return "rank" + std::to_string(std::get<0>(info.param)) + "_" + std::get<1>(info.param).name;
                         });

/// The partner's basis has directions that are only round-off: V has entries in them that shrink from step to step,
/// until their squares are no numbers.
TEST(HostEngineTest, QrBasisWithARankFarAboveASideStaysFinite) {
  for (const auto& [rank, in, out] : {std::tuple(64, 112, 23), std::tuple(16, 128, 2)}) {
    for (int seed = 1; seed <= 6; ++seed) {
      torch::manual_seed(static_cast<uint64_t>(seed));
      const FactorPair pair = random_pair("q", rank, in, out, torch::kFloat);
      pair.a.detach().div_(std::sqrt(in));
      pair.b.detach().zero_();
      LoraRite<QrBasis> optimizer({pair}, with_engine(LoraRiteOptions(1e-2), Engine::Host));
      for (int step = 0; step < 20; ++step) {
        torch::manual_seed(static_cast<uint64_t>(1000 * seed + step));
        const at::Tensor x = torch::randn({in, 50}), y = torch::randn({out, 50});
        optimizer.zero_grad();
        (pair.b.mm(pair.a.mm(x)) - y).square().mean().backward();
        optimizer.step();
        ASSERT_TRUE(at::isfinite(pair.a).all().item<bool>() && at::isfinite(pair.b).all().item<bool>())
            << "rank " << rank << ", seed " << seed << ", step " << step;
      }
      EXPECT_EQ(optimizer.skipped_steps(), 0);
      EXPECT_GT(pair.b.abs().max().item<double>(), 0);
    }
  }
}

TEST(HostEngineTest, AgreesForQrBasisAndLongFactors) {
  for (const bool rows : {false, true}) {
    torch::manual_seed(52);
    const std::vector<FactorPair> host = {random_pair("long", 16, 9001, 5003, torch::kFloat)};
    const auto device = clone_pairs(host);
    const auto options = LoraRiteOptions(1e-2).row_equilibration(rows);
    LoraRite<QrBasis> on_host(host, with_engine(options, Engine::Host));
    LoraRite<QrBasis> on_device(device, with_engine(options, Engine::Device));
    run_steps(on_host, host, 0, 5);
    run_steps(on_device, device, 0, 5);
    EXPECT_LT(distance(host, device), 3e-6) << "rows " << rows;
  }
}

/// Who has a gradient in a step.
struct Pattern {
  const char* name;
  bool (*has_gradient)(size_t side, int64_t step);
};
const Pattern kPatterns[] = {
    {"A is frozen", [](size_t side, int64_t) { return side == 1; }},
    {"B is frozen", [](size_t side, int64_t) { return side == 0; }},
    {"A and B in turn", [](size_t side, int64_t step) { return static_cast<int64_t>(side) == step % 2; }},
    {"A rests for a while", [](size_t side, int64_t step) { return side == 1 || step < 3 || step > 16; }},
    {"both rest for a while", [](size_t, int64_t step) { return step < 3 || step > 16; }},
};

/// Factors whose sums over the rows are formed in several parts: a factor that rests keeps its sums, each of them once.
TEST(HostEngineTest, AFactorThatRestsCountsOnceHoweverManyChunksItHas) {
  for (const int64_t rank : {8, 16, 32, 64}) {
    for (const Pattern& pattern : kPatterns) {
      torch::manual_seed(63);
      // Two chunks and more of A, one of B, and the other way round; the second pair always moves.
      const std::vector<FactorPair> host = {random_pair("long a", rank, 9000, 80, torch::kFloat),
                                            random_pair("another", rank, 9000, 80, torch::kFloat),
                                            random_pair("long b", rank, 80, 9000, torch::kFloat)};
      const auto device = clone_pairs(host), start = clone_pairs(host);
      LoraRite<> on_host(host, with_engine(LoraRiteOptions(1e-2), Engine::Host));
      LoraRite<> on_device(device, with_engine(LoraRiteOptions(1e-2), Engine::Device));
      for (int64_t step = 0; step < 20; ++step) {
        set_gradients(host, 90 + step);
        set_gradients(device, 90 + step);
        for (const size_t side : {0, 1}) {
          if (pattern.has_gradient(side, step)) continue;
          for (const auto* pairs : {&host, &device})
            for (const size_t pair : {0, 2})
              torch::Tensor(side == 0 ? (*pairs)[pair].a : (*pairs)[pair].b).mutable_grad() = torch::Tensor();
        }
        on_host.step();
        on_device.step();
      }
      EXPECT_LT(distance(host, device), 1e-5) << pattern.name << ", rank " << rank;
      EXPECT_GT(distance(start, host), 1e-3) << "the factors moved";
    }
  }
}

/// Any number of chunks, any pattern of missing gradients.
TEST(HostEngineTest, AgreesWithTheDeviceEngineWhicheverFactorsRest) {
  std::mt19937_64 random(67);
  const auto draw = [&](int64_t least, int64_t most) {
    return std::uniform_int_distribution<int64_t>(least, most)(random);
  };
  for (int trial = 0; trial < 30; ++trial) {
    const int64_t rank = std::array<int64_t, 5>{1, 5, 8, 16, 33}[static_cast<size_t>(draw(0, 4))];
    torch::manual_seed(static_cast<uint64_t>(trial));
    std::vector<FactorPair> host;
    for (int64_t i = draw(1, 3); i > 0; --i)
      host.push_back(random_pair("pair " + std::to_string(i), rank, 64 + draw(0, 200) * draw(1, 100),
                                 64 + draw(0, 200) * draw(1, 100), torch::kFloat));
    const auto device = clone_pairs(host);
    const auto& setting = kSettings[static_cast<size_t>(draw(0, std::size(kSettings) - 1))];
    LoraRite<> on_host(host, with_engine(setting.options(), Engine::Host));
    LoraRite<> on_device(device, with_engine(setting.options(), Engine::Device));
    const int64_t rests = draw(1, 9);  // in ten
    for (int64_t step = 0; step < 8; ++step) {
      set_gradients(host, static_cast<uint64_t>(100 + step));
      set_gradients(device, static_cast<uint64_t>(100 + step));
      for (size_t i = 0; i < host.size(); ++i) {
        if (draw(1, 10) <= rests)
          torch::Tensor(host[i].a).mutable_grad() = torch::Tensor(device[i].a).mutable_grad() = torch::Tensor();
        if (draw(1, 10) <= rests)
          torch::Tensor(host[i].b).mutable_grad() = torch::Tensor(device[i].b).mutable_grad() = torch::Tensor();
      }
      on_host.step();
      on_device.step();
      ASSERT_LT(distance(host, device), 1e-5) << "trial " << trial << ", " << setting.name << ", step " << step;
    }
  }
}

/// What was in a factor while a step was skipped has no say in the steps that follow.
TEST(HostEngineTest, ForgetsWhatAFactorHeldDuringASkippedStep) {
  for (const double held : {100.0, static_cast<double>(NAN)}) {
    torch::manual_seed(64);
    const std::vector<FactorPair> first = {random_pair("q", 4, 30, 20, torch::kFloat)};
    const auto second = clone_pairs(first);
    LoraRite<> visited(first, LoraRiteOptions(1e-2)), undisturbed(second, LoraRiteOptions(1e-2));
    run_steps(visited, first, 0, 3);
    run_steps(undisturbed, second, 0, 3);
    const torch::Tensor old = torch::Tensor(first[0].b).data();
    torch::Tensor(first[0].b).set_data(held * old);
    set_gradients(first, 95);
    torch::Tensor(first[0].a).mutable_grad().fill_(NAN);
    visited.step();
    EXPECT_EQ(visited.skipped_steps(), 1);
    torch::Tensor(first[0].b).set_data(old);
    run_steps(visited, first, 3, 6);
    run_steps(undisturbed, second, 3, 6);
    EXPECT_EQ(visited.skipped_steps(), 1);
    EXPECT_TRUE(equal_factors(first, second)) << "held " << held;
  }
}

/// An edit that a skipped step saw first is an edit still.
TEST(HostEngineTest, AnEditBeforeASkippedStepIsAnEditAfterIt) {
  torch::manual_seed(65);
  const std::vector<FactorPair> host = {random_pair("q", 4, 30, 20, torch::kFloat)};
  const auto device = clone_pairs(host);
  LoraRite<> on_host(host, with_engine(LoraRiteOptions(1e-2), Engine::Host));
  LoraRite<> on_device(device, with_engine(LoraRiteOptions(1e-2), Engine::Device));
  for (const auto& [pairs, optimizer] : {std::pair(&host, &on_host), std::pair(&device, &on_device)}) {
    run_steps(*optimizer, *pairs, 0, 3);
    {
      torch::NoGradGuard no_grad;
      torch::Tensor((*pairs)[0].b).mul_(torch::tensor({3.0, 0.5, -1.0, 2.0}));
    }
    set_gradients(*pairs, 96);
    torch::Tensor((*pairs)[0].a).mutable_grad().fill_(NAN);
    optimizer->step();
    run_steps(*optimizer, *pairs, 3, 6);
  }
  EXPECT_LT(distance(host, device), 3e-6);
}

TEST(HostEngineTest, HoldsNoGradientAfterASkippedStep) {
  torch::manual_seed(66);
  const std::vector<FactorPair> pairs = {random_pair("q", 4, 30, 20, torch::kFloat)};
  LoraRite<> optimizer(pairs);
  set_gradients(pairs, 97);
  torch::Tensor gradient = pairs[0].a.grad();
  gradient.fill_(NAN);
  optimizer.step();
  optimizer.zero_grad();
  EXPECT_EQ(optimizer.skipped_steps(), 1);
  EXPECT_EQ(gradient.use_count(), 1u);
}

/// 1 − ηλ is no float where ηλ is near its resolution. The sizes are those of a learning rate of 1e-5 and a decay of
/// 1e-2.
TEST(HostEngineTest, DecaysByAsMuchAsTheDeviceEngine) {
  for (const double decay : {1e-7, 2e-8}) {
    torch::manual_seed(68);
    const std::vector<FactorPair> host = {random_pair("q", 4, 400, 300, torch::kFloat)};
    const auto device = clone_pairs(host), start = clone_pairs(host);
    // The steps themselves are far shorter than a float's resolution, but for the decay.
    const auto options = LoraRiteOptions(1e-7).weight_decay(decay / 1e-7);
    LoraRite<> on_host(host, with_engine(options, Engine::Host)),
        on_device(device, with_engine(options, Engine::Device));
    run_steps(on_host, host, 0, 200);
    run_steps(on_device, device, 0, 200);
    const auto shrunk = [&](const std::vector<FactorPair>& pairs) {
      const torch::Tensor x = start[0].b.detach().to(torch::kDouble), y = pairs[0].b.detach().to(torch::kDouble);
      return ((x * (x - y)).sum() / (x * x).sum()).item<double>();
    };
    // Both round to nearest after each step, so what they lose is the same.
    EXPECT_NEAR(shrunk(host), shrunk(device), 0.05 * 200 * decay) << "decay " << decay;
  }
}

TEST(HostEngineTest, IsWhatAutomaticChoosesForFloatsOnACpu) {
  torch::manual_seed(53);
  const std::vector<FactorPair> host = {random_pair("q", 3, 9, 7, torch::kFloat)};
  const auto chosen = clone_pairs(host), device = clone_pairs(host);
  LoraRite<> first(host, with_engine(LoraRiteOptions(1e-2), Engine::Host)), second(chosen, LoraRiteOptions(1e-2));
  LoraRite<> third(device, with_engine(LoraRiteOptions(1e-2), Engine::Device));
  run_steps(first, host, 0, 3);
  run_steps(second, chosen, 0, 3);
  run_steps(third, device, 0, 3);
  EXPECT_TRUE(equal_factors(host, chosen));
  EXPECT_FALSE(equal_factors(device, chosen)) << "the engines round alike, so this test shows nothing";
}

TEST(HostEngineTest, ResultDoesNotDependOnTheNumberOfThreads) {
  const auto run = [](int threads, bool rows) {
    const int before = at::get_num_threads();
    at::set_num_threads(threads);
    torch::manual_seed(54);
    std::vector<FactorPair> pairs;
    for (int i = 0; i < 5; ++i) pairs.push_back(random_pair(std::to_string(i), 8, 300, 20000, torch::kFloat));
    LoraRite<> optimizer(pairs, LoraRiteOptions(1e-2).max_update_rms(0.1).row_equilibration(rows));
    run_steps(optimizer, pairs, 0, 4);
    at::set_num_threads(before);
    return std::pair(pairs, saved_bytes(optimizer));
  };
  for (const bool rows : {false, true}) {
    const auto one = run(1, rows), two = run(2, rows), four = run(4, rows);
    EXPECT_TRUE(equal_factors(one.first, two.first));
    EXPECT_TRUE(equal_factors(one.first, four.first));
    EXPECT_TRUE(one.second == two.second && one.second == four.second) << "the states differ";
  }
}

TEST(HostEngineTest, LeavesOtherPairsToTheDeviceEngine) {
  torch::manual_seed(55);
  FactorPair strided = random_pair("strided", 3, 9, 7, torch::kFloat);
  strided.a = torch::randn({9, 3}).t().requires_grad_();
  for (const FactorPair& pair :
       {strided, random_pair("double", 3, 9, 7, torch::kDouble), random_pair("half", 3, 9, 7, torch::kBFloat16)}) {
    LoraRite<> automatic({pair}, LoraRiteOptions(1e-2));
    run_steps(automatic, {pair}, 0, 1);
    LoraRite<> forced({pair}, with_engine(LoraRiteOptions(1e-2), Engine::Host));
    EXPECT_TRUE(mentions(error_of([&] { run_steps(forced, {pair}, 0, 1); }), pair.name));
  }
}

TEST(HostEngineTest, RefusesACapturableStepOnceItWasChosen) {
  torch::manual_seed(60);
  const std::vector<FactorPair> pairs = {random_pair("q", 4, 9, 7, torch::kFloat)};
  LoraRite<> optimizer(pairs, LoraRiteOptions(1e-2));
  run_steps(optimizer, pairs, 0, 1);
  static_cast<LoraRiteOptions&>(optimizer.param_groups()[0].options()).capturable(true);
  EXPECT_TRUE(mentions(error_of([&] { run_steps(optimizer, pairs, 1, 2); }),
                       "capturable was switched on after the engine was chosen"));
}

TEST(HostEngineTest, TakesGradientsThatAreNotContiguous) {
  torch::manual_seed(56);
  const std::vector<FactorPair> plain = {random_pair("q", 4, 9, 7, torch::kFloat)};
  const auto strided = clone_pairs(plain);
  LoraRite<> first(plain, LoraRiteOptions(1e-2)), second(strided, LoraRiteOptions(1e-2));
  for (int64_t step = 0; step < 3; ++step) {
    set_gradients(plain, 70 + step);
    strided[0].a.mutable_grad() = plain[0].a.grad().t().contiguous().t();
    strided[0].b.mutable_grad() = plain[0].b.grad().t().contiguous().t();
    first.step();
    second.step();
  }
  EXPECT_TRUE(equal_factors(plain, strided));
}

TEST(HostEngineTest, CheckpointsGoFromEngineToEngine) {
  for (const auto& options : {LoraRiteOptions(1e-2), LoraRiteOptions(1e-2).row_equilibration(true)}) {
    for (const Engine writer : {Engine::Host, Engine::Device}) {
      const Engine reader = writer == Engine::Host ? Engine::Device : Engine::Host;
      torch::manual_seed(57);
      const std::vector<FactorPair> pairs = {random_pair("q", 5, 40, 30, torch::kFloat)};
      LoraRite<> written(pairs, with_engine(options, writer));
      run_steps(written, pairs, 0, 4);
      const auto resumed_pairs = clone_pairs(pairs);
      LoraRite<> resumed(resumed_pairs, with_engine(options, reader));
      load_bytes(resumed, saved_bytes(written));
      run_steps(written, pairs, 4, 8);
      run_steps(resumed, resumed_pairs, 4, 8);
      EXPECT_LT(distance(resumed_pairs, pairs), 1e-6);
    }
  }
}

/// Steps two runs, of which one is edited in a way that its neighbour would notice if it happened there.
double distance_after(void (*edit)(torch::Tensor&), Engine engine, bool rows = false) {
  torch::manual_seed(58);
  const std::vector<FactorPair> pairs = {random_pair("q", 4, 300, 200, torch::kFloat)};
  const auto reference = clone_pairs(pairs);
  const auto options = LoraRiteOptions(5e-2).row_equilibration(rows);
  LoraRite<> optimizer(pairs, with_engine(options, engine));
  LoraRite<> expected(reference, with_engine(options, Engine::Device));
  run_steps(optimizer, pairs, 0, 4);
  run_steps(expected, reference, 0, 4);
  {
    torch::NoGradGuard no_grad;
    for (torch::Tensor b : {pairs[0].b, reference[0].b}) edit(b);
  }
  run_steps(optimizer, pairs, 4, 7);
  run_steps(expected, reference, 4, 7);
  return distance(pairs, reference);
}

TEST(HostEngineTest, NoticesEdits) {
  EXPECT_LT(distance_after([](torch::Tensor& b) { b.mul_(3); }, Engine::Host), 1e-5);
  EXPECT_LT(distance_after([](torch::Tensor& b) { b.mul_(3); }, Engine::Host, /*rows=*/true), 1e-5);
  EXPECT_LT(distance_after([](torch::Tensor& b) { b.copy_(b.flip(0).clone()); }, Engine::Host), 1e-5);
  EXPECT_LT(distance_after([](torch::Tensor& b) { b.select(0, 17).add_(5); }, Engine::Host), 1e-5);
  EXPECT_LT(distance_after([](torch::Tensor& b) { b.data().add_(1); }, Engine::Host), 1e-5) << "past the version";
  EXPECT_LT(distance_after([](torch::Tensor& b) { b.set_data(2 * b.detach().clone()); }, Engine::Host), 1e-5);
}

/// Whatever columns they are: the elements that are looked at in every step lie in all of them.
TEST(HostEngineTest, NoticesColumnsThatWereWrittenPastTheVersionCounter) {
  for (const int64_t rank : {1, 3, 8, 16}) {
    for (int64_t column = 0; column < rank; ++column) {
      torch::manual_seed(61);
      const std::vector<FactorPair> edited = {random_pair("q", rank, 256, 1024, torch::kFloat)};
      const auto announced = clone_pairs(edited);
      LoraRite<> first(edited, LoraRiteOptions(1e-2)), second(announced, LoraRiteOptions(1e-2));
      run_steps(first, edited, 0, 3);
      run_steps(second, announced, 0, 3);
      {
        torch::NoGradGuard no_grad;
        edited[0].b.data().narrow(1, column, 1).mul_(100);
        announced[0].b.narrow(1, column, 1).mul_(100);
      }
      run_steps(first, edited, 3, 6);
      run_steps(second, announced, 3, 6);
      EXPECT_TRUE(equal_factors(edited, announced)) << "column " << column << " of " << rank;
    }
  }
}

TEST(HostEngineTest, NamesAFactorThatIsNoLongerContiguous) {
  torch::manual_seed(62);
  const std::vector<FactorPair> pairs = {random_pair("q", 4, 30, 20, torch::kFloat)};
  LoraRite<> optimizer(pairs);
  run_steps(optimizer, pairs, 0, 2);
  const torch::Tensor kept = pairs[0].a.detach().clone();
  torch::Tensor(pairs[0].b).set_data(torch::randn({4, 20}).t());
  EXPECT_TRUE(mentions(error_of([&] { optimizer.step(); }), "pair 'q': factor b now has strides [1, 20]"));
  EXPECT_TRUE(torch::equal(pairs[0].a, kept));
}

TEST(HostEngineTest, SkipsAStepThatIsNotFinite) {
  for (const float value : {NAN, INFINITY}) {
    torch::manual_seed(59);
    const std::vector<FactorPair> pairs = {random_pair("q", 4, 30, 20, torch::kFloat)};
    LoraRite<> optimizer(pairs, LoraRiteOptions(1e-2));
    run_steps(optimizer, pairs, 0, 3);
    const auto before = clone_pairs(pairs);
    set_gradients(pairs, 80);
    pairs[0].b.mutable_grad().select(0, 3).fill_(value);
    optimizer.step();
    EXPECT_TRUE(equal_factors(pairs, before));
    EXPECT_EQ(optimizer.skipped_steps(), 1);
    run_steps(optimizer, pairs, 4, 6);
    EXPECT_FALSE(equal_factors(pairs, before));
    EXPECT_EQ(optimizer.skipped_steps(), 1);
  }
}

/// A thread keeps no more than 1 MiB of the work space that large ranks take.
TEST(LaneBuffers, LargeOnesAreGivenBack) {
  std::thread([] {                             // which keeps nothing yet
    constexpr size_t large = size_t{3} << 14;  // doubles: 384 KiB
    {
      std::vector<host::Buffer> buffers;
      for (int i = 0; i < 8; ++i) buffers.emplace_back(large);
    }
    EXPECT_EQ(host::Buffer::bytes_kept(), 2 * large * sizeof(double));
    { const host::Buffer again(large); }
    EXPECT_EQ(host::Buffer::bytes_kept(), 2 * large * sizeof(double));
    { const host::Buffer another(size_t{1} << 15); }  // 256 KiB
    EXPECT_EQ(host::Buffer::bytes_kept(), size_t{1} << 20);
  })
      .join();
}

TEST(TorchThreads, CallEachTaskOnceAndErrorsComeThrough) {
  host::Threads& threads = host::torch_threads();
  std::vector<std::atomic<int>> calls(1000);
  threads.for_each(1000, [&](int64_t i, int64_t) { ++calls[static_cast<size_t>(i)]; });
  for (const auto& count : calls) EXPECT_EQ(count, 1);
  std::vector<std::atomic<int>> busy(static_cast<size_t>(threads.count()));
  threads.for_each(1000, [&](int64_t, int64_t thread) {
    EXPECT_EQ(++busy.at(static_cast<size_t>(thread)), 1) << "two threads have one number";
    --busy[static_cast<size_t>(thread)];
  });
  EXPECT_THROW(threads.for_each(8, [](int64_t i, int64_t) { TORCH_CHECK(i != 5, "five"); }), c10::Error);
}

}  // namespace
}  // namespace lora_rite::test
