#pragma once

#include <cmath>
#include <cstdint>
#include <utility>

#include "lora_rite/engine/cuda/arguments.hpp"
#include "lora_rite/engine/cuda/block_algebra.hpp"
#include "lora_rite/rule/decide.hpp"
#include "lora_rite/rule/rows.hpp"

/// Act 2: the rule, one block for each factor.
namespace lora_rite::cuda {

namespace detail {

/// The sum of r×r matrices, one of each tile of a factor.
template <class Pool>
LORA_RITE_FUNCTION Matrix<Pool> sum_of_tiles(Pool& pool, const Factor& factor, const double* of_tiles) {
  const int64_t rank = pool.rank(), square = rank * rank;
  return matrix_of(pool, [&](int i, int j) {
    const double* element = of_tiles + factor.first_tile * square + i * rank + j;
    double sum = 0;
    for (int tile = 0; tile < factor.tiles; ++tile) sum += element[tile * square];
    return sum;
  });
}

/// A column's Σ x² or Σ w x over all tiles of a factor.
LORA_RITE_FUNCTION inline double column_sum(const Set& set, const Factor& factor, int which, int column) {
  const int64_t rank = set.rank;
  const double* of_tiles = set.tile_columns + 2 * rank * factor.first_tile + which * rank + column;
  double sum = 0;
  for (int tile = 0; tile < factor.tiles; ++tile) sum += of_tiles[2 * rank * tile];
  return sum;
}

/// Did someone write to this factor since the last step?
template <class Pool>
LORA_RITE_FUNCTION bool is_edited(Pool& pool, const Set& set, const Factor& factor) {
  const Values<Pool> changed = values_of(pool, [&](int i) {
    const double known = factor.squared_sums[i];
    const bool norm = rule::norm_changed(known, column_sum(set, factor, 0, i));
    const bool sum = rule::weighted_sum_changed(known, static_cast<double>(factor.rows), factor.weighted_sums[i],
                                                column_sum(set, factor, 1, i));
    return norm || sum ? 1.0 : 0.0;
  });
  bool any = false;
  for (int i = 0; i < pool.rank(); ++i) any = any || changed.at(i) != 0;
  return any;
}

/// → to [r, r]
template <class Pool>
LORA_RITE_FUNCTION void store(const Matrix<Pool>& matrix, double* to) {
  Pool& pool = matrix.pool();
  pool.for_elements([&](int i, int j) { to[i * pool.rank() + j] = matrix.at(i, j); });
}

}  // namespace detail

/// `rule::Eigenvalues` that does not ask twice: the eigenvalues of V were found one step ago, when its root was taken.
/// What is not remembered is found by the same function, so a run that is resumed gets the same bits.
template <class Pool>
struct RememberedEigenvalues {
  static constexpr double kOfSums = 0;  // tiles are added up apart: no more than the eigensolver leaves

  const double* known;  ///< of V, ascending; the first is NaN if they are unknown
  double* found;        ///< of the next V

  LORA_RITE_FUNCTION Number escaping_mass(const Matrix<Pool>& second_moment, const Matrix<Pool>& transported) const {
    const Values<Pool> values = is_finite(known[0]) ? values_of(second_moment.pool(), [&](int i) { return known[i]; })
                                                    : ascending(eigh(second_moment).values);
    return rule::Eigenvalues::escaping_mass(values, second_moment, transported);
  }
  LORA_RITE_FUNCTION Matrix<Pool> preconditioner(const Matrix<Pool>& second_moment, const Number& escaped_mass,
                                                 const rule::RoundOff<Matrix<Pool>>* round_off,
                                                 const rule::Hyperparameters& numbers) const {
    const auto spectrum = eigh(second_moment);
    const Values<Pool> values = ascending(spectrum.values);
    second_moment.pool().for_each(second_moment.pool().rank(), [&](int i) { found[i] = values.at(i); });
    return rule::Eigenvalues::preconditioner(spectrum, second_moment, escaped_mass, round_off, numbers);
  }
};

/// Is the step taken, and with which c?
struct Verdict {
  bool allowed;
  double clip_factor;
};
template <class Pool>
LORA_RITE_FUNCTION Verdict verdict_of(Pool& pool, const Arguments& step) {
  const Alone& alone = step.alone;
  if (alone.finite == nullptr) return {*step.step_allowed, *step.clip_factor};
  constexpr int kLanes = Pool::kMatrix / 2 < 128 ? Pool::kMatrix / 2 : 128;
  double *bad = pool.work(0), *squares = bad + kLanes;
  pool.for_each(kLanes, [&](int lane) {
    double not_finite = 0, sum = 0;
    for (int tile = lane; tile < alone.tiles; tile += kLanes) not_finite += alone.finite[tile] ? 0 : 1;
    for (int factor = lane; factor < alone.factors; factor += kLanes) sum += alone.decided[factor].squared_norm;
    bad[lane] = not_finite, squares[lane] = sum;
  });
  double not_finite = 0, sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) not_finite += bad[lane], sum += squares[lane];
  const double share = alone.clip_unmagnified_norm / std::sqrt(sum);
  return {not_finite == 0, alone.clip_unmagnified_norm > 0 && share < 1 ? share : 1.0};
}

