#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "lora_rite/engine/host/buffer_pool.hpp"
#include "lora_rite/engine/host/kernels/dispatch.hpp"
#include "lora_rite/rule/vocabulary.hpp"

/// The rule's vocabulary for a CPU: eight r×r matrices at once, each in a lane of vector registers.
/// A single small matrix would leave the arithmetic units idle between the steps of its eigensolver.
namespace lora_rite::host {

constexpr int64_t kLanes = kernels::kLanes;

/// One number for each of the eight matrices. As a flag: 0 is false.
struct Lanes {
  std::array<double, kLanes> lane;

  Lanes() : Lanes(0.0) {}
  Lanes(double value) { lane.fill(value); }  // NOLINT: a number is the same in all lanes
  double& operator[](int64_t i) { return lane[static_cast<size_t>(i)]; }
  double operator[](int64_t i) const { return lane[static_cast<size_t>(i)]; }
};

template <class Function>
Lanes map_lanes(const Function& function) {
  Lanes result;
  for (int64_t i = 0; i < kLanes; ++i) result[i] = function(i);
  return result;
}

inline Lanes operator+(const Lanes& a, const Lanes& b) {
  return map_lanes([&](int64_t i) { return a[i] + b[i]; });
}
inline Lanes operator-(const Lanes& a, const Lanes& b) {
  return map_lanes([&](int64_t i) { return a[i] - b[i]; });
}
inline Lanes operator*(const Lanes& a, const Lanes& b) {
  return map_lanes([&](int64_t i) { return a[i] * b[i]; });
}
inline Lanes operator/(const Lanes& a, const Lanes& b) {
  return map_lanes([&](int64_t i) { return a[i] / b[i]; });
}
inline Lanes operator>(const Lanes& a, const Lanes& b) {
  return map_lanes([&](int64_t i) { return a[i] > b[i] ? 1.0 : 0.0; });
}
inline Lanes sqrt(const Lanes& a) {
  return map_lanes([&](int64_t i) { return std::sqrt(a[i]); });
}
inline Lanes rsqrt(const Lanes& a) {
  return map_lanes([&](int64_t i) { return 1.0 / std::sqrt(a[i]); });
}
inline Lanes reciprocal(const Lanes& a) { return 1.0 / a; }
inline Lanes pow(double base, const Lanes& exponent) {
  return map_lanes([&](int64_t i) { return std::pow(base, exponent[i]); });
}
inline Lanes pow(const Lanes& base, double exponent) {
  return map_lanes([&](int64_t i) { return std::pow(base[i], exponent); });
}
inline Lanes at_least(const Lanes& a, const Lanes& b) {
  return map_lanes([&](int64_t i) { return a[i] > b[i] ? a[i] : b[i]; });
}
inline Lanes at_most(const Lanes& a, const Lanes& b) {
  return map_lanes([&](int64_t i) { return a[i] < b[i] ? a[i] : b[i]; });
}
inline Lanes choose(const Lanes& condition, const Lanes& yes, const Lanes& no) {
  return map_lanes([&](int64_t i) { return condition[i] != 0 ? yes[i] : no[i]; });
}

/// Eight r×r matrices.
class LaneMatrix {
 public:
  LaneMatrix() = default;
  explicit LaneMatrix(int64_t rank)
      : rank_(rank), stride_(rank % 32 == 0 ? rank + 1 : rank), buffer_(static_cast<size_t>(rank * stride_ * kLanes)) {}
  LaneMatrix(const LaneMatrix& other) { *this = other; }
  LaneMatrix& operator=(const LaneMatrix& other) {
    if (this == &other) return *this;
    if (buffer_.size() != other.buffer_.size()) buffer_ = other.defined() ? Buffer(other.buffer_.size()) : Buffer();
    rank_ = other.rank_;
    stride_ = other.stride_;
    if (defined()) std::memcpy(data(), other.data(), buffer_.size() * sizeof(double));
    return *this;
  }
  LaneMatrix(LaneMatrix&&) noexcept = default;
  LaneMatrix& operator=(LaneMatrix&&) noexcept = default;

  bool defined() const { return buffer_.data() != nullptr; }
  int64_t rank() const { return rank_; }
  int64_t stride() const { return stride_; }  ///< from row to row, in lanes; padded against cache conflicts
  double* data() const { return buffer_.data(); }
  double& at(int64_t i, int64_t j, int64_t lane) const { return data()[(i * stride_ + j) * kLanes + lane]; }
  Lanes get(int64_t i, int64_t j) const {
    Lanes result;
    std::memcpy(result.lane.data(), &at(i, j, 0), sizeof(result.lane));
    return result;
  }
  void set(int64_t i, int64_t j, const Lanes& value) const {
    std::memcpy(&at(i, j, 0), value.lane.data(), sizeof(value.lane));
  }
  kernels::Operand operand() const { return {data(), stride_, 1}; }

