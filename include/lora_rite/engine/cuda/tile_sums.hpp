#pragma once

#include <cstdint>

#include "lora_rite/engine/cuda/arguments.hpp"
#include "lora_rite/rule/rows.hpp"

/// Sums over the rows of a tile, in double: products of floats are exact there.
namespace lora_rite::cuda {

/// How a block goes through a tile: kRows rows at a time are staged in shared memory.
template <int R>
struct Tall {
  static constexpr int kThreads = 256;
  static constexpr int kRows = R <= 16 ? 64 : R == 32 ? 32 : 16;
  static constexpr int kStride = R + 1;  ///< of staged rows
  static constexpr int kStage = kRows * kStride;
  static constexpr int kPartial = 17;  ///< doubles for a thread's 16 sums, which then share no memory bank
  static constexpr int kStages = 3 * kStage > kThreads* kPartial ? 3 * kStage : kThreads* kPartial;
  static constexpr int kMaps = 2 * R * R;
  static constexpr int kWeights = kStages + kMaps;  ///< where the rows' weights begin
  /// Doubles of shared memory: sums are put together where rows were staged.
  static constexpr int kShared = kWeights + kTileRows;
};

/// The rows of a tile, from begin up to end.
struct Rows {
  int64_t begin, end;
};
LORA_RITE_FUNCTION inline Rows rows_of(const Factor& factor, int tile) {
  const int64_t begin = static_cast<int64_t>(tile - factor.first_tile) * kTileRows;
  return {begin, begin + kTileRows < factor.rows ? begin + kTileRows : factor.rows};
}

/// `rule::column_weight` of a tile's rows, from row `begin` on.
template <int R, class Team>
LORA_RITE_FUNCTION void weigh_rows(Team& team, int64_t begin, double* weights) {
  team.for_each(kTileRows, [&](int i) { weights[i] = rule::column_weight(begin + i); });
}

/// f(index) of the elements of rows from `first` on → to[i, j], zero where the tile or the rank ends. Consecutive
/// threads read what lies together.
template <int R, class Team, class Function>
LORA_RITE_FUNCTION void stage(Team& team, const Factor& factor, int64_t first, int rank, double* to,
                              const Function& function) {
  using T = Tall<R>;
  const bool rank_first = factor.rank_first != 0;
  const int64_t left = factor.rows - first;
  team.for_each(T::kRows * R, [&](int e) {
    const int i = rank_first ? e % T::kRows : e / R, j = rank_first ? e / T::kRows : e % R;
    to[i * T::kStride + j] = i < left && j < rank ? function(factor.offset(first + i, j, rank)) : 0.0;
  });
}

/// The sum of xᵀy over staged rows x, y, by squares of 4×4, which one thread adds up for every kGroups-th row. With
/// `kSymmetric` x is y, and the squares below the diagonal are left out.
template <int R, class Team, bool kSymmetric>
class ProductSum {
  using T = Tall<R>;
  static constexpr int kSide = R / 4;
  static constexpr int kSquares = kSymmetric ? kSide * (kSide + 1) / 2 : kSide * kSide;
  static constexpr int kFit = T::kThreads / kSquares;
  static constexpr int kGroups = kFit < T::kRows ? kFit : T::kRows;
  static constexpr int kUnits = kSquares * kGroups;

 public:
  LORA_RITE_FUNCTION void add(Team& team, const double* x, const double* y) {
    team.for_each(kUnits, [&](int unit) {
      const Corner at = corner_of(unit % kSquares);
      Square& sum = sums_[unit];
      for (int row = unit / kSquares; row < T::kRows; row += kGroups) {
        const double *left = x + row * T::kStride + at.i, *right = y + row * T::kStride + at.j;
        for (int a = 0; a < 4; ++a)
          for (int b = 0; b < 4; ++b) sum.of[4 * a + b] += left[a] * right[b];
      }
    });
  }

  /// → to [r, r]. `shared` has kThreads·kPartial doubles.
  LORA_RITE_FUNCTION void store(Team& team, int rank, double* shared, double* to) {
    team.for_each(kUnits, [&](int unit) {
      for (int e = 0; e < 16; ++e) shared[unit * T::kPartial + e] = sums_[unit].of[e];
    });
    team.for_each(16 * kSquares, [&](int number) {
      const int square = number / 16, e = number % 16;
      const Corner at = corner_of(square);
      const int i = at.i + e / 4, j = at.j + e % 4;
      double sum = 0;
      for (int group = 0; group < kGroups; ++group) sum += shared[(group * kSquares + square) * T::kPartial + e];
      if (i >= rank || j >= rank || (kSymmetric && i > j)) return;
      to[i * rank + j] = sum;
      if (kSymmetric) to[j * rank + i] = sum;
    });
  }