/// First half: the partner's basis, how it turned, and the gradient seen in it.
template <class Basis, class Pool>
LORA_RITE_FUNCTION void unmagnify(Pool& pool, const Arguments& step, const AllPointers& pointers, int number) {
  using M = Matrix<Pool>;
  const Set& set = step.set;
  const int rank = set.rank;
  const int64_t square = static_cast<int64_t>(rank) * rank;
  const Factor &factor = set.factors[number], &partner = set.factors[number ^ 1];
  // Alone it is not known yet. What is not finite then is nobody's input, for the step will not be taken.
  if ((step.alone.finite == nullptr && !*step.step_allowed) || !pointers.moves(number)) {
    pool.for_each(1, [&](int) { set.decided[number].squared_norm = 0; });
    return;
  }
  const bool edited = detail::is_edited(pool, set, partner);
  rule::Statistics<M> statistics;
  statistics.gram = detail::sum_of_tiles(pool, partner, set.tile_gram);
  // An edited factor has no past.
  const rule::WayBack<Number> back =
      edited ? rule::WayBack<Number>{1.0, 0.0} : rule::WayBack<Number>{*partner.previous_scale, *partner.previous_rate};
  statistics.cross = rule::cross_gram(back, statistics.gram, detail::sum_of_tiles(pool, partner, set.tile_cross));
  statistics.gradient_gram = pointers.at[number].gradient != nullptr
                                 ? detail::sum_of_tiles(pool, factor, set.tile_gradient_gram)
                                 : matrix_of(pool, [](int, int) { return 0.0; });
  statistics.steps = *partner.step;
  const rule::Unmagnified<M> found = rule::unmagnify<Basis>(std::move(statistics), set.factor_epsilon);
  detail::store(found.inverse_root, set.inverse_root + number * square);
  detail::store(found.change, set.change + number * square);
  detail::store(found.magnified_gram, set.gradient_gram + number * square);
  detail::store(found.gradient_gram, set.projected_gram + number * square);
  const double norm = trace_of(found.gradient_gram).value;
  pool.for_each(1, [&](int) {
    set.decided[number].squared_norm = norm > 0 ? norm : 0.0;
    set.partner_edited[number] = edited;
  });
}

