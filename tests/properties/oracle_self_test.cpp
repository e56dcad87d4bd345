// The oracle against a second, independent form of the algorithm in ΔW-space, and against properties
// that the paper proves. An oracle that is wrong would make every test that trusts it worthless.

#include "support/ambient_oracle.hpp"
#include "support/oracle.hpp"

#include <gtest/gtest.h>

#include <random>

namespace lora_rite::test {
namespace {

Matrix gaussian(Eigen::Index rows, Eigen::Index cols, std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  return Matrix::NullaryExpr(rows, cols, [&] { return normal(random); });
}

/// ∇W of ½‖W ∘ (ΔW − target)‖²: explicit, and different in every direction.
struct WeightedLeastSquares {
  Matrix weight, target;

  Matrix grad_w(const Matrix& delta_w) const { return weight.array().square() * (delta_w - target).array(); }
};

struct Problem {
  Matrix a_tall, b;
  WeightedLeastSquares loss;
};

Problem make_problem(Eigen::Index out, Eigen::Index in, Eigen::Index rank) {
  std::mt19937_64 random(17);
  Problem problem;
  problem.a_tall = gaussian(in, rank, random);
  problem.b = gaussian(out, rank, random);
  problem.loss.weight = gaussian(out, in, random).cwiseAbs() + Matrix::Constant(out, in, 0.2);
  problem.loss.target = 3 * gaussian(out, in, random);
  return problem;
}

OracleOptions lively_options() {
  OracleOptions options;
  options.lr = 0.05;
  options.beta2 = 0.9;
  options.eps = 1e-6;
  return options;
}

Matrix product(const OraclePair& pair) { return pair.b.x * pair.a.x.transpose(); }

/// ΔW after each of `steps` steps of the oracle under test.
std::vector<Matrix> oracle_trajectory(const Problem& problem, const OracleOptions& options, Root root, int steps) {
  Oracle oracle(root);
  oracle.groups.push_back(options);
  oracle.pairs.push_back({0, OracleFactor(problem.a_tall), OracleFactor(problem.b)});
  std::vector<Matrix> trajectory;
  for (int i = 0; i < steps; ++i) {
    const OraclePair& pair = oracle.pairs[0];
    const Matrix grad_w = problem.loss.grad_w(product(pair));
    oracle.step({{Matrix(grad_w.transpose() * pair.b.x), Matrix(grad_w * pair.a.x)}});
    trajectory.push_back(product(oracle.pairs[0]));
  }
  return trajectory;
}

void expect_same(const std::vector<Matrix>& left, const std::vector<Matrix>& right, const Matrix& start,
                 double tolerance) {
  ASSERT_EQ(left.size(), right.size());
  const double movement = (left.back() - start).norm();
  ASSERT_GT(movement, 0.1 * start.norm()) << "nothing moved: the comparison would be empty";
  for (size_t i = 0; i < left.size(); ++i) {
    EXPECT_LT((left[i] - right[i]).norm(), tolerance * movement) << "at step " << i + 1;
  }
}

using OptionChange = void (*)(OracleOptions&);

class OracleForms : public testing::TestWithParam<std::pair<const char*, OptionChange>> {};

// In ΔW-space there is no basis: agreement shows that roots, transports and their transposes are right.
TEST_P(OracleForms, EqualsTheBasisFreeForm) {
  for (const Root root : {Root::Polar, Root::Qr}) {
    OracleOptions options = lively_options();
    GetParam().second(options);
    const Problem problem = make_problem(7, 9, 3);
    AmbientOracle ambient(problem.a_tall, problem.b, options);
    std::vector<Matrix> trajectory;
    for (int i = 0; i < 40; ++i) {
      ambient.step(problem.loss.grad_w(ambient.b() * ambient.a_tall().transpose()));
      trajectory.push_back(ambient.b() * ambient.a_tall().transpose());
    }
    // Round-off in the empty directions is ε_machine/ε = 1e-10 before it is projected away.
    expect_same(oracle_trajectory(problem, options, root, 40), trajectory, problem.b * problem.a_tall.transpose(),
                1e-9);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Options, OracleForms,
    testing::Values(std::make_pair("escape", OptionChange([](OracleOptions&) {})),
                    std::make_pair("no_escape", OptionChange([](OracleOptions& o) { o.escape = false; })),
                    std::make_pair("no_clip", OptionChange([](OracleOptions& o) { o.clip = 0; })),
                    std::make_pair("weight_decay", OptionChange([](OracleOptions& o) { o.weight_decay = 0.5; })),
                    std::make_pair("eps_root", OptionChange([](OracleOptions& o) { o.eps_root = 1e-3; }))),
    [](const auto& info) { return std::string(info.param.first); });

TEST(OracleSelf, IsInvariantUnderGeneralTransformations) {
  const Problem problem = make_problem(7, 9, 3);
  std::mt19937_64 random(5);
  const Matrix t = gaussian(3, 3, random);
  Problem transformed = problem;
  transformed.a_tall = problem.a_tall * t.transpose();  // A' = TA
  transformed.b = problem.b * t.inverse();
  expect_same(oracle_trajectory(problem, lively_options(), Root::Polar, 40),
              oracle_trajectory(transformed, lively_options(), Root::Polar, 40), problem.b * problem.a_tall.transpose(),
              1e-9);
}

TEST(OracleSelf, BasesAreOrthonormalAndReproduceTheFactor) {
  std::mt19937_64 random(3);
  Matrix deficient = gaussian(8, 4, random);
  deficient.col(2) = deficient.col(0) - 2 * deficient.col(1);
  for (const Matrix& y : {gaussian(8, 4, random), gaussian(3, 5, random), deficient, Matrix(Matrix::Zero(6, 2))}) {
    for (const Root root : {Root::Polar, Root::Qr}) {
      const Basis basis = basis_of(y, root);
      EXPECT_LT((basis.u * basis.r - y).norm(), 1e-13 * (1 + y.norm()));
      EXPECT_LT((basis.r.transpose() * basis.r - y.transpose() * y).norm(), 1e-12 * (1 + y.norm()));
      // UᵀU is a projector whose rank is Y's.
      const Matrix gram = basis.u.transpose() * basis.u;
      EXPECT_LT((gram * gram - gram).norm(), 1e-12);
    }
  }
}

// One step written out by hand for r = n = m = 1: S = ±1 up to ε, so X moves by η / |Y|.
TEST(OracleSelf, ScalarPairMovesByTheRateOverThePartner) {
  OracleOptions options;
  options.lr = 0.01;
  options.clip = 0;
  options.eps = 0;
  Oracle oracle(Root::Polar);
  oracle.groups.push_back(options);
  const auto scalar = [](double value) { return Matrix(Matrix::Constant(1, 1, value)); };
  oracle.pairs.push_back({0, OracleFactor(scalar(2)), OracleFactor(scalar(-4))});
  oracle.step({{scalar(3), scalar(5)}});
  EXPECT_NEAR(oracle.pairs[0].a.x(0, 0), 2 - 0.01 / 4, 1e-15);
  EXPECT_NEAR(oracle.pairs[0].b.x(0, 0), -4 - 0.01 / 2, 1e-15);
}

}  // namespace
}  // namespace lora_rite::test
