#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

/// The loops of the host engine, on plain arrays: no tensors, no allocation, no dispatch inside.
///
/// They are written once, on the compilers' vector extensions, and compiled twice on x86: for the instruction set that
/// the user's flags allow and for AVX2 with FMA; `kernels()` chooses at run time. Every body is therefore forced inline
/// into a function that carries the target attribute.
///
/// Two kinds of data:
/// - *Tall blocks*: some rows of an n×r factor, momentum or gradient as float [columns][block_rows]: column i of the
///   block is contiguous, whatever the layout in memory. Columns are padded to a multiple of 4, rows to one of 16, with
///   zeros.
/// - *Lanes*: four r×r double matrices side by side, element (i, j) of all four at [(i · stride + j) · 4], aligned to
/// 32
///   bytes.
namespace lora_rite::engine::kernels {

#define LORA_RITE_INLINE inline __attribute__((always_inline))
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a call: all of it is inlined

typedef float Float4 __attribute__((vector_size(16)));
typedef float Float8 __attribute__((vector_size(32)));
typedef double Double4 __attribute__((vector_size(32)));
typedef int64_t Mask4 __attribute__((vector_size(32)));

/// Between vectors and memory of any alignment: one instruction each.
template <class Vector, class Number>
LORA_RITE_INLINE void load(Vector& vector, const Number* from) {
  std::memcpy(&vector, from, sizeof(Vector));
}
template <class Vector, class Number>
LORA_RITE_INLINE void store(const Vector& vector, Number* to) {
  std::memcpy(to, &vector, sizeof(Vector));
}

constexpr int64_t kLanes = 4;

inline int64_t padded(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }
inline int64_t padded_rank(int64_t rank) { return padded(rank, 4); }

/// Rows of a block: what keeps a block of every array in the first-level cache.
inline int64_t block_rows(int64_t rank) { return padded(std::max<int64_t>(32, 1024 / padded_rank(rank)), 16); }

/// How an n×r factor lies in memory: element (row, i) at [i · n + row] for A, at [row · r + i] for B.
struct Shape {
  int64_t rows;
  int64_t rank;
  bool rank_first;
};

/// Work space of one thread for blocks of padded rank p and b rows.
struct Blocks {
  float *factor, *momentum, *gradient, *update;  ///< [p][b]
  double *left, *right;                          ///< [p][b], or by rows [b][p]
};

/// Sums over rows that a pass leaves behind, of padded rank p; the pass adds to them.
struct Sums {
  double* gram;      ///< XᵀX [p][p], upper triangle by tiles; K = GᵀG in act 1
  double* cross;     ///< XᵀN [p][p]
  double* weighted;  ///< Σ w_i x_i [p]
};

/// Act 3's instructions for one factor.
struct Maps {
  const float *momentum, *inverse_root_transposed;  ///< [p][p]
  const double* gradient;                           ///< [p][p]; it weighs up faint directions, where a float is noise
  float keep, rate;                                 ///< X ← keep · X − rate · N
  bool has_gradient;                                ///< else X rests and only N is carried along
  float update_scale;                               ///< on M; 1 unless its RMS is bounded
};

// --- Tall blocks ---------------------------------------------------------------------------------------------------

LORA_RITE_INLINE void transpose(Float4& a, Float4& b, Float4& c, Float4& d) {
  const Float4 ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Float4 cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  a = __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5);
  b = __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7);
  c = __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
  d = __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
}

/// memcpy, which compilers turn into an instruction that is slow for some hundred bytes.
LORA_RITE_INLINE void copy(const float* from, int64_t count, float* to) {
  int64_t k = 0;
  for (; k + 8 <= count; k += 8) {
    Float8 eight;
    load(eight, from + k);
    store(eight, to + k);
  }
  for (; k < count; ++k) to[k] = from[k];
}

