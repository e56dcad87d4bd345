// LoraRite<PolarBasis> and LoraRite<QrBasis> against the naive oracle. One table of cases (shapes,
// ranks, starts) and one of settings (options) drive everything.
//
// Tolerance. With unit round-off u a step is wrong by about u ‖X‖, for the factor itself is rounded, and
// by u κ of what it moved, κ = κ(R) κ((V + ρI)^{1/2} + εI): R⁺ amplifies by the first, the preconditioner
// by the second. The oracle reports the largest κ it met, and over the steps the errors of a smooth map
// add up:
//
//   ‖X − X_oracle‖ ≤ 32 · steps · u · (‖X‖ + κ · movement)
//
// That is 1e-13 to 1e-10 of the movement for double factors with κ from 1e1 to 1e4. `ceiling` keeps an
// ill-conditioned case from becoming a test that nothing fails.

#include "support/duel.hpp"

#include <gtest/gtest.h>
#include <lora_rite/lora_rite.hpp>

#include <string>
#include <tuple>
#include <vector>

namespace lora_rite::test {
namespace {

constexpr int kSteps = 30;

double unit_round_off(torch::ScalarType dtype) { return dtype == torch::kDouble ? 0x1p-53 : 0x1p-24; }

/// Bound on ‖X − X_oracle‖ / movement, whatever κ is.
double ceiling(torch::ScalarType dtype) { return dtype == torch::kDouble ? 1e-6 : 1e-2; }

struct PairSpec {
  int64_t out, in, rank;
  size_t group = 0;
};

enum class Start { Random, ZeroB, ZeroA, DeficientA, IllConditioned };
enum class Gradients { Loss, Random };
enum class Layout { Contiguous, Strided };

struct Case {
  const char* name;
  std::vector<PairSpec> pairs;
  Start start = Start::Random;
  Gradients gradients = Gradients::Loss;
  bool some_missing = false;
  Layout layout = Layout::Contiguous;
};

const std::vector<Case>& cases() {
  static const std::vector<Case> table = {
      {"rank1_wide", {{5, 9, 1}}},
      {"rank2_tall", {{12, 5, 2}}},
      {"rank4_square", {{8, 8, 4}}},
      {"rank8_wide", {{16, 24, 8}}},
      {"rank16_tall", {{40, 24, 16}}, Start::Random, Gradients::Random},
      {"rank64", {{96, 80, 64}}, Start::Random, Gradients::Random},
      {"rank_is_both_sides", {{4, 4, 4}}, Start::Random, Gradients::Random},
      {"rank_is_out", {{4, 9, 4}}},
      {"rank_above_out", {{3, 8, 5}}},
      {"rank_above_in", {{9, 4, 6}}},
      {"rank_above_one", {{3, 7, 6}}},
      {"one_by_one", {{1, 1, 1}}, Start::Random, Gradients::Random},
      {"equal_pairs", {{8, 6, 3}, {8, 6, 3}, {8, 6, 3}}},
      {"mixed_pairs", {{8, 6, 3}, {5, 9, 2}, {8, 6, 3}, {6, 8, 3}}, Start::Random, Gradients::Random},
      {"two_groups", {{8, 6, 3, 0}, {5, 9, 2, 0}, {8, 6, 3, 1}, {7, 7, 4, 1}}},
      {"zero_b", {{8, 6, 3}, {9, 7, 2}}, Start::ZeroB},
      {"zero_b_rank16", {{32, 24, 16}}, Start::ZeroB, Gradients::Random},
      {"zero_a", {{8, 6, 3}}, Start::ZeroA},
      {"deficient_a", {{8, 9, 3}}, Start::DeficientA},
      {"ill_conditioned", {{8, 9, 4}}, Start::IllConditioned, Gradients::Random},
      {"missing_gradients", {{8, 6, 3}, {8, 6, 3}, {5, 9, 2}}, Start::Random, Gradients::Random, true},
      {"missing_gradients_of_a_loss", {{8, 6, 3, 0}, {8, 6, 3, 1}}, Start::Random, Gradients::Loss, true},
      {"strided_views", {{8, 6, 3}, {8, 6, 3}}, Start::Random, Gradients::Random, false, Layout::Strided},
  };
  return table;
}

struct Setting {
  const char* name;
  void (*change)(LoraRiteOptions&);
};

/// Each option alone, then some together.
const std::vector<Setting>& settings() {
  static const std::vector<Setting> table = {
      {"defaults", [](LoraRiteOptions&) {}},
      {"no_escape", [](LoraRiteOptions& o) { o.escape(false); }},
      {"no_clip", [](LoraRiteOptions& o) { o.clip_unmagnified_norm(0); }},
      {"betas",
       [](LoraRiteOptions& o) {
         o.betas({0.5, 0.8});
       }},
      {"no_momentum",
       [](LoraRiteOptions& o) {
         o.betas({0.0, 0.0}).eps(0.01);
       }},
      {"eps", [](LoraRiteOptions& o) { o.eps(0.01); }},
      {"eps_root", [](LoraRiteOptions& o) { o.eps_root(1e-4); }},
      {"preconditioner_exponent", [](LoraRiteOptions& o) { o.preconditioner_exponent(0.25); }},
      {"no_preconditioner", [](LoraRiteOptions& o) { o.preconditioner_exponent(0).eps(0.01).eps_root(1e-4); }},
      {"rows_and_exponent",
       [](LoraRiteOptions& o) { o.row_equilibration(true).preconditioner_exponent(0.375).max_relative_change(0.1); }},
      {"weight_decay", [](LoraRiteOptions& o) { o.weight_decay(0.5); }},
      {"max_update_rms", [](LoraRiteOptions& o) { o.max_update_rms(0.3); }},
      {"max_relative_change", [](LoraRiteOptions& o) { o.max_relative_change(0.05); }},
      {"row_equilibration", [](LoraRiteOptions& o) { o.row_equilibration(true); }},
      {"row_equilibration_bounded",
       [](LoraRiteOptions& o) { o.row_equilibration(true).max_relative_change(0.1).clip_unmagnified_norm(0.5); }},
      {"lr_ratio_b", [](LoraRiteOptions& o) { o.lr_ratio_b(4); }},
      {"balance", [](LoraRiteOptions& o) { o.balance(true); }},
      {"maximize", [](LoraRiteOptions& o) { o.maximize(true); }},
      {"reference", [](LoraRiteOptions& o) { o = LoraRiteOptions::reference(o.lr()); }},
      {"together",
       [](LoraRiteOptions& o) {
         o.betas({0.8, 0.9}).weight_decay(0.3).max_update_rms(0.5).lr_ratio_b(2).maximize(true);
         o.clip_unmagnified_norm(3).eps(1e-4).eps_root(1e-3).max_relative_change(0.1);
       }},
      {"together_balanced",
       [](LoraRiteOptions& o) { o.balance(true).weight_decay(0.2).lr_ratio_b(3).max_update_rms(0.4).escape(false); }},
  };
  return table;
}

/// Options of each group. The second group differs from the first in as much as possible.
std::vector<LoraRiteOptions> group_options(const Case& test_case, const Setting& setting) {
  auto first = LoraRiteOptions(0.02).betas({0.9, 0.95});
  setting.change(first);
  std::vector<LoraRiteOptions> groups = {first};
  for (const auto& pair : test_case.pairs) {
    if (pair.group == 1 && groups.size() == 1) {
      auto second = first;
      second.lr(0.01).clip_unmagnified_norm(0.5).escape(!first.escape()).weight_decay(0.1);
      groups.push_back(second);
    }
  }
  return groups;
}

/// The factors of one pair and its loss ½‖weight ∘ (B A − target)‖².
struct Problem {
  torch::Tensor a, b;            ///< [r, in], [out, r]
  torch::Tensor weight, target;  ///< [out, in], double
  Matrix start_a, start_b;       ///< tall, as the optimizer got them

