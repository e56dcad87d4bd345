#include <gtest/gtest.h>

#include <lora_rite/engine/device/tensor_algebra.hpp>
#include <lora_rite/rule/decide.hpp>

#include "support/pairs.hpp"

namespace lora_rite::test {
namespace {

template <class Basis>
class GramRoot : public testing::Test {};
using Bases = testing::Types<PolarBasis, QrBasis>;
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

TEST(QrBasis, IsTheInverseOfQrsTriangleWithAPositiveDiagonal) {
  torch::manual_seed(5);
  const auto y = torch::randn({20, 6}, torch::kDouble);
  const auto triangle = std::get<1>(torch::linalg_qr(y, "reduced"));
  const auto expected = torch::inverse(triangle * triangle.diagonal().sign().unsqueeze(1));
  const auto found = QrBasis::inverse_root(torch::matmul(y.t(), y), kCutoff);
  EXPECT_LT((found - expected).abs().max().item<double>(), 1e-12);
}

TYPED_TEST(GramRoot, TakenTwiceIsExactForIllConditionedDoubles) {
  torch::manual_seed(6);
  for (const double kappa : {1.0, 1e2, 1e4, 1e6}) {
    const auto y = conditioned(60, 8, kappa);
    const double cutoff = rule::relative_cutoff(2.2e-16, 8);
    const auto c = TypeParam::inverse_root(torch::matmul(y.t(), y), cutoff);
    const auto yc = torch::matmul(y, c);
    const auto u = torch::matmul(yc, TypeParam::inverse_root(torch::matmul(yc.t(), yc), cutoff));
    EXPECT_LT(deviation_from_identity(torch::matmul(u.t(), u)), 1e-13) << "kappa " << kappa;
  }
}

TYPED_TEST(GramRoot, TakenTwiceKeepsToTheRowSpaceOfARankDeficientMatrix) {
  torch::manual_seed(7);
  const auto y = torch::matmul(torch::randn({30, 3}, torch::kDouble), torch::randn({3, 8}, torch::kDouble));
  const double cutoff = rule::relative_cutoff(2.2e-16, 8);
  const auto c = TypeParam::inverse_root(torch::matmul(y.t(), y), cutoff);
  const auto yc = torch::matmul(y, c);
  const auto root = torch::matmul(c, TypeParam::inverse_root(torch::matmul(yc.t(), yc), cutoff));
  const auto pseudo_inverse = torch::linalg_pinv(y);
  const auto off = root - torch::matmul(pseudo_inverse, torch::matmul(y, root));
  EXPECT_LT(off.norm().template item<double>(), 1e-14 * 30);
}

}  // namespace
}  // namespace lora_rite::test