/// Rows [first, first + count) of `data` → block; rows up to the next multiple of 16 become zero.
LORA_RITE_INLINE void load_block(const float* data, const Shape& shape, int64_t first, int64_t count, int64_t b,
                                 float* block) {
  const int64_t end = padded(count, 16);
  for (int64_t i = 0; i < shape.rank && count < end; ++i)
    std::memset(block + i * b + count, 0, (end - count) * sizeof(float));
  if (shape.rank_first) {
    for (int64_t i = 0; i < shape.rank; ++i) copy(data + i * shape.rows + first, count, block + i * b);
    return;
  }
  const float* rows = data + first * shape.rank;
  const int64_t r = shape.rank, even_rows = count / 4 * 4, even_rank = r / 4 * 4;
  for (int64_t row = 0; row < even_rows; row += 4) {
    for (int64_t i = 0; i < even_rank; i += 4) {
      const float* from = rows + row * r + i;
      Float4 v0, v1, v2, v3;
      load(v0, from);
      load(v1, from + r);
      load(v2, from + 2 * r);
      load(v3, from + 3 * r);
      transpose(v0, v1, v2, v3);
      float* to = block + i * b + row;
      store(v0, to);
      store(v1, to + b);
      store(v2, to + 2 * b);
      store(v3, to + 3 * b);
    }
    for (int64_t i = even_rank; i < r; ++i)
      for (int64_t k = row; k < row + 4; ++k) block[i * b + k] = rows[k * r + i];
  }
  for (int64_t row = even_rows; row < count; ++row)
    for (int64_t i = 0; i < r; ++i) block[i * b + row] = rows[row * r + i];
}

/// The way back.
LORA_RITE_INLINE void store_block(const float* block, const Shape& shape, int64_t first, int64_t count, int64_t b,
                                  float* data) {
  if (shape.rank_first) {
    for (int64_t i = 0; i < shape.rank; ++i) copy(block + i * b, count, data + i * shape.rows + first);
    return;
  }
  float* rows = data + first * shape.rank;
  const int64_t r = shape.rank, even_rows = count / 4 * 4, even_rank = r / 4 * 4;
  for (int64_t row = 0; row < even_rows; row += 4) {
    for (int64_t i = 0; i < even_rank; i += 4) {
      const float* from = block + i * b + row;
      Float4 v0, v1, v2, v3;
      load(v0, from);
      load(v1, from + b);
      load(v2, from + 2 * b);
      load(v3, from + 3 * b);
      transpose(v0, v1, v2, v3);
      float* to = rows + row * r + i;
      store(v0, to);
      store(v1, to + r);
      store(v2, to + 2 * r);
      store(v3, to + 3 * r);
    }
    for (int64_t i = even_rank; i < r; ++i)
      for (int64_t k = row; k < row + 4; ++k) rows[k * r + i] = block[i * b + k];
  }
  for (int64_t row = even_rows; row < count; ++row)
    for (int64_t i = 0; i < r; ++i) rows[row * r + i] = block[i * b + row];
}

LORA_RITE_INLINE void widen(const float* block, int64_t p, int64_t count, int64_t b, double* wide) {
  for (int64_t i = 0; i < p; ++i)
    for (int64_t row = 0; row < count; row += 4) {
      Float4 narrow;
      load(narrow, block + i * b + row);
      store(__builtin_convertvector(narrow, Double4), wide + i * b + row);
    }
}

/// out(row, j) = Σ_k in(row, k) map[k][j]. Tiles of 16 rows × 4 columns.
LORA_RITE_INLINE void map_block(const float* in, const float* map, int64_t p, int64_t count, int64_t b, float* out) {
  for (int64_t row = 0; row < count; row += 16) {
    for (int64_t j = 0; j < p; j += 4) {
      Float8 sum[4][2];
      for (auto& column : sum)
        for (auto& entry : column) entry = Float8{0, 0, 0, 0, 0, 0, 0, 0};
      for (int64_t k = 0; k < p; ++k) {
        Float8 low;
        load(low, in + k * b + row);
        Float8 high;
        load(high, in + k * b + row + 8);
        const float* m = map + k * p + j;
#pragma GCC unroll 4
        for (int64_t t = 0; t < 4; ++t) {
          sum[t][0] += low * m[t];
          sum[t][1] += high * m[t];
        }
      }
      for (int64_t t = 0; t < 4; ++t)
        for (int64_t half = 0; half < 2; ++half) store(sum[t][half], out + (j + t) * b + row + 8 * half);
    }
  }
}

