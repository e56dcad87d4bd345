#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#ifdef __linux__
#include <unistd.h>
#endif
#ifdef __SSE2__
#include <immintrin.h>
#endif

#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
#define LORA_RITE_VECTOR_EXTENSIONS 1
#else
#define LORA_RITE_VECTOR_EXTENSIONS 0
#endif

/// What the host engine's kernels are called with, and the vectors they are written in.
namespace lora_rite::host::kernels {

#if LORA_RITE_VECTOR_EXTENSIONS
/// Vectors never cross a call, which would be a question of the ABI: what takes or returns one is inlined.
#define LORA_RITE_INLINE inline __attribute__((always_inline))
#define LORA_RITE_INLINE_LAMBDA __attribute__((always_inline))

typedef float Float4 __attribute__((vector_size(16)));
typedef float Float8 __attribute__((vector_size(32)));
typedef float Float16 __attribute__((vector_size(64)));
typedef double Double4 __attribute__((vector_size(32)));
typedef double Double8 __attribute__((vector_size(64)));
typedef int64_t Mask4 __attribute__((vector_size(32)));
#endif

/// A sum of squares that counts as zero, for its reciprocal comes near the largest number: beside entries of 1 it is
/// nothing, and what squares of floats add up to is 1e-90 or more.
constexpr double kVanishing = 1e-280;
/// Numbers below it have reciprocals that overflow.
constexpr double kSmallest = 1e-307;

inline int64_t padded_rank(int64_t rank) { return (rank + 3) / 4 * 4; }

// --- Tall data -----------------------------------------------------------------------------------------------------

/// How an n×r factor lies in memory: element (row, i) at [i · n + row] for A, at [row · r + i] for B.
struct Shape {
  int64_t rows;
  int64_t rank;
  bool rank_first;
};

/// Rows of a block: what keeps a block of every array in the first-level cache, or at rank 32 and more in the second. A
/// multiple of what all tiles want.
inline int64_t block_rows(int64_t rank) {
  const int64_t rows = 768 / padded_rank(rank) / 48 * 48;
  return rows < 48 ? 48 : rows;
}

/// Doubles from one row of `Blocks::wide` to the next; the odd end keeps rows of powers of two from sharing cache
/// sets.
inline int64_t pair_stride(int64_t p) { return 2 * p + 8; }

/// Work space of one thread for blocks of b rows and padded rank p, all by rows; the passes over A use some
/// of them by columns, [r][b].
struct Blocks {
  float *factor, *momentum, *gradient, *update;  ///< [b][p]
  double* gradient_wide;                         ///< [b][p]
  double* wide;                                  ///< X | N [b][2p + 8], or X alone [b][p]
  double* rows;                                  ///< a number of each row [b]
  float *momentum_map, *gradient_map;            ///< in float [p][p]

  /// In doubles: all, and what is a number or numbers of each row.
  static int64_t size(int64_t rank) { return rows_size(rank) + padded_rank(rank) * padded_rank(rank); }
  static int64_t rows_size(int64_t rank) {
    const int64_t p = padded_rank(rank);
    return block_rows(rank) * (3 * p + pair_stride(p) + 1);
  }
  static Blocks in(double* memory, int64_t rank) {
    const int64_t b = block_rows(rank), p = padded_rank(rank), block = b * p;
    float* floats = reinterpret_cast<float*>(memory);
    double *wide = memory + 3 * block, *rows = wide + b * pair_stride(p);
    float* maps = reinterpret_cast<float*>(rows + b);
    return {floats, floats + block, floats + 2 * block, floats + 3 * block, memory + 2 * block, wide,
            rows,   maps,           maps + p * p};
  }
};

/// Sums over rows that a pass leaves behind; the pass adds to them.
struct Sums {
  double* products;  ///< XᵀX | XᵀN [p][2p]; of XᵀX only what lies in i ≤ j
  double* weighted;  ///< Σ w_i x_i [p]
  double* squares;   ///< Σ n_i² [p], to a float's accuracy; not formed where `sums_in_float` is false
  /// XᵀN in double? Else each block sums it in float, and sums of blocks are double; not where `sums_in_float` is
  /// false.
  bool wide_cross = true;
};

/// Is XᵀN faster in float for factors of this rank? Tiles of 12 columns leave registers half empty.
inline bool sums_in_float(int64_t rank) { return padded_rank(rank) >= 16 || rank == 8; }

/// Has the first-level cache room for a block of every array and for the rows of the next one? Of the processors that
/// have the vector units the newer have 48 KiB, the older 32. Yes where nobody tells.
inline bool first_cache_is_roomy() {
#ifdef _SC_LEVEL1_DCACHE_SIZE
  static const int64_t bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);
  return bytes <= 0 || bytes > int64_t{40} * 1024;
#else
  return true;
#endif
}

/// Row equilibration of one factor: row ← decay·row + (1−decay)·mean_j (G·map)², and G's rows are divided by the root
/// of that; a row that never had a gradient rests.
struct RowMoments {
  const double* map = nullptr;     ///< [p][p]; null: G's rows stay as they are
  const float* moments = nullptr;  ///< [rows]
  double decay = 1;
  float* next = nullptr;  ///< [rows] what they become, perhaps in place; null: not kept
};

/// Act 3's instructions for one factor: N ← N·momentum + G·gradient, X ← X − (rate·N + decay·X). The decay stands by
/// itself: a float next to 1 does not hold 1 − decay.
struct Maps {
  const double *momentum, *gradient;  ///< [p][p]
  float decay, rate;
  bool has_gradient;          ///< else X rests and only N is carried along
  bool wide_momentum = true;  ///< N·momentum in double? Else both numbers are floats, and so are the sums.
  bool wide_gradient = true;  ///< the same of G·gradient, which is in float only where the other is
  RowMoments rows = {};       ///< where there is a gradient; they want `wide_gradient`
};

// --- Lanes ---------------------------------------------------------------------------------------------------------

/// r×r matrices side by side: element (i, j) of all of them at [(i · stride + j) · kLanes], aligned to 64 bytes.
constexpr int64_t kLanes = 8;

/// An r×r matrix of lanes with any strides, so that transposes cost nothing.
struct Operand {
  const double* data;
  int64_t row_stride, column_stride;  ///< in lanes
};

/// Lanes of work space that `eigh` takes.
inline int64_t eigh_work(int64_t r) { return 5 * r; }

/// The loops, compiled for one instruction set.
struct Table {
  const char* name;
  void (*gram)(const float* data, const float* rows, const Shape& shape, int64_t first, int64_t end,
               const Blocks& blocks, double* products, double* equilibrated);
  void (*sum_rows)(const float* factor, const float* momentum, const double* weights, const Shape& shape, int64_t first,
                   int64_t end, const Blocks& blocks, const Sums& sums);
  void (*apply)(float* factor, float* momentum, const float* gradient, const double* weights, const Shape& shape,
                int64_t first, int64_t end, const Maps& maps, const Blocks& blocks, const Sums& sums);
  void (*update_gram)(const float* momentum, const float* gradient, const Shape& shape, int64_t first, int64_t end,
                      const Maps& maps, const Blocks& blocks, double* products);
  void (*multiply)(const Operand& x, const Operand& y, int64_t r, int64_t stride, bool symmetric, double* out);
  void (*eigh)(double* matrices, int64_t r, int64_t stride, double* eigenvalues, double* work, double* eigenvectors);
};

}  // namespace lora_rite::host::kernels