 private:
  int64_t rank_ = 0;
  int64_t stride_ = 0;
  Buffer buffer_;
};

/// Mᵀ, without moving anything. Holds a temporary alive, refers to everything else.
struct Transposed {
  LaneMatrix own;
  const LaneMatrix* other = nullptr;

  const LaneMatrix& matrix() const { return other != nullptr ? *other : own; }
  int64_t rank() const { return matrix().rank(); }
  Lanes get(int64_t i, int64_t j) const { return matrix().get(j, i); }
  kernels::Operand operand() const { return {matrix().data(), 1, matrix().stride()}; }
};

/// r eigenvalues of each of the eight matrices.
class LaneValues {
 public:
  LaneValues() = default;
  explicit LaneValues(int64_t rank) : rank_(rank), buffer_(static_cast<size_t>(rank * kLanes)) {}
  int64_t rank() const { return rank_; }
  double* data() const { return buffer_.data(); }
  double& at(int64_t i, int64_t lane) const { return data()[i * kLanes + lane]; }
  Lanes get(int64_t i) const {
    Lanes result;
    std::memcpy(result.lane.data(), data() + i * kLanes, sizeof(result.lane));
    return result;
  }
  void set(int64_t i, const Lanes& value) const {
    std::memcpy(data() + i * kLanes, value.lane.data(), sizeof(value.lane));
  }