/// out(row, j) += Σ_k in(row, k) map[k][j], summed in double. Tiles of 8 rows × 4 columns.
LORA_RITE_INLINE void add_wide_map(const double* in, const double* map, int64_t p, int64_t count, int64_t b,
                                   float* out) {
  for (int64_t row = 0; row < count; row += 8) {
    for (int64_t j = 0; j < p; j += 4) {
      Double4 sum[4][2];
      for (auto& column : sum)
        for (auto& entry : column) entry = Double4{0, 0, 0, 0};
      for (int64_t k = 0; k < p; ++k) {
        Double4 low;
        load(low, in + k * b + row);
        Double4 high;
        load(high, in + k * b + row + 4);
        const double* m = map + k * p + j;
#pragma GCC unroll 4
        for (int64_t t = 0; t < 4; ++t) {
          sum[t][0] += low * m[t];
          sum[t][1] += high * m[t];
        }
      }
      for (int64_t t = 0; t < 4; ++t)
        for (int64_t half = 0; half < 2; ++half) {
          Float4 before;
          load(before, out + (j + t) * b + row + 4 * half);
          store(before + __builtin_convertvector(sum[t][half], Float4), out + (j + t) * b + row + 4 * half);
        }
    }
  }
}

/// The block by rows, in double: wide[row][i].
LORA_RITE_INLINE void widen_rows(const float* block, int64_t p, int64_t count, int64_t b, double* wide) {
  for (int64_t row = 0; row < count; row += 4) {
    for (int64_t i = 0; i < p; i += 4) {
      const float* from = block + i * b + row;
      Float4 v0, v1, v2, v3;
      load(v0, from);
      load(v1, from + b);
      load(v2, from + 2 * b);
      load(v3, from + 3 * b);
      transpose(v0, v1, v2, v3);
      double* to = wide + row * p + i;
      store(__builtin_convertvector(v0, Double4), to);
      store(__builtin_convertvector(v1, Double4), to + p);
      store(__builtin_convertvector(v2, Double4), to + 2 * p);
      store(__builtin_convertvector(v3, Double4), to + 3 * p);
    }
  }
}

/// products[i…i+3][j…] += Σ_row left[row][i…] right[row][j…], kVectors · 4 columns.
template <int64_t kVectors>
LORA_RITE_INLINE void add_product_tile(const double* left, const double* right, int64_t p, int64_t count,
                                       double* products) {
  Double4 sum[4][kVectors];
  for (auto& row : sum)
    for (auto& entry : row) entry = Double4{0, 0, 0, 0};
  for (int64_t row = 0; row < count; ++row) {
    Double4 y[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) load(y[v], right + row * p + 4 * v);
#pragma GCC unroll 4
    for (int64_t s = 0; s < 4; ++s)
#pragma GCC unroll 2
      for (int64_t v = 0; v < kVectors; ++v) sum[s][v] += left[row * p + s] * y[v];
  }
  for (int64_t s = 0; s < 4; ++s)
    for (int64_t v = 0; v < kVectors; ++v) {
      Double4 before;
      load(before, products + s * p + 4 * v);
      store(before + sum[s][v], products + s * p + 4 * v);
    }
}

/// products += leftᵀ right of blocks by rows [count][p]; with kUpper only what lies in i ≤ j need be right.
template <bool kUpper>
LORA_RITE_INLINE void add_products(const double* left, const double* right, int64_t p, int64_t count,
                                   double* products) {
  for (int64_t i = 0; i < p; i += 4) {
    int64_t j = kUpper ? i : 0;
    for (; j + 8 <= p; j += 8) add_product_tile<2>(left + i, right + j, p, count, products + i * p + j);
    if (j < p) add_product_tile<1>(left + i, right + j, p, count, products + i * p + j);
  }
}

