// The host engine's loops, compiled for each instruction set, against Eigen.

#include <gtest/gtest.h>
#include <lora_rite/engine/host/kernels/dispatch.hpp>
#include <lora_rite/engine/host/kernels/plain.hpp>

#include <Eigen/Dense>
#include <algorithm>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

namespace lora_rite::test {
using namespace host::kernels;
namespace {

using Eigen::MatrixXd;

std::vector<const Table*> tables() {
  std::vector<const Table*> result = available();
  result.push_back(&plain::table);
  return result;
}

/// Doubles with the alignment that the kernels want of lanes.
class Aligned {
 public:
  explicit Aligned(int64_t size) : blocks_(static_cast<size_t>((size + 7) / 8)) {}
  double* data() { return blocks_.data()->numbers; }
  const double* data() const { return blocks_.data()->numbers; }
  double& operator[](int64_t i) { return data()[i]; }
  double operator[](int64_t i) const { return data()[i]; }

 private:
  struct alignas(64) Block {
    double numbers[8];
  };
  std::vector<Block> blocks_;
};

Aligned lanes_of(const std::vector<MatrixXd>& matrices, int64_t stride) {
  const int64_t r = matrices[0].rows();
  Aligned lanes(r * stride * kLanes);
  for (int64_t lane = 0; lane < kLanes; ++lane)
    for (int64_t i = 0; i < r; ++i)
      for (int64_t j = 0; j < r; ++j)
        lanes[(i * stride + j) * kLanes + lane] = matrices[static_cast<size_t>(lane)](i, j);
  return lanes;
}

MatrixXd matrix_of(const Aligned& lanes, int64_t r, int64_t stride, int64_t lane) {
  MatrixXd result(r, r);
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < r; ++j) result(i, j) = lanes[(i * stride + j) * kLanes + lane];
  return result;
}

/// Gram matrices of every kind in one batch: well conditioned, graded over many orders of magnitude, rank-deficient
/// with equal eigenvalues, zero.
std::vector<MatrixXd> gram_matrices(int64_t r) {
  std::vector<MatrixXd> result;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    MatrixXd x = MatrixXd::Random(2 * r, r);
    if (lane == 1)
      for (int64_t j = 0; j < r; ++j) x.col(j) *= std::pow(0.5, j);
    if (lane == 2) x = MatrixXd::Identity(2 * r, r) * ((r + 1) / 2 == r ? 1 : 3), x.rightCols(r / 2).setZero();
    if (lane == 3) x.setZero();
    if (lane == 4) x = MatrixXd::Identity(2 * r, r);
    if (lane == 5) x.row(0) *= 1e9;                                       // one huge direction over a plain rest
    if (lane == 6) x = MatrixXd::Ones(2 * r, r);                          // rank 1, no coordinate apart
    if (lane == 7) x.rightCols(r / 2) *= 1e-12, x.bottomRows(r) *= 1e-6;  // faint directions
    result.push_back(x.transpose() * x);
  }
  return result;
}

TEST(Kernels, AreChosenByName) {
  const Table slow = {"slow", {}, {}, {}, {}, {}, {}}, fast = {"fast", {}, {}, {}, {}, {}, {}};
  const std::vector<const Table*> both = {&fast, &slow};
  for (const char* nobody : {static_cast<const char*>(nullptr), ""}) {
    EXPECT_EQ(choose(both, nobody), &fast);
    EXPECT_EQ(choose({}, nobody), nullptr);
  }
  EXPECT_EQ(choose(both, "slow"), &slow);
  EXPECT_EQ(choose(both, "none"), nullptr);
  for (const auto& [tables, expected] :
       {std::pair(both, "LORA_RITE_KERNELS is 'other', expected one of fast, slow, none: what this machine runs"),
        std::pair(std::vector<const Table*>(),
                  "LORA_RITE_KERNELS is 'other', expected one of none: what this machine runs")}) {
    try {
      choose(tables, "other");
      ADD_FAILURE();
    } catch (const std::invalid_argument& error) {
      EXPECT_STREQ(error.what(), expected);
    }
  }
}