  Problem(const PairSpec& spec, const Case& test_case, torch::ScalarType dtype) {
    auto initial_a = torch::randn({spec.rank, spec.in}, torch::kDouble);
    auto initial_b = torch::randn({spec.out, spec.rank}, torch::kDouble);
    switch (test_case.start) {
      case Start::Random:
        break;
      case Start::ZeroB:
        initial_b.zero_();
        break;
      case Start::ZeroA:
        initial_a.zero_();
        break;
      case Start::DeficientA:
        initial_a[1].copy_(0.5 * initial_a[0] - 2 * initial_a[2]);
        break;
      case Start::IllConditioned: {
        // κ(T) = 1e3 between the two: both factors are that ill-conditioned.
        const auto rotation = std::get<0>(torch::linalg_qr(torch::randn({spec.rank, spec.rank}, torch::kDouble)));
        const auto scales = torch::logspace(-1.5, 1.5, spec.rank, 10.0, torch::kDouble).diag();
        initial_a = scales.matmul(rotation).matmul(initial_a);
        initial_b = initial_b.matmul(rotation.t()).matmul(scales.inverse());
        break;
      }
    }
    weight = 0.25 + torch::randn({spec.out, spec.in}, torch::kDouble).abs();
    target = 2 * torch::randn({spec.out, spec.in}, torch::kDouble);
    a = initial_a.to(dtype);
    b = initial_b.to(dtype);
    if (test_case.layout == Layout::Strided) {
      a = a.t().contiguous().t();
      b = torch::cat({b, b}, 1).slice(1, 0, spec.rank);
    }
    a = a.detach().requires_grad_();
    b = b.detach().requires_grad_();
    start_a = tall_a(a);
    start_b = tall_b(b);
  }