/// weighted[i] += Σ_row weights[row] x[row][i]
LORA_RITE_INLINE void add_weighted(const double* x, const double* weights, int64_t p, int64_t count, double* weighted) {
  for (int64_t i = 0; i < p; i += 4) {
    Double4 sum, entry;
    load(sum, weighted + i);
    for (int64_t row = 0; row < count; ++row) {
      load(entry, x + row * p + i);
      sum += weights[row] * entry;
    }
    store(sum, weighted + i);
  }
}

/// GᵀG over rows [first, end).
LORA_RITE_INLINE void gram_body(const float* data, const Shape& shape, int64_t first, int64_t end, const Blocks& blocks,
                                double* gram) {
  const int64_t p = padded_rank(shape.rank), b = block_rows(shape.rank);
  std::memset(blocks.gradient, 0, p * b * sizeof(float));
  for (int64_t row = first; row < end; row += b) {
    const int64_t count = std::min(b, end - row), whole = padded(count, 16);
    load_block(data, shape, row, count, b, blocks.gradient);
    widen_rows(blocks.gradient, p, whole, b, blocks.left);
    add_products<true>(blocks.left, blocks.left, p, whole, gram);
  }
}

/// What a block of X and N adds to their sums.
LORA_RITE_INLINE void add_sums(const Blocks& blocks, const double* weights, int64_t p, int64_t count, int64_t b,
                               const Sums& sums) {
  widen_rows(blocks.factor, p, count, b, blocks.left);
  widen_rows(blocks.momentum, p, count, b, blocks.right);
  add_products<true>(blocks.left, blocks.left, p, count, sums.gram);
  add_products<false>(blocks.left, blocks.right, p, count, sums.cross);
  add_weighted(blocks.left, weights, p, count, sums.weighted);
}

/// XᵀX, XᵀN and the weighted column sums over rows [first, end); without a momentum XᵀN is 0. `weights` [padded rows].
LORA_RITE_INLINE void remember_body(const float* factor, const float* momentum, const double* weights,
                                    const Shape& shape, int64_t first, int64_t end, const Blocks& blocks,
                                    const Sums& sums) {
  const int64_t p = padded_rank(shape.rank), b = block_rows(shape.rank);
  std::memset(blocks.factor, 0, p * b * sizeof(float));
  std::memset(blocks.momentum, 0, p * b * sizeof(float));
  for (int64_t row = first; row < end; row += b) {
    const int64_t count = std::min(b, end - row), whole = padded(count, 16);
    load_block(factor, shape, row, count, b, blocks.factor);
    if (momentum != nullptr) load_block(momentum, shape, row, count, b, blocks.momentum);
    add_sums(blocks, weights + row, p, whole, b, sums);
  }
}

/// Act 3 over rows [first, end): M = N·momentum_map + G·gradient_map, N ← M R⁺ᵀ, X ← keep·X − rate·N, and of the new X
/// and N what `remember` leaves.
LORA_RITE_INLINE void apply_body(float* factor, float* momentum, const float* gradient, const double* weights,
                                 const Shape& shape, int64_t first, int64_t end, const Maps& maps, const Blocks& blocks,
                                 const Sums& sums) {
  const int64_t p = padded_rank(shape.rank), b = block_rows(shape.rank);
  for (float* block : {blocks.factor, blocks.momentum, blocks.gradient}) std::memset(block, 0, p * b * sizeof(float));
  for (int64_t row = first; row < end; row += b) {
    const int64_t count = std::min(b, end - row), whole = padded(count, 16);
    load_block(momentum, shape, row, count, b, blocks.momentum);
    map_block(blocks.momentum, maps.momentum, p, whole, b, blocks.update);
    if (maps.has_gradient) {
      load_block(gradient, shape, row, count, b, blocks.gradient);
      widen(blocks.gradient, p, whole, b, blocks.left);
      add_wide_map(blocks.left, maps.gradient, p, whole, b, blocks.update);
    }
    if (maps.update_scale != 1) {
      for (int64_t k = 0; k < p * b; ++k) blocks.update[k] *= maps.update_scale;
    }
    map_block(blocks.update, maps.inverse_root_transposed, p, whole, b, blocks.momentum);
    store_block(blocks.momentum, shape, row, count, b, momentum);
    if (!maps.has_gradient) continue;
    load_block(factor, shape, row, count, b, blocks.factor);
    for (int64_t i = 0; i < p; ++i) {
      for (int64_t k = 0; k < whole; k += 8) {
        Float8 x, n;
        load(x, blocks.factor + i * b + k);
        load(n, blocks.momentum + i * b + k);
        store(maps.keep * x - maps.rate * n, blocks.factor + i * b + k);
      }
    }
    store_block(blocks.factor, shape, row, count, b, factor);
    add_sums(blocks, weights + row, p, whole, b, sums);
  }
}

