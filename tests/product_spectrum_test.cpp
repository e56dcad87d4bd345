#include <gtest/gtest.h>
#include <lora_rite/product_spectrum.hpp>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "support/pairs.hpp"

namespace lora_rite::test {
namespace {

constexpr double kEpsilon = std::numeric_limits<double>::epsilon();

// LibTorch's SVD of the full product, convolutions flattened.
std::vector<double> full_singular_values(const FactorPair& pair, double scale) {
  const torch::Tensor a = pair.a.detach().to(torch::kDouble).flatten(1);
  const torch::Tensor b = pair.b.detach().to(torch::kDouble).flatten(1);
  const torch::Tensor values = torch::linalg_svdvals(scale * torch::matmul(b, a));
  return {values.data_ptr<double>(), values.data_ptr<double>() + values.numel()};
}

double norm_of(const torch::Tensor& factor) { return factor.detach().to(torch::kDouble).norm().item<double>(); }

// Both are backward stable: each value is off by at most a small polynomial of the sizes times ε ‖A‖ ‖B‖, for which
// in + out + r stands here.
double tolerance(const FactorPair& pair, double scale) {
  const auto sizes = static_cast<double>(pair.a.numel() / pair.a.size(0) + pair.b.size(0) + pair.a.size(0));
  return sizes * kEpsilon * std::abs(scale) * norm_of(pair.a) * norm_of(pair.b);
}

void expect_spectrum_of_full_product(const FactorPair& pair, double scale) {
  const ProductSpectrum found = product_spectrum(pair, scale);
  const std::vector<double> full = full_singular_values(pair, scale);
  const double bound = tolerance(pair, scale);
  ASSERT_LE(found.singular_values.size(), full.size()) << pair.name;
  double squares = 0;
  for (size_t i = 0; i < full.size(); ++i) {
    const double own = i < found.singular_values.size() ? found.singular_values[i] : 0;
    EXPECT_NEAR(own, full[i], bound) << pair.name << " value " << i;
    squares += full[i] * full[i];
  }
  EXPECT_NEAR(found.frobenius_norm, std::sqrt(squares), bound * static_cast<double>(full.size())) << pair.name;
  EXPECT_EQ(found.spectral_norm, found.singular_values.front()) << pair.name;
}

TEST(ProductSpectrum, IsThatOfTheFullProduct) {
  torch::manual_seed(1);
  const auto transposed = [](const torch::Tensor& b) { return b.transpose(0, 1).flatten(1).t().contiguous(); };
  const torch::Tensor b = torch::randn({5, 3, 2, 1}, torch::kDouble), a = torch::randn({3, 4, 2, 2}, torch::kDouble);
  EXPECT_EQ(product_spectrum({"", a, b}).singular_values, product_spectrum({"", a, transposed(b)}).singular_values);
  for (const auto dtype : {torch::kDouble, torch::kFloat, torch::kBFloat16, torch::kHalf}) {
    expect_spectrum_of_full_product(random_pair("wide", 4, 30, 12, dtype), 2);
    expect_spectrum_of_full_product(random_pair("one", 1, 7, 9, dtype), 0.25);
    expect_spectrum_of_full_product(random_pair("rank above both sides", 9, 5, 6, dtype), -1.5);
    expect_spectrum_of_full_product(random_pair("rank above one side", 9, 20, 6, dtype), 1);
  }
  expect_spectrum_of_full_product({"convolution", torch::randn({3, 4, 2, 2}), torch::randn({5, 3, 1, 1})}, 3);
}

TEST(ProductSpectrum, KnowsAPlantedSpectrum) {
  torch::manual_seed(2);
  const auto orthonormal = [](int64_t rows, int64_t columns) {
    return std::get<0>(torch::linalg_qr(torch::randn({rows, columns}, torch::kDouble)));
  };
  const std::vector<double> planted = {8, 4, 2, 1};
  const torch::Tensor diagonal = torch::diag(torch::tensor(planted, torch::kDouble));
  // A holds all of it but a balance of 1 : 1/16, and an odd basis between the factors.
  const torch::Tensor basis = orthonormal(4, 4);
  const FactorPair pair{"planted", 16 * torch::matmul(basis, torch::matmul(diagonal, orthonormal(20, 4).t())),
                        torch::matmul(orthonormal(10, 4), basis.t()) / 16};
  const ProductSpectrum found = product_spectrum(pair, 0.5);
  for (size_t i = 0; i < planted.size(); ++i) EXPECT_NEAR(found.singular_values[i], planted[i] / 2, 1e-13);
  EXPECT_EQ(found.numerical_rank, 4);
  EXPECT_NEAR(found.condition_number, 8, 1e-12);
  EXPECT_NEAR(found.condition_number_a, 8, 1e-12);
  EXPECT_NEAR(found.condition_number_b, 1, 1e-12);
  EXPECT_NEAR(found.frobenius_norm, std::sqrt(85.0) / 2, 1e-12);
  EXPECT_NEAR(found.norm_a, 16 * std::sqrt(85.0), 1e-11);
  EXPECT_NEAR(found.norm_b, 2.0 / 16, 1e-14);
  EXPECT_NEAR(found.balance, found.norm_b / found.norm_a, 1e-16);
  double entropy = 0;
  for (const double value : planted) entropy -= value / 15 * std::log(value / 15);
  EXPECT_NEAR(found.effective_rank, std::exp(entropy), 1e-12);
}

TEST(ProductSpectrum, EqualValuesHaveTheFullEffectiveRank) {
  const FactorPair pair{"equal", torch::eye(3, 7), 2 * torch::eye(8, 3)};
  EXPECT_NEAR(product_spectrum(pair).effective_rank, 3, 1e-13);
  EXPECT_NEAR(product_spectrum(pair).condition_number, 1, 1e-13);
  pair.a[2].zero_();  // a singular value of exactly 0
  EXPECT_NEAR(product_spectrum(pair).effective_rank, 2, 1e-13);
  EXPECT_EQ(product_spectrum(pair).numerical_rank, 2);
}

TEST(ProductSpectrum, DoesNotDependOnTheSplit) {
  torch::manual_seed(3);
  const FactorPair pair = random_pair("q", 3, 20, 12);
  // κ(T) = 100, with values around 1.
  const torch::Tensor t = torch::matmul(std::get<0>(torch::linalg_qr(torch::randn({3, 3}, torch::kDouble))),
                                        torch::diag(torch::tensor({10.0, 1.0, 0.1}, torch::kDouble)));
  const FactorPair other{"q", torch::matmul(t, pair.a.detach()), torch::matmul(pair.b.detach(), torch::linalg_inv(t))};
  const ProductSpectrum first = product_spectrum(pair), second = product_spectrum(other);
  EXPECT_GT(std::abs(first.norm_a - second.norm_a), 1);  // it is another split
  for (size_t i = 0; i < 3; ++i) {
    // The factors themselves are rounded after the multiplication: κ(T) ε more.
    EXPECT_NEAR(first.singular_values[i], second.singular_values[i], 100 * tolerance(pair, 1));
  }
  // Each value, and so the sum, is off by so much of the least one.
  const double relative = 100 * tolerance(pair, 1) / first.singular_values.back();
  EXPECT_LT(relative, 1e-9);
  EXPECT_NEAR(first.condition_number, second.condition_number, 2 * relative * first.condition_number);
  EXPECT_NEAR(first.effective_rank, second.effective_rank, 10 * relative);
  EXPECT_EQ(first.numerical_rank, 3);
  EXPECT_EQ(second.numerical_rank, 3);
  EXPECT_GT(std::abs(first.condition_number_b / second.condition_number_b - 1), 0.5) << "that of a factor does";
}

TEST(ProductSpectrum, OfALackingRankDoesNotDependOnTheSplit) {
  torch::manual_seed(8);
  FactorPair pair = random_pair("q", 3, 20, 12);
  const torch::NoGradGuard no_grad;
  pair.a[2].copy_(2 * pair.a[0]);
  const torch::Tensor t = torch::randn({3, 3}, torch::kDouble) + 3 * torch::eye(3, torch::kDouble);
  const FactorPair other{"q", torch::matmul(t, pair.a), torch::matmul(pair.b, torch::linalg_inv(t))};
  for (const FactorPair& each : {pair, other}) {
    const ProductSpectrum found = product_spectrum(each);
    EXPECT_EQ(found.numerical_rank, 2);
    EXPECT_TRUE(std::isinf(found.condition_number));
    EXPECT_NEAR(found.effective_rank, product_spectrum(pair).effective_rank, 1e-9);
  }
}

TEST(ProductSpectrum, OneDirectionHasTheEffectiveRankOne) {
  torch::manual_seed(9);
  const auto column = [](int64_t size) { return torch::randn({size, 1}, torch::kDouble); };
  const FactorPair pair{"one", torch::matmul(column(4), column(20).t()), torch::matmul(column(12), column(4).t())};
  const ProductSpectrum found = product_spectrum(pair);
  EXPECT_EQ(found.singular_values.size(), 4U);
  EXPECT_EQ(found.numerical_rank, 1);
  EXPECT_NEAR(found.effective_rank, 1, 1e-12);  // round-off ε has the entropy ε log ε
}

TEST(ProductSpectrum, RankDeficientFactorsAreCountedOut) {
  torch::manual_seed(4);
  FactorPair pair = random_pair("q", 4, 20, 12);
  torch::NoGradGuard no_grad;
  pair.a[3].copy_(2 * pair.a[0]);
  const ProductSpectrum found = product_spectrum(pair);
  EXPECT_EQ(found.numerical_rank, 3);
  EXPECT_TRUE(std::isinf(found.condition_number));
  EXPECT_TRUE(std::isinf(found.condition_number_a));
  EXPECT_TRUE(std::isfinite(found.condition_number_b));
  EXPECT_LT(found.effective_rank, 3 + 1e-9);
  expect_spectrum_of_full_product(pair, 1);
}

TEST(ProductSpectrum, AFactorOfZerosGivesNoNaN) {
  torch::manual_seed(5);
  for (const bool a_too : {false, true}) {
    FactorPair pair = random_pair("fresh", 4, 20, 12, torch::kFloat);
    torch::NoGradGuard no_grad;
    pair.b.zero_();
    if (a_too) pair.a.zero_();
    const ProductSpectrum found = product_spectrum(pair, 2);
    EXPECT_EQ(found.singular_values, std::vector<double>(4, 0.0));
    EXPECT_EQ(found.numerical_rank, 0);
    EXPECT_EQ(found.frobenius_norm, 0);
    EXPECT_EQ(found.spectral_norm, 0);
    EXPECT_EQ(found.effective_rank, 0);
    EXPECT_EQ(found.condition_number, std::numeric_limits<double>::infinity());
    EXPECT_EQ(found.condition_number_b, std::numeric_limits<double>::infinity());
    EXPECT_EQ(std::isinf(found.condition_number_a), a_too);
    EXPECT_EQ(found.balance, a_too ? 1 : 0);
  }
  FactorPair pair = random_pair("only b", 4, 20, 12);
  torch::NoGradGuard no_grad;
  pair.a.zero_();
  EXPECT_EQ(product_spectrum(pair).balance, std::numeric_limits<double>::infinity());
}

// ΔW would take 640 GB in float.
TEST(ProductSpectrum, NeverFormsTheProduct) {
  const int64_t size = 400000;
  // Columns of the norm √size, orthogonal: 1 1 1 1 … and 1 -1 1 -1 …
  const torch::Tensor ones = torch::ones({size}), signs = ones - 2 * (torch::arange(size) % 2);
  const torch::Tensor left = torch::stack({signs, ones}, 1), right = torch::stack({ones, signs}, 1);
  // Whole numbers, and so without rounding: B A = left · diag(3, 1) · rightᵀ, whose values are 3 · size and size.
  const torch::Tensor basis = torch::tensor({{2.0F, 1.0F}, {1.0F, 1.0F}});
  const torch::Tensor inverse = torch::tensor({{1.0F, -1.0F}, {-1.0F, 2.0F}});
  const torch::Tensor a = torch::matmul(inverse, torch::diag(torch::tensor({3.0F, 1.0F}))).matmul(right.t());
  const ProductSpectrum found = product_spectrum({"large", a, torch::matmul(left, basis)}, 0.25);
  ASSERT_EQ(found.singular_values.size(), 2U);
  // Each is off by some √size ε of ‖A‖₂ ‖B‖₂, which is below 20 · size.
  const double bound = 20 * std::sqrt(static_cast<double>(size)) * kEpsilon;
  EXPECT_NEAR(found.singular_values[0] / 300000, 1, bound);
  EXPECT_NEAR(found.singular_values[1] / 100000, 1, 3 * bound);
  EXPECT_EQ(found.numerical_rank, 2);
  EXPECT_NEAR(found.condition_number, 3, 12 * bound);
  EXPECT_NEAR(found.frobenius_norm / std::sqrt(10.0), 100000, 4 * bound * 100000);
}

TEST(ProductSpectrum, RefusesWhatIsNoPairOfNumbers) {
  torch::manual_seed(6);
  const auto message_of = [](const FactorPair& pair, double scale) -> std::string {
    try {
      product_spectrum(pair, scale);
    } catch (const c10::Error& error) {
      return error.what_without_backtrace();
    }
    return "";
  };
  FactorPair pair = random_pair("q", 2, 5, 6);
  EXPECT_EQ(message_of(pair, 1), "");
  EXPECT_NE(message_of({"q", pair.a, pair.b.detach().t()}, 1).find("pair 'q': the ranks differ"), std::string::npos);
  EXPECT_NE(message_of({"q", pair.a, {}}, 1).find("factor b is undefined"), std::string::npos);
  EXPECT_NE(message_of(pair, std::nan("")).find("scale is nan"), std::string::npos);
  torch::NoGradGuard no_grad;
  pair.b[3][1] = std::nan("");
  EXPECT_NE(message_of(pair, 1).find("factor b holds values that are not finite"), std::string::npos);
}

TEST(ProductSpectrum, LeavesTheFactorsAlone) {
  torch::manual_seed(7);
  const std::vector<FactorPair> pairs = {random_pair("q", 3, 8, 6)};
  const auto before = clone_pairs(pairs);
  product_spectrum(pairs[0]);
  EXPECT_TRUE(equal_factors(pairs, before));
  EXPECT_TRUE(pairs[0].a.requires_grad());
}

}  // namespace
}  // namespace lora_rite::test
