#include "lora_rite/engine/cuda/block_algebra.hpp"

#include <gtest/gtest.h>

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "engine/cuda/host_team.hpp"

/// Beside Eigen, which shares no code.
namespace lora_rite::test {
using namespace cuda;
namespace {

constexpr double kEpsilon = std::numeric_limits<double>::epsilon();

/// A pool of one team, its memory poisoned.
template <int R>
struct Bench {
  using PoolType = Pool<emulated::HostTeam, R>;
  emulated::HostTeam team;
  std::vector<double> shared, global;
  PoolType pool;

  explicit Bench(int rank, uint64_t seed = 1, int shared_matrices = 3)
      : team(seed),
        shared(PoolType::shared_size(shared_matrices), std::numeric_limits<double>::quiet_NaN()),
        global(PoolType::global_size(shared_matrices), std::numeric_limits<double>::quiet_NaN()),
        pool(team, rank, shared_matrices, global.data()) {
    team.share(shared.data());
  }

  Matrix<PoolType> matrix(const Eigen::MatrixXd& x) {
    return matrix_of(pool, [&](int i, int j) { return x(i, j); });
  }
};

template <class PoolType>
Eigen::MatrixXd read(const Matrix<PoolType>& x) {
  const int rank = x.pool().rank();
  Eigen::MatrixXd result(rank, rank);
  for (int i = 0; i < rank; ++i)
    for (int j = 0; j < rank; ++j) result(i, j) = x.at(i, j);
  return result;
}
template <class PoolType>
Eigen::VectorXd read(const Values<PoolType>& x) {
  Eigen::VectorXd result(x.pool().rank());
  for (int i = 0; i < result.size(); ++i) result(i) = x.at(i);
  return result;
}

Eigen::MatrixXd random_matrix(int rows, int columns, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal;
  Eigen::MatrixXd result(rows, columns);
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) result(i, j) = normal(engine);
  return result;
}

/// Q diag(λ) Qᵀ with a random Q.
Eigen::MatrixXd with_spectrum(const Eigen::VectorXd& values, unsigned seed) {
  const auto n = static_cast<int>(values.size());
  const Eigen::MatrixXd q = Eigen::HouseholderQR<Eigen::MatrixXd>(random_matrix(n, n, seed)).householderQ();
  const Eigen::MatrixXd s = q * values.asDiagonal() * q.transpose();
  return (s + s.transpose()) / 2;
}

/// The matrices that act 2 meets: noise, ill-conditioned, deficient, clusters, nearly diagonal, zero.
std::vector<Eigen::MatrixXd> spectra(int rank) {
  std::vector<Eigen::MatrixXd> result;
  const Eigen::MatrixXd noise = random_matrix(4 * rank, rank, 3);
  result.push_back(noise.transpose() * noise);
  for (const double condition : {1e4, 1e8, 1e16}) {
    Eigen::VectorXd values(rank);
    for (int i = 0; i < rank; ++i) values(i) = std::pow(condition, -static_cast<double>(i) / std::max(rank - 1, 1));
    result.push_back(with_spectrum(values, 5));
  }
  Eigen::VectorXd half = Eigen::VectorXd::Zero(rank), clusters = Eigen::VectorXd::Ones(rank);
  half.head((rank + 1) / 2) = Eigen::VectorXd::LinSpaced((rank + 1) / 2, 1, 2);
  clusters.head(rank / 2).setConstant(1e-3);
  result.push_back(with_spectrum(half, 6));
  result.push_back(with_spectrum(clusters, 7));
  result.push_back(1e-200 * with_spectrum(clusters, 8));
  Eigen::MatrixXd diagonal = Eigen::VectorXd::LinSpaced(rank, 1, 3).asDiagonal();
  diagonal(0, rank - 1) = diagonal(rank - 1, 0) = 1e-9;
  result.push_back(diagonal);
  if (rank == 4) {  // a block whose squares are next to nothing
    Eigen::MatrixXd apart = Eigen::MatrixXd::Zero(4, 4);
    apart.topLeftCorner(2, 2) << 2, 0.3, 0.3, 2;
    apart.bottomRightCorner(2, 2) << 1.5e-158, 0.7e-158, 0.7e-158, 1.5e-158;
    result.push_back(apart);
  }
  result.push_back(Eigen::MatrixXd::Zero(rank, rank));
  return result;
}

template <int R>
void check_spectra(int rank) {
  for (const Eigen::MatrixXd& s : spectra(rank)) {
    SCOPED_TRACE(rank);
    Bench<R> bench(rank);
    const auto input = bench.matrix(s);
    const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> oracle(s);
    const double most = oracle.eigenvalues().cwiseAbs().maxCoeff();
    const auto ascending = eigenvalues(input);
    EXPECT_LE((read(ascending) - oracle.eigenvalues()).cwiseAbs().maxCoeff(), 8 * kEpsilon * rank * most);
    const auto found = eigh(input);
    const Eigen::MatrixXd q = read(found.vectors);
    const Eigen::VectorXd values = read(found.values);
    EXPECT_LE((q.transpose() * q - Eigen::MatrixXd::Identity(rank, rank)).norm(), 16 * kEpsilon * rank);
    EXPECT_LE((s * q - q * values.asDiagonal()).norm(), 16 * kEpsilon * rank * most);
    // The run without vectors does the same arithmetic.
    EXPECT_EQ(read(cuda::ascending(found.values)), read(ascending));
  }
}

TEST(CudaBlocks, EigenvaluesAreEigens) {
  check_spectra<4>(1), check_spectra<4>(2), check_spectra<4>(4), check_spectra<8>(7), check_spectra<8>(8);
  check_spectra<16>(13), check_spectra<16>(16), check_spectra<32>(32), check_spectra<64>(33), check_spectra<64>(64);
}

/// Sweeps of Jacobi's rotations, by the barriers that they take.
template <int R>
std::vector<int64_t> sweeps_of_spectra() {
  std::vector<int64_t> result;
  for (const Eigen::MatrixXd& s : spectra(R)) {
    Bench<R> bench(R);
    const auto input = bench.matrix(s);
    const int64_t before = bench.team.barriers();
    eigenvalues(input);
    result.push_back((bench.team.barriers() - before - 3 * (R - 1)) / (2 * (R - 1) + 1));
  }
  return result;
}

/// Barriers are what an eigenvalue problem costs on a GPU. Noise takes 6 sweeps at r = 16; spectra over many orders of
/// magnitude took 8 to 15, and take less than that with one step of the QR iteration in front.
TEST(CudaBlocks, SweepsAreFew) {
  for (const int64_t sweeps : sweeps_of_spectra<16>()) EXPECT_LE(sweeps, 6);
  for (const int64_t sweeps : sweeps_of_spectra<32>()) EXPECT_LE(sweeps, 8);
  for (const int64_t sweeps : sweeps_of_spectra<64>()) EXPECT_LE(sweeps, 11);
}

template <int R>
void check_algebra(int rank) {
  SCOPED_TRACE(rank);
  Bench<R> bench(rank);
  const Eigen::MatrixXd x = random_matrix(rank, rank, 11), y = random_matrix(rank, rank, 12);
  const Eigen::MatrixXd s = x.transpose() * x;
  const auto a = bench.matrix(x), b = bench.matrix(y), gram = bench.matrix(s);
  const auto close = [&](const auto& found, const Eigen::MatrixXd& expected) {
    EXPECT_LE((read(found) - expected).norm(), 4 * kEpsilon * rank * (1 + expected.norm() * rank));
  };
  close(matmul(a, b), x * y);
  close(matmul(transpose(a), b), x.transpose() * y);
  close(matmul(a, transpose(b)), x * y.transpose());
  close(symmetrized(a), (x + x.transpose()) / 2);
  close(a + b * 3.0, x + 3 * y);
  close(scale_rows_by_norms(gram, b), Eigen::MatrixXd(s.diagonal().cwiseSqrt().asDiagonal()) * y);
  const Eigen::MatrixXd columns = y.colwise().squaredNorm();
  EXPECT_LE((read(squared_column_norms(b)) - columns.transpose()).norm(), 4 * kEpsilon * columns.norm() * rank);
  EXPECT_NEAR(squared_norm_of_scaled_rows(gram, b).value, read(scale_rows_by_norms(gram, b)).squaredNorm(),
              4 * kEpsilon * rank * read(scale_rows_by_norms(gram, b)).squaredNorm());
  EXPECT_NEAR(trace_of(gram).value, s.trace(), 4 * kEpsilon * rank * s.trace());
  const auto norms = squared_column_norms(b);
  EXPECT_EQ(smallest(norms).value, read(norms).minCoeff());
  EXPECT_EQ(largest_difference(norms, squared_column_norms(a)).value,
            (read(norms) - read(squared_column_norms(a))).maxCoeff());
}

TEST(CudaBlocks, MatricesAreThoseOfEigen) {
  check_algebra<4>(1), check_algebra<4>(3), check_algebra<8>(8), check_algebra<16>(13), check_algebra<64>(64);
}

TEST(CudaBlocks, OrthogonalFactorIsQrsWithAPositiveDiagonal) {
  for (const int rank : {1, 2, 7, 16}) {
    Bench<16> bench(rank);
    const Eigen::MatrixXd x = random_matrix(rank, rank, 21);
    const Eigen::MatrixXd o = read(orthogonal_factor(bench.matrix(x)));
    EXPECT_LE((o.transpose() * o - Eigen::MatrixXd::Identity(rank, rank)).norm(), 8 * kEpsilon * rank);
    const Eigen::MatrixXd r = o.transpose() * x;
    EXPECT_LE(Eigen::MatrixXd(r.triangularView<Eigen::StrictlyLower>()).norm(), 16 * kEpsilon * rank * x.norm());
    EXPECT_GT(r.diagonal().minCoeff(), 0);
  }
}

TEST(CudaBlocks, PositiveInverseIsExactToTheConditionNumber) {
  for (const int rank : {1, 5, 16}) {
    for (const double condition : {1.0, 1e6, 1e12}) {
      Eigen::VectorXd values(rank);
      for (int i = 0; i < rank; ++i) values(i) = std::pow(condition, static_cast<double>(i) / std::max(rank - 1, 1));
      const Eigen::MatrixXd s = with_spectrum(values, 31);
      Bench<16> bench(rank);
      const Eigen::MatrixXd inverse = read(positive_inverse(bench.matrix(s)));
      EXPECT_LE((inverse - s.ldlt().solve(Eigen::MatrixXd::Identity(rank, rank))).norm(),
                8 * kEpsilon * condition * rank * inverse.norm());
    }
  }
}

/// A slot that was given up is not taken before the barrier, for a thread may still read it.
TEST(CudaBlocks, SlotsRestUntilTheBarrier) {
  Slots slots;
  EXPECT_EQ(slots.acquire(3), 0);
  EXPECT_EQ(slots.acquire(3), 1);
  slots.share(0);
  slots.release(0);
  slots.release(1);
  EXPECT_EQ(slots.acquire(3), 2);
  slots.barrier_passed();
  EXPECT_EQ(slots.acquire(3), 1) << "slot 0 still has an owner";
  EXPECT_EQ(slots.peak(), 3);
}

}  // namespace
}  // namespace lora_rite::test