 private:
  int64_t rank_ = 0;
  Buffer buffer_;
};

/// A matrix whose element (i, j) is function(i, j, lane).
template <class Function>
LaneMatrix make_matrix(int64_t rank, const Function& function) {
  LaneMatrix result(rank);
  for (int64_t i = 0; i < rank; ++i)
    for (int64_t j = 0; j < rank; ++j)
      for (int64_t lane = 0; lane < kLanes; ++lane) result.at(i, j, lane) = function(i, j, lane);
  return result;
}

inline int64_t rank_of(const LaneMatrix& matrix) { return matrix.rank(); }
inline Transposed transpose(const LaneMatrix& matrix) { return {{}, &matrix}; }
inline Transposed transpose(LaneMatrix&& matrix) { return {std::move(matrix), nullptr}; }

template <class Left, class Right>
LaneMatrix multiply(const Left& x, const Right& y, bool symmetric = false) {
  LaneMatrix result(x.rank());
  kernels::best().multiply(x.operand(), y.operand(), x.rank(), result.stride(), symmetric, result.data());
  return result;
}
inline LaneMatrix matmul(const LaneMatrix& x, const LaneMatrix& y) { return multiply(x, y); }
inline LaneMatrix matmul(const Transposed& x, const LaneMatrix& y) { return multiply(x, y); }
inline LaneMatrix matmul(const LaneMatrix& x, const Transposed& y) { return multiply(x, y); }
inline LaneMatrix symmetric_product(const LaneMatrix& x, const LaneMatrix& y) { return multiply(x, y, true); }
inline LaneMatrix symmetric_product(const Transposed& x, const LaneMatrix& y) { return multiply(x, y, true); }
inline LaneMatrix symmetric_product(const LaneMatrix& x, const Transposed& y) { return multiply(x, y, true); }

inline LaneMatrix operator*(const LaneMatrix& m, const Lanes& factor) {
  return make_matrix(m.rank(), [&](int64_t i, int64_t j, int64_t lane) { return m.at(i, j, lane) * factor[lane]; });
}
inline LaneMatrix operator*(const Transposed& m, const Lanes& factor) {
  return make_matrix(m.rank(),
                     [&](int64_t i, int64_t j, int64_t lane) { return m.matrix().at(j, i, lane) * factor[lane]; });
}
inline LaneMatrix operator+(const LaneMatrix& a, const LaneMatrix& b) {
  return make_matrix(a.rank(), [&](int64_t i, int64_t j, int64_t lane) { return a.at(i, j, lane) + b.at(i, j, lane); });
}
inline LaneMatrix choose(const Lanes& condition, const LaneMatrix& yes, const LaneMatrix& no) {
  return make_matrix(yes.rank(), [&](int64_t i, int64_t j, int64_t lane) {
    return condition[lane] != 0 ? yes.at(i, j, lane) : no.at(i, j, lane);
  });
}
inline LaneMatrix symmetrized(const LaneMatrix& m) {
  return make_matrix(m.rank(),
                     [&](int64_t i, int64_t j, int64_t lane) { return 0.5 * (m.at(i, j, lane) + m.at(j, i, lane)); });
}
inline LaneMatrix identity_like(const LaneMatrix& m) {
  return make_matrix(m.rank(), [](int64_t i, int64_t j, int64_t) { return i == j ? 1.0 : 0.0; });
}
inline LaneMatrix scale_columns(const LaneMatrix& m, const LaneValues& values) {
  return make_matrix(m.rank(),
                     [&](int64_t i, int64_t j, int64_t lane) { return m.at(i, j, lane) * values.at(j, lane); });
}
inline LaneMatrix scale_columns(const Transposed& m, const LaneValues& values) {
  return make_matrix(
      m.rank(), [&](int64_t i, int64_t j, int64_t lane) { return m.matrix().at(j, i, lane) * values.at(j, lane); });
}
/// diag(S)^{1/2} M
template <class M>
LaneMatrix scale_rows_by_norms(const LaneMatrix& gram, const M& m) {
  LaneMatrix result(m.rank());
  for (int64_t i = 0; i < m.rank(); ++i) {
    const Lanes norm = sqrt(at_least(gram.get(i, i), 0.0));
    for (int64_t j = 0; j < m.rank(); ++j) result.set(i, j, m.get(i, j) * norm);
  }
  return result;
}
inline Lanes squared_norm_of_scaled_rows(const LaneMatrix& gram, const LaneMatrix& m) {
  Lanes sum;
  for (int64_t i = 0; i < m.rank(); ++i) {
    Lanes of_row;
    for (int64_t j = 0; j < m.rank(); ++j)
      for (int64_t lane = 0; lane < kLanes; ++lane) of_row[lane] += m.at(i, j, lane) * m.at(i, j, lane);
    sum = sum + of_row * at_least(gram.get(i, i), 0.0);
  }
  return sum;
}
inline LaneValues squared_column_norms(const LaneMatrix& m) {
  LaneValues result(m.rank());
  for (int64_t j = 0; j < m.rank(); ++j) {
    Lanes sum;
    for (int64_t i = 0; i < m.rank(); ++i)
      for (int64_t lane = 0; lane < kLanes; ++lane) sum[lane] += m.at(i, j, lane) * m.at(i, j, lane);
    result.set(j, sum);
  }
  return result;
}
inline LaneValues operator*(const LaneValues& a, const LaneValues& b) {
  LaneValues result(a.rank());
  for (int64_t i = 0; i < a.rank(); ++i) result.set(i, a.get(i) * b.get(i));
  return result;
}
inline Lanes trace_of(const LaneMatrix& m) {
  return map_lanes([&](int64_t lane) {
    double sum = 0;
    for (int64_t i = 0; i < m.rank(); ++i) sum += m.at(i, i, lane);
    return sum;
  });
}

/// Eigenvalues in no order; the rows of what the solver returns are the eigenvectors.
inline Spectrum<Transposed, LaneValues> eigh(const LaneMatrix& symmetric) {
  LaneMatrix destroyed = symmetric;  // NOLINT(performance-unnecessary-copy-initialization): through a pointer
  LaneMatrix vectors(symmetric.rank());
  LaneValues values(symmetric.rank()), work(kernels::eigh_work(symmetric.rank()));
  kernels::best().eigh(destroyed.data(), destroyed.rank(), destroyed.stride(), values.data(), work.data(),
                       vectors.data());
  return {std::move(values), transpose(std::move(vectors))};
}
inline const LaneMatrix& transpose(const Transposed& m) { return m.matrix(); }

/// In ascending order.
inline LaneValues ascending(LaneValues values) {
  for (int64_t lane = 0; lane < kLanes; ++lane)  // insertion sort: the solver's values come nearly in order
    for (int64_t i = 1; i < values.rank(); ++i)
      for (int64_t j = i; j > 0 && values.at(j, lane) < values.at(j - 1, lane); --j)
        std::swap(values.at(j, lane), values.at(j - 1, lane));
  return values;
}

/// Eigenvalues, ascending.
inline LaneValues eigenvalues(const LaneMatrix& symmetric) {
  LaneMatrix destroyed = symmetric;  // NOLINT(performance-unnecessary-copy-initialization): likewise
  LaneValues values(symmetric.rank()), work(kernels::eigh_work(symmetric.rank()));
  kernels::best().eigh(destroyed.data(), destroyed.rank(), destroyed.stride(), values.data(), work.data(), nullptr);
  return ascending(std::move(values));
}

template <class Function>
LaneValues map_values(const LaneValues& values, const Function& function) {
  Lanes largest;
  for (int64_t i = 0; i < values.rank(); ++i) largest = at_least(values.get(i), largest);
  LaneValues result(values.rank());
  for (int64_t i = 0; i < values.rank(); ++i) result.set(i, function(values.get(i), largest));
  return result;
}

template <class Function>
LaneValues map_values(const LaneValues& values, const LaneValues& others, const Function& function) {
  LaneValues result(values.rank());
  for (int64_t i = 0; i < values.rank(); ++i) result.set(i, function(values.get(i), others.get(i)));
  return result;
}
inline Lanes smallest(const LaneValues& values) {
  Lanes least = values.get(0);
  for (int64_t i = 1; i < values.rank(); ++i) least = at_most(values.get(i), least);
  return least;
}
/// A CPU has the answer at once. Lanes too many repeat another one.
template <class Question>
bool surely(const LaneMatrix&, const Question& question) {
  const Lanes flags = question();
  return std::all_of(flags.lane.begin(), flags.lane.end(), [](double flag) { return flag != 0; });
}
inline Lanes largest_difference(const LaneValues& a, const LaneValues& b) {
  Lanes largest = a.get(0) - b.get(0);
  for (int64_t i = 1; i < a.rank(); ++i) largest = at_least(a.get(i) - b.get(i), largest);
  return largest;
}

/// S^{-1} = L^{-T} L^{-1} of positive definite S = L Lᵀ.
inline LaneMatrix positive_inverse(const LaneMatrix& matrix) {
  const int64_t r = matrix.rank();
  LaneMatrix lower = matrix, inverse = make_matrix(r, [](int64_t, int64_t, int64_t) { return 0.0; });
  // x ← x − Σ_{k from first to end} left(i, k) · right(k)
  const auto subtract = [&](Lanes& x, int64_t i, int64_t first, int64_t end, auto right) {
    for (int64_t k = first; k < end; ++k)
      for (int64_t lane = 0; lane < kLanes; ++lane) x[lane] -= lower.at(i, k, lane) * right(k, lane);
  };
  for (int64_t j = 0; j < r; ++j) {
    for (int64_t i = j; i < r; ++i) {
      Lanes x = lower.get(i, j);
      subtract(x, i, 0, j, [&](int64_t k, int64_t lane) { return lower.at(j, k, lane); });
      lower.set(i, j, i == j ? sqrt(x) : x / lower.get(j, j));
    }
  }
  for (int64_t j = 0; j < r; ++j) {
    for (int64_t i = j; i < r; ++i) {
      Lanes x = i == j ? 1.0 : 0.0;
      subtract(x, i, j, i, [&](int64_t k, int64_t lane) { return inverse.at(k, j, lane); });
      inverse.set(i, j, x / lower.get(i, i));
    }
  }
  return symmetric_product(transpose(inverse), inverse);
}

/// Householder's reflections, one matrix after the other: only QrBasis asks for it.
inline LaneMatrix orthogonal_factor(const Transposed& matrix) {
  const int64_t r = matrix.rank();
  LaneMatrix result = identity_like(matrix.matrix());
  LaneMatrix work = matrix.matrix();  // work.at(j, i) is element (i, j)
  std::vector<double> v(static_cast<size_t>(r));
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    for (int64_t k = 0; k < r; ++k) {
      double tail = 0;
      for (int64_t i = k + 1; i < r; ++i) tail += work.at(k, i, lane) * work.at(k, i, lane);
      // R's diagonal becomes +‖x‖: v = x − ‖x‖ e, in the form without cancellation.
      const double head = work.at(k, k, lane), norm = std::sqrt(head * head + tail);
      for (int64_t i = k; i < r; ++i) v[static_cast<size_t>(i)] = work.at(k, i, lane);
      v[static_cast<size_t>(k)] = head > 0 ? -tail / (head + norm) : head - norm;
      double length = 0;
      for (int64_t i = k; i < r; ++i) length += v[static_cast<size_t>(i)] * v[static_cast<size_t>(i)];
      if (length <= kernels::kVanishing) continue;
      const auto reflect = [&](auto element) {
        double inner = 0;
        for (int64_t i = k; i < r; ++i) inner += v[static_cast<size_t>(i)] * element(i);
        inner *= 2 / length;
        for (int64_t i = k; i < r; ++i) element(i) -= inner * v[static_cast<size_t>(i)];
      };
      for (int64_t j = k; j < r; ++j) reflect([&](int64_t i) -> double& { return work.at(j, i, lane); });
      for (int64_t j = 0; j < r; ++j) reflect([&](int64_t i) -> double& { return result.at(j, i, lane); });
    }
  }
  return result;
}

}  // namespace lora_rite::host

namespace lora_rite {
template <>
struct ScalarOf<host::LaneMatrix> {
  using type = host::Lanes;
};
}  // namespace lora_rite