TEST(Kernels, EigenvectorsDiagonalise) {
  std::srand(1);
  for (const Table* table : tables()) {
    for (const int64_t r : {1, 2, 3, 5, 8, 16, 33, 64}) {
      for (const double scale : {1.0, 1e-140, 1e140}) {
        const int64_t stride = r + 1;
        auto matrices = gram_matrices(r);
        for (auto& matrix : matrices) matrix *= scale;
        Aligned work = lanes_of(matrices, stride), vectors(r * stride * kLanes);
        Aligned values(r * kLanes), space(eigh_work(r) * kLanes), alone(r * kLanes);
        table->eigh(work.data(), r, stride, values.data(), space.data(), vectors.data());
        Aligned again = lanes_of(matrices, stride);
        table->eigh(again.data(), r, stride, alone.data(), space.data(), nullptr);
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const std::string where = std::string(table->name) + ", rank " + std::to_string(r) + ", lane " +
                                    std::to_string(lane) + ", scale " + std::to_string(scale);
          const MatrixXd& matrix = matrices[static_cast<size_t>(lane)];
          const MatrixXd q = matrix_of(vectors, r, stride, lane).transpose();
          Eigen::VectorXd lambda(r), lambda_alone(r);
          for (int64_t i = 0; i < r; ++i) lambda(i) = values[i * kLanes + lane];
          for (int64_t i = 0; i < r; ++i) lambda_alone(i) = alone[i * kLanes + lane];
          std::sort(lambda_alone.begin(), lambda_alone.end());
          Eigen::VectorXd sorted = lambda;
          std::sort(sorted.begin(), sorted.end());
          const double tolerance = 20.0 * static_cast<double>(r) * 2.3e-16;
          EXPECT_LT((q.transpose() * q - MatrixXd::Identity(r, r)).norm(), tolerance) << where;
          EXPECT_LE((q * lambda.asDiagonal() * q.transpose() - matrix).norm(), tolerance * matrix.norm()) << where;
          EXPECT_LE((sorted - lambda_alone).norm(), tolerance * matrix.norm()) << where;
        }
      }
    }
  }
}

/// Beside a largest entry of 1, entries whose squares, or their reciprocals, are no numbers any more.
TEST(Kernels, EigenvaluesOfEntriesWhoseSquaresVanish) {
  for (const Table* table : tables()) {
    for (const int64_t r : {3, 4, 8, 16}) {
      const int64_t stride = r + 1;
      std::vector<MatrixXd> matrices;
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        MatrixXd matrix = MatrixXd::Identity(r, r);
        for (int64_t i = 2; i < r; ++i)
          matrix(0, i) = matrix(i, 0) = std::pow(10.0, -148.0 - 2.0 * static_cast<double>(lane));
        matrices.push_back(matrix);
      }
      Aligned work = lanes_of(matrices, stride), again = lanes_of(matrices, stride), vectors(r * stride * kLanes);
      Aligned values(r * kLanes), alone(r * kLanes), space(eigh_work(r) * kLanes);
      table->eigh(work.data(), r, stride, values.data(), space.data(), vectors.data());
      table->eigh(again.data(), r, stride, alone.data(), space.data(), nullptr);
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const MatrixXd q = matrix_of(vectors, r, stride, lane);
        EXPECT_LT((q.transpose() * q - MatrixXd::Identity(r, r)).norm(), 1e-14) << table->name << ", lane " << lane;
        for (int64_t i = 0; i < r; ++i) {
          EXPECT_NEAR(values[i * kLanes + lane], 1, 1e-14) << table->name << ", lane " << lane;
          EXPECT_NEAR(alone[i * kLanes + lane], 1, 1e-14) << table->name << ", lane " << lane;
        }
      }
    }
  }
}