/// Second half: the moments and the maps from N and G to the next N.
template <class Pool>
LORA_RITE_FUNCTION void decide(Pool& pool, const Arguments& step, const AllPointers& pointers, int number) {
  using M = Matrix<Pool>;
  const Set& set = step.set;
  const int rank = set.rank;
  const int64_t square = static_cast<int64_t>(rank) * rank;
  const Factor& factor = set.factors[number];
  const Verdict verdict = verdict_of(pool, step);
  if (step.alone.finite != nullptr && number == 0) {
    pool.for_each(
        1, [&](int) { *step.alone.step_allowed = verdict.allowed, *step.alone.clip_factor = verdict.clip_factor; });
  }
  if (!verdict.allowed || !pointers.moves(number)) return;
  const bool has_gradient = pointers.at[number].gradient != nullptr;
  const Side side = number % 2 == 0 ? Side::A : Side::B;
  const double side_rate = step.rates != nullptr ? step.rates[number % 2] : rule::rate_of(side, step.numbers);
  const double rows = static_cast<double>(factor.rows);
  const rule::Moments<M> old = {M(pool, factor.second_moment), *factor.escaped_mass, M(pool, factor.inverse_root),
                                *factor.step};
  const M root(pool, set.inverse_root + number * square);
  rule::Unmagnified<M> now = {root,
                              M(pool, set.change + number * square),
                              M(pool, set.gradient_gram + number * square),
                              M(pool, set.projected_gram + number * square),
                              M(),
                              M()};
  if (step.numbers.max_relative_change > 0) {
    const M own(pool, set.inverse_root + (number ^ 1) * square);
    now.damping =
        rule::relative_change_damping(root, own, Number(side_rate), Number(rows), step.numbers.max_relative_change);
  }
  const RememberedEigenvalues<Pool> roots = {set.eigenvalues + static_cast<int64_t>(number) * rank,
                                             set.next_eigenvalues + static_cast<int64_t>(number) * rank};
  const rule::Decision<M> decision =
      rule::decide(old, now, Number(rows), Number(verdict.clip_factor), Number(has_gradient ? 1.0 : 0.0),
                   Number(set.partner_edited[number] ? 1.0 : 0.0), epsilon_of(set.dtype), step.numbers, roots);
  detail::store(decision.moments.second_moment, set.second_moment + number * square);
  double* maps = set.maps + 2 * square * number;
  detail::store(matmul(decision.momentum_map, transpose(root)), maps);
  detail::store(matmul(decision.gradient_map, transpose(root)), maps + square);
  pool.for_each(1, [&](int) {
    Decided& decided = set.decided[number];
    decided.rate = has_gradient ? side_rate : 0.0;
    decided.kept = 1 - decided.rate * step.numbers.weight_decay;
    decided.step = decision.moments.step.value;
    decided.escaped_mass = decision.moments.escaped_mass.value;
  });
}

/// After act 3: what is remembered of a factor. Nothing reads it any more in this step.
template <class Pool>
LORA_RITE_FUNCTION void remember(Pool& pool, const Arguments& step, const AllPointers& pointers, int number) {
  const Set& set = step.set;
  const int64_t rank = set.rank, square = rank * rank;
  const Factor& factor = set.factors[number];
  if (!*step.step_allowed) {
    if (step.alone.finite != nullptr && number == 0 && step.alone.decided == set.decided)
      pool.for_each(1, [&](int) { ++*step.alone.skipped; });
    return;
  }
  const Decided decided = set.decided[number];
  if (pointers.moves(number)) {
    pool.for_elements([&](int i, int j) {
      const int64_t element = i * rank + j;
      factor.second_moment[element] = set.second_moment[number * square + element];
      factor.inverse_root[element] = set.inverse_root[number * square + element];
    });
    pool.for_each(set.rank, [&](int i) {
      const int64_t place = number * rank + i;
      set.eigenvalues[place] = set.next_eigenvalues[place];
    });
    pool.for_each(2 * set.rank, [&](int i) {
      const int which = i / set.rank, column = i % set.rank;
      (which == 0 ? factor.squared_sums : factor.weighted_sums)[column] =
          detail::column_sum(set, factor, which, column);
    });
  }
  pool.for_each(1, [&](int) {
    *factor.unmagnified_norm = std::sqrt(decided.squared_norm);
    *factor.clip_factor = *step.clip_factor;
    if (!pointers.moves(number)) return;
    *factor.step = decided.step;
    *factor.escaped_mass = decided.escaped_mass;
    const rule::WayBack<double> back = rule::way_back(decided.kept, decided.rate);
    *factor.previous_scale = back.scale;
    *factor.previous_rate = back.rate;
  });
}

/// Threads of act 2 at a rank.
template <int R>
struct ActTwo {
  static constexpr int kThreads = R <= 8 ? 64 : R == 16 ? 128 : 256;
};

}  // namespace lora_rite::cuda