 private:
  struct Square {
    double of[16] = {};
  };
  struct Corner {
    int i, j;
  };
  LORA_RITE_FUNCTION static Corner corner_of(int square) {
    if (!kSymmetric) return {4 * (square / kSide), 4 * (square % kSide)};
    int i = 0;
    while (square >= kSide - i) square -= kSide - i, ++i;
    return {4 * i, 4 * (i + square)};
  }

  typename Team::template PerThread<Square, kUnits> sums_;
};

/// Σ x² and Σ w x of every column of what is stored: see `PairState::column_sums`.
template <int R, class Team>
class ColumnSums {
  using T = Tall<R>;
  static constexpr int kFit = T::kThreads / R;
  static constexpr int kGroups = kFit < T::kRows ? kFit : T::kRows;
  static constexpr int kUnits = R * kGroups;

 public:
  /// `weights` are those of the staged rows, `stored` what an element is in memory.
  template <class Function>
  LORA_RITE_FUNCTION void add(Team& team, const double* x, const double* weights, const Function& stored) {
    team.for_each(kUnits, [&](int unit) {
      Both& sum = sums_[unit];
      for (int row = unit / R; row < T::kRows; row += kGroups) {
        const double element = stored(x[row * T::kStride + unit % R]);
        sum.squares += element * element;
        sum.weighted += weights[row] * element;
      }
    });
  }

  /// → to [2, r].
  LORA_RITE_FUNCTION void store(Team& team, int rank, double* shared, double* to) {
    team.for_each(kUnits, [&](int unit) {
      double* both = shared + int64_t{unit} * 2;
      both[0] = sums_[unit].squares, both[1] = sums_[unit].weighted;
    });
    team.for_each(2 * rank, [&](int number) {
      const int which = number / rank, column = number % rank;
      double sum = 0;
      for (int group = 0; group < kGroups; ++group) sum += shared[2 * (group * R + column) + which];
      to[number] = sum;
    });
  }

 private:
  struct Both {
    double squares = 0, weighted = 0;
  };
  typename Team::template PerThread<Both, kUnits> sums_;
};

/// X as it is stepped: the master copy where it still rounds to what is stored. Elsewhere someone wrote to the factor.
struct Stepped {
  Elements stored;
  const float* master;

  LORA_RITE_FUNCTION double load(int64_t index) const {
    const double x = stored.load(index);
    if (master == nullptr) return x;
    const double fine = master[index];
    return rounded(fine, stored.dtype) == x ? fine : x;
  }
};

/// XᵀX, XᵀN and the column sums of one tile as it lies in memory. The pass that moves the rows and the look for edits
/// call this alike, so the same values give the same bits.
template <int R, class Team>
LORA_RITE_FUNCTION void sum_tile(Team& team, const Set& set, const Factor& factor, const Stepped& x, int tile) {
  using T = Tall<R>;
  double* const shared = team.shared();
  const int rank = set.rank;
  const auto [begin, end] = rows_of(factor, tile);
  ProductSum<R, Team, true> gram;
  ProductSum<R, Team, false> cross;
  ColumnSums<R, Team> columns;
  double *of_x = shared, *of_n = shared + T::kStage, *weights = shared + T::kWeights;
  const bool is_rounded = factor.master != nullptr;
  weigh_rows<R>(team, begin, weights);
  for (int64_t first = begin; first < end; first += T::kRows) {
    stage<R>(team, factor, first, rank, of_x, [&](int64_t index) { return x.load(index); });
    gram.add(team, of_x, of_x);
    columns.add(team, of_x, weights + (first - begin),
                [&](double e) { return is_rounded ? rounded(e, set.dtype) : e; });
    if (factor.momentum == nullptr) continue;
    stage<R>(team, factor, first, rank, of_n,
             [&](int64_t index) { return static_cast<double>(factor.momentum[index]); });
    cross.add(team, of_x, of_n);
  }
  const int64_t square = static_cast<int64_t>(rank) * rank;
  gram.store(team, rank, shared, set.tile_gram + tile * square);
  cross.store(team, rank, shared, set.tile_cross + tile * square);
  columns.store(team, rank, shared, set.tile_columns + static_cast<int64_t>(tile) * 2 * rank);
}

}  // namespace lora_rite::cuda
