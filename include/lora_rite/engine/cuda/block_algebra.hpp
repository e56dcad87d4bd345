#pragma once

#include <cstdint>
#include <utility>

#include "lora_rite/engine/cuda/jacobi.hpp"
#include "lora_rite/engine/cuda/number.hpp"
#include "lora_rite/engine/cuda/pool.hpp"
#include "lora_rite/rule/vocabulary.hpp"

/// The rule's vocabulary for one matrix that a team of threads shares.
namespace lora_rite::cuda {

/// r numbers in a slot of the pool.
template <class Pool>
class Values {
 public:
  Values() = default;
  LORA_RITE_FUNCTION explicit Values(Pool& pool) : pool_(&pool), slot_(pool.vectors.acquire(Pool::kVectors)) {}
  LORA_RITE_FUNCTION Values(const Values& other) : pool_(other.pool_), slot_(other.slot_) {
    if (pool_ != nullptr) pool_->vectors.share(slot_);
  }
  LORA_RITE_FUNCTION Values(Values&& other) noexcept : pool_(other.pool_), slot_(other.slot_) { other.pool_ = nullptr; }
  LORA_RITE_FUNCTION Values& operator=(Values other) {
    exchange(pool_, other.pool_);
    exchange(slot_, other.slot_);
    return *this;
  }
  LORA_RITE_FUNCTION ~Values() {
    if (pool_ != nullptr) pool_->vectors.release(slot_);
  }

  LORA_RITE_FUNCTION Pool& pool() const { return *pool_; }
  LORA_RITE_FUNCTION double* data() const { return pool_->vector(slot_); }
  LORA_RITE_FUNCTION double at(int i) const { return data()[i]; }

 private:
  Pool* pool_ = nullptr;
  int slot_ = 0;
};

/// An r×r matrix in a slot of the pool, or a view of global memory. Written once, when it is made; copies and
/// transposes share the slot.
template <class Pool>
class Matrix {
 public:
  Matrix() = default;
  LORA_RITE_FUNCTION explicit Matrix(Pool& pool)
      : pool_(&pool), slot_(pool.matrices.acquire(Pool::kMatrices)), data_(pool.matrix(slot_)) {}
  /// A view of r×r numbers that lie row by row. Nobody may write to them while a matrix of this team lives.
  LORA_RITE_FUNCTION Matrix(Pool& pool, const double* rows) : pool_(&pool), data_(rows), row_(pool.rank()) {}
  LORA_RITE_FUNCTION Matrix(const Matrix& other)
      : pool_(other.pool_), slot_(other.slot_), data_(other.data_), row_(other.row_), column_(other.column_) {
    if (owns()) pool_->matrices.share(slot_);
  }
  LORA_RITE_FUNCTION Matrix(Matrix&& other) noexcept
      : pool_(other.pool_), slot_(other.slot_), data_(other.data_), row_(other.row_), column_(other.column_) {
    other.pool_ = nullptr;
  }
  LORA_RITE_FUNCTION Matrix& operator=(Matrix other) {
    exchange(pool_, other.pool_);
    exchange(slot_, other.slot_);
    exchange(data_, other.data_);
    exchange(row_, other.row_);
    exchange(column_, other.column_);
    return *this;
  }
  LORA_RITE_FUNCTION ~Matrix() {
    if (owns()) pool_->matrices.release(slot_);
  }

  LORA_RITE_FUNCTION bool defined() const { return pool_ != nullptr; }
  LORA_RITE_FUNCTION Pool& pool() const { return *pool_; }
  LORA_RITE_FUNCTION double at(int i, int j) const { return data_[i * row_ + j * column_]; }

  LORA_RITE_FUNCTION View view() const { return {data_, row_, column_}; }

  /// For whoever makes it.
  LORA_RITE_FUNCTION double* rows() const { return pool_->matrix(slot_); }

  LORA_RITE_FUNCTION Matrix transposed() const {
    Matrix result(*this);
    exchange(result.row_, result.column_);
    return result;
  }