TEST(Kernels, ProductsOfLanesAndTheirTransposes) {
  std::srand(2);
  for (const Table* table : tables()) {
    for (const int64_t r : {1, 2, 3, 4, 6, 8, 9, 16, 31}) {
      const int64_t stride = r + 1;
      std::vector<MatrixXd> x, y;
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        x.push_back(MatrixXd::Random(r, r));
        y.push_back(MatrixXd::Random(r, r));
      }
      const Aligned left = lanes_of(x, stride), right = lanes_of(y, stride);
      Aligned out(r * stride * kLanes);
      for (const bool transposed_left : {false, true}) {
        for (const bool transposed_right : {false, true}) {
          const Operand a = transposed_left ? Operand{left.data(), 1, stride} : Operand{left.data(), stride, 1};
          const Operand b = transposed_right ? Operand{right.data(), 1, stride} : Operand{right.data(), stride, 1};
          table->multiply(a, b, r, stride, false, out.data());
          for (int64_t lane = 0; lane < kLanes; ++lane) {
            MatrixXd p = x[static_cast<size_t>(lane)], q = y[static_cast<size_t>(lane)];
            if (transposed_left) p.transposeInPlace();
            if (transposed_right) q.transposeInPlace();
            EXPECT_LT((matrix_of(out, r, stride, lane) - p * q).norm(), 1e-13 * static_cast<double>(r)) << table->name;
          }
        }
      }
    }
  }
}

TEST(Kernels, OfASymmetricProductHalfIsMirrored) {
  std::srand(3);
  for (const Table* table : tables()) {
    for (const int64_t r : {1, 2, 3, 4, 7, 8, 16, 31}) {
      const int64_t stride = r + 1;
      std::vector<MatrixXd> x;
      for (int64_t lane = 0; lane < kLanes; ++lane) x.push_back(MatrixXd::Random(r, r));
      const Aligned lanes = lanes_of(x, stride);
      Aligned out(r * stride * kLanes), whole(r * stride * kLanes);
      const Operand plain = {lanes.data(), stride, 1}, transposed = {lanes.data(), 1, stride};
      table->multiply(plain, transposed, r, stride, true, out.data());
      table->multiply(plain, transposed, r, stride, false, whole.data());
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const MatrixXd half = matrix_of(out, r, stride, lane), both = matrix_of(whole, r, stride, lane);
        EXPECT_EQ(half, half.transpose()) << table->name << ", rank " << r;
        EXPECT_EQ(MatrixXd(half.triangularView<Eigen::Upper>()), MatrixXd(both.triangularView<Eigen::Upper>()))
            << table->name << ", rank " << r;
      }
    }
  }
}

struct Random {
  std::mt19937 generator{7};
  std::vector<float> floats(int64_t size) {
    std::normal_distribution<float> normal;
    std::vector<float> result(static_cast<size_t>(size));
    for (float& value : result) value = normal(generator);
    return result;
  }
};

/// A factor in memory as a tall matrix.
MatrixXd tall(const std::vector<float>& data, const Shape& shape) {
  MatrixXd result(shape.rows, shape.rank);
  for (int64_t row = 0; row < shape.rows; ++row)
    for (int64_t i = 0; i < shape.rank; ++i)
      result(row, i) = data[static_cast<size_t>(shape.rank_first ? i * shape.rows + row : row * shape.rank + i)];
  return result;
}

double relative(const MatrixXd& found, const MatrixXd& expected) {
  return (found - expected).norm() / (expected.norm() + 1e-300);
}

/// The matrix [rank, rank] that begins at `column` of sums [rank, columns].
MatrixXd part_of(const std::vector<double>& sums, int64_t rank, int64_t columns, int64_t column) {
  MatrixXd result(rank, rank);
  for (int64_t i = 0; i < rank; ++i)
    for (int64_t j = 0; j < rank; ++j) result(i, j) = sums[static_cast<size_t>(i * columns + column + j)];
  return result;
}

/// The same of a symmetric one at the first column, of which only i ≤ j is there.
MatrixXd symmetric(const std::vector<double>& sums, int64_t rank, int64_t columns) {
  return part_of(sums, rank, columns, 0).selfadjointView<Eigen::Upper>();
}

/// body(table, shape, blocks, where) for every instruction set, both factors, and these ranks and numbers of rows. In
/// the blocks is what an earlier step left there.
template <class Body>
void for_each_shape(const std::vector<int64_t>& ranks, const std::vector<int64_t>& rows, const Body& body) {
  for (const Table* table : tables()) {
    for (const bool rank_first : {true, false}) {
      for (const int64_t rank : ranks) {
        for (const int64_t n : rows) {
          Aligned memory(Blocks::size(rank));
          std::fill_n(memory.data(), Blocks::size(rank), 1e3);
          body(table, Shape{n, rank, rank_first}, Blocks::in(memory.data(), rank),
               std::string(table->name) + ", rank " + std::to_string(rank) + ", rows " + std::to_string(n) +
                   (rank_first ? ", A" : ", B"));
        }
      }
    }
  }
}