/// Σ M² over rows [first, end), M being act 3's.
LORA_RITE_INLINE double update_squares_body(const float* momentum, const float* gradient, const Shape& shape,
                                            int64_t first, int64_t end, const Maps& maps, const Blocks& blocks) {
  const int64_t p = padded_rank(shape.rank), b = block_rows(shape.rank);
  for (float* block : {blocks.momentum, blocks.gradient}) std::memset(block, 0, p * b * sizeof(float));
  double sum = 0;
  for (int64_t row = first; row < end; row += b) {
    const int64_t count = std::min(b, end - row), whole = padded(count, 16);
    load_block(momentum, shape, row, count, b, blocks.momentum);
    map_block(blocks.momentum, maps.momentum, p, whole, b, blocks.update);
    if (maps.has_gradient) {
      load_block(gradient, shape, row, count, b, blocks.gradient);
      widen(blocks.gradient, p, whole, b, blocks.left);
      add_wide_map(blocks.left, maps.gradient, p, whole, b, blocks.update);
    }
    for (int64_t i = 0; i < p; ++i)
      for (int64_t k = 0; k < count; ++k) {
        const double m = blocks.update[i * b + k];
        sum += m * m;
      }
  }
  return sum;
}

// --- Lanes ---------------------------------------------------------------------------------------------------------

/// An r×r matrix of lanes with any strides, so that transposes cost nothing.
struct Operand {
  const double* data;
  int64_t row_stride, column_stride;  ///< in lanes
};

/// out = x y, all r×r; out is contiguous by rows of `stride` lanes and no operand.
LORA_RITE_INLINE void multiply_body(const Operand& x, const Operand& y, int64_t r, int64_t stride, double* out) {
  const auto tile = [&](int64_t i, int64_t j, auto rows, auto columns) __attribute__((always_inline)) {
    constexpr int64_t kRows = decltype(rows)::value, kColumns = decltype(columns)::value;
    Double4 sum[kRows][kColumns];
    for (auto& row : sum)
      for (auto& entry : row) entry = Double4{0, 0, 0, 0};
    const double* left = x.data + i * x.row_stride * kLanes;
    const double* right = y.data + j * y.column_stride * kLanes;
    for (int64_t k = 0; k < r; ++k) {
      Double4 c[kColumns];
      for (int64_t t = 0; t < kColumns; ++t) load(c[t], right + (k * y.row_stride + t * y.column_stride) * kLanes);
#pragma GCC unroll 4
      for (int64_t s = 0; s < kRows; ++s) {
        Double4 a;
        load(a, left + (s * x.row_stride + k * x.column_stride) * kLanes);
#pragma GCC unroll 4
        for (int64_t t = 0; t < kColumns; ++t) sum[s][t] += a * c[t];
      }
    }
    for (int64_t s = 0; s < kRows; ++s)
      for (int64_t t = 0; t < kColumns; ++t) store(sum[s][t], out + ((i + s) * stride + j + t) * kLanes);
  };
  const std::integral_constant<int64_t, 1> one;
  const std::integral_constant<int64_t, 2> two;
  const std::integral_constant<int64_t, 4> four;
  const int64_t even = r / 4 * 4;
  for (int64_t i = 0; i < even; i += 4) {
    int64_t j = 0;
    for (; j + 2 <= r; j += 2) tile(i, j, four, two);
    for (; j < r; ++j) tile(i, j, four, one);
  }
  for (int64_t i = even; i < r; ++i)
    for (int64_t j = 0; j < r; ++j) tile(i, j, one, one);
}

