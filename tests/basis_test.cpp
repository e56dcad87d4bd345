#include <gtest/gtest.h>

#include "support/pairs.hpp"

namespace lora_rite {
namespace {

template <class Basis>
class GramRoot : public ::testing::Test {};
using Bases = ::testing::Types<PolarBasis, QrBasis>;
TYPED_TEST_SUITE(GramRoot, Bases);

constexpr double kCutoff = 1e-14;

/// n×r with singular values from 1 down to 1/κ.
torch::Tensor conditioned(int64_t rows, int64_t rank, double kappa) {
  const auto q = std::get<0>(torch::linalg_qr(torch::randn({rows, rank}, torch::kDouble), "reduced"));
  const auto v = std::get<0>(torch::linalg_qr(torch::randn({rank, rank}, torch::kDouble), "reduced"));
  return torch::matmul(q * torch::logspace(0, -std::log10(kappa), rank, 10.0, torch::kDouble), v.t());
}

double deviation_from_identity(const torch::Tensor& matrix) {
  return (matrix - torch::eye(matrix.size(-1), torch::kDouble)).abs().max().item<double>();
}

TYPED_TEST(GramRoot, MakesTheColumnsOrthonormal) {
  torch::manual_seed(1);
  for (const int64_t rank : {1, 2, 7, 16, 64}) {
    for (const double kappa : {1.0, 1e2, 1e4}) {
      const auto y = conditioned(100, rank, kappa);
      const auto u = torch::matmul(y, TypeParam::inverse_root(torch::matmul(y.t(), y), kCutoff));
      // A Gram matrix squares κ; 100 covers the rank.
      EXPECT_LT(deviation_from_identity(torch::matmul(u.t(), u)), 100 * 2.2e-16 * kappa * kappa)
          << "rank " << rank << ", kappa " << kappa;
    }
  }
}

TYPED_TEST(GramRoot, OfARankDeficientMatrixSpansItsColumnSpace) {
  torch::manual_seed(2);
  const auto y = torch::matmul(torch::randn({30, 3}, torch::kDouble), torch::randn({3, 8}, torch::kDouble));
  const auto u = torch::matmul(y, TypeParam::inverse_root(torch::matmul(y.t(), y), kCutoff));
  const auto projector = torch::matmul(u, u.t());
  EXPECT_NEAR(projector.trace().template item<double>(), 3, 1e-9);
  EXPECT_LT((torch::matmul(projector, y) - y).norm().template item<double>(), 1e-9);
}

TYPED_TEST(GramRoot, OfZeroIsZero) {
  EXPECT_EQ(TypeParam::inverse_root(torch::zeros({4, 4}, torch::kDouble), kCutoff).abs().max().template item<double>(),
            0);
}

TYPED_TEST(GramRoot, WorksOnBatchesAsOnSingleMatrices) {
  torch::manual_seed(3);
  const auto y = torch::randn({2, 3, 20, 5}, torch::kDouble);
  const auto gram = torch::matmul(y.mT(), y);
  const auto batch = TypeParam::inverse_root(gram, kCutoff);
  EXPECT_LT((batch[1][2] - TypeParam::inverse_root(gram[1][2], kCutoff)).abs().max().template item<double>(), 1e-12);
}

TEST(PolarBasis, IsSymmetric) {
  torch::manual_seed(4);
  const auto y = torch::randn({20, 6}, torch::kDouble);
  const auto root = PolarBasis::inverse_root(torch::matmul(y.t(), y), kCutoff);
  EXPECT_LT((root - root.t()).abs().max().item<double>(), 1e-14);
}

TEST(QrBasis, IsTheInverseOfQrsTriangleUpToSigns) {
  torch::manual_seed(5);
  const auto y = torch::randn({20, 6}, torch::kDouble);
  const auto expected = torch::inverse(std::get<1>(torch::linalg_qr(y, "reduced")));
  const auto found = QrBasis::inverse_root(torch::matmul(y.t(), y), kCutoff);
  EXPECT_LT((found.abs() - expected.abs()).abs().max().item<double>(), 1e-12);
}

TEST(WellConditionedCoordinates, LeaveAConditionNumberThatASecondRootCanTake) {
  torch::manual_seed(6);
  for (const double kappa : {1.0, 1e4, 1e6, 1e9, 1e12}) {
    const auto y = conditioned(60, 8, kappa);
    const auto c = rule::well_conditioned_coordinates(torch::matmul(y.t(), y));
    const auto yc = torch::matmul(y, c);
    const auto u = torch::matmul(yc, PolarBasis::inverse_root(torch::matmul(yc.t(), yc), 1e-14));
    // The second Gram matrix has at most κ² · 16 r ε: 1e4 at κ = 1e9 is squared again to 1e-16 · 1e8.
    const double left = std::max(1.0, kappa * std::sqrt(16 * 8 * 2.2e-16));
    EXPECT_LT(deviation_from_identity(torch::matmul(u.t(), u)), 100 * 2.2e-16 * left * left) << "kappa " << kappa;
  }
}

}  // namespace
}  // namespace lora_rite
