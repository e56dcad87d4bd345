#include <gtest/gtest.h>
#include <lora_rite/engine/host/kernels/dispatch.hpp>

#include "support/pairs.hpp"

namespace lora_rite::test {
namespace {

TEST(Diagnostics, DoNotDisturbTraining) {
  torch::manual_seed(21);
  const std::vector<FactorPair> watched = {random_pair("q", 3, 8, 6)};
  const auto unwatched = clone_pairs(watched);
  LoraRite<> first(watched), second(unwatched);
  first.diagnostics();
  for (int i = 0; i < 4; ++i) {
    run_steps(first, watched, i, i + 1);
    run_steps(second, unwatched, i, i + 1);
    first.diagnostics();
  }
  EXPECT_TRUE(equal_factors(watched, unwatched));
  EXPECT_EQ(saved_bytes(first), saved_bytes(second));
}

TEST(Diagnostics, BeforeTheFirstStepShowTheFactorsAlone) {
  torch::manual_seed(22);
  auto pair = random_pair("q", 2, 8, 6);
  torch::NoGradGuard no_grad;
  pair.a.copy_(torch::zeros({2, 8}));
  pair.a[0][0] = 4;
  pair.a[1][1] = 2;
  pair.b.zero_();
  LoraRite<> optimizer(std::vector<FactorPair>{pair});
  const auto found = optimizer.diagnostics();
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].name, "q");
  EXPECT_NEAR(found[0].a.condition_number, 2, 1e-12);
  EXPECT_TRUE(std::isinf(found[0].b.condition_number));
  EXPECT_EQ(found[0].a.effective_rank, 0);
  EXPECT_EQ(found[0].a.escaped_mass, 0);
}

TEST(Diagnostics, ADeficientFactorHasAnInfiniteConditionNumber) {
  torch::manual_seed(24);
  for (const auto dtype : {torch::kFloat, torch::kDouble}) {
    const auto pair = random_pair("q", 3, 40, 30, dtype);
    LoraRite<> optimizer(std::vector<FactorPair>{pair});
    EXPECT_LT(optimizer.diagnostics()[0].a.condition_number, 10);
    torch::NoGradGuard no_grad;
    pair.a[2].copy_(pair.a[0] + pair.a[1] * 2);
    pair.b.select(1, 1).copy_(pair.b.select(1, 0));
    EXPECT_TRUE(std::isinf(optimizer.diagnostics()[0].b.condition_number));
    // Its sums were rounded to the factor's dtype.
    EXPECT_GT(optimizer.diagnostics()[0].a.condition_number, 1e6);
  }
}

TEST(Diagnostics, ReportTheUnmagnifiedGradientAndTheClip) {
  torch::manual_seed(23);
  // Two shapes of one rank are decided upon together.
  const std::vector<FactorPair> pairs = {random_pair("q", 3, 8, 6), random_pair("k", 2, 5, 9),
                                         random_pair("v", 3, 5, 9)};
  const auto before = clone_pairs(pairs);
  LoraRite<> optimizer(pairs, LoraRiteOptions(1e-3).clip_unmagnified_norm(0.5));
  run_steps(optimizer, pairs, 0, 1);
  const auto found = optimizer.diagnostics();
  double total = 0;
  for (size_t i = 0; i < pairs.size(); ++i) {
    // Ḡ_A = G_Aᵀ R⁺ has the norm of G_Aᵀ times the pseudo-inverse of B, seen from B's columns: ‖U_Bᵀ-part‖.
    const auto unmagnified = [](const torch::Tensor& tall_gradient, const torch::Tensor& tall_partner) {
      const auto r = std::get<1>(torch::linalg_qr(tall_partner, "reduced"));
      return torch::matmul(tall_gradient, torch::linalg_pinv(r)).norm().item<double>();
    };
    const double a = unmagnified(pairs[i].a.grad().t(), before[i].b.detach());
    const double b = unmagnified(pairs[i].b.grad(), before[i].a.detach().t());
    EXPECT_NEAR(found[i].a.unmagnified_gradient_norm, a, 1e-9 * a);
    EXPECT_NEAR(found[i].b.unmagnified_gradient_norm, b, 1e-9 * b);
    total += a * a + b * b;
  }
  EXPECT_NEAR(found[0].clip_factor, 0.5 / std::sqrt(total), 1e-12);
}