// Vectors are never returned, which would be a question of the ABI; these two set `result`.
LORA_RITE_INLINE void square_root(const Double4& x, Double4& result) {
  result = Double4{std::sqrt(x[0]), std::sqrt(x[1]), std::sqrt(x[2]), std::sqrt(x[3])};
}
LORA_RITE_INLINE void magnitude(const Double4& x, Double4& result) { result = x < 0 ? -x : x; }
LORA_RITE_INLINE bool any(const Mask4& mask) { return (mask[0] | mask[1] | mask[2] | mask[3]) != 0; }

/// A = Q diag(λ) Qᵀ for four symmetric matrices at once: Householder tridiagonalisation and implicit QL steps with
/// Wilkinson's shift (Golub & Van Loan, §8.3), every lane at its own pace. `a` is destroyed. Rows of `vectors` become
/// the eigenvectors (Qᵀ), in no order; nullptr: values only. `off` is work space [r]. Stride in lanes; everything
/// aligned to 32 bytes.
LORA_RITE_INLINE void eigh_body(Double4* a, int64_t r, int64_t stride, Double4* values, Double4* off,
                                Double4* vectors) {
  const Double4 zero = {0, 0, 0, 0}, one = {1, 1, 1, 1};
  const auto at = [&](Double4 * m, int64_t i, int64_t j) __attribute__((always_inline))->Double4& {
    return m[i * stride + j];
  };
  // Scaled to a largest entry of 1, so that no square overflows or vanishes.
  Double4 scale = zero;
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      Double4 size;
      magnitude(at(a, i, j), size);
      scale = size > scale ? size : scale;
    }
  const Double4 inverse_scale = scale > 0 ? one / scale : zero;
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < r; ++j) at(a, i, j) *= inverse_scale;

  // Tridiagonalise: the Householder vector v of column k stays in row k, its factor β on the diagonal of that row.
  for (int64_t k = 0; k + 2 < r; ++k) {
    Double4* v = a + k * stride;
    values[k] = v[k];
    Double4 tail = zero;
    for (int64_t i = k + 2; i < r; ++i) tail += v[i] * v[i];
    const Double4 head = v[k + 1];
    Double4 norm, size;
    square_root(head * head + tail, norm);
    magnitude(head, size);
    const Double4 alpha = head > 0 ? -norm : norm;  // no cancellation in head − α
    const Mask4 reflect = tail > 0;
    off[k] = reflect ? alpha : head;
    v[k + 1] = head - alpha;
    const Double4 beta = reflect ? one / (norm * (norm + size)) : zero;  // 2 / vᵀv
    v[k] = beta;
    // w = β A v − ½β (β vᵀAv) v, A ← A − v wᵀ − w vᵀ
    Double4 inner = zero;
    for (int64_t i = k + 1; i < r; ++i) {
      const Double4* row = a + i * stride;
      Double4 s0 = zero, s1 = zero;
      int64_t j = k + 1;
      for (; j + 2 <= r; j += 2) {
        s0 += row[j] * v[j];
        s1 += row[j + 1] * v[j + 1];
      }
      if (j < r) s0 += row[j] * v[j];
      values[i] = beta * (s0 + s1);
      inner += values[i] * v[i];
    }
    const Double4 half = 0.5 * beta * inner;
    for (int64_t i = k + 1; i < r; ++i) values[i] -= half * v[i];
    for (int64_t i = k + 1; i < r; ++i) {
      Double4* row = a + i * stride;
      const Double4 vi = v[i], wi = values[i];
      for (int64_t j = k + 1; j < r; ++j) row[j] -= vi * values[j] + wi * v[j];
    }
  }
  if (r >= 2) {
    values[r - 2] = at(a, r - 2, r - 2);
    off[r - 2] = at(a, r - 2, r - 1);
  }
  values[r - 1] = at(a, r - 1, r - 1);
  off[r - 1] = zero;

  if (vectors != nullptr) {
    for (int64_t i = 0; i < r; ++i)
      for (int64_t j = 0; j < r; ++j) at(vectors, i, j) = i == j ? one : zero;
    // Z = Qᵀ, Q = H₀ H₁ …: applied to Z from the right, the last one first, each touches rows and columns > k only.
    for (int64_t k = r - 3; k >= 0; --k) {
      const Double4* v = a + k * stride;
      const Double4 beta = v[k];
      for (int64_t i = k + 1; i < r; ++i) {
        Double4* row = vectors + i * stride;
        Double4 s0 = zero, s1 = zero;
        int64_t j = k + 1;
        for (; j + 2 <= r; j += 2) {
          s0 += row[j] * v[j];
          s1 += row[j + 1] * v[j + 1];
        }
        if (j < r) s0 += row[j] * v[j];
        const Double4 s = beta * (s0 + s1);
        for (j = k + 1; j < r; ++j) row[j] -= s * v[j];
      }
    }
  }

  // QL: off[i] couples values[i] and values[i + 1].
  const double epsilon = 2.220446049250313e-16;
  for (int64_t l = 0; l < r; ++l) {
    for (int64_t iteration = 0; iteration < 60; ++iteration) {
      // m: the first index ≥ l whose coupling is negligible, in each lane; nothing to do where m = l.
      Mask4 found = {0, 0, 0, 0};
      Mask4 m = {r - 1, r - 1, r - 1, r - 1};
      for (int64_t i = l; i + 1 < r; ++i) {
        Double4 coupling, left, right;
        magnitude(off[i], coupling);
        magnitude(values[i], left);
        magnitude(values[i + 1], right);
        const Mask4 small = coupling <= epsilon * (left + right);
        const Mask4 index = {i, i, i, i};
        m = (small & ~found) ? index : m;
        found |= small;
        if (!any(~found)) break;
      }
      const Mask4 busy = m > l;
      if (!any(busy)) break;
      const int64_t last = std::max(std::max(m[0], m[1]), std::max(m[2], m[3]));
      Double4 end_value;  // values[m]
      for (int64_t lane = 0; lane < kLanes; ++lane) end_value[lane] = values[m[lane]][lane];
      const Double4 coupling = busy ? off[l] : one;
      const Double4 slope = (values[l + (l + 1 < r)] - values[l]) / (2.0 * coupling);
      Double4 length;
      square_root(slope * slope + 1.0, length);
      Double4 g = end_value - values[l] + coupling / (slope + (slope < 0 ? -length : length));
      Double4 s = one, c = one, shift = zero;
      Mask4 alive = busy;  // a lane whose bulge vanished under way rests
      for (int64_t i = last - 1; i >= l; --i) {
        const Mask4 turn = alive & (m > i);
        const Double4 f = s * off[i], b = c * off[i];
        Double4 radius;
        square_root(f * f + g * g, radius);
        const Mask4 vanished = turn & (radius == 0);
        off[i + 1] = turn ? radius : off[i + 1];
        values[i + 1] -= vanished ? shift : zero;
        alive &= ~vanished;
        const Mask4 rotate = turn & ~vanished;
        const Double4 inverse = one / (rotate ? radius : one);
        const Double4 new_s = f * inverse, new_c = g * inverse;
        const Double4 base = values[i + 1] - shift;
        const Double4 t = (values[i] - base) * new_s + 2.0 * new_c * b;
        const Double4 new_shift = new_s * t;
        values[i + 1] = rotate ? base + new_shift : values[i + 1];
        g = rotate ? new_c * t - b : g;
        s = rotate ? new_s : s;
        c = rotate ? new_c : c;
        shift = rotate ? new_shift : shift;
        if (vectors != nullptr) {
          const Double4 sine = rotate ? new_s : zero, cosine = rotate ? new_c : one;
          Double4 *lower = vectors + i * stride, *upper = lower + stride;
          for (int64_t k = 0; k < r; ++k) {
            const Double4 x = lower[k], y = upper[k];
            upper[k] = sine * x + cosine * y;
            lower[k] = cosine * x - sine * y;
          }
        }
      }
      values[l] -= alive ? shift : zero;
      off[l] = alive ? g : off[l];
      for (int64_t lane = 0; lane < kLanes; ++lane)
        if (busy[lane]) off[m[lane]][lane] = 0;
    }
  }
  for (int64_t i = 0; i < r; ++i) values[i] *= scale;
}

