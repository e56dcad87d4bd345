// Long runs, and spectra that long runs come into: what is remembered stays symmetric and without a negative
// eigenvalue, the loss stays at its floor, two factorizations stay together, and after any stretch of odd gradients a
// step moves.
//
// 5000 steps, 100000 where LORA_RITE_SOAK is set.

#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <lora_rite/engine/pair_state.hpp>
#include <lora_rite/lora_rite.hpp>

#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "support/pairs.hpp"
#include "support/soak.hpp"
#include "support/tensors.hpp"

namespace lora_rite::test {
namespace {

using Basis = PolarBasis;

int64_t step_count() { return is_soak() ? 100000 : 5000; }

/// What the optimizer remembers of its first pair, as a checkpoint has it.
PairState state_of(const LoraRite<Basis>& optimizer, const FactorPair& pair) {
  torch::serialize::OutputArchive out;
  optimizer.save(out);
  std::stringstream stream;
  out.save_to(stream);
  torch::serialize::InputArchive in, group, entry;
  in.load_from(stream);
  in.read("0", group);
  group.read("0", entry);
  const auto wide = pair.a.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat;
  return PairState::load(entry, "pair", {pair.a.sizes().vec(), pair.b.sizes().vec()}, pair.a.size(0), wide,
                         torch::kCPU);
}

/// Finite, symmetric, positive semi-definite to the solver's round-off, and the escaped mass not negative.
void expect_sound(const LoraRite<Basis>& optimizer, const FactorPair& pair) {
  ASSERT_TRUE(all_finite(pair.a) && all_finite(pair.b));
  const PairState state = state_of(optimizer, pair);
  for (const Side factor : kSides) {
    const int64_t side = index_of(factor);
    const auto v = state.moments.second_moment[side][0];
    ASSERT_TRUE(all_finite(v) && all_finite(state.moments.inverse_root) && all_finite(state.momentum[factor]));
    EXPECT_TRUE(torch::equal(v, v.t())) << "side " << side;
    const auto spectrum = torch::linalg_eigvalsh(v);
    const double largest = spectrum[-1].item<double>();
    EXPECT_GE(largest, 0);
    EXPECT_GE(spectrum[0].item<double>(), -16 * 0x1p-52 * static_cast<double>(v.size(0)) * largest) << "side " << side;
    EXPECT_GE(state.moments.escaped_mass[side][0].item<double>(), 0);
  }
}

/// Float pairs, by each engine.
class Soak : public testing::TestWithParam<Engine> {
 protected:
  const int threads_ = at::get_num_threads();
  void SetUp() override { at::set_num_threads(1); }  // the factors are tiny
  void TearDown() override { at::set_num_threads(threads_); }
};

TEST_P(Soak, StationaryProblemStaysAtItsFloorAndInvariant) {
  constexpr int64_t rank = 3, in = 8, out = 7;
  torch::manual_seed(31);
  const auto target = torch::randn({out, rank}, torch::kDouble).matmul(torch::randn({rank, in}, torch::kDouble));
  auto plain = lora_rite::test::random_pair("plain", rank, in, out, torch::kFloat);
  // (T A, B T⁻¹) with powers of two: the same digits, so only the optimizer can make a difference at first.
  const auto t = torch::tensor({4.F, 0.5F, 8.F});
  FactorPair moved = {"moved", (plain.a.detach() * t.unsqueeze(1)).requires_grad_(),
                      (plain.b.detach() / t).requires_grad_()};
  const double lr = 3e-3;
  const auto options = LoraRiteOptions(lr).betas({0.9, 0.99}).engine(GetParam());
  LoraRite<Basis> one({plain}, options), other({moved}, options);
  const auto step = [&](LoraRite<Basis>& optimizer, const FactorPair& pair, const torch::Tensor& noise) {
    const auto error = product(pair.a, pair.b) - target + noise;
    pair.a.mutable_grad() = pair.b.detach().to(torch::kDouble).t().matmul(error).to(torch::kFloat).contiguous();
    pair.b.mutable_grad() = error.matmul(pair.a.detach().to(torch::kDouble).t()).to(torch::kFloat).contiguous();
    optimizer.step();
  };
  const int64_t steps = step_count();
  double largest_loss = 0, largest_distance = 0;
  for (int64_t i = 1; i <= steps; ++i) {
    const auto noise = 0.1 * torch::randn({out, in}, torch::kDouble);
    step(one, plain, noise);
    step(other, moved, noise);
    if (i % (steps / 50) != 0) continue;
    expect_sound(one, plain);
    expect_sound(other, moved);
    const auto w = product(plain.a, plain.b);
    if (i < steps / 2) continue;
    largest_loss = std::max(largest_loss, frobenius(w - target));
    largest_distance = std::max(largest_distance, frobenius(product(moved.a, moved.b) - w));
    ASSERT_FALSE(HasFailure()) << "after step " << i;
  }
  EXPECT_EQ(one.skipped_steps() + other.skipped_steps(), 0);
  // At the floor every step is noise: M has an RMS of at most 1 and moves ΔW by η (√(n r) + √(m r)). Momentum keeps a
  // direction for 1 / (1 − β₁) steps.
  const double one_step = lr * (std::sqrt(double(in * rank)) + std::sqrt(double(out * rank)));
  EXPECT_LT(largest_loss, 10 * one_step);
  EXPECT_GT(largest_loss, 0);
  // Near a minimum the map contracts, so round-off does not add up: a step's (u κ one_step and u of the factors' norm,
  // κ about 1e2) times the steps that the contraction takes to forget, here at most 1 / lr.
  EXPECT_LT(largest_distance, 0x1p-24 * 1e2 * (one_step + frobenius(target)) / lr);
}

TEST_P(Soak, ThousandZeroGradientsThenALargeOneMoveOnce) {
  torch::manual_seed(37);
  auto pair = lora_rite::test::random_pair("pair", 3, 8, 7, torch::kFloat);
  LoraRite<Basis> optimizer({pair}, LoraRiteOptions(0.01).engine(GetParam()));
  lora_rite::test::run_steps(optimizer, {pair}, 0, 3);
  for (int step = 0; step < 1000; ++step) {
    pair.a.mutable_grad() = torch::zeros_like(pair.a);
    pair.b.mutable_grad() = torch::zeros_like(pair.b);
    optimizer.step();
  }
  expect_sound(optimizer, pair);
  const auto before = product(pair.a, pair.b);
  lora_rite::test::run_steps(optimizer, {pair}, 3, 4, 1e6);
  expect_sound(optimizer, pair);
  const double moved = frobenius(product(pair.a, pair.b) - before);
  EXPECT_GT(moved, 1e-4);
  // V has decayed to 0.37 of what it was, and one gradient has a weight of 1 − β₂ in it: ‖M‖ ≤ (1−β₁) √(n r / (1−β₂)).
  EXPECT_LT(moved, 0.01 * 0.1 * std::sqrt(1000.0) * (std::sqrt(24.0) + std::sqrt(21.0)) * 1.2);
}

TEST_P(Soak, GradientsOfEveryRankKeepTheStateSound) {
  for (int64_t rank = 0; rank <= 4; ++rank) {
    torch::manual_seed(41);
    auto pair = lora_rite::test::random_pair("pair", 4, 9, 8, torch::kFloat);
    LoraRite<Basis> optimizer({pair}, LoraRiteOptions(0.01).engine(GetParam()));
    const auto start = product(pair.a, pair.b);
    const auto left = torch::randn({8, rank}), right = torch::randn({rank, 9});
    for (int step = 0; step < 300; ++step) {  // ∇W of that rank, always the same
      const auto grad_w = left.matmul(right);
      pair.a.mutable_grad() = pair.b.detach().t().matmul(grad_w).contiguous();
      pair.b.mutable_grad() = grad_w.matmul(pair.a.detach().t()).contiguous();
      optimizer.step();
    }
    expect_sound(optimizer, pair);
    const double moved = frobenius(product(pair.a, pair.b) - start);
    EXPECT_EQ(moved > 0.1, rank > 0) << moved;
  }
}

TEST_P(Soak, SubnormalGradientsKeepTheStateSound) {
  torch::manual_seed(43);
  for (const double eps : {0.0, 1e-8}) {
    auto pair = lora_rite::test::random_pair("pair", 3, 8, 7, torch::kFloat);
    LoraRite<Basis> optimizer({pair}, LoraRiteOptions(0.01).eps(eps).engine(GetParam()));
    const auto start = product(pair.a, pair.b);
    lora_rite::test::run_steps(optimizer, {pair}, 0, 100, 1e-41);
    EXPECT_GT(frobenius(pair.a.grad()), 0);
    expect_sound(optimizer, pair);
    // Without ε they count like any others; with it they are rightly ignored.
    const double moved = frobenius(product(pair.a, pair.b) - start);
    EXPECT_EQ(moved > 0.01, eps == 0) << moved;
    lora_rite::test::run_steps(optimizer, {pair}, 100, 103);
    EXPECT_GT(frobenius(product(pair.a, pair.b) - start), 0.01);
    expect_sound(optimizer, pair);
  }
}

TEST_P(Soak, RepeatedEigenvaluesKeepTheStateSound) {
  // Orthonormal factors and gradients: every eigenproblem is that of a multiple of the identity, exactly.
  const auto eye = torch::eye(8);
  FactorPair pair = {"pair", eye.slice(0, 0, 4).clone().requires_grad_(), eye.slice(1, 0, 4).clone().requires_grad_()};
  LoraRite<Basis> optimizer({pair}, LoraRiteOptions(1e-3).engine(GetParam()));
  for (int step = 0; step < 300; ++step) {
    pair.a.mutable_grad() = eye.slice(0, step % 5, step % 5 + 4).clone();
    pair.b.mutable_grad() = eye.slice(1, step % 5, step % 5 + 4).clone();
    optimizer.step();
  }
  expect_sound(optimizer, pair);
  EXPECT_GT(relative_difference(pair.a, eye.slice(0, 0, 4), 1), 1e-2);
}

INSTANTIATE_TEST_SUITE_P(Engines, Soak, testing::Values(Engine::Host, Engine::Device),
                         [](const auto& info) { return info.param == Engine::Host ? "Host" : "Device"; });

TEST(SoakInDouble, ConditionOf1e12KeepsTheStateSoundAndMoves) {
  for (const double condition : {1e3, 1e6, 1e9, 1e12}) {
    torch::manual_seed(47);
    constexpr int64_t rank = 4;
    const auto scales = torch::logspace(0, -std::log10(condition), rank, 10.0, torch::kDouble);
    const auto rotation = std::get<0>(torch::linalg_qr(torch::randn({rank, rank}, torch::kDouble)));
    const auto t = rotation.matmul(scales.diag());
    FactorPair pair = {"pair", t.matmul(torch::randn({rank, 9}, torch::kDouble)).requires_grad_(),
                       torch::randn({8, rank}, torch::kDouble).matmul(t.inverse()).requires_grad_()};
    const auto target = torch::randn({8, 9}, torch::kDouble);
    LoraRite<Basis> optimizer({pair}, LoraRiteOptions(1e-3));
    const double first = frobenius(product(pair.a, pair.b) - target);
    for (int step = 0; step < 300; ++step) {
      optimizer.zero_grad();
      (pair.b.matmul(pair.a) - target).square().sum().backward();
      optimizer.step();
    }
    expect_sound(optimizer, pair);
    EXPECT_EQ(optimizer.skipped_steps(), 0);
    // 300 steps of at most η (√36 + √32) downhill take a sixth off it. Beyond a condition of 1e7, where the square of a
    // singular value is lost in a Gram matrix, the faintest directions rest, and it is a little less.
    EXPECT_LT(frobenius(product(pair.a, pair.b) - target), 0.95 * first) << condition;
  }
}

TEST(SoakInHalf, LongRunsWithAndWithoutMasterCopyStayFiniteAndMove) {
  for (const auto dtype : {torch::kHalf, torch::kBFloat16}) {
    for (const bool master : {false, true}) {
      torch::manual_seed(53);
      auto pair = lora_rite::test::random_pair("pair", 3, 8, 7, dtype);
      const auto target = torch::randn({7, 8}, torch::kDouble);
      LoraRite<Basis> optimizer({pair}, LoraRiteOptions(0.01).master_weights(master));
      const double first = frobenius(product(pair.a, pair.b) - target);
      for (int64_t step = 0; step < step_count() / 10; ++step) {
        const auto error = product(pair.a, pair.b) - target;
        pair.a.mutable_grad() = pair.b.detach().to(torch::kDouble).t().matmul(error).to(dtype);
        pair.b.mutable_grad() = error.matmul(pair.a.detach().to(torch::kDouble).t()).to(dtype);
        optimizer.step();
      }
      expect_sound(optimizer, pair);
      EXPECT_EQ(optimizer.skipped_steps(), 0);
      EXPECT_LT(frobenius(product(pair.a, pair.b) - target), 0.9 * first) << dtype << " master " << master;
    }
  }
}

}  // namespace
}  // namespace lora_rite::test