/// What one pass reads and leaves, and the same in Eigen.
struct Pass {
  Shape shape;
  std::vector<float> x, n, g;
  std::vector<double> weights, momentum_map, gradient_map;
  MatrixXd mm, gm;
  int64_t p;

  explicit Pass(const Shape& shape) : shape(shape), p(padded_rank(shape.rank)) {
    const auto [rows, rank, rank_first] = shape;
    Random random;
    x = random.floats(rows * rank), n = random.floats(rows * rank), g = random.floats(rows * rank);
    for (int64_t i = 0; i < rows; ++i) weights.push_back(0.5 + 0.01 * static_cast<double>(i));
    momentum_map.resize(static_cast<size_t>(p * p)), gradient_map.resize(momentum_map.size());
    mm.resize(rank, rank), gm.resize(rank, rank);
    const std::vector<float> entries = random.floats(2 * rank * rank);
    for (int64_t i = 0; i < rank; ++i)
      for (int64_t j = 0; j < rank; ++j) {
        const size_t e = static_cast<size_t>(i * rank + j), square = static_cast<size_t>(rank * rank);
        const size_t place = static_cast<size_t>(i * p + j);
        mm(i, j) = momentum_map[place] = entries[e];
        gm(i, j) = gradient_map[place] = entries[e + square];
      }
  }

  Maps maps(bool wide_momentum, bool wide_gradient) const {
    return {momentum_map.data(), gradient_map.data(), 0.1F, 0.1F, true, wide_momentum, wide_gradient, {}};
  }
};

/// The sums that a pass leaves.
struct Left {
  std::vector<double> products, weighted, squares;
  bool wide;

  Left(int64_t p, bool wide)
      : products(static_cast<size_t>(2 * p * p)), weighted(static_cast<size_t>(p)), squares(weighted), wide(wide) {}
  Sums sums() { return {products.data(), weighted.data(), squares.data(), wide}; }
};

