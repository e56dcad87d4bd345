#pragma once

#include <Eigen/Core>
#include <Eigen/Eigenvalues>
#include <cmath>
#include <cstdint>

#include "lora_rite/engine/host/kernels/types.hpp"

/// The host engine's loops as formulas, in Eigen and double: what runs where the compiler has no vector extensions, and
/// what the tests hold the other kernels against.
namespace lora_rite::host::kernels::plain {

using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using FloatMatrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Stride = Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>;

/// Rows [first, end) of a factor as a matrix, where they lie.
template <class Float>
auto rows_of(Float* data, const Shape& shape, int64_t first, int64_t end) {
  using View = std::conditional_t<std::is_const_v<Float>, const FloatMatrix, FloatMatrix>;
  const int64_t row = shape.rank_first ? 1 : shape.rank, column = shape.rank_first ? shape.rows : 1;
  return Eigen::Map<View, 0, Stride>(data + first * row, end - first, shape.rank, Stride(row, column));
}

/// The r×r part of the padded array [p][columns] that begins at `data`.
template <class Number>
auto square_of(Number* data, int64_t rank, int64_t columns) {
  using Plain = Eigen::Matrix<std::remove_const_t<Number>, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using View = std::conditional_t<std::is_const_v<Number>, const Plain, Plain>;
  return Eigen::Map<View, 0, Eigen::OuterStride<>>(data, rank, rank, Eigen::OuterStride<>(columns));
}

/// row^{-1/2}, `unseen` for a row that never had a gradient.
inline double row_scale(double row, double unseen) { return row > 0 ? 1 / std::sqrt(row) : unseen; }

inline void gram(const float* data, const float* rows, const Shape& shape, int64_t first, int64_t end, const Blocks&,
                 double* products, double* equilibrated) {
  const int64_t p = padded_rank(shape.rank);
  Matrix g = rows_of(data, shape, first, end).template cast<double>();
  square_of(products, shape.rank, p) += g.transpose() * g;
  if (rows == nullptr) return;
  for (int64_t row = 0; row < end - first; ++row) g.row(row) *= row_scale(rows[first + row], 1);
  square_of(equilibrated, shape.rank, p) += g.transpose() * g;
}

inline void sum_rows(const float* factor, const float* momentum, const double* weights, const Shape& shape,
                     int64_t first, int64_t end, const Blocks&, const Sums& sums) {
  const int64_t p = padded_rank(shape.rank);
  const Matrix x = rows_of(factor, shape, first, end).template cast<double>();
  square_of(sums.products, shape.rank, 2 * p) += x.transpose() * x;
  if (momentum != nullptr) {
    const Matrix n = rows_of(momentum, shape, first, end).template cast<double>();
    square_of(sums.products + p, shape.rank, 2 * p) += x.transpose() * n;
    Eigen::Map<Eigen::RowVectorXd>(sums.squares, shape.rank) += n.colwise().squaredNorm();
  }
  Eigen::Map<Eigen::VectorXd>(sums.weighted, shape.rank) +=
      x.transpose() * Eigen::Map<const Eigen::VectorXd>(weights + first, end - first);
}

inline Matrix equilibrated(const float* gradient, const Shape& shape, int64_t first, int64_t end,
                           const RowMoments& rows) {
  Matrix g = rows_of(gradient, shape, first, end).template cast<double>();
  if (rows.map == nullptr) return g;
  const Matrix s = g * square_of(rows.map, shape.rank, padded_rank(shape.rank));
  for (int64_t row = 0; row < end - first; ++row) {
    const double fresh = s.row(row).squaredNorm() / static_cast<double>(shape.rank);
    const double moment = rows.decay * rows.moments[first + row] + (1 - rows.decay) * fresh;
    if (rows.next != nullptr) rows.next[first + row] = static_cast<float>(moment);
    g.row(row) *= row_scale(moment, 0);
  }
  return g;
}

inline Matrix updated(const float* momentum, const float* gradient, const Shape& shape, int64_t first, int64_t end,
                      const Maps& maps) {
  const int64_t p = padded_rank(shape.rank);
  Matrix n = rows_of(momentum, shape, first, end).template cast<double>() * square_of(maps.momentum, shape.rank, p);
  if (maps.has_gradient)
    n += equilibrated(gradient, shape, first, end, maps.rows) * square_of(maps.gradient, shape.rank, p);
  return n;
}

inline void apply(float* factor, float* momentum, const float* gradient, const double* weights, const Shape& shape,
                  int64_t first, int64_t end, const Maps& maps, const Blocks& blocks, const Sums& sums) {
  auto n = rows_of(momentum, shape, first, end);
  n = updated(momentum, gradient, shape, first, end, maps).cast<float>();
  if (!maps.has_gradient) return;
  auto x = rows_of(factor, shape, first, end);
  x = (x - (maps.rate * n + maps.decay * x)).eval();
  sum_rows(factor, momentum, weights, shape, first, end, blocks, sums);
}

inline void update_gram(const float* momentum, const float* gradient, const Shape& shape, int64_t first, int64_t end,
                        const Maps& maps, const Blocks&, double* products) {
  const Matrix n = updated(momentum, gradient, shape, first, end, maps);
  square_of(products, shape.rank, padded_rank(shape.rank)) += n.transpose() * n;
}

/// One of the matrices that lie in lanes.
inline auto lane_of(double* data, int64_t r, int64_t row_stride, int64_t column_stride, int64_t lane) {
  return Eigen::Map<Matrix, 0, Stride>(data + lane, r, r, Stride(row_stride * kLanes, column_stride * kLanes));
}

inline void multiply(const Operand& x, const Operand& y, int64_t r, int64_t stride, bool symmetric, double* out) {
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const Matrix product = lane_of(const_cast<double*>(x.data), r, x.row_stride, x.column_stride, lane) *
                           lane_of(const_cast<double*>(y.data), r, y.row_stride, y.column_stride, lane);
    auto result = lane_of(out, r, stride, 1, lane);
    if (symmetric) {
      result = product.selfadjointView<Eigen::Upper>();
    } else {
      result = product;
    }
  }
}

inline void eigh(double* matrices, int64_t r, int64_t stride, double* eigenvalues, double*, double* eigenvectors) {
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const Matrix matrix = lane_of(matrices, r, stride, 1, lane);
    const Eigen::SelfAdjointEigenSolver<Matrix> solver(
        matrix, eigenvectors != nullptr ? Eigen::ComputeEigenvectors : Eigen::EigenvaluesOnly);
    for (int64_t i = 0; i < r; ++i) eigenvalues[i * kLanes + lane] = solver.eigenvalues()[i];
    if (eigenvectors != nullptr) lane_of(eigenvectors, r, stride, 1, lane) = solver.eigenvectors().transpose();
  }
}

inline constexpr Table table = {"plain", gram, sum_rows, apply, update_gram, multiply, eigh};

}  // namespace lora_rite::host::kernels::plain
