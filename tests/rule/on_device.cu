// The rule as code for a GPU: act 2 of a factor in one thread, over matrices of its own. The test asks Clang for PTX,
// which needs no CUDA: what NVIDIA's headers would declare stands here. Nothing runs; a function that only a host has
// is an error.

#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#define __host__ __attribute__((host))
#define __device__ __attribute__((device))
#define __global__ __attribute__((global))
#define __CUDACC__
#define LORA_RITE_DEVICE_RULE

namespace std {
__device__ double sqrt(double x) { return __nvvm_sqrt_rn_d(x); }
}  // namespace std

#include "lora_rite/rule/vocabulary.hpp"

namespace lora_rite::on_device {

constexpr int kRank = 4;

/// A double that argument-dependent lookup finds functions for.
struct Number {
  double value = 0;
  __host__ __device__ Number() {}
  __host__ __device__ Number(double x) : value(x) {}
};

#define LORA_RITE_OPERATOR(op)                                                                     \
  __host__ __device__ inline Number operator op(Number a, Number b) { return a.value op b.value; } \
  __host__ __device__ inline Number operator op(double a, Number b) { return a op b.value; }       \
  __host__ __device__ inline Number operator op(Number a, double b) { return a.value op b; }
LORA_RITE_OPERATOR(+)
LORA_RITE_OPERATOR(-)
LORA_RITE_OPERATOR(*)
LORA_RITE_OPERATOR(/)
LORA_RITE_OPERATOR(>)
#undef LORA_RITE_OPERATOR

__host__ __device__ inline double root(double x) { return std::sqrt(x); }
__host__ __device__ inline Number sqrt(Number x) { return root(x.value); }
__host__ __device__ inline Number rsqrt(Number x) { return 1.0 / root(x.value); }
/// x^n for the whole powers that a test needs.
__host__ __device__ inline Number pow(double x, Number n) {
  double result = 1;
  for (int i = 0; i < static_cast<int>(n.value); ++i) result *= x;
  return result;
}
__host__ __device__ inline Number pow(Number x, double) { return x; }
__host__ __device__ inline Number reciprocal(Number x) { return 1.0 / x; }
__host__ __device__ inline Number at_least(Number x, Number y) { return x.value > y.value ? x : y; }
__host__ __device__ inline Number at_most(Number x, Number y) { return x.value < y.value ? x : y; }
__host__ __device__ inline Number choose(Number condition, Number yes, Number no) {
  return condition.value != 0 ? yes : no;
}

struct Values {
  Number at[kRank];
};

/// Four rows of four doubles; `defined` as at::Tensor has it.
struct Matrix {
  double at[kRank][kRank] = {};
  bool is_defined = false;
  __host__ __device__ bool defined() const { return is_defined; }
};

template <class Function>
__host__ __device__ Matrix matrix_of(const Function& function) {
  Matrix result;
  result.is_defined = true;
  for (int i = 0; i < kRank; ++i)
    for (int j = 0; j < kRank; ++j) result.at[i][j] = function(i, j);
  return result;
}

__host__ __device__ inline Matrix operator+(const Matrix& a, const Matrix& b) {
  return matrix_of([&](int i, int j) { return a.at[i][j] + b.at[i][j]; });
}
__host__ __device__ inline Matrix operator*(const Matrix& a, Number x) {
  return matrix_of([&](int i, int j) { return a.at[i][j] * x.value; });
}
__host__ __device__ inline Matrix matmul(const Matrix& a, const Matrix& b) {
  return matrix_of([&](int i, int j) {
    double sum = 0;
    for (int k = 0; k < kRank; ++k) sum += a.at[i][k] * b.at[k][j];
    return sum;
  });
}
__host__ __device__ inline Matrix transpose(const Matrix& a) {
  return matrix_of([&](int i, int j) { return a.at[j][i]; });
}
__host__ __device__ inline Matrix symmetrized(const Matrix& a) {
  return matrix_of([&](int i, int j) { return (a.at[i][j] + a.at[j][i]) / 2; });
}
__host__ __device__ inline Matrix identity_like(const Matrix&) {
  return matrix_of([](int i, int j) { return i == j ? 1.0 : 0.0; });
}
__host__ __device__ inline Matrix choose(Number condition, const Matrix& yes, const Matrix& no) {
  return condition.value != 0 ? yes : no;
}
__host__ __device__ inline int64_t rank_of(const Matrix&) { return kRank; }
__host__ __device__ inline Number trace_of(const Matrix& a) {
  double sum = 0;
  for (int i = 0; i < kRank; ++i) sum += a.at[i][i];
  return sum;
}
__host__ __device__ inline Matrix scale_columns(const Matrix& a, const Values& d) {
  return matrix_of([&](int i, int j) { return a.at[i][j] * d.at[j].value; });
}
__host__ __device__ inline Matrix scale_rows_by_norms(const Matrix& gram, const Matrix& a) {
  return matrix_of([&](int i, int j) { return root(gram.at[i][i]) * a.at[i][j]; });
}
__host__ __device__ inline Values squared_column_norms(const Matrix& a) {
  Values sums;
  for (int j = 0; j < kRank; ++j)
    for (int i = 0; i < kRank; ++i) sums.at[j] = sums.at[j] + a.at[i][j] * a.at[i][j];
  return sums;
}
__host__ __device__ inline Number squared_norm_of_scaled_rows(const Matrix& gram, const Matrix& a) {
  return trace_of(matmul(transpose(scale_rows_by_norms(gram, a)), scale_rows_by_norms(gram, a)));
}

/// Jacobi's rotations, a fixed number of sweeps.
__host__ __device__ inline Spectrum<Matrix, Values> eigh(const Matrix& symmetric) {
  Matrix a = symmetric, q = identity_like(a);
  for (int turn = 0; turn < 8 * kRank * kRank; ++turn) {
    const int i = turn % kRank, j = turn / kRank % kRank;
    if (i >= j || a.at[i][j] == 0) continue;
    const double theta = (a.at[j][j] - a.at[i][i]) / (2 * a.at[i][j]);
    const double t = (theta < 0 ? -1 : 1) / ((theta < 0 ? -theta : theta) + root(theta * theta + 1));
    const double c = 1 / root(t * t + 1), s = t * c;
    Matrix rotation = identity_like(a);
    rotation.at[i][i] = rotation.at[j][j] = c;
    rotation.at[i][j] = s, rotation.at[j][i] = -s;
    a = matmul(transpose(rotation), matmul(a, rotation));
    q = matmul(q, rotation);
  }
  Spectrum<Matrix, Values> spectrum;
  for (int i = 0; i < kRank; ++i) spectrum.values.at[i] = a.at[i][i];
  spectrum.vectors = q;
  return spectrum;
}
__host__ __device__ inline Values eigenvalues(const Matrix& symmetric) {
  Values values = eigh(symmetric).values;
  for (int i = 0; i < kRank; ++i)
    for (int j = i + 1; j < kRank; ++j)
      if (values.at[j].value < values.at[i].value) {
        const Number larger = values.at[i];
        values.at[i] = values.at[j], values.at[j] = larger;
      }
  return values;
}
__host__ __device__ inline Number smallest(const Values& values) {
  Number result = values.at[0];
  for (int i = 1; i < kRank; ++i) result = at_most(result, values.at[i]);
  return result;
}
__host__ __device__ inline Number largest_difference(const Values& a, const Values& b) {
  Number result = a.at[0] - b.at[0];
  for (int i = 1; i < kRank; ++i) result = at_least(result, a.at[i] - b.at[i]);
  return result;
}
template <class Function>
__host__ __device__ Values map_values(const Values& values, const Function& function) {
  Number largest = 0.0;
  for (int i = 0; i < kRank; ++i) largest = at_least(largest, values.at[i]);
  Values result;
  for (int i = 0; i < kRank; ++i) result.at[i] = function(values.at[i], largest);
  return result;
}
template <class Function>
__host__ __device__ Values map_values(const Values& values, const Values& others, const Function& function) {
  Values result;
  for (int i = 0; i < kRank; ++i) result.at[i] = function(values.at[i], others.at[i]);
  return result;
}
__host__ __device__ inline Values operator*(const Values& a, const Values& b) {
  return map_values(a, b, [](Number x, Number y) { return x * y; });
}
/// By Gauss and Jordan; positive definite matrices need no pivots.
__host__ __device__ inline Matrix positive_inverse(const Matrix& matrix) {
  Matrix a = matrix, inverse = identity_like(a);
  for (int k = 0; k < kRank; ++k) {
    const double scale = 1 / a.at[k][k];
    for (int j = 0; j < kRank; ++j) a.at[k][j] *= scale, inverse.at[k][j] *= scale;
    for (int i = 0; i < kRank; ++i) {
      const double share = i == k ? 0 : a.at[i][k];
      for (int j = 0; j < kRank; ++j) {
        a.at[i][j] -= share * a.at[k][j];
        inverse.at[i][j] -= share * inverse.at[k][j];
      }
    }
  }
  return inverse;
}

template <class Question>
__host__ __device__ bool surely(const Matrix&, const Question& question) {
  return question().value != 0;
}

}  // namespace lora_rite::on_device

template <>
struct lora_rite::ScalarOf<lora_rite::on_device::Matrix> {
  using type = lora_rite::on_device::Number;
};

#include "lora_rite/rule/decide.hpp"

namespace lora_rite::on_device {

/// Act 2 of one factor in a thread.
__global__ void decide(const rule::Statistics<Matrix>* statistics, const rule::Moments<Matrix>* old, double rows,
                       rule::Hyperparameters numbers, rule::Decision<Matrix>* result) {
  constexpr double kFloat = std::numeric_limits<float>::epsilon();
  rule::Unmagnified<Matrix> now = rule::unmagnify<PolarBasis>(*statistics, kFloat);
  if (numbers.max_relative_change > 0) {
    now.damping = rule::relative_change_damping(now.inverse_root, now.inverse_root, Number(numbers.lr), Number(rows),
                                                numbers.max_relative_change);
  }
  *result =
      rule::decide<rule::Eigenvalues>(*old, now, Number(rows), Number(1.0), Number(1.0), Number(0.0), kFloat, numbers);
}

}  // namespace lora_rite::on_device