/// The passes that every step makes, one after the other, against Eigen.
void check_passes(const Table* table, const Shape& shape, const Blocks& blocks, const std::string& where) {
  const auto [rows, rank, rank_first] = shape;
  const Pass pass(shape);
  const int64_t p = pass.p;
  const MatrixXd x0 = tall(pass.x, shape), n0 = tall(pass.n, shape), g0 = tall(pass.g, shape);

  std::vector<double> gram(static_cast<size_t>(p * p)), update_gram(gram);
  table->gram(pass.g.data(), nullptr, shape, 0, rows, blocks, gram.data(), nullptr);
  EXPECT_LT(relative(symmetric(gram, rank, p), g0.transpose() * g0), 1e-13) << where;

  const MatrixXd n1 = n0 * pass.mm + g0 * pass.gm, x1 = 0.9 * x0 - 0.1 * n1;
  const Maps mixed = pass.maps(false, true);
  table->update_gram(pass.n.data(), pass.g.data(), shape, 0, rows, mixed, blocks, update_gram.data());
  EXPECT_LT(relative(symmetric(update_gram, rank, p), n1.transpose() * n1), 1e-5) << where;

  for (const bool wide_cross : {true, false}) {
    if (!wide_cross && !sums_in_float(shape.rank)) continue;
    for (const auto& [wide_momentum, wide_gradient] : {std::pair(true, true), {false, true}, {false, false}}) {
      std::vector<float> x = pass.x, n = pass.n;
      Left left(p, wide_cross);
      table->apply(x.data(), n.data(), pass.g.data(), pass.weights.data(), shape, 0, rows,
                   pass.maps(wide_momentum, wide_gradient), blocks, left.sums());
      // In double all but the result's own rounding is exact.
      EXPECT_LT(relative(tall(n, shape), n1), wide_momentum && wide_gradient ? 2e-7 : 1e-5) << where;
      EXPECT_LT(relative(tall(x, shape), x1), 1e-5) << where;
      const MatrixXd x2 = tall(x, shape), n2 = tall(n, shape);
      EXPECT_LT(relative(symmetric(left.products, rank, 2 * p), x2.transpose() * x2), 1e-13) << where;
      const MatrixXd cross = part_of(left.products, rank, 2 * p, p), of_columns = x2.transpose() * n2;
      const double exact = relative(cross, of_columns);
      if (wide_cross || table == &plain::table) {
        EXPECT_LT(exact, 1e-12) << where;
      } else {  // each entry to the round-off of what it sums
        const MatrixXd most = x2.colwise().norm().transpose() * n2.colwise().norm();
        EXPECT_LT(((cross - of_columns).array() / most.array()).abs().maxCoeff(), 6e-7) << where;
        if (rows >= 16) {
          EXPECT_GT(exact, 1e-12) << where << ": not in float?";
        }
      }
      Eigen::RowVectorXd sums = Eigen::RowVectorXd::Zero(rank);
      for (int64_t row = 0; row < rows; ++row) sums += pass.weights[static_cast<size_t>(row)] * x2.row(row);
      for (int64_t i = 0; i < rank; ++i) {
        EXPECT_NEAR(left.weighted[static_cast<size_t>(i)], sums(i), 1e-10) << where;
        if (!sums_in_float(shape.rank)) continue;
        const double square = n2.col(i).squaredNorm();
        EXPECT_NEAR(left.squares[static_cast<size_t>(i)], square, 1e-6 * square) << where;
      }
      for (size_t i = static_cast<size_t>(rank); i < static_cast<size_t>(p); ++i)
        EXPECT_TRUE(left.weighted[i] == 0 && left.squares[i] == 0) << where;

      // What act 3 leaves is bit for bit what reading the rows again gives: a resumed run depends on it.
      Left again(p, wide_cross);
      table->sum_rows(x.data(), n.data(), pass.weights.data(), shape, 0, rows, blocks, again.sums());
      EXPECT_EQ(left.products, again.products) << where;
      EXPECT_EQ(left.weighted, again.weighted) << where;
      EXPECT_EQ(left.squares, again.squares) << where;

      // A factor without a gradient rests; only its momentum is carried along.
      std::vector<float> resting_x = x, resting_n = n;
      Maps resting = pass.maps(wide_momentum, wide_gradient);
      resting.has_gradient = false;
      table->apply(resting_x.data(), resting_n.data(), nullptr, pass.weights.data(), shape, 0, rows, resting, blocks,
                   {});
      EXPECT_EQ(resting_x, x) << where;
      EXPECT_LT(relative(tall(resting_n, shape), n2 * pass.mm), 1e-5) << where;
    }
  }

  // Without a momentum XᵀN is 0.
  Left alone(p, false);
  if (!sums_in_float(shape.rank)) alone.wide = true;
  table->sum_rows(pass.x.data(), nullptr, pass.weights.data(), shape, 0, rows, blocks, alone.sums());
  EXPECT_LT(relative(symmetric(alone.products, rank, 2 * p), x0.transpose() * x0), 1e-13) << where;
  EXPECT_EQ(part_of(alone.products, rank, 2 * p, p), MatrixXd::Zero(rank, rank)) << where;
}

TEST(Kernels, PassesOverTheRows) {
  for_each_shape({1, 3, 4, 7, 8, 9, 12, 13, 16, 20, 32, 33, 64}, {1, 5, 16, 63, 64, 300}, check_passes);
}

/// A factor that rests keeps its sums, and a run that is resumed forms them again, perhaps with XᵀN in the other type.
TEST(Kernels, WhatXtNIsSummedInChangesNoBitOfXtX) {
  const auto check = [](const Table* table, const Shape& shape, const Blocks& blocks, const std::string& where) {
    const Pass pass(shape);
    const int64_t rank = shape.rank, p = pass.p;
    Left wide(p, true), narrow(p, false);
    for (Left* left : {&wide, &narrow})
      table->sum_rows(pass.x.data(), pass.n.data(), pass.weights.data(), shape, 0, shape.rows, blocks, left->sums());
    EXPECT_EQ(symmetric(wide.products, rank, 2 * p), symmetric(narrow.products, rank, 2 * p)) << where;
  };
  for_each_shape({8, 13, 16, 20, 28, 32, 33, 64}, {5, 63, 300}, check);
}

