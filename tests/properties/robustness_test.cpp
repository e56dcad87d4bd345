// What stops or poisons other implementations: spectra that fall off, gradients of any size, zeros,
// repeated singular values, missing rank. Skipped steps are in skipped_step_test.cpp, edits from outside
// in external_edit_test.cpp, the half types in half_precision_test.cpp.

#include "support/duel.hpp"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace lora_rite::test {
namespace {

torch::Tensor orthonormal_columns(int64_t rows, int64_t columns) {
  return std::get<0>(torch::linalg_qr(torch::randn({rows, columns}, torch::kDouble)));
}

template <class Basis>
class Robustness : public testing::Test {};
using Bases = testing::Types<PolarBasis, QrBasis>;
TYPED_TEST_SUITE(Robustness, Bases);

/// A float pair with n = 2048 and r = 64, and gradients with singular values 0.8^i: κ = 1e6.
struct FallingSpectrum {
  static constexpr int64_t kRows = 2048, kRank = 64;
  torch::Tensor a = torch::randn({kRank, kRows}).requires_grad_();
  torch::Tensor b = torch::randn({kRows, kRank}).requires_grad_();
  torch::Tensor columns = orthonormal_columns(kRows, kRank);
  torch::Tensor values = torch::pow(0.8, torch::arange(kRank, torch::kDouble));

