#pragma once

#include <cmath>
#include <limits>

#include "lora_rite/engine/cuda/number.hpp"
#include "lora_rite/engine/cuda/pool.hpp"
#include "lora_rite/rule/vocabulary.hpp"

/// Eigenvalues of small symmetric matrices, by a team: Jacobi's rotations, r/2 at a time.
namespace lora_rite::cuda {

template <class T>
LORA_RITE_FUNCTION void exchange(T& a, T& b) {
  const T other = a;
  a = b, b = other;
}

namespace jacobi {

/// The two columns that rotation `u` of round `round` turns, of `size` columns (an even number). Over size − 1 rounds
/// every column meets every other once: one stays, the others go round.
struct Couple {
  int p, q;
};
LORA_RITE_FUNCTION inline Couple couple_of(int u, int round, int size) {
  const int others = size - 1;
  if (u == 0) return {round, others};
  const int p = round + u, q = round - u;
  return {p < others ? p : p - others, q >= 0 ? q : q + others};
}

/// Cosine and sine that make a_pq of [[app, apq], [apq, aqq]] zero, the angle being at most 45°. By reciprocal roots:
/// with d = aqq − app and h = (d² + 4 apq²)^{-1/2} it is c² = (1 + |d| h) / 2 and s = ± apq h / c.
struct Angle {
  double c, s;
};
LORA_RITE_FUNCTION inline Angle angle_of(double app, double apq, double aqq) {
  constexpr double negligible = 1e-20;  // beside the largest element, which is about 1
  if (!(std::fabs(apq) > negligible)) return {1.0, 0.0};
  const double d = aqq - app;
  const double h = reciprocal_root(d * d + 4 * apq * apq);
  const double squared = 0.5 + 0.5 * std::fabs(d) * h, inverse = reciprocal_root(squared);
  return {squared * inverse, (d < 0 ? -apq : apq) * h * inverse};
}

}  // namespace jacobi

/// By Householder's reflections: r = O R → R in `r`, and O in `o`, both r×r in rows of the pool's stride. In column k:
/// v from x = R[k…, k], then R ← (I − βvvᵀ) R and O ← O (I − βvvᵀ).
template <class Pool>
LORA_RITE_OUT_OF_LINE LORA_RITE_FUNCTION void householder(Pool& pool, double* r, double* o) {
  constexpr int kStride = Pool::kStride;
  const int rank = pool.rank();
  pool.for_elements([&](int i, int j) { o[i * kStride + j] = i == j ? 1.0 : 0.0; });
  const int reflector = pool.vectors.acquire(Pool::kVectors), of_columns = pool.vectors.acquire(Pool::kVectors);
  const int of_rows = pool.vectors.acquire(Pool::kVectors);
  double *v = pool.vector(reflector), *w = pool.vector(of_columns), *z = pool.vector(of_rows);
  for (int k = 0; k + 1 < rank; ++k) {
    pool.for_each(rank, [&](int i) { v[i] = i < k ? 0.0 : r[i * kStride + k]; });
    double rest = 0;
    for (int i = k + 1; i < rank; ++i) rest += v[i] * v[i];
    const double head = v[k], norm = std::sqrt(head * head + rest);
    const double first = head < 0 ? head - norm : head + norm;
    // What is so small beside the matrix, which was scaled to 1, is nothing, and its reciprocal would be infinite.
    const double beta = rest > 1e-280 ? 2 / (first * first + rest) : 0.0;
    const auto element = [&](int i) { return i == k ? first : v[i]; };
    pool.for_each(2 * rank, [&](int e) {
      const int i = e < rank ? e : e - rank;
      double sum = 0;
      for (int l = k; l < rank; ++l) sum += element(l) * (e < rank ? r[l * kStride + i] : o[i * kStride + l]);
      (e < rank ? w : z)[i] = beta * sum;
    });
    pool.for_elements([&](int i, int j) {
      if (i >= k) r[i * kStride + j] -= element(i) * w[j];
      if (j >= k) o[i * kStride + j] -= z[i] * element(j);
    });
  }
  pool.vectors.release(reflector), pool.vectors.release(of_columns), pool.vectors.release(of_rows);
}

/// A symmetric matrix → its eigenvalues, divided by the number that is returned, on the diagonal of
/// `pool.work(0)`, and with `kVectors` its eigenvectors in the columns of `pool.work(1)`. Off the diagonal nothing is
/// left but 2ε of the largest element.
template <bool kVectors, class Pool>
LORA_RITE_OUT_OF_LINE LORA_RITE_FUNCTION double diagonalize(Pool& pool, const View& symmetric) {
  // All R columns take part, though those from r on are zero: division by a constant is cheap.
  constexpr int kStride = Pool::kStride, kMostSweeps = 30, kSize = Pool::kRank, kHalf = kSize / 2;
  const int rank = pool.rank();
  double *a = pool.work(0), *q = pool.work(1);
  double largest = 0;
  for (int i = 0; i < rank; ++i)
    largest = std::fabs(symmetric.at(i, i)) > largest ? std::fabs(symmetric.at(i, i)) : largest;
  // A power of two, by which dividing is exact. No element of a positive semi-definite matrix exceeds its diagonal.
  int exponent = 0;
  std::frexp(largest, &exponent);
  const double scale = largest > 0 ? std::ldexp(1.0, exponent) : 1.0;
  // Columns in the order of their diagonal, then one step of the QR iteration: A = OR ← RO = OᵀAO. Where eigenvalues
  // are far apart, half of the sweeps are spared.
  const int places = pool.vectors.acquire(Pool::kVectors), product = pool.matrices.acquire(Pool::kMatrices);
  double *place = pool.vector(places), *ro = pool.matrix(product);
  pool.for_each(rank, [&](int i) {
    int larger = 0;
    for (int k = 0; k < rank; ++k)
      if (symmetric.at(k, k) > symmetric.at(i, i) || (!(symmetric.at(k, k) < symmetric.at(i, i)) && k < i)) ++larger;
    place[i] = larger;
  });
  pool.for_elements([&](int i, int j) {
    // The upper half counts.
    const double x = symmetric.at(i < j ? i : j, i < j ? j : i) / scale;
    a[static_cast<int>(place[i]) * kStride + static_cast<int>(place[j])] = x;
  });
  householder(pool, a, q);
  pool.for_elements([&](int i, int j) {
    double sum = 0;
    for (int k = i; k < rank; ++k) sum += a[i * kStride + k] * q[k * kStride + j];
    ro[i * kStride + j] = sum;
  });
  pool.for_each(kSize * kSize, [&](int e) {
    const int i = e / kSize, j = e % kSize;
    const bool inside = i < rank && j < rank;
    a[i * kStride + j] = inside ? ro[(i < j ? i : j) * kStride + (i < j ? j : i)] : 0.0;
  });
  if (kVectors) {
    pool.for_elements([&](int i, int j) { ro[i * kStride + j] = q[static_cast<int>(place[i]) * kStride + j]; });
    pool.for_each(kSize * kSize, [&](int e) {
      const int i = e / kSize, j = e % kSize;
      q[i * kStride + j] = i < rank && j < rank ? ro[i * kStride + j] : 0.0;
    });
  }
  pool.vectors.release(places), pool.matrices.release(product);

  const int angles = pool.vectors.acquire(Pool::kVectors), rest = pool.vectors.acquire(Pool::kVectors);
  double *cosines = pool.vector(angles), *sines = cosines + kHalf, *off = pool.vector(rest);
  for (int sweep = 0; sweep < kMostSweeps; ++sweep) {
    pool.for_each(rank, [&](int i) {
      double most = 0;
      for (int j = i + 1; j < rank; ++j) {
        const double x = std::fabs(a[i * kStride + j]);
        most = x > most ? x : most;
      }
      off[i] = most;
    });
    double most = 0;
    for (int i = 0; i < rank; ++i) most = off[i] > most ? off[i] : most;
    if (most <= 2 * std::numeric_limits<double>::epsilon()) break;
    for (int round = 0; round + 1 < kSize; ++round) {
      pool.for_each(kHalf, [&](int u) {
        const jacobi::Couple of = jacobi::couple_of(u, round, kSize);
        const jacobi::Angle angle =
            jacobi::angle_of(a[of.p * kStride + of.p], a[of.p * kStride + of.q], a[of.q * kStride + of.q]);
        cosines[u] = angle.c, sines[u] = angle.s;
      });
      // Rotations u and w turn the square of rows p, q and columns s, t, and nobody else does.
      constexpr int kSquares = kHalf * kHalf;
      pool.for_each(kSquares + (kVectors ? rank * kHalf : 0), [&](int e) {
        if (e >= kSquares) {
          const int row = (e - kSquares) / kHalf, u = (e - kSquares) % kHalf;
          const jacobi::Couple of = jacobi::couple_of(u, round, kSize);
          double &x = q[row * kStride + of.p], &y = q[row * kStride + of.q];
          const double c = cosines[u], s = sines[u], turned = c * x - s * y;
          y = s * x + c * y, x = turned;
          return;
        }
        const int u = e / kHalf, w = e % kHalf;
        if (u > w) return;
        const jacobi::Couple of = jacobi::couple_of(u, round, kSize), with = jacobi::couple_of(w, round, kSize);
        const double c = cosines[u], s = sines[u], d = cosines[w], t = sines[w];
        const double x00 = a[of.p * kStride + with.p], x01 = a[of.p * kStride + with.q];
        const double x10 = a[of.q * kStride + with.p], x11 = a[of.q * kStride + with.q];
        const double y00 = c * x00 - s * x10, y01 = c * x01 - s * x11;
        const double y10 = s * x00 + c * x10, y11 = s * x01 + c * x11;
        const double z00 = d * y00 - t * y01, z01 = u == w ? 0.0 : t * y00 + d * y01;
        const double z10 = u == w ? 0.0 : d * y10 - t * y11, z11 = t * y10 + d * y11;
        a[of.p * kStride + with.p] = z00, a[with.p * kStride + of.p] = z00;
        a[of.q * kStride + with.q] = z11, a[with.q * kStride + of.q] = z11;
        a[of.p * kStride + with.q] = z01, a[with.q * kStride + of.p] = z01;
        a[of.q * kStride + with.p] = z10, a[with.p * kStride + of.q] = z10;
      });
    }
  }
  pool.vectors.release(angles), pool.vectors.release(rest);
  return scale;
}

}  // namespace lora_rite::cuda
