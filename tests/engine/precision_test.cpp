// Floats take the place of doubles in the host engine's products where they are exact enough (precision.hpp). Here is
// how exact: beside the same training in double, and between factorisations of the same ΔW.
//
// Bounds are some three times what was found before any product was in float. Without the guards what they are for is
// wrong by four times to 10²⁶ times as much.

#include "lora_rite/engine/host/precision.hpp"

#include <gtest/gtest.h>
#include <lora_rite/lora_rite.hpp>

#include <algorithm>
#include <cmath>
#include <ostream>
#include <sstream>
#include <string>
#include <vector>

namespace lora_rite::test {
namespace {

using torch::Tensor;

Tensor random(int64_t rows, int64_t columns) { return torch::randn({rows, columns}, torch::kDouble); }

Tensor rotation(int64_t rank) { return std::get<0>(torch::linalg_qr(random(rank, rank))); }

/// A matrix [rank, rank] whose singular values lie evenly, in logarithms, between condition^{±1/2}.
Tensor conditioned(int64_t rank, double condition) {
  const double half = std::log10(condition) / 2;
  return rotation(rank).matmul(torch::logspace(-half, half, rank, 10.0, torch::kDouble).diag()).matmul(rotation(rank));
}

/// Least squares: BA shall become W [out, in]. The gradients are exact but for their rounding to the factors' dtype.
struct Problem {
  Tensor target, a, b;
  double rate = 1e-2;
  int steps = 30;

  static Problem of(int64_t out, int64_t in, int64_t rank) {
    torch::manual_seed(1);
    return {random(out, in) / std::sqrt(static_cast<double>(in)), random(rank, in) / std::sqrt(static_cast<double>(in)),
            random(out, rank) / std::sqrt(static_cast<double>(rank))};
  }

  /// ΔW after each step.
  std::vector<Tensor> train(torch::ScalarType dtype, Engine engine, const Tensor& transformation,
                            std::vector<PairDiagnostics>* diagnostics = nullptr) const {
    Tensor own_a = transformation.matmul(a).to(dtype).requires_grad_();
    Tensor own_b = b.matmul(transformation.inverse()).to(dtype).requires_grad_();
    LoraRite<> optimizer(std::vector<Tensor>{own_a, own_b}, LoraRiteOptions(rate).engine(engine));
    std::vector<Tensor> trajectory;
    for (int step = 0; step < steps; ++step) {
      const Tensor wide_a = own_a.detach().to(torch::kDouble), wide_b = own_b.detach().to(torch::kDouble);
      const Tensor residual = wide_b.matmul(wide_a) - target;
      own_a.mutable_grad() = wide_b.t().matmul(residual).to(dtype);
      own_b.mutable_grad() = residual.matmul(wide_a.t()).to(dtype);
      optimizer.step();
      trajectory.push_back(own_b.detach().to(torch::kDouble).matmul(own_a.detach().to(torch::kDouble)));
    }
    if (diagnostics != nullptr) *diagnostics = optimizer.diagnostics();
    return trajectory;
  }
  std::vector<Tensor> train(torch::ScalarType dtype, Engine engine) const {
    return train(dtype, engine, torch::eye(a.size(0), torch::kDouble));
  }