// --- Choice of the instruction set ---------------------------------------------------------------------------------

/// The loops, compiled for one instruction set.
struct Table {
  const char* name;
  void (*gram)(const float* data, const Shape& shape, int64_t first, int64_t end, const Blocks& blocks, double* gram);
  void (*remember)(const float* factor, const float* momentum, const double* weights, const Shape& shape, int64_t first,
                   int64_t end, const Blocks& blocks, const Sums& sums);
  void (*apply)(float* factor, float* momentum, const float* gradient, const double* weights, const Shape& shape,
                int64_t first, int64_t end, const Maps& maps, const Blocks& blocks, const Sums& sums);
  double (*update_squares)(const float* momentum, const float* gradient, const Shape& shape, int64_t first, int64_t end,
                           const Maps& maps, const Blocks& blocks);
  void (*multiply)(const Operand& x, const Operand& y, int64_t r, int64_t stride, double* out);
  void (*eigh)(double* a, int64_t r, int64_t stride, double* values, double* off, double* vectors);
};

#define LORA_RITE_TABLE(function, label, target)                                                                       \
  inline const Table& function() {                                                                                     \
    struct Functions {                                                                                                 \
      target static void gram(const float* data, const Shape& shape, int64_t first, int64_t end, const Blocks& blocks, \
                              double* gram) {                                                                          \
        gram_body(data, shape, first, end, blocks, gram);                                                              \
      }                                                                                                                \
      target static void remember(const float* factor, const float* momentum, const double* weights,                   \
                                  const Shape& shape, int64_t first, int64_t end, const Blocks& blocks,                \
                                  const Sums& sums) {                                                                  \
        remember_body(factor, momentum, weights, shape, first, end, blocks, sums);                                     \
      }                                                                                                                \
      target static void apply(float* factor, float* momentum, const float* gradient, const double* weights,           \
                               const Shape& shape, int64_t first, int64_t end, const Maps& maps, const Blocks& blocks, \
                               const Sums& sums) {                                                                     \
        apply_body(factor, momentum, gradient, weights, shape, first, end, maps, blocks, sums);                        \
      }                                                                                                                \
      target static double update_squares(const float* momentum, const float* gradient, const Shape& shape,            \
                                          int64_t first, int64_t end, const Maps& maps, const Blocks& blocks) {        \
        return update_squares_body(momentum, gradient, shape, first, end, maps, blocks);                               \
      }                                                                                                                \
      target static void multiply(const Operand& x, const Operand& y, int64_t r, int64_t stride, double* out) {        \
        multiply_body(x, y, r, stride, out);                                                                           \
      }                                                                                                                \
      target static void eigh(double* a, int64_t r, int64_t stride, double* values, double* off, double* vectors) {    \
        eigh_body(reinterpret_cast<Double4*>(a), r, stride, reinterpret_cast<Double4*>(values),                        \
                  reinterpret_cast<Double4*>(off), reinterpret_cast<Double4*>(vectors));                               \
      }                                                                                                                \
    };                                                                                                                 \
    static const Table table = {label,                                                                                 \
                                Functions::gram,                                                                       \
                                Functions::remember,                                                                   \
                                Functions::apply,                                                                      \
                                Functions::update_squares,                                                             \
                                Functions::multiply,                                                                   \
                                Functions::eigh};                                                                      \
    return table;                                                                                                      \
  }

LORA_RITE_TABLE(baseline, "baseline", )
#if defined(__x86_64__)
LORA_RITE_TABLE(avx2, "avx2", __attribute__((target("avx2,fma"))))
#endif

#pragma GCC diagnostic pop

/// The fastest loops that this machine runs.
inline const Table& best() {
#if defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2) return avx2();
#endif
  return baseline();
}

}  // namespace lora_rite::engine::kernels