/// The same passes where rows have second moments of their own.
void check_row_equilibration(const Table* table, const Shape& shape, const Blocks& blocks, const std::string& where) {
  const auto [rows, rank, rank_first] = shape;
  const int64_t p = padded_rank(rank);
  Random random;
  std::vector<float> n = random.floats(rows * rank), g = random.floats(rows * rank);
  const int64_t silent = rows > 4 ? 3 : rows;  // a row that has no gradient, and never had one
  std::vector<float> moments(static_cast<size_t>(rows)), nothing(n.size());
  for (size_t k = 0; k < moments.size(); ++k) moments[k] = 0.01F + 0.7F * static_cast<float>(k % 11);
  moments[0] = 0;  // its first gradient comes now
  if (silent < rows) {
    moments[static_cast<size_t>(silent)] = 0;
    for (int64_t i = 0; i < rank; ++i) g[static_cast<size_t>(rank_first ? i * rows + silent : silent * rank + i)] = 0;
  }
  std::vector<double> momentum_map(static_cast<size_t>(p * p)), gradient_map(momentum_map), plain_map(momentum_map);
  MatrixXd gm(rank, rank), pm(rank, rank);
  for (MatrixXd* map : {&gm, &pm}) {
    const std::vector<float> entries = random.floats(rank * rank);
    for (int64_t e = 0; e < rank * rank; ++e) (*map)(e / rank, e % rank) = entries[static_cast<size_t>(e)];
  }
  for (int64_t i = 0; i < rank; ++i)
    for (int64_t j = 0; j < rank; ++j) {
      momentum_map[static_cast<size_t>(i * p + j)] = i == j ? 0.5 : 0;
      gradient_map[static_cast<size_t>(i * p + j)] = gm(i, j);
      plain_map[static_cast<size_t>(i * p + j)] = pm(i, j);
    }
  const MatrixXd g0 = tall(g, shape), n0 = tall(n, shape);
  const double decay = 0.75;
  Eigen::VectorXd next(rows), scale(rows), known_scale(rows);
  for (int64_t k = 0; k < rows; ++k) {
    const double known = moments[static_cast<size_t>(k)];
    known_scale(k) = known > 0 ? 1 / std::sqrt(known) : 1;
    next(k) = decay * known + (1 - decay) * (g0.row(k) * pm).squaredNorm() / static_cast<double>(rank);
    scale(k) = next(k) > 0 ? 1 / std::sqrt(next(k)) : 0;
  }

  std::vector<double> plain(static_cast<size_t>(p * p)), equilibrated(plain), of_update(plain);
  table->gram(g.data(), moments.data(), shape, 0, rows, blocks, plain.data(), equilibrated.data());
  const MatrixXd scaled = known_scale.asDiagonal() * g0;
  EXPECT_LT(relative(symmetric(plain, rank, p), g0.transpose() * g0), 1e-13) << where;
  EXPECT_LT(relative(symmetric(equilibrated, rank, p), scaled.transpose() * scaled), 1e-13) << where;

  // An update is as good as floats are. Moments are rounded to float, and so is what they are the squares of.
  const MatrixXd n1 = 0.5 * n0 + scale.asDiagonal() * g0 * gm;
  Maps maps = {
      momentum_map.data(), gradient_map.data(), 0, 0.1F, true, false, true, {plain_map.data(), moments.data(), decay}};
  const std::vector<float> before = moments;
  table->update_gram(n.data(), g.data(), shape, 0, rows, maps, blocks, of_update.data());
  EXPECT_LT(relative(symmetric(of_update, rank, p), n1.transpose() * n1), 2e-6) << where;
  EXPECT_EQ(moments, before) << where;

  maps.rows.next = moments.data();
  std::vector<double> weights(moments.size());
  Left left(p, true);
  table->apply(nothing.data(), n.data(), g.data(), weights.data(), shape, 0, rows, maps, blocks, left.sums());
  EXPECT_LT(relative(tall(n, shape), n1), 1e-6) << where;
  for (int64_t k = 0; k < rows; ++k)
    EXPECT_NEAR(moments[static_cast<size_t>(k)], next(k), 2e-7 * next(k)) << where << ", row " << k;
}

TEST(Kernels, RowEquilibration) {
  for_each_shape({1, 3, 4, 7, 8, 16, 20, 33, 64}, {1, 5, 16, 63, 300}, check_row_equilibration);
}

}  // namespace
}  // namespace lora_rite::test