TEST(Diagnostics, EffectiveRankIsTheRankOfAnEvenGradient) {
  torch::manual_seed(24);
  // B has orthonormal columns, and A's gradient two equally strong directions of four.
  auto pair = random_pair("q", 4, 8, 6);
  torch::NoGradGuard no_grad;
  pair.b.copy_(std::get<0>(torch::linalg_qr(torch::randn({6, 4}, torch::kDouble), "reduced")));
  LoraRite<> optimizer(std::vector<FactorPair>{pair});
  auto gradient = torch::zeros({4, 8}, torch::kDouble);
  gradient[0][0] = gradient[1][1] = 3;
  pair.a.mutable_grad() = gradient;
  optimizer.step();
  EXPECT_NEAR(optimizer.diagnostics()[0].a.effective_rank, 2, 1e-9);
}

TEST(Diagnostics, UpdateRmsIsThatOfTheStepInTheOrthonormalBasis) {
  torch::manual_seed(25);
  const std::vector<FactorPair> pairs = {random_pair("q", 3, 8, 6)};
  const auto before = clone_pairs(pairs);
  LoraRite<> optimizer(pairs, LoraRiteOptions(1e-3));
  run_steps(optimizer, pairs, 0, 1);
  // X moves by η M R⁺ᵀ, and U = B R⁺ is orthonormal: ‖B ΔA‖ = η ‖M‖.
  const auto moved = torch::matmul(before[0].b, pairs[0].a - before[0].a);
  const double expected = moved.norm().item<double>() / 1e-3 / std::sqrt(3.0 * 8.0);
  EXPECT_NEAR(optimizer.diagnostics()[0].a.update_rms, expected, 1e-9 * expected);
}

TEST(Diagnostics, AFactorThatIsNotFiniteHasNoConditionNumberAndHidesNoOtherPair) {
  torch::manual_seed(27);
  const std::vector<FactorPair> pairs = {random_pair("q", 3, 8, 6), random_pair("k", 3, 8, 6)};
  LoraRite<> optimizer(pairs);
  for (const bool stepped : {false, true}) {
    if (stepped) run_steps(optimizer, pairs, 0, 2);
    const auto before = pairs[0].b.detach().clone();
    for (const double value : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
      torch::NoGradGuard no_grad;
      torch::Tensor(pairs[0].b)[2][1] = value;
      const auto found = optimizer.diagnostics();
      EXPECT_EQ(found[0].name, "q");
      EXPECT_TRUE(std::isnan(found[0].b.condition_number));
      EXPECT_GT(found[0].a.condition_number, 1);
      EXPECT_GT(found[1].b.condition_number, 1);
      EXPECT_EQ(found[0].b.update_rms > 0, stepped);
      torch::Tensor(pairs[0].b).copy_(before);
    }
  }
}

TEST(Diagnostics, EscapedMassGrowsWhenTheBasisTurnsAndNotWithoutEscape) {
  torch::manual_seed(26);
  for (const bool escape : {true, false}) {
    const std::vector<FactorPair> pairs = {random_pair("q", 3, 8, 6)};
    LoraRite<> optimizer(pairs, LoraRiteOptions(0.1).escape(escape));
    run_steps(optimizer, pairs, 0, 6);
    const double mass = optimizer.diagnostics()[0].a.escaped_mass;
    if (escape) {
      EXPECT_GT(mass, 0);
    } else {
      EXPECT_EQ(mass, 0);
    }
  }
}

/// Run once more with LORA_RITE_KERNELS=none (tests/CMakeLists.txt).
TEST(KernelName, IsThatOfTheKernelsInUseAndWithoutThemAutomaticDoes) {
  const host::kernels::Table* kernels = host::kernels::chosen();
  EXPECT_EQ(kernel_name(), kernels == nullptr ? "none" : kernels->name);
  const auto step = [](Engine engine) {
    const FactorPair pair = random_pair("q", 3, 8, 6, torch::kFloat);
    LoraRite<> optimizer({pair}, LoraRiteOptions(1e-2).engine(engine));
    run_steps(optimizer, {pair}, 0, 2);
    return pair;
  };
  EXPECT_NO_THROW(step(Engine::Automatic));
  EXPECT_NO_THROW(step(Engine::Device));
  if (kernels != nullptr) {
    EXPECT_NO_THROW(step(Engine::Host));
  } else {
    EXPECT_TRUE(mentions(error_of([&] { step(Engine::Host); }), "kernels, of which none are in use (see kernel_name)"));
  }
}

}  // namespace
}  // namespace lora_rite::test
