#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "lora_rite/engine/host/buffer_pool.hpp"
#include "lora_rite/engine/host/chunked_sums.hpp"
#include "lora_rite/engine/host/kernels/dispatch.hpp"
#include "lora_rite/engine/host/lane_algebra.hpp"
#include "lora_rite/rule/side.hpp"
#include "lora_rite/rule/types.hpp"

/// What the acts of the host engine hand to each other, on plain memory. k pairs agree in shape; r is padded to p, a
/// multiple of 4.
namespace lora_rite::host {

/// One factor, as its owner gives it for one step. Both arrays lie as `kernels::Shape` says, without gaps.
struct FactorView {
  float* values = nullptr;          ///< X
  const float* gradient = nullptr;  ///< G, null where there is none
  bool touched = false;             ///< may someone else have written to it since the last step?
};

/// What is remembered of k pairs: arrays of the caller's. A dimension of size 2 is the side, A first.
struct StateView {
  double *second_moment, *inverse_root;  ///< V and R⁺ of the partner [2, k, r, r]
  double *escaped_mass, *step;           ///< ρ and t [2, k]
  double* column_sums;                   ///< of the factors as the last step left them [2, 2, k, r]: ‖x‖², Σ w x
  double *previous_scale, *previous_rate;  ///< the way back to the factors one step ago, `rule::WayBack` [2, k]
  PerSide<float*> momentum = {};           ///< N [k, factor], null before the first gradient
  PerSide<float*> row_moments = {};        ///< second moments of rows [k, n], null if not wanted or not yet there
};

/// One of the 2k factors.
struct FactorId {
  Side side;
  size_t pair;
};

/// What a step knows of one factor.
struct FactorWork {
  FactorView view;
  bool edited = false;             ///< by someone else, since the last step
  bool finite = true;              ///< factor, momentum and gradient
  double unmagnified_squared = 0;  ///< ‖Ḡ‖²
  bool wide_momentum = true;       ///< must N's map be in double?
  bool wide_gradient = true;       ///< the same of G's
  bool wide_cross = true;          ///< must XᵀN of what the step left be in double?
  double row_decay = 1;            ///< β₂', for row equilibration

  bool has_gradient() const { return view.gradient != nullptr; }
};

/// The k factors of a side in one step.
struct SideWork {
  std::vector<FactorWork> factors;
  ChunkedSums gradient_gram;         ///< GᵀG [k, p, p]
  ChunkedSums scaled_gradient_gram;  ///< the same of rows scaled by their moments, where those are known
  // Maps: beyond r zero, as they were made; nobody writes there.
  std::vector<double> momentum_maps;  ///< N → N [k, p, p]
  std::vector<double> gradient_maps;  ///< G → N [k, p, p]
  std::vector<double> row_maps;       ///< G → S₀ [k, p, p], for row equilibration
  float decay = 0, rate = 0;          ///< X ← X − (rate · N + decay · X)
  float* momentum = nullptr;          ///< [k, factor]
  float* row_moments = nullptr;       ///< [k, n], null if not known or not wanted
};

/// Act 2 for eight factors.
struct LaneGroup {
  rule::Unmagnified<LaneMatrix> unmagnified;
  LaneMatrix second_moment;  ///< of the next step, as the following ones
  LaneValues eigenvalues;    ///< of the second moment, ascending
  Lanes escaped_mass, step;
};

/// Blocks of one thread.
struct Workspace {
  Buffer memory;
  kernels::Blocks blocks;

  explicit Workspace(int64_t rank)
      : memory(static_cast<size_t>(kernels::Blocks::size(rank))), blocks(kernels::Blocks::in(memory.data(), rank)) {}
};

/// All memory of one step. `observe` makes it; the Observation has it, then the Plan; `commit` frees it.
struct Work {
  PerSide<SideWork> sides;
  std::vector<LaneGroup> groups;
  std::vector<Workspace> workspaces;  ///< one a thread
  bool row_equilibration = false;

  FactorWork& operator[](FactorId id) { return sides[id.side].factors[id.pair]; }
  const FactorWork& operator[](FactorId id) const { return sides[id.side].factors[id.pair]; }
};

/// How rows are divided into chunks, each for one thread at a time.
struct Chunks {
  int64_t rows, count;

  /// Equal chunks, because a short last one would cost as much as it saves. Each has some elements, and many times more
  /// of them than the sums that it leaves behind.
  static Chunks of(const kernels::Shape& shape) {
    constexpr int64_t kElements = 32768, kRanks = 64;
    const int64_t p = kernels::padded_rank(shape.rank);
    const int64_t count = std::max<int64_t>(1, shape.rows / std::max(kElements / p, kRanks * p));
    return {(shape.rows + count - 1) / count, count};
  }
};

/// r×r numbers, row by row, `stride` apart ↔ one lane of a matrix.
inline void copy_in(const double* numbers, int64_t stride, LaneMatrix& matrix, int64_t lane) {
  for (int64_t i = 0; i < matrix.rank(); ++i)
    for (int64_t j = 0; j < matrix.rank(); ++j) matrix.at(i, j, lane) = numbers[i * stride + j];
}
/// The same of a symmetric matrix of which the upper triangle is there.
inline void copy_in_upper(const double* numbers, int64_t stride, LaneMatrix& matrix, int64_t lane) {
  for (int64_t i = 0; i < matrix.rank(); ++i)
    for (int64_t j = 0; j < matrix.rank(); ++j)
      matrix.at(i, j, lane) = numbers[std::min(i, j) * stride + std::max(i, j)];
}
inline void copy_out(const LaneMatrix& matrix, int64_t lane, double* numbers, int64_t stride) {
  for (int64_t i = 0; i < matrix.rank(); ++i)
    for (int64_t j = 0; j < matrix.rank(); ++j) numbers[i * stride + j] = matrix.at(i, j, lane);
}

/// Are all of them finite?
inline bool all_finite(const double* numbers, size_t size) {
  std::array<double, 8> sums = {};  // side by side: one sum would wait for itself
  size_t e = 0;
  for (; e + sums.size() <= size; e += sums.size())
    for (size_t k = 0; k < sums.size(); ++k) sums[k] += numbers[e + k] - numbers[e + k];
  for (; e < size; ++e) sums[0] += numbers[e] - numbers[e];
  return std::accumulate(sums.begin(), sums.end(), 0.0) == 0;  // else NaN
}

}  // namespace lora_rite::host