 private:
  LORA_RITE_FUNCTION bool owns() const { return pool_ != nullptr && slot_ >= 0; }

  Pool* pool_ = nullptr;
  int slot_ = -1;
  const double* data_ = nullptr;
  int row_ = Pool::kStride;
  int column_ = 1;
};

// --- Scalars, from every thread for itself ---------------------------------------------------------------------------

template <class Pool>
LORA_RITE_FUNCTION int64_t rank_of(const Matrix<Pool>& a) {
  return a.pool().rank();
}

template <class Pool>
LORA_RITE_FUNCTION Number trace_of(const Matrix<Pool>& a) {
  double sum = 0;
  for (int i = 0; i < a.pool().rank(); ++i) sum += a.at(i, i);
  return {sum};
}

template <class Pool>
LORA_RITE_FUNCTION Number smallest(const Values<Pool>& values) {
  double result = values.at(0);
  for (int i = 1; i < values.pool().rank(); ++i) result = values.at(i) < result ? values.at(i) : result;
  return {result};
}

template <class Pool>
LORA_RITE_FUNCTION Number largest_difference(const Values<Pool>& a, const Values<Pool>& b) {
  double result = a.at(0) - b.at(0);
  for (int i = 1; i < a.pool().rank(); ++i) {
    const double difference = a.at(i) - b.at(i);
    result = difference > result ? difference : result;
  }
  return {result};
}

template <class Pool, class Question>
LORA_RITE_FUNCTION bool surely(const Matrix<Pool>&, const Question& question) {
  return question().value != 0;
}

// --- Matrices --------------------------------------------------------------------------------------------------------

/// The matrix of f(i, j).
template <class Pool, class Function>
LORA_RITE_FUNCTION Matrix<Pool> matrix_of(Pool& pool, const Function& function) {
  Matrix<Pool> result(pool);
  double* to = result.rows();
  pool.for_elements([&](int i, int j) { to[i * Pool::kStride + j] = function(i, j); });
  return result;
}

template <class Pool>
LORA_RITE_FUNCTION Matrix<Pool> operator+(const Matrix<Pool>& a, const Matrix<Pool>& b) {
  return matrix_of(a.pool(), [&](int i, int j) { return a.at(i, j) + b.at(i, j); });
}
template <class Pool>
LORA_RITE_FUNCTION Matrix<Pool> operator*(const Matrix<Pool>& a, Number x) {
  return matrix_of(a.pool(), [&](int i, int j) { return a.at(i, j) * x.value; });
}
template <class Pool>
LORA_RITE_FUNCTION Matrix<Pool> operator*(Number x, const Matrix<Pool>& a) {
  return a * x;
}
template <class Pool>
LORA_RITE_FUNCTION Matrix<Pool> operator*(const Matrix<Pool>& a, double x) {
  return a * Number(x);
}
template <class Pool>
LORA_RITE_FUNCTION Matrix<Pool> transpose(const Matrix<Pool>& a) {
  return a.transposed();
}
template <class Pool>
LORA_RITE_FUNCTION Matrix<Pool> symmetrized(const Matrix<Pool>& a) {
  return matrix_of(a.pool(), [&](int i, int j) { return 0.5 * (a.at(i, j) + a.at(j, i)); });
}
template <class Pool>
LORA_RITE_FUNCTION Matrix<Pool> identity_like(const Matrix<Pool>& a) {
  return matrix_of(a.pool(), [](int i, int j) { return i == j ? 1.0 : 0.0; });
}
template <class Pool>
LORA_RITE_FUNCTION Matrix<Pool> choose(Number condition, const Matrix<Pool>& yes, const Matrix<Pool>& no) {
  return condition.value != 0 ? yes : no;
}

/// Squares of 2×2: half of the loads.
template <class Pool>
LORA_RITE_OUT_OF_LINE LORA_RITE_FUNCTION Matrix<Pool> matmul(const Matrix<Pool>& a, const Matrix<Pool>& b) {
  Pool& pool = a.pool();
  Matrix<Pool> result(pool);
  double* to = result.rows();
  constexpr int kHalf = Pool::kRank / 2;
  const int rank = pool.rank();
  pool.for_each(kHalf * kHalf, [&](int e) {
    const int i = 2 * (e / kHalf), j = 2 * (e % kHalf);
    if (i >= rank || j >= rank) return;
    const int i1 = i + 1 < rank ? i + 1 : i, j1 = j + 1 < rank ? j + 1 : j;
    double x00 = 0, x01 = 0, x10 = 0, x11 = 0;
    for (int k = 0; k < rank; ++k) {
      const double a0 = a.at(i, k), a1 = a.at(i1, k), b0 = b.at(k, j), b1 = b.at(k, j1);
      x00 += a0 * b0, x01 += a0 * b1, x10 += a1 * b0, x11 += a1 * b1;
    }
    to[i * Pool::kStride + j] = x00, to[i * Pool::kStride + j1] = j1 > j ? x01 : x00;
    if (i1 > i) to[i1 * Pool::kStride + j] = x10, to[i1 * Pool::kStride + j1] = j1 > j ? x11 : x10;
  });
  return result;
}

template <class Pool>
LORA_RITE_FUNCTION Matrix<Pool> scale_columns(const Matrix<Pool>& a, const Values<Pool>& d) {
  return matrix_of(a.pool(), [&](int i, int j) { return a.at(i, j) * d.at(j); });
}
template <class Pool>
LORA_RITE_FUNCTION Matrix<Pool> scale_rows_by_norms(const Matrix<Pool>& gram, const Matrix<Pool>& a) {
  return matrix_of(a.pool(), [&](int i, int j) {
    const double square = gram.at(i, i);
    return std::sqrt(square > 0 ? square : 0.0) * a.at(i, j);
  });
}

/// S^{-1} by sweeping pivots (Goodnight 1979): positive definite matrices need no order.
template <class Pool>
LORA_RITE_FUNCTION Matrix<Pool> positive_inverse(const Matrix<Pool>& matrix) {
  Pool& pool = matrix.pool();
  const int rank = pool.rank();
  Matrix<Pool> result = matrix_of(pool, [&](int i, int j) { return matrix.at(i, j); });
  double* a = result.rows();
  const Values<Pool> row(pool), column(pool);
  double *of_row = row.data(), *of_column = column.data();
  for (int k = 0; k < rank; ++k) {
    pool.for_each(rank, [&](int i) { of_row[i] = a[k * Pool::kStride + i], of_column[i] = a[i * Pool::kStride + k]; });
    pool.for_elements([&](int i, int j) {
      double& x = a[i * Pool::kStride + j];
      const double pivot = of_row[k];
      if (i == k && j == k) {
        x = 1 / pivot;
      } else if (i == k) {
        x = of_row[j] / pivot;
      } else if (j == k) {
        x = -of_column[i] / pivot;
      } else {
        x -= of_column[i] * (of_row[j] / pivot);
      }
    });
  }
  return result;
}

// --- Eigenvalues and rows of numbers ---------------------------------------------------------------------------------

/// The r numbers f(i).
template <class Pool, class Function>
LORA_RITE_FUNCTION Values<Pool> values_of(Pool& pool, const Function& function) {
  Values<Pool> result(pool);
  double* to = result.data();
  pool.for_each(pool.rank(), [&](int i) { to[i] = function(i); });
  return result;
}

template <class Pool, class Function>
LORA_RITE_FUNCTION Values<Pool> map_values(const Values<Pool>& values, const Function& function) {
  double largest = 0;
  for (int i = 0; i < values.pool().rank(); ++i) largest = values.at(i) > largest ? values.at(i) : largest;
  const Number most(largest);
  return values_of(values.pool(), [&](int i) { return Number(function(Number(values.at(i)), most)).value; });
}
template <class Pool, class Function>
LORA_RITE_FUNCTION Values<Pool> map_values(const Values<Pool>& values, const Values<Pool>& others,
                                           const Function& function) {
  return values_of(values.pool(),
                   [&](int i) { return Number(function(Number(values.at(i)), Number(others.at(i)))).value; });
}
template <class Pool>
LORA_RITE_FUNCTION Values<Pool> operator*(const Values<Pool>& a, const Values<Pool>& b) {
  return values_of(a.pool(), [&](int i) { return a.at(i) * b.at(i); });
}
template <class Pool>
LORA_RITE_FUNCTION Values<Pool> squared_column_norms(const Matrix<Pool>& a) {
  return values_of(a.pool(), [&](int j) {
    double sum = 0;
    for (int i = 0; i < a.pool().rank(); ++i) sum += a.at(i, j) * a.at(i, j);
    return sum;
  });
}
template <class Pool>
LORA_RITE_FUNCTION Number squared_norm_of_scaled_rows(const Matrix<Pool>& gram, const Matrix<Pool>& a) {
  const Values<Pool> of_rows = values_of(a.pool(), [&](int i) {
    double sum = 0;
    for (int j = 0; j < a.pool().rank(); ++j) sum += a.at(i, j) * a.at(i, j);
    const double square = gram.at(i, i);
    return square > 0 ? square * sum : 0.0;
  });
  double sum = 0;
  for (int i = 0; i < a.pool().rank(); ++i) sum += of_rows.at(i);
  return {sum};
}

template <class Pool>
LORA_RITE_FUNCTION Spectrum<Matrix<Pool>, Values<Pool>> eigh(const Matrix<Pool>& symmetric) {
  Pool& pool = symmetric.pool();
  const double scale = diagonalize<true>(pool, symmetric.view());
  const double *a = pool.work(0), *q = pool.work(1);
  Spectrum<Matrix<Pool>, Values<Pool>> result;
  result.values = values_of(pool, [&](int i) { return scale * a[i * Pool::kStride + i]; });
  result.vectors = matrix_of(pool, [&](int i, int j) { return q[i * Pool::kStride + j]; });
  return result;
}

/// The same numbers, ascending.
template <class Pool>
LORA_RITE_FUNCTION Values<Pool> ascending(const Values<Pool>& values) {
  Pool& pool = values.pool();
  Values<Pool> result(pool);
  double* to = result.data();
  pool.for_each(pool.rank(), [&](int i) {
    int place = 0;
    for (int k = 0; k < pool.rank(); ++k)
      if (values.at(k) < values.at(i) || (!(values.at(k) > values.at(i)) && k < i)) ++place;
    to[place] = values.at(i);
  });
  return result;
}

template <class Pool>
LORA_RITE_FUNCTION Values<Pool> eigenvalues(const Matrix<Pool>& symmetric) {
  Pool& pool = symmetric.pool();
  const double scale = diagonalize<false>(pool, symmetric.view());
  const double* a = pool.work(0);
  return ascending(values_of(pool, [&](int i) { return scale * a[i * Pool::kStride + i]; }));
}

template <class Pool>
LORA_RITE_FUNCTION Matrix<Pool> orthogonal_factor(const Matrix<Pool>& matrix) {
  Pool& pool = matrix.pool();
  double *r = pool.work(0), *o = pool.work(1);
  constexpr int kStride = Pool::kStride;
  pool.for_elements([&](int i, int j) { r[i * kStride + j] = matrix.at(i, j); });
  householder(pool, r, o);
  return matrix_of(pool,
                   [&](int i, int j) { return r[j * kStride + j] < 0 ? -o[i * kStride + j] : o[i * kStride + j]; });
}

}  // namespace lora_rite::cuda

template <class Pool>
struct lora_rite::ScalarOf<lora_rite::cuda::Matrix<Pool>> {
  using type = lora_rite::cuda::Number;
};
