// Gradients of a rank below r: what rounding leaves in the directions that the gradient has not must not become a step
// of full length.

#include <gtest/gtest.h>
#include <lora_rite/lora_rite.hpp>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "support/pairs.hpp"

namespace lora_rite::test {
namespace {

torch::Tensor wide(const torch::Tensor& tensor) { return tensor.detach().to(torch::kDouble); }

/// From B = 0, where the first step moves B alone, by a gradient of rank k: the share of the step outside of the
/// gradient's column space. `later`: of a second step, by the gradient times 1e-6, beside which V is large.
double share_outside(torch::ScalarType dtype, int64_t rank, int64_t k, const LoraRiteOptions& options,
                     int64_t out = 192, bool later = false) {
  torch::manual_seed(81);
  const int64_t in = 256;
  const torch::Tensor a = torch::randn({rank, in}, torch::kDouble).to(dtype).requires_grad_();
  const torch::Tensor b = torch::zeros({out, rank}, dtype).requires_grad_();
  const torch::Tensor left = torch::randn({out, k}, torch::kDouble), right = torch::randn({k, in}, torch::kDouble);
  torch::Tensor(a).mutable_grad() = torch::zeros_like(a);
  torch::Tensor(b).mutable_grad() = left.matmul(right).matmul(wide(a).t()).to(dtype);
  LoraRite<> optimizer({FactorPair{"pair", a, b}}, options);
  optimizer.step();
  torch::Tensor start = torch::zeros_like(wide(b));
  if (later) {
    start = wide(b).clone();
    torch::Tensor(b).mutable_grad().mul_(1e-6);
    optimizer.step();
  }
  const torch::Tensor basis = std::get<0>(torch::linalg_qr(left)), step = wide(b) - start;
  EXPECT_GT(step.norm().item<double>(), 0.1 * options.lr() * std::sqrt(static_cast<double>(k)));
  return ((step - basis.matmul(basis.t().matmul(step))).norm() / step.norm()).item<double>();
}

TEST(RoundOff, OfALowRankGradientMovesNothing) {
  struct Row {
    torch::ScalarType dtype;
    double stored;  ///< the step's own rounding where it is stored, from which nothing can be kept
  };
  for (const auto& [dtype, stored] : {Row{torch::kDouble, 1e-8}, Row{torch::kFloat, 0x1p-23},
                                      Row{torch::kHalf, 0x1p-10}, Row{torch::kBFloat16, 0x1p-7}})
    for (const Engine engine : {Engine::Automatic, Engine::Device})
      for (const int64_t rank : {4, 16, 64})
        for (const int64_t k : {int64_t{1}, int64_t{2}, rank - 1})
          EXPECT_LT(share_outside(dtype, rank, k, LoraRiteOptions(1e-2).engine(engine)), 2 * stored)
              << dtype << ", rank " << rank << ", gradient of rank " << k;
}

/// Sums over many rows leave more in double than rounding left in the gradient, and so does a gradient that was far
/// larger before.
TEST(RoundOff, OfALowRankGradientMovesNothingWithManyRowsAndAfterALargeGradient) {
  for (const Engine engine : {Engine::Automatic, Engine::Device})
    for (const int64_t rank : {4, 16})
      for (const int64_t k : {int64_t{1}, int64_t{2}, rank - 1})
        for (const int64_t out : {192, 16384, 65536})
          for (const bool later : {false, true})
            EXPECT_LT(share_outside(torch::kFloat, rank, k, LoraRiteOptions(1e-2).engine(engine), out, later), 4e-7)
                << "rank " << rank << ", gradient of rank " << k << ", out = " << out << ", later " << later;
}

/// Without eigenvectors noise is damped, not taken out: some hundredths at r = 64.
TEST(RoundOff, OfALowRankGradientMovesLittleInACapturableStep) {
  for (const auto dtype : {torch::kFloat, torch::kHalf, torch::kBFloat16})
    for (const int64_t rank : {4, 16, 64})
      for (const int64_t k : {int64_t{1}, int64_t{2}, rank - 1})
        EXPECT_LT(share_outside(dtype, rank, k, LoraRiteOptions(1e-2).capturable(true)), rank < 64 ? 0.02 : 0.07)
            << dtype << ", rank " << rank << ", gradient of rank " << k;
}

/// Eight factors are decided together on the Host engine. What one of them has must not change a bit of the others.
TEST(RoundOff, OfOnePairChangesNoBitOfItsNeighbours) {
  const auto options = LoraRiteOptions(1e-2).clip_unmagnified_norm(0);  // which is over all pairs
  torch::manual_seed(84);
  const std::vector<FactorPair> both = {random_pair("of low rank", 4, 240, 256, torch::kFloat),
                                        random_pair("of full rank", 4, 240, 256, torch::kFloat)};
  const std::vector<FactorPair> alone = clone_pairs({both[1]});
  const torch::Tensor direction = torch::randn({1, 4});
  LoraRite<> beside(both, options), by_itself(alone, options);
  for (uint64_t step = 0; step < 20; ++step) {
    set_gradients(both, 90 + step);
    torch::Tensor full_rank = both[1].b.grad();
    full_rank.select(1, 3).mul_(5e-3);  // one direction is faint, and far above round-off
    torch::Tensor(both[0].b).mutable_grad() = torch::randn({256, 1}).matmul(direction);
    torch::Tensor(both[0].a).mutable_grad() = torch::Tensor();  // so that the basis stays, and V has rank 1
    for (const Side side : kSides)
      torch::Tensor(alone[0].factor(side)).mutable_grad() = both[1].factor(side).grad().clone();
    beside.step();
    by_itself.step();
    for (const Side side : kSides)
      ASSERT_TRUE(torch::equal(both[1].factor(side), alone[0].factor(side))) << "step " << step;
  }
}

/// How far two factorisations of one start end apart, relative to the way, after 20 steps of least squares on k
/// samples.
double difference(int64_t k, torch::ScalarType dtype, int64_t rank, double condition, bool from_zero, uint64_t seed) {
  torch::manual_seed(seed);
  const int64_t in = 24, out = 20;
  const auto normal = [](int64_t rows, int64_t columns) { return torch::randn({rows, columns}, torch::kDouble); };
  const auto rotation = [&] { return std::get<0>(torch::linalg_qr(normal(rank, rank))); };
  const torch::Tensor x = normal(k, in).to(dtype), y = normal(k, out).to(dtype);
  const torch::Tensor a = normal(rank, in) / 5,
                      b = from_zero ? torch::zeros({out, rank}, torch::kDouble) : 0.3 * normal(out, rank);
  const double half = std::log10(condition) / 2;
  const torch::Tensor t =
      rotation().matmul(torch::logspace(-half, half, rank, 10.0, torch::kDouble).diag()).matmul(rotation());
  const auto run = [&](const torch::Tensor& start_a, const torch::Tensor& start_b) {
    const FactorPair pair = {"pair", start_a.to(dtype).clone().requires_grad_(),
                             start_b.to(dtype).clone().requires_grad_()};
    const torch::Tensor start = wide(pair.b).matmul(wide(pair.a));
    LoraRite<> optimizer({pair}, LoraRiteOptions(1e-2));
    for (int step = 0; step < 20; ++step) {
      optimizer.zero_grad();
      (x.matmul(pair.a.t()).matmul(pair.b.t()) - y).square().mean().backward();
      optimizer.step();
    }
    const torch::Tensor end = wide(pair.b).matmul(wide(pair.a));
    return std::make_pair(end, (end - start).norm().item<double>());
  };
  const auto [first, way] = run(a, b);
  const auto [second, other_way] = run(t.matmul(a), b.matmul(torch::linalg_inv(t)));
  EXPECT_GT(way, 0.1);
  return ((first - second).norm() / way).item<double>();
}

/// As for gradients of full rank (invariance_test.cpp): 50 u (κ(T) + 100).
TEST(RoundOff, LeavesFewSamplesInvariantInFloat) {
  for (const double condition : {1.0, 1e2})
    for (const int64_t k : {1, 2, 3, 100})
      for (const uint64_t seed : {5, 6, 7, 8})
        EXPECT_LT(difference(k, torch::kFloat, 4, condition, false, seed),
                  50 * 0x1p-24 * (condition + 100) * (k == 1 ? 3 : 1))
            << k << " samples, κ(T) " << condition << ", seed " << seed;
}

/// From B = 0 a step by a gradient of low rank leaves B of low rank, whose pseudo-inverse depends on the factorisation:
/// that is the rule's own, and doubles show it as well. Rounding adds nothing to speak of. In the median, for where a
/// direction of B passes through zero, a last bit decides what it becomes.
TEST(RoundOff, AddsNothingToWhatTheRuleItselfDoesFromZero) {
  for (const double condition : {1.0, 1e2}) {
    for (const int64_t k : {1, 2, 3, 100}) {
      std::vector<double> excess;
      for (uint64_t seed = 5; seed < 12; ++seed)
        excess.push_back(difference(k, torch::kFloat, 4, condition, true, seed) -
                         1.2 * difference(k, torch::kDouble, 4, condition, true, seed));
      std::sort(excess.begin(), excess.end());
      EXPECT_LT(excess[3], 3e-5) << k << " samples, κ(T) " << condition;
      EXPECT_LT(excess[5], 1e-2) << "all but one; " << k << " samples, κ(T) " << condition;
    }
  }
}

/// Columns of very different sizes are each known to a float's precision, also after many steps.
TEST(RoundOff, LeavesColumnsOfVeryDifferentSizesAlone) {
  for (const int64_t rank : {4, 16}) {
    torch::manual_seed(83);
    const torch::Tensor target = torch::randn({40, 50}), a = torch::randn({rank, 50}) / 7,
                        b = 0.3 * torch::randn({40, rank});
    const torch::Tensor t = torch::pow(2.0, torch::linspace(-10, 10, rank).round());
    const auto run = [&](const torch::Tensor& start_a, const torch::Tensor& start_b) {
      const FactorPair pair = {"pair", start_a.clone().requires_grad_(), start_b.clone().requires_grad_()};
      LoraRite<> optimizer({pair}, LoraRiteOptions(1e-3));
      for (int step = 0; step < 150; ++step) {
        optimizer.zero_grad();
        (pair.b.matmul(pair.a) - target).square().mean().backward();
        optimizer.step();
      }
      return wide(pair.b).matmul(wide(pair.a));
    };
    const torch::Tensor start = wide(b).matmul(wide(a)), first = run(a, b);
    const torch::Tensor second = run(t.unsqueeze(1) * a, b / t);  // κ(T) = 1e6
    EXPECT_LT(((first - second).norm() / (first - start).norm()).item<double>(), 1e-3) << "rank " << rank;
  }
}

/// A direction that is small, but more than round-off, keeps its full share.
TEST(RoundOff, FaintDirectionsThatAreNoRoundOffMove) {
  for (const auto& [dtype, faint] : {std::pair(torch::kFloat, 1e-4), std::pair(torch::kBFloat16, 0.1)}) {
    torch::manual_seed(82);
    const int64_t rank = 4, in = 64, out = 48;
    const torch::Tensor a = std::get<0>(torch::linalg_qr(torch::randn({in, rank}, torch::kDouble))).t().contiguous();
    const torch::Tensor left = std::get<0>(torch::linalg_qr(torch::randn({out, rank}, torch::kDouble)));
    const torch::Tensor sizes = torch::tensor({1.0, 1.0, 1.0, faint}, torch::kDouble);
    const FactorPair pair = {"pair", a.to(dtype).requires_grad_(), torch::zeros({out, rank}, dtype).requires_grad_()};
    torch::Tensor(pair.a).mutable_grad() = torch::zeros_like(pair.a);
    torch::Tensor(pair.b).mutable_grad() = (left * sizes).to(dtype);
    LoraRite<> optimizer({pair}, LoraRiteOptions(1e-2));
    optimizer.step();
    const torch::Tensor moved = left.t().matmul(wide(pair.b)).diagonal().abs();
    EXPECT_GT((moved[3] / moved[0]).item<double>(), 0.9) << dtype;
  }
}

}  // namespace
}  // namespace lora_rite::test