  /// Gradients of Aᵀ and B at the given point; random ones are drawn by the caller.
  std::pair<Matrix, Matrix> loss_gradients(const Matrix& a_tall, const Matrix& b_tall) const {
    const Matrix error = to_matrix(weight).array().square() * (b_tall * a_tall.transpose() - to_matrix(target)).array();
    return {error.transpose() * b_tall, error * a_tall};
  }
};

/// Now and then one factor of a pair has no gradient, or neither has.
bool is_missing(const Case& test_case, int step, size_t pair, int side) {
  if (!test_case.some_missing) return false;
  const auto i = static_cast<int>(pair);
  if ((step + i) % 7 == 3) return true;
  return (2 * step + 3 * i + side) % 5 == 0;
}

void expect_close(const torch::Tensor& actual, const OracleFactor& expected, double amplification, const Matrix& start,
                  int64_t rank_dimension, int step, const std::string& where) {
  const double u = unit_round_off(actual.scalar_type());
  const double size = expected.x.norm(), movement = (expected.x - start).norm();
  const double derived = 32 * step * u * (size + amplification * movement);
  const double most = ceiling(actual.scalar_type()) * std::max(movement, 0.1 * size);
  const double error = (to_matrix(tall(actual.detach(), rank_dimension)) - expected.x).norm();
  EXPECT_LE(error, std::min(derived, most)) << where << ", amplification " << amplification;
}

template <class Basis>
void expect_agreement(const Case& test_case, const Setting& setting, torch::ScalarType dtype) {
  torch::manual_seed(11);
  const auto groups = group_options(test_case, setting);
  std::vector<Problem> problems;
  std::vector<std::vector<FactorPair>> factors(groups.size());
  Oracle oracle(kRoot<Basis>);
  for (const auto& group : groups) oracle.groups.push_back(oracle_options(group));
  for (const auto& spec : test_case.pairs) {
    problems.emplace_back(spec, test_case, dtype);
    const Problem& problem = problems.back();
    factors[spec.group].push_back({"p" + std::to_string(problems.size()), problem.a, problem.b});
    oracle.pairs.push_back({spec.group, OracleFactor(problem.start_a), OracleFactor(problem.start_b)});
  }
  LoraRite<Basis> optimizer(factors[0], groups[0]);
  for (size_t i = 1; i < groups.size(); ++i) optimizer.add_pairs(factors[i], groups[i]);

  for (int step = 1; step <= kSteps; ++step) {
    std::vector<std::pair<TallGradient, TallGradient>> oracle_gradients;
    for (size_t i = 0; i < problems.size(); ++i) {
      Problem& problem = problems[i];
      std::pair<Matrix, Matrix> ours, theirs;
      if (test_case.gradients == Gradients::Loss) {
        // Each side at its own point: errors could feed back, as in training.
        ours = problem.loss_gradients(tall_a(problem.a), tall_b(problem.b));
        theirs = problem.loss_gradients(oracle.pairs[i].a.x, oracle.pairs[i].b.x);
      } else {
        const auto random = [&](const torch::Tensor& like) {
          return torch::randn(like.sizes(), torch::kDouble).to(dtype);
        };
        ours = {tall_a(random(problem.a)), tall_b(random(problem.b))};
        theirs = ours;
      }
      std::pair<TallGradient, TallGradient> gradient = {theirs.first, theirs.second};
      problem.a.mutable_grad() = from_tall(ours.first, problem.a, 0);
      problem.b.mutable_grad() = from_tall(ours.second, problem.b, 1);
      if (is_missing(test_case, step, i, 0)) {
        gradient.first = std::nullopt;
        problem.a.mutable_grad() = torch::Tensor();
      }
      if (is_missing(test_case, step, i, 1)) {
        gradient.second = std::nullopt;
        problem.b.mutable_grad() = torch::Tensor();
      }
      oracle_gradients.push_back(std::move(gradient));
    }
    oracle.step(oracle_gradients);
    optimizer.step();
    for (size_t i = 0; i < problems.size(); ++i) {
      const auto where = "pair " + std::to_string(i) + " after step " + std::to_string(step);
      const Problem& problem = problems[i];
      const OraclePair& pair = oracle.pairs[i];
      // Errors of one factor reach the other through the bases.
      const double amplification = std::max(pair.a.amplification, pair.b.amplification);
      expect_close(problem.a, pair.a, amplification, problem.start_a, 0, step, where + ", A");
      expect_close(problem.b, pair.b, amplification, problem.start_b, 1, step, where + ", B");
    }
    if (testing::Test::HasFailure()) return;  // what follows only grows from it
  }
  for (size_t i = 0; i < problems.size(); ++i) {
    const Problem& problem = problems[i];
    EXPECT_GT((tall_a(problem.a) - problem.start_a).norm(), 0.02 * problem.start_a.norm());
    EXPECT_GT((tall_b(problem.b) - problem.start_b).norm(), 0.02 * problem.start_b.norm());
  }
  EXPECT_EQ(optimizer.skipped_steps(), 0);
}

using Parameters = std::tuple<const Case*, const Setting*>;

std::string name_of(const testing::TestParamInfo<Parameters>& info) {
  return std::string(std::get<0>(info.param)->name) + "_with_" + std::get<1>(info.param)->name;
}

/// Every case with the defaults and with most options at once; the cases that exercise most with every
/// setting.
std::vector<Parameters> all_parameters() {
  std::vector<Parameters> result;
  for (const Case& test_case : cases()) {
    const std::string name = test_case.name;
    const bool thorough = name == "mixed_pairs" || name == "two_groups" || name == "zero_b";
    for (const Setting& setting : settings()) {
      const std::string setting_name = setting.name;
      // Whether a pair of which a factor stands still is balanced is not the rule's business.
      if (test_case.some_missing && setting_name == "together_balanced") continue;
      if (thorough || setting_name == "defaults" || setting_name.rfind("together", 0) == 0) {
        result.emplace_back(&test_case, &setting);
      }
    }
  }
  return result;
}

std::vector<Parameters> float_parameters() {
  std::vector<Parameters> result;
  for (const Case& test_case : cases()) {
    // Rounded closed loops part where the loss amplifies; given gradients isolate the optimizer.
    if (test_case.gradients == Gradients::Random) {
      result.emplace_back(&test_case, &settings().front());
      result.emplace_back(&test_case, &settings().back());
    }
  }
  return result;
}

class OracleAgreement : public testing::TestWithParam<Parameters> {};

TEST_P(OracleAgreement, OfThePolarBasisInDouble) {
  const auto [test_case, setting] = GetParam();
  expect_agreement<PolarBasis>(*test_case, *setting, torch::kDouble);
}

TEST_P(OracleAgreement, OfTheQrBasisInDouble) {
  const auto [test_case, setting] = GetParam();
  expect_agreement<QrBasis>(*test_case, *setting, torch::kDouble);
}

INSTANTIATE_TEST_SUITE_P(Table, OracleAgreement, testing::ValuesIn(all_parameters()), name_of);

class OracleAgreementInFloat : public testing::TestWithParam<Parameters> {};

TEST_P(OracleAgreementInFloat, OfThePolarBasis) {
  const auto [test_case, setting] = GetParam();
  expect_agreement<PolarBasis>(*test_case, *setting, torch::kFloat);
}

TEST_P(OracleAgreementInFloat, OfTheQrBasis) {
  const auto [test_case, setting] = GetParam();
  expect_agreement<QrBasis>(*test_case, *setting, torch::kFloat);
}

INSTANTIATE_TEST_SUITE_P(Table, OracleAgreementInFloat, testing::ValuesIn(float_parameters()), name_of);

TEST(OracleOptionDefaults, AreTheDocumentedOnes) {
  const LoraRiteOptions options;
  EXPECT_EQ(options.betas(), std::make_tuple(0.9, 0.999));
  EXPECT_EQ(options.eps(), 1e-8);
  EXPECT_EQ(options.eps_root(), 0.0);
  EXPECT_EQ(options.weight_decay(), 0.0);
  EXPECT_TRUE(options.escape());
  EXPECT_EQ(options.clip_unmagnified_norm(), 1.0);
  EXPECT_EQ(options.max_update_rms(), 0.0);
  EXPECT_EQ(options.lr_ratio_b(), 1.0);
  EXPECT_FALSE(options.balance() || options.maximize() || options.master_weights());
}

}  // namespace
}  // namespace lora_rite::test
