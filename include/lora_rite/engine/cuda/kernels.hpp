#pragma once

#include <cmath>
#include <cstdint>

#include "lora_rite/engine/cuda/arguments.hpp"
#include "lora_rite/engine/cuda/number.hpp"
#include "lora_rite/engine/cuda/tile_sums.hpp"

/// Acts 1 and 3: a block for each tile. (`decide.hpp` has act 2.)
namespace lora_rite::cuda {

/// Act 1: GᵀG of a tile; and of its factor the column sums, which tell whether anything changed since the step before.
/// Where it did, XᵀX and XᵀN are formed anew.
template <int R, class Team>
LORA_RITE_FUNCTION void observe(Team& team, const Arguments& step, const AllPointers& pointers, int tile) {
  using T = Tall<R>;
  double* const shared = team.shared();
  const Set& set = step.set;
  const int number = set.factor_of_tile[tile], rank = set.rank;
  const Factor factor = set.factors[number];
  double* const eigenvalues = set.eigenvalues + static_cast<int64_t>(number) * rank;
  double* const known = set.tile_columns + static_cast<int64_t>(tile) * 2 * rank;
  if (!pointers.moves(number)) {
    team.for_each(1, [&](int) {
      set.tile_finite[tile] = true;
      if (!step.sums_unknown) return;
      known[0] = NAN;  // which equals nothing: the sums are formed when the pair moves
      if (tile == factor.first_tile) eigenvalues[0] = NAN;
    });
    return;
  }
  const Pointers& at = pointers.at[number];
  const auto [begin, end] = rows_of(factor, tile);
  const Elements stored = {at.values, set.dtype}, gradient = {const_cast<void*>(at.gradient), set.dtype};
  ColumnSums<R, Team> columns;
  ProductSum<R, Team, true> gram;
  double *of_x = shared, *of_g = shared + T::kStage, *weights = shared + T::kWeights;
  weigh_rows<R>(team, begin, weights);
  for (int64_t first = begin; first < end; first += T::kRows) {
    stage<R>(team, factor, first, rank, of_x, [&](int64_t index) { return stored.load(index); });
    columns.add(team, of_x, weights + (first - begin), [](double x) { return x; });
    if (at.gradient == nullptr) continue;
    stage<R>(team, factor, first, rank, of_g, [&](int64_t index) { return gradient.load(index); });
    gram.add(team, of_g, of_g);
  }
  double* of_gradient = set.tile_gradient_gram + static_cast<int64_t>(tile) * rank * rank;
  gram.store(team, rank, shared, of_gradient);
  double* now = shared + T::kStages;
  columns.store(team, rank, shared, now);
  bool changed = step.sums_unknown;
  for (int i = 0; i < 2 * rank; ++i) changed = changed || !(now[i] == known[i]);
  if (changed) sum_tile<R>(team, set, factor, Stepped{stored, factor.master}, tile);
  team.for_each(1, [&](int) {
    if (step.sums_unknown && tile == factor.first_tile) eigenvalues[0] = NAN;
    const int64_t begin_of_tile = static_cast<int64_t>(tile) * rank * rank;
    const double *of_factor = set.tile_gram + begin_of_tile, *cross = set.tile_cross + begin_of_tile;
    double sum = 0;  // squares: not finite where a number is not
    for (int i = 0; i < rank; ++i) sum += of_factor[i * rank + i] + cross[i * rank + i] + of_gradient[i * rank + i];
    set.tile_finite[tile] = is_finite(sum);
  });
}

/// Act 3: N ← N·momentum_map + G·gradient_map, X ← kept·X − rate·N, and the sums of what was stored.
template <int R, class Team>
LORA_RITE_FUNCTION void apply(Team& team, const Arguments& step, const AllPointers& pointers, int tile) {
  using T = Tall<R>;
  double* const shared = team.shared();
  const Set& set = step.set;
  const int number = set.factor_of_tile[tile], rank = set.rank;
  const Factor factor = set.factors[number];
  if (!*step.step_allowed || !pointers.moves(number)) return;
  const Pointers& at = pointers.at[number];
  const Elements stored = {at.values, set.dtype}, gradient = {const_cast<void*>(at.gradient), set.dtype};
  const Stepped x = {stored, factor.master};
  const Decided& decided = set.decided[number];
  const double kept = decided.kept, rate = decided.rate;
  const bool has_gradient = at.gradient != nullptr;
  if (factor.momentum == nullptr) return;  // it has never had a gradient
  double *of_n = shared, *of_g = of_n + T::kStage, *of_x = of_g + T::kStage;
  double *of_momentum = shared + T::kStages, *of_gradient = of_momentum + T::kMaps / 2;
  const double* maps = set.maps + static_cast<int64_t>(number) * 2 * rank * rank;
  team.for_each(R * R, [&](int e) {
    const int i = e / R, j = e % R;
    const bool inside = i < rank && j < rank;
    of_momentum[e] = inside ? maps[i * rank + j] : 0.0;
    of_gradient[e] = inside ? maps[(rank + i) * rank + j] : 0.0;
  });
  const auto [begin, end] = rows_of(factor, tile);
  for (int64_t first = begin; first < end; first += T::kRows) {
    stage<R>(team, factor, first, rank, of_n, [&](int64_t i) { return static_cast<double>(factor.momentum[i]); });
    if (has_gradient) {
      stage<R>(team, factor, first, rank, of_g, [&](int64_t i) { return gradient.load(i); });
      stage<R>(team, factor, first, rank, of_x, [&](int64_t i) { return x.load(i); });
    }
    const int64_t left = end - first;
    // Four columns of a row for each thread, neighbours where memory has neighbours. All rows are read from the
    // stages, so they may be overwritten.
    team.for_each(T::kRows * (R / 4), [&](int e) {
      const int i = factor.rank_first != 0 ? e % T::kRows : e / (R / 4);
      const int j = 4 * (factor.rank_first != 0 ? e / T::kRows : e % (R / 4));
      if (i >= left) return;
      double fresh[4] = {};
      for (int k = 0; k < rank; ++k) {
        const double n = of_n[i * T::kStride + k];
        for (int c = 0; c < 4; ++c) fresh[c] += n * of_momentum[k * R + j + c];
      }
      for (int k = 0; has_gradient && k < rank; ++k) {
        const double g = of_g[i * T::kStride + k];
        for (int c = 0; c < 4; ++c) fresh[c] += g * of_gradient[k * R + j + c];
      }
      for (int c = 0; c < 4 && j + c < rank; ++c) {
        const int64_t index = factor.offset(first + i, j + c, rank);
        factor.momentum[index] = static_cast<float>(fresh[c]);
        if (!has_gradient) continue;
        const double moved = kept * of_x[i * T::kStride + j + c] - rate * fresh[c];
        if (factor.master != nullptr) factor.master[index] = static_cast<float>(moved);
        stored.store(index, rounded(factor.master != nullptr ? static_cast<float>(moved) : moved, set.dtype));
      }
    });
  }
  sum_tile<R>(team, set, factor, x, tile);
}

}  // namespace lora_rite::cuda