  /// How far two runs are apart in the end, as a share of the way from the start.
  double distance(const std::vector<Tensor>& one, const std::vector<Tensor>& other) const {
    return (one.back() - other.back()).norm().item<double>() / (other.back() - b.matmul(a)).norm().item<double>();
  }
};

struct BesideDouble {
  const char* name;
  Problem (*make)();
  double bound;
};
std::ostream& operator<<(std::ostream& out, const BesideDouble& one) { return out << one.name; }

Problem plain() { return Problem::of(256, 192, 16); }
Problem from_zero(double rate) {
  Problem problem = plain();
  problem.b.zero_();
  problem.rate = rate;
  return problem;
}
/// Factors of this condition number, in coordinates of their own that are no better.
Problem ill_conditioned(double condition) {
  Problem problem = plain();
  const Tensor t = conditioned(16, condition);
  problem.b = problem.b.matmul(t);
  return problem;
}
Problem short_side() { return Problem::of(8, 384, 16); }
Problem gradients_of_rank_2() {
  Problem problem = plain();
  problem.target = problem.b.matmul(problem.a) + random(256, 2).matmul(random(2, 192)) / 20;
  return problem;
}
Problem graded() {
  Problem problem = Problem::of(512, 384, 64);
  problem.steps = 12;
  problem.target = torch::zeros_like(problem.target);
  for (int i = 0; i < 64; ++i) problem.target += std::pow(0.8, i) * random(512, 1).matmul(random(1, 384)) / 20;
  return problem;
}

class PrecisionBesideDouble : public testing::TestWithParam<BesideDouble> {};

TEST_P(PrecisionBesideDouble, FloatsStayAsNearAsTheirRoundOff) {
  const Problem problem = GetParam().make();
  const auto exact = problem.train(torch::kDouble, Engine::Device);
  const double host = problem.distance(problem.train(torch::kFloat, Engine::Host), exact);
  EXPECT_LT(host, GetParam().bound);
}

INSTANTIATE_TEST_SUITE_P(, PrecisionBesideDouble,
                         testing::Values(BesideDouble{"plain", plain, 5e-7},
                                         BesideDouble{"from_zero_slow", [] { return from_zero(1e-3); }, 6e-7},
                                         BesideDouble{"from_zero_fast", [] { return from_zero(1e-2); }, 6e-7},
                                         BesideDouble{"condition_1e2", [] { return ill_conditioned(1e2); }, 5e-6},
                                         BesideDouble{"condition_1e3", [] { return ill_conditioned(1e3); }, 1.5e-4},
                                         BesideDouble{"condition_1e4", [] { return ill_conditioned(1e4); }, 7e-3},
                                         BesideDouble{"rank_above_a_side", short_side, 3e-7},
                                         BesideDouble{"gradients_of_rank_2", gradients_of_rank_2, 4e-3},
                                         BesideDouble{"graded", graded, 3e-6}),
                         [](const auto& test) { return std::string(test.param.name); });

struct Factorisation {
  int64_t rank;
  double condition, bound;
};
std::ostream& operator<<(std::ostream& out, const Factorisation& one) {
  return out << "rank " << one.rank << ", condition " << one.condition;
}

class PrecisionOfInvariance : public testing::TestWithParam<Factorisation> {};

TEST_P(PrecisionOfInvariance, AnyFactorisationGivesTheSameStepsToTheRoundOffOfItsStart) {
  const auto [rank, condition, bound] = GetParam();
  Problem problem = Problem::of(40, 30, rank);
  problem.steps = 20;
  const auto one = problem.train(torch::kFloat, Engine::Host);
  const auto other = problem.train(torch::kFloat, Engine::Host, conditioned(rank, condition));
  EXPECT_LT(problem.distance(other, one), bound);
}

std::vector<Factorisation> factorisations() {
  std::vector<Factorisation> result;
  for (const int64_t rank : {4, 8, 16})
    for (const auto& [condition, bound] : {std::pair(1.0, 1e-6), {1e2, 4e-6}, {1e3, 6e-5}, {1e4, 5e-4}, {1e6, 5e-2}})
      result.push_back({rank, condition, bound});
  return result;
}

INSTANTIATE_TEST_SUITE_P(, PrecisionOfInvariance, testing::ValuesIn(factorisations()));

TEST(Precision, DiagnosticsCountTheStepsInDouble) {
  std::vector<PairDiagnostics> easy, hard;
  Problem problem = plain();
  problem.train(torch::kFloat, Engine::Host, torch::eye(16, torch::kDouble), &easy);
  problem.train(torch::kFloat, Engine::Host, conditioned(16, 1e5), &hard);
  for (const Side side : kSides) {
    const DoubleSteps &of_easy = side == Side::A ? easy[0].a.in_double : easy[0].b.in_double,
                      &of_hard = side == Side::A ? hard[0].a.in_double : hard[0].b.in_double;
    EXPECT_EQ(of_easy.momentum_map, 0);
    EXPECT_EQ(of_easy.gradient_map, 0);
    EXPECT_LE(of_easy.cross_product, 2);  // the first steps are long
    EXPECT_EQ(of_hard.gradient_map, problem.steps);
    EXPECT_GT(of_hard.cross_product, 0);
  }
  problem.train(torch::kFloat, Engine::Device, torch::eye(16, torch::kDouble), &hard);
  EXPECT_EQ(hard[0].a.in_double.gradient_map, 0);
}

// The first step from B = 0 is all of B. Where the gradient has fewer directions than the rank, of unequal size, what
// the step rounds must stay below what the rule takes for round-off of B: else A's next step is thousands of times too
// long. A first step at rate 0, as warm-ups begin, writes N alone, from which the second makes B.
class PrecisionFromZero : public testing::TestWithParam<double> {};

TEST_P(PrecisionFromZero, AGradientOfLowRankMovesNoFactorFartherThanInDouble) {
  constexpr int64_t rank = 8, directions = 4, out = 50, in = 60;
  for (int seed = 0; seed < 10; ++seed) {
    torch::manual_seed(seed);
    const Tensor u = std::get<0>(at::linalg_qr(torch::randn({out, directions}, torch::kDouble)));
    const Tensor v = std::get<0>(at::linalg_qr(torch::randn({in, directions}, torch::kDouble)));
    const Tensor sizes = at::logspace(0, -2.5, directions, 10.0, torch::kDouble);
    const Tensor gradient = (u * sizes).matmul(v.t());
    const Tensor start = (torch::randn({rank, in}, torch::kDouble) / std::sqrt(double{in})).to(torch::kFloat);
    const auto relative_change_of_a = [&](torch::Dtype dtype, Engine engine) {
      const Tensor a = start.to(dtype, /*non_blocking=*/false, /*copy=*/true).requires_grad_();
      const Tensor b = torch::zeros({out, rank}, dtype).requires_grad_();
      LoraRite<> optimizer({{"pair", a, b}}, LoraRiteOptions(1e-2).engine(engine));
      Tensor before;
      for (int step = 0; step < (GetParam() == 0 ? 3 : 2); ++step) {
        optimizer.param_groups()[0].options().set_lr(step == 0 ? GetParam() : 1e-2);
        before = a.detach().to(torch::kDouble, /*non_blocking=*/false, /*copy=*/true);
        a.mutable_grad() = b.detach().to(torch::kDouble).t().matmul(gradient).to(dtype);
        b.mutable_grad() = gradient.matmul(before.t()).to(dtype);
        optimizer.step();
      }
      return ((a.detach().to(torch::kDouble) - before).norm() / before.norm()).item<double>();
    };
    EXPECT_LT(relative_change_of_a(torch::kFloat, Engine::Host),
              1.5 * relative_change_of_a(torch::kDouble, Engine::Device))
        << "seed " << seed;
  }
}

INSTANTIATE_TEST_SUITE_P(FirstRate, PrecisionFromZero, testing::Values(1e-2, 0.0));

// From B = 0 the first steps turn B's basis over, and XᵀN is in double; later ones do not.
TEST(Precision, AResumedRunChoosesAsTheRunThatWentOn) {
  const Problem problem = from_zero(1e-2);
  const auto factors_of = [&] {
    return std::vector<Tensor>{problem.a.to(torch::kFloat).requires_grad_(),
                               problem.b.to(torch::kFloat).requires_grad_()};
  };
  const auto step = [&](LoraRite<>& optimizer, const std::vector<Tensor>& factors) {
    const Tensor a = factors[0].detach(), b = factors[1].detach();
    const Tensor residual = b.matmul(a) - problem.target.to(torch::kFloat);
    factors[0].mutable_grad() = b.t().matmul(residual);
    factors[1].mutable_grad() = residual.matmul(a.t());
    optimizer.step();
  };
  const std::vector<Tensor> factors = factors_of();
  LoraRite<> optimizer(factors, LoraRiteOptions(problem.rate).engine(Engine::Host));
  std::vector<int64_t> in_double;
  for (int begin = 1; begin <= 12; ++begin) {
    step(optimizer, factors);
    in_double.push_back(optimizer.diagnostics()[0].b.in_double.cross_product);

    const std::vector<Tensor> resumed_factors = factors_of();
    LoraRite<> resumed(resumed_factors, LoraRiteOptions(problem.rate).engine(Engine::Host));
    std::stringstream file;
    torch::save(optimizer, file);
    torch::load(resumed, file);
    {
      torch::NoGradGuard no_grad;
      for (size_t i = 0; i < 2; ++i) resumed_factors[i].copy_(factors[i]);
    }
    // The run itself goes on: what it leaves after one more step is what the resumed one leaves.
    step(resumed, resumed_factors);
    const std::vector<Tensor> next = {resumed_factors[0].detach().clone(), resumed_factors[1].detach().clone()};
    step(optimizer, factors);
    in_double.push_back(optimizer.diagnostics()[0].b.in_double.cross_product);
    EXPECT_TRUE(torch::equal(factors[0].detach(), next[0]) && torch::equal(factors[1].detach(), next[1]))
        << "after step " << 2 * begin;
  }
  EXPECT_GT(in_double.front() + in_double[1] + in_double[2], 0) << "nothing was in double";
  EXPECT_EQ(in_double[in_double.size() - 2], in_double.back()) << "everything was in double";
}

// Balancing moves both factors, and what XᵀN is summed in depends on both.
TEST(Precision, AResumedRunThatBalancesChoosesAsTheRunThatWentOn) {
  constexpr int64_t rank = 16;
  for (const double size_of_b : {1e-2, 1e-1}) {
    for (const double rate : {1e-3, 3e-3, 1e-2, 3e-2}) {
      torch::manual_seed(5);
      const Tensor a = torch::randn({rank, 80}), b = size_of_b * torch::randn({60, rank});
      const auto start = [&] { return std::vector<Tensor>{a.clone().requires_grad_(), b.clone().requires_grad_()}; };
      const auto options = LoraRiteOptions(rate).engine(Engine::Host).balance(true);
      const std::vector<Tensor> factors = start();
      LoraRite<> optimizer(factors, options);
      for (int step = 0; step < 6; ++step) {
        const std::vector<Tensor> resumed_factors = start();
        LoraRite<> resumed(resumed_factors, options);
        std::stringstream file;
        torch::save(optimizer, file);
        torch::load(resumed, file);
        for (size_t i = 0; i < 2; ++i) {
          resumed_factors[i].detach().copy_(factors[i].detach());
          resumed_factors[i].mutable_grad() = factors[i].mutable_grad() = torch::randn_like(factors[i]);
        }
        resumed.step();
        optimizer.step();
        for (size_t i = 0; i < 2; ++i)
          EXPECT_TRUE(torch::equal(factors[i], resumed_factors[i]))
              << "factor " << i << ", B " << size_of_b << ", rate " << rate << ", step " << step;
      }
    }
  }
}

}  // namespace
}  // namespace lora_rite::test