  /// Another gradient [n, r] of that spectrum.
  torch::Tensor gradient() const {
    const auto left = columns.roll(torch::randint(kRows, {1}).item<int64_t>(), 0);
    return (left * values).matmul(orthonormal_columns(kRank, kRank)).to(torch::kFloat);
  }
};

TYPED_TEST(Robustness, FallingSpectrumNeverFreezesAFactor) {
  int frozen = 0;
  for (int trial = 0; trial < 50; ++trial) {
    torch::manual_seed(100 + trial);
    FallingSpectrum problem;
    LoraRite<TypeParam> optimizer({FactorPair{"pair", problem.a, problem.b}},
                                  LoraRiteOptions(1e-3).escape(trial % 2 == 0));
    for (int step = 0; step < 2; ++step) {
      problem.a.mutable_grad() = problem.gradient().t().contiguous();
      problem.b.mutable_grad() = problem.gradient();
      const auto a = problem.a.detach().clone(), b = problem.b.detach().clone();
      optimizer.step();
      ASSERT_TRUE(all_finite(problem.a) && all_finite(problem.b));
      // M has an RMS of about 1, and N = M R⁺ᵀ of 1/√2048: the factors (RMS 1) move by 2e-5 of
      // themselves. A quarter of that is the least that a step without a defect can do.
      for (const double moved :
           {relative_difference(problem.a, a, frobenius(a)), relative_difference(problem.b, b, frobenius(b))}) {
        if (!(moved > 5e-6)) ++frozen;
        EXPECT_LT(moved, 1e-4);
      }
    }
  }
  EXPECT_EQ(frozen, 0);
}

TYPED_TEST(Robustness, FallingSpectrumReachesEveryDirection) {
  // Without ε the first step is orthonormal whatever the spectrum: MᵀM = n I.
  torch::manual_seed(7);
  FallingSpectrum problem;
  // Orthonormal factors: R = I, and the movement itself is M.
  {
    torch::NoGradGuard no_grad;
    problem.a.copy_(orthonormal_columns(FallingSpectrum::kRows, FallingSpectrum::kRank).t());
    problem.b.zero_();
    problem.b.slice(0, 0, FallingSpectrum::kRank).fill_diagonal_(1.0);
  }
  LoraRite<TypeParam> optimizer({FactorPair{"pair", problem.a, problem.b}}, LoraRiteOptions(1.0).eps(0).escape(false));
  problem.a.mutable_grad() = problem.gradient().t().contiguous();
  problem.b.mutable_grad() = problem.gradient();
  const auto start = problem.a.detach().clone();
  optimizer.step();
  const auto moved = (problem.a.detach() - start).to(torch::kDouble);
  const auto singular = torch::linalg_svdvals(moved) / std::sqrt(double(FallingSpectrum::kRows));
  // The gradient's own float rounding is 6e-8 of its largest singular value, a tenth of the smallest.
  EXPECT_GT(singular.min().template item<double>(), 0.99);
  EXPECT_LT(singular.max().template item<double>(), 1.01);
}

TYPED_TEST(Robustness, SpectrumBelowRoundOffNeitherBlowsUpNorBlindsTheRest) {
  // Singular values 0.5^i down to 1e-19: most eigenvalues of V are round-off, of either sign. Where they
  // stand for nothing a step must not be amplified by them, and the directions above must have all of it.
  for (int trial = 0; trial < 20; ++trial) {
    torch::manual_seed(400 + trial);
    const int64_t rows = 96, rank = 64;
    auto a = orthonormal_columns(rows, rank).t().contiguous().requires_grad_();
    auto b = orthonormal_columns(rows, rank).requires_grad_();
    const auto start = b.detach().clone();
    const auto values = torch::pow(0.5, torch::arange(rank, torch::kDouble));
    LoraRite<TypeParam> optimizer({FactorPair{"pair", a, b}}, LoraRiteOptions(1.0).eps(0));
    b.mutable_grad() = (orthonormal_columns(rows, rank) * values).matmul(orthonormal_columns(rank, rank));
    optimizer.step();
    // RᵀR = AAᵀ = I: the movement is M, whose singular values over √n are σ / max(σ, round-off).
    const auto singular = torch::linalg_svdvals(b.detach() - start) / std::sqrt(double(rows));
    EXPECT_LT(singular.max().template item<double>(), 1.1) << trial;
    EXPECT_GT(singular[15].template item<double>(), 0.9) << trial;
    EXPECT_GT(singular[40].template item<double>(), 0) << trial;
  }
}

TYPED_TEST(Robustness, FallingSpectrumStaysInvariant) {
  // T scales by powers of two: the transformed factors and gradients hold exactly the same digits, so
  // only the optimizer itself can make a difference. κ(T) = 2^10.
  for (int trial = 0; trial < 3; ++trial) {
    torch::manual_seed(300 + trial);
    FallingSpectrum problem;
    const auto exponents = torch::randint(-5, 6, {FallingSpectrum::kRank}, torch::kDouble);
    const auto t = torch::pow(2.0, exponents).to(torch::kFloat);
    auto a = (problem.a.detach() * t.unsqueeze(1)).requires_grad_();
    auto b = (problem.b.detach() / t).requires_grad_();
    const auto options = LoraRiteOptions(1e-2);
    LoraRite<TypeParam> original({FactorPair{"pair", problem.a, problem.b}}, options);
    LoraRite<TypeParam> transformed({FactorPair{"pair", a, b}}, options);
    const auto start = product(problem.a, problem.b);
    for (int step = 0; step < 4; ++step) {
      const auto gradient_a = problem.gradient().t().contiguous(), gradient_b = problem.gradient();
      problem.a.mutable_grad() = gradient_a;
      problem.b.mutable_grad() = gradient_b;
      a.mutable_grad() = gradient_a / t.unsqueeze(1);
      b.mutable_grad() = gradient_b * t;
      original.step();
      transformed.step();
    }
    const auto expected = product(problem.a, problem.b);
    const double movement = frobenius(expected - start);
    ASSERT_GT(movement, 5e-4 * frobenius(start));
    // Eigenvalues of V below 1e-12 of the largest come out of round-off 1e-16 with 4 digits.
    EXPECT_LT(relative_difference(product(a, b), expected, movement), 1e-3);
  }
}

/// Movement of both factors after some steps with gradients of the given scale (times [1, alternate]).
template <class Basis>
std::vector<torch::Tensor> scaled_run(torch::ScalarType dtype, double scale, double alternate,
                                      const LoraRiteOptions& options) {
  torch::manual_seed(51);
  auto a = torch::randn({4, 12}).to(dtype).requires_grad_();
  auto b = torch::randn({10, 4}).to(dtype).requires_grad_();
  const auto start_a = a.detach().clone(), start_b = b.detach().clone();
  LoraRite<Basis> optimizer({FactorPair{"pair", a, b}}, options);
  for (int step = 0; step < 6; ++step) {
    const double factor = step % 2 == 0 ? scale : scale * alternate;
    a.mutable_grad() = (torch::randn({4, 12}, torch::kDouble) * factor).to(dtype);
    b.mutable_grad() = (torch::randn({10, 4}, torch::kDouble) * factor).to(dtype);
    optimizer.step();
  }
  EXPECT_EQ(optimizer.skipped_steps(), 0);
  return {a.detach() - start_a, b.detach() - start_b};
}

constexpr double kScales[] = {1e-30, 1e-22, 1e-15, 1e-8, 1, 1e8, 1e15, 1e22, 1e30};

TYPED_TEST(Robustness, GradientsOfAnyScaleGiveFiniteBoundedSteps) {
  for (const auto dtype : {torch::kFloat, torch::kDouble}) {
    for (const double scale : kScales) {
      for (const double eps : {0.0, 1e-8}) {
        for (const double clip : {0.0, 1.0}) {
          for (const double alternate : {1.0, 0.0, 1e-8}) {
            const auto options = LoraRiteOptions(0.01).eps(eps).clip_unmagnified_norm(clip);
            for (const auto& moved : scaled_run<TypeParam>(dtype, scale, alternate, options)) {
              EXPECT_TRUE(all_finite(moved)) << scale << " eps " << eps << " clip " << clip;
              EXPECT_LT(frobenius(moved), 10) << scale << " eps " << eps << " clip " << clip;
              // Without ε every scale moves; with it, gradients below ε are rightly ignored.
              EXPECT_GT(frobenius(moved), eps == 0 && alternate == 1 ? 0.01 : -1) << scale;
            }
          }
        }
      }
    }
  }
}

TYPED_TEST(Robustness, WithoutEpsTheStepDoesNotDependOnTheScaleOfTheGradients) {
  const auto options = LoraRiteOptions(0.01).eps(0).clip_unmagnified_norm(0);
  for (const auto dtype : {torch::kFloat, torch::kDouble}) {
    const auto expected = scaled_run<TypeParam>(dtype, 1, 1, options);
    for (const double scale : kScales) {
      const auto moved = scaled_run<TypeParam>(dtype, scale, 1, options);
      for (size_t i = 0; i < moved.size(); ++i) {
        // Scaled random numbers are rounded anew, factors at every step: 1e2 u.
        EXPECT_LT(relative_difference(moved[i], expected[i], frobenius(expected[i])),
                  dtype == torch::kDouble ? 1e-12 : 1e-4)
            << scale;
      }
    }
  }
}

TYPED_TEST(Robustness, ManyZeroGradientsThenALargeOneGiveABoundedStep) {
  for (const double eps : {0.0, 1e-8}) {
    for (const auto dtype : {torch::kFloat, torch::kDouble}) {
      torch::manual_seed(53);
      auto a = torch::randn({4, 12}).to(dtype).requires_grad_();
      auto b = torch::randn({10, 4}).to(dtype).requires_grad_();
      const auto start_a = a.detach().clone(), start_b = b.detach().clone();
      LoraRite<TypeParam> optimizer({FactorPair{"pair", a, b}}, LoraRiteOptions(0.01).eps(eps));
      for (int step = 0; step < 40; ++step) {
        a.mutable_grad() = torch::zeros_like(a);
        b.mutable_grad() = torch::zeros_like(b);
        optimizer.step();
      }
      EXPECT_TRUE(torch::equal(a, start_a) && torch::equal(b, start_b)) << "moved by nothing";
      for (int step = 0; step < 3; ++step) {
        a.mutable_grad() = 1e6 * torch::randn_like(a).detach();
        b.mutable_grad() = 1e6 * torch::randn_like(b).detach();
        optimizer.step();
      }
      for (const auto& moved : {a.detach() - start_a, b.detach() - start_b}) {
        EXPECT_TRUE(all_finite(moved));
        EXPECT_GT(frobenius(moved), 1e-3);
        EXPECT_LT(frobenius(moved), 5);
      }
    }
  }
}

TYPED_TEST(Robustness, RepeatedSingularValuesAgreeWithTheOracle) {
  // Orthonormal factors, orthogonal gradients, all singular values equal: every eigenproblem of the
  // first step is degenerate.
  const auto eye = torch::eye(9, torch::kDouble);
  Duel<TypeParam> duel(eye.slice(0, 0, 3).clone(), eye.slice(0, 0, 8).slice(1, 0, 3).clone(),
                       LoraRiteOptions(0.01).eps(1e-6));
  for (int step = 0; step < 10; ++step) {
    const auto a = eye.slice(0, step % 4, step % 4 + 3), b = eye.slice(0, 0, 8).slice(1, 2, 5);
    duel.step(step % 2 == 0 ? a : 2 * a, b);
    ASSERT_LT(duel.disagreement(), 1e-9) << step;
  }
  EXPECT_GT(relative_difference(duel.a, eye.slice(0, 0, 3), 1), 1e-2);
}

TYPED_TEST(Robustness, RankDeficientGradientsMoveOnlyWhatTheySee) {
  for (const auto dtype : {torch::kFloat, torch::kDouble}) {
    torch::manual_seed(57);
    auto a = torch::randn({4, 12}).to(dtype).requires_grad_();
    auto b = torch::randn({10, 4}).to(dtype).requires_grad_();
    const auto start = product(a, b);
    LoraRite<TypeParam> optimizer({FactorPair{"pair", a, b}}, LoraRiteOptions(0.01).eps(1e-6));
    // ∇W of rank one, always the same; each step moves ΔW by about η in each factor's direction.
    const auto left = torch::randn({10, 1}).to(dtype), right = torch::randn({1, 12}).to(dtype);
    for (int step = 1; step <= 20; ++step) {
      const auto grad_w = left.matmul(right);
      const auto gradient_a = b.detach().t().matmul(grad_w);
      const auto gradient_b = grad_w.matmul(a.detach().t());
      a.mutable_grad() = gradient_a;
      b.mutable_grad() = gradient_b;
      optimizer.step();
      ASSERT_TRUE(all_finite(a) && all_finite(b)) << step;
      const double moved = frobenius(product(a, b) - start);
      // M has rank one and at most RMS 1: ‖dΔW‖ ≤ η (√(12·4) + √(10·4)) + O(η²).
      EXPECT_LT(moved, 1.2 * step * 0.01 * (std::sqrt(48.0) + std::sqrt(40.0)));
      EXPECT_GT(moved, 1e-3 * step);
    }
  }
}

TYPED_TEST(Robustness, RankDeficientFactorsAreInvariantUnderRotations) {
  // A's third row is a combination of the others. A Moore-Penrose inverse keeps every movement of B in
  // A's row space, so a rotation of the factors rotates the movement.
  const auto run = [](bool rotate) {
    torch::manual_seed(61);
    auto a = torch::randn({3, 9}, torch::kDouble), b = torch::randn({8, 3}, torch::kDouble);
    a[2].copy_(a[0] - 0.5 * a[1]);
    const auto target = torch::randn({8, 9}, torch::kDouble);
    const auto q = orthonormal_columns(3, 3);
    if (rotate) a = q.matmul(a), b = b.matmul(q.t());
    a.requires_grad_();
    b.requires_grad_();
    const auto start = product(a, b);
    LoraRite<TypeParam> optimizer({FactorPair{"pair", a, b}}, LoraRiteOptions(0.02).eps(1e-4));
    std::vector<torch::Tensor> movements;
    for (int step = 0; step < 10; ++step) {
      optimizer.zero_grad();
      (b.matmul(a) - target).square().sum().backward();
      optimizer.step();
      movements.push_back(product(a, b) - start);
    }
    return movements;
  };
  const auto expected = run(false), actual = run(true);
  const double movement = frobenius(expected.back());
  ASSERT_GT(movement, 0.1);
  for (size_t step = 0; step < actual.size(); ++step) {
    // Round-off of the null direction, 1e-16 relative to the rest, is amplified by 1/ε at most.
    EXPECT_LT(relative_difference(actual[step], expected[step], movement), 1e-10) << step;
  }
}

TYPED_TEST(Robustness, ZeroFactorsStayZeroWithoutNaNAndLiveOnceOneIsSet) {
  for (const double eps : {0.0, 1e-8}) {
    torch::manual_seed(59);
    auto a = torch::zeros({3, 9}).requires_grad_(), b = torch::zeros({8, 3}).requires_grad_();
    LoraRite<TypeParam> optimizer({FactorPair{"pair", a, b}}, LoraRiteOptions(0.01).eps(eps));
    const auto step = [&] {
      a.mutable_grad() = torch::randn({3, 9});
      b.mutable_grad() = torch::randn({8, 3});
      optimizer.step();
    };
    for (int i = 0; i < 3; ++i) step();
    // R⁺ = 0 on both sides: a saddle that no optimizer of factors leaves.
    EXPECT_EQ(frobenius(a) + frobenius(b), 0);
    {
      torch::NoGradGuard no_grad;
      a.normal_();
    }
    for (int i = 0; i < 3; ++i) step();
    EXPECT_TRUE(all_finite(a) && all_finite(b));
    EXPECT_GT(frobenius(b), 1e-3);
  }
}

}  // namespace
}  // namespace lora_rite::test
