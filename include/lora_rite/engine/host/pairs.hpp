#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "lora_rite/engine/host/known.hpp"
#include "lora_rite/engine/host/precision.hpp"
#include "lora_rite/engine/host/threads.hpp"
#include "lora_rite/engine/host/work.hpp"
#include "lora_rite/rule/hyperparameters.hpp"
#include "lora_rite/rule/rows.hpp"

/// LoRA-RITE for k pairs of float factors of one shape, on plain memory: no LibTorch in here. The gradients are read
/// once for act 1. One pass over the rows does act 3 and leaves the Gram matrices that the next step's act 1 needs.
/// Pairs, and chunks of rows where factors are long, are shared out over threads; a result does not depend on their
/// number.
///
///     host::Pairs pairs(k, {{in, r, true}, {out, r, false}});
///     host::Observation observation = pairs.observe(a_views, b_views, state, numbers, threads);      // act 1
///     host::unmagnify<PolarBasis>(pairs, observation, state, threads);                               // act 2
///     host::Plan plan = host::plan(pairs, std::move(observation), state, numbers, clip, threads);
///     pairs.commit(std::move(plan), state, numbers, threads);                                        // act 3
namespace lora_rite::host {

/// What act 1 found. Dropped without `plan`, nothing has happened.
class Observation {
 public:
  /// Are all factors, momenta and gradients finite?
  bool finite() const {
    for (const Side side : kSides)
      for (const FactorWork& factor : work->sides[side].factors)
        if (!factor.finite) return false;
    return true;
  }

  std::unique_ptr<Work> work;
};

/// All that `commit` does and all memory that it needs. Dropped, nothing has happened.
class Plan {
 public:
  std::unique_ptr<Work> work;
};

/// What is known of the pairs between steps beside their state: sums over the rows as the last step left them, which
/// can be formed again from the factors.
class Pairs {
 public:
  /// The distance from 1 to the next number of factors and gradients.
  static constexpr double kEpsilon = std::numeric_limits<float>::epsilon();

  Pairs(int64_t count, const PerSide<kernels::Shape>& shapes)
      : count_(count), rank_(shapes.a.rank), padded_(kernels::padded_rank(rank_)) {
    for (const Side side : kSides) known_[side] = KnownFactors(count, shapes[side]);
    weights_.resize(static_cast<size_t>(std::max(shapes.a.rows, shapes.b.rows)));
    for (size_t row = 0; row < weights_.size(); ++row) weights_[row] = rule::column_weight(static_cast<int64_t>(row));
  }

  int64_t count() const { return count_; }
  int64_t rank() const { return rank_; }
  /// p
  int64_t padded_rank() const { return padded_; }
  const kernels::Shape& shape(Side side) const { return known_[side].shape; }

  /// The numbers of p×p matrices.
  size_t square() const { return static_cast<size_t>(padded_ * padded_); }

  /// Lanes are filled with the k factors A, then the k factors B; surplus lanes repeat the last factor.
  int64_t group_count() const { return (2 * count_ + kLanes - 1) / kLanes; }
  FactorId factor_in(int64_t group, int64_t lane) const {
    return factor_of(std::min(group * kLanes + lane, 2 * count_ - 1));
  }
  FactorId factor_of(int64_t number) const {
    return number < count_ ? FactorId{Side::A, static_cast<size_t>(number)}
                           : FactorId{Side::B, static_cast<size_t>(number - count_)};
  }
  int64_t number_of(FactorId id) const { return index_of(id.side) * count_ + static_cast<int64_t>(id.pair); }

  /// XᵀX | XᵀN of a factor [p, 2p]; of XᵀX what lies in i ≤ j.
  const double* products(FactorId id) const { return known_[id.side].products.total(id.pair); }

  /// Eigenvalues of a factor's second moment [r], ascending; null where they are not known.
  const double* eigenvalues(FactorId id) const {
    const KnownFactors& known = known_[id.side];
    return known.factors[id.pair].knows_eigenvalues ? known.eigenvalues.data() + id.pair * static_cast<size_t>(rank_)
                                                    : nullptr;
  }

  const DoubleSteps& double_steps(FactorId id) const { return known_[id.side].factors[id.pair].double_steps; }

  /// Act 1: GᵀG of every factor; sums over the rows of factors that were touched; who was edited, what is not finite.
  Observation observe(const PerSide<std::vector<FactorView>>& views, const StateView& state,
                      const rule::Hyperparameters& numbers, Threads& threads) {
    Observation observation{make_work(numbers.row_equilibration, threads)};
    Work& work = *observation.work;
    for (const Side side : kSides) {
      for (size_t i = 0; i < views[side].size(); ++i) {
        work.sides[side].factors[i].view = views[side][i];
      }
      work.sides[side].row_moments = work.row_equilibration ? state.row_moments[side] : nullptr;
    }
    for_each_chunk(work, threads, [&](FactorId id, int64_t chunk, int64_t first, int64_t end, const auto& blocks) {
      SideWork& side = work.sides[id.side];
      double* gram = side.gradient_gram.emptied_part(id.pair, chunk);
      double* scaled = side.row_moments == nullptr ? nullptr : side.scaled_gradient_gram.emptied_part(id.pair, chunk);
      const float* gradient = work[id].view.gradient;
      if (gradient == nullptr) return;
      kernels::best().gram(gradient, row_moments_of(side, id), shape(id.side), first, end, blocks, gram, scaled);
    });
    threads.for_each(2 * count_, [&](int64_t number, int64_t) {
      const FactorId id = factor_of(number);
      SideWork& side = work.sides[id.side];
      side.gradient_gram.add_up(id.pair);
      if (side.row_moments != nullptr) side.scaled_gradient_gram.add_up(id.pair);
      FactorView& view = side.factors[id.pair].view;
      view.touched = view.touched || fingerprint(id, view) != known_[id.side].factors[id.pair].seen;
    });
    for (int64_t number = 0; number < 2 * count_; ++number) {
      const FactorId id = factor_of(number);
      if (work[id].view.touched) sum_rows(id, work, state, threads);
    }
    threads.for_each(2 * count_, [&](int64_t number, int64_t) {
      const FactorId id = factor_of(number);
      FactorWork& factor = work[id];
      factor.edited = sums_changed(id, state);
      factor.finite = all_finite(work.sides[id.side].gradient_gram.total(id.pair), square()) &&
                      all_finite(products(id), 2 * square());
    });
    return observation;
  }

  /// Act 3: rows move, and all that is remembered becomes that of the next step. Asks for no memory.
  void commit(Plan&& plan, const StateView& state, const rule::Hyperparameters& numbers, Threads& threads) noexcept {
    Work& work = *plan.work;
    store_moments(work, state, threads);
    for_each_chunk(work, threads, [&](FactorId id, int64_t chunk, int64_t first, int64_t end, const auto& blocks) {
      move_rows(id, chunk, first, end, work, blocks);
    });
    threads.for_each(2 * count_, [&](int64_t number, int64_t) {
      const FactorId id = factor_of(number);
      add_up(id);
      remember_way_back(id, work, state);
      work[id].wide_cross = wants_wide_cross(id, state);
    });
    for (int64_t number = 0; number < 2 * count_; ++number) {
      const FactorId id = factor_of(number);
      settle(id, work[id].wide_cross, work, state, threads);
    }
    if (numbers.balance) balance(work, state, threads);
    threads.for_each(2 * count_, [&](int64_t number, int64_t) { remember(factor_of(number), work, state); });
    plan.work.reset();
  }

  /// After the state was replaced: nothing is known of the factors.
  void forget() {
    for (const Side side : kSides)
      for (KnownFactor& factor : known_[side].factors) factor = KnownFactor();
  }

  /// body(factor, chunk, first row, end row, blocks) for every chunk of every factor, in parallel.
  template <class Body>
  void for_each_chunk(const Work& work, Threads& threads, const Body& body) const {
    const int64_t of_a = count_ * known_.a.chunks.count, of_b = count_ * known_.b.chunks.count;
    threads.for_each(of_a + of_b, [&](int64_t task, int64_t thread) {
      const Side side = task < of_a ? Side::A : Side::B;
      const KnownFactors& known = known_[side];
      const int64_t part = task < of_a ? task : task - of_a;
      const int64_t chunk = part % known.chunks.count, first = chunk * known.chunks.rows;
      body(FactorId{side, static_cast<size_t>(part / known.chunks.count)}, chunk, first,
           std::min(first + known.chunks.rows, known.shape.rows), work.workspaces[static_cast<size_t>(thread)].blocks);
    });
  }

  /// Sums over the rows of each of the k factors of a side.
  ChunkedSums sums_of_rows(Side side, size_t size) const {
    return ChunkedSums(count_, known_[side].chunks.count, static_cast<int64_t>(size));
  }

  /// Act 3's instructions for a factor.
  kernels::Maps maps_of(FactorId id, const Work& work) const {
    const SideWork& side = work.sides[id.side];
    const FactorWork& factor = side.factors[id.pair];
    const size_t begin = id.pair * square();
    kernels::Maps maps = {side.momentum_maps.data() + begin,
                          side.gradient_maps.data() + begin,
                          side.decay,
                          side.rate,
                          factor.has_gradient(),
                          factor.wide_momentum,
                          factor.wide_gradient,
                          {}};
    if (side.row_moments != nullptr && maps.has_gradient)
      maps.rows = {side.row_maps.data() + begin, row_moments_of(side, id), factor.row_decay};
    return maps;
  }

  float* momentum_of(const SideWork& side, FactorId id) const {
    return side.momentum + static_cast<int64_t>(id.pair) * shape(id.side).rows * rank_;
  }

 private:
  float* row_moments_of(const SideWork& side, FactorId id) const {
    return side.row_moments == nullptr ? nullptr
                                       : side.row_moments + static_cast<int64_t>(id.pair) * shape(id.side).rows;
  }

  Fingerprint fingerprint(FactorId id, const FactorView& view) const {
    const KnownFactors& known = known_[id.side];
    return {view.values, known.shape.rows * rank_, known.stride};
  }

  /// All memory of a step. It is asked for and given back in every step: between steps it is worth more to the forward
  /// and backward pass, and asking for it costs next to nothing beside a pass over the rows.
  std::unique_ptr<Work> make_work(bool row_equilibration, Threads& threads) const {
    auto work = std::make_unique<Work>();
    const size_t size = static_cast<size_t>(count_) * square();
    for (const Side side : kSides) {
      SideWork& own = work->sides[side];
      own.factors.resize(static_cast<size_t>(count_));
      own.gradient_gram = sums_of_rows(side, square());
      own.momentum_maps.resize(size);
      own.gradient_maps.resize(size);
      if (!row_equilibration) continue;
      own.scaled_gradient_gram = sums_of_rows(side, square());
      own.row_maps.resize(size);
    }
    work->groups.resize(static_cast<size_t>(group_count()));
    work->row_equilibration = row_equilibration;
    for (int64_t thread = 0; thread < threads.count(); ++thread) work->workspaces.emplace_back(rank_);
    return work;
  }

  /// All sums over the rows of a factor, from its rows: what act 3 usually leaves behind.
  void sum_rows(FactorId id, const Work& work, const StateView& state, Threads& threads) {
    read_rows(id, work, state, threads);
    settle(id, wants_wide_cross(id, state), work, state, threads);
    known_[id.side].factors[id.pair].seen = fingerprint(id, work[id].view);
  }

  /// Must XᵀN be in double? It depends on what the state and the rows say, and on nothing else: a run that is resumed
  /// must sum as the run that went on.
  bool wants_wide_cross(FactorId id, const StateView& state) const {
    const KnownFactors& known = known_[id.side];
    if (!kernels::sums_in_float(rank_)) return true;
    const double* squares = known.columns.total(id.pair) + padded_;
    const double* root = state.inverse_root + number_of({partner_of(id.side), id.pair}) * rank_ * rank_;
    return !cross_product_fits_float(products(id), 2 * padded_, squares, root, rank_,
                                     state.previous_rate[number_of(id)]);
  }

  /// Where XᵀN was summed in the wrong type the rows are read once more.
  void settle(FactorId id, bool wide_cross, const Work& work, const StateView& state, Threads& threads) {
    KnownFactor& factor = known_[id.side].factors[id.pair];
    if (factor.wide_cross == wide_cross) return;
    factor.wide_cross = wide_cross;
    read_rows(id, work, state, threads);
  }

  void read_rows(FactorId id, const Work& work, const StateView& state, Threads& threads) {
    KnownFactors& known = known_[id.side];
    const float* momentum = state.momentum[id.side];
    if (momentum != nullptr) momentum += static_cast<int64_t>(id.pair) * known.shape.rows * rank_;
    threads.for_each(known.chunks.count, [&](int64_t chunk, int64_t thread) {
      const int64_t first = chunk * known.chunks.rows, end = std::min(first + known.chunks.rows, known.shape.rows);
      kernels::best().sum_rows(work[id].view.values, momentum, weights_.data(), known.shape, first, end,
                               work.workspaces[static_cast<size_t>(thread)].blocks, emptied_sums(id, chunk));
    });
    add_up(id);
  }

  kernels::Sums emptied_sums(FactorId id, int64_t chunk) {
    KnownFactors& known = known_[id.side];
    double* columns = known.columns.emptied_part(id.pair, chunk);
    return {known.products.emptied_part(id.pair, chunk), columns, columns + padded_, known.factors[id.pair].wide_cross};
  }

  void add_up(FactorId id) {
    known_[id.side].products.add_up(id.pair);
    known_[id.side].columns.add_up(id.pair);
  }

  /// ‖x‖² and Σ w x of column j.
  double squared_norm(FactorId id, int64_t j) const { return products(id)[j * 2 * padded_ + j]; }
  double weighted_sum(FactorId id, int64_t j) const { return known_[id.side].columns.total(id.pair)[j]; }

  /// The remembered ‖x‖² of a factor's columns [r] in `state`; count · r further on: Σ w x.
  double* remembered_sums(FactorId id, const StateView& state) const {
    return state.column_sums + (index_of(id.side) * 2 * count_ + static_cast<int64_t>(id.pair)) * rank_;
  }

  /// Do a factor's column sums differ from the remembered ones by more than round-off?
  bool sums_changed(FactorId id, const StateView& state) const {
    const double* norms = remembered_sums(id, state);
    const double* sums = norms + count_ * rank_;
    const auto rows = static_cast<double>(shape(id.side).rows);
    for (int64_t j = 0; j < rank_; ++j) {
      if (rule::norm_changed(norms[j], squared_norm(id, j)) ||
          rule::weighted_sum_changed(norms[j], rows, sums[j], weighted_sum(id, j)))
        return true;
    }
    return false;
  }

  void store_moments(const Work& work, const StateView& state, Threads& threads) {
    const int64_t size = rank_ * rank_;
    threads.for_each(group_count(), [&](int64_t g, int64_t) {
      const LaneGroup& group = work.groups[static_cast<size_t>(g)];
      const int64_t first = g * kLanes, lanes = std::min<int64_t>(kLanes, 2 * count_ - first);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        copy_out(group.second_moment, lane, state.second_moment + (first + lane) * size, rank_);
        copy_out(group.unmagnified.inverse_root, lane, state.inverse_root + (first + lane) * size, rank_);
        state.escaped_mass[first + lane] = group.escaped_mass[lane];
        state.step[first + lane] = group.step[lane];
        const FactorId id = factor_of(first + lane);
        KnownFactors& known = known_[id.side];
        known.factors[id.pair].knows_eigenvalues = true;
        for (int64_t i = 0; i < rank_; ++i)
          known.eigenvalues[id.pair * static_cast<size_t>(rank_) + static_cast<size_t>(i)] =
              group.eigenvalues.at(i, lane);
      }
    });
  }

  void move_rows(FactorId id, int64_t chunk, int64_t first, int64_t end, const Work& work,
                 const kernels::Blocks& blocks) {
    const SideWork& side = work.sides[id.side];
    if (side.momentum == nullptr) return;
    kernels::Maps maps = maps_of(id, work);
    maps.rows.next = row_moments_of(side, id);
    // A factor that rests keeps its sums. XᵀN is then not asked for, because its rate was 0.
    const kernels::Sums sums = maps.has_gradient ? emptied_sums(id, chunk) : kernels::Sums{};
    const FactorView& view = side.factors[id.pair].view;
    kernels::best().apply(view.values, momentum_of(side, id), view.gradient, weights_.data(), shape(id.side), first,
                          end, maps, blocks, sums);
  }

  /// `rule::balancing_scale`. Pairs of which one factor is zero, or did not move, are left alone.
  void balance(const Work& work, const StateView& state, Threads& threads) {
    for (size_t i = 0; i < static_cast<size_t>(count_); ++i) {
      PerSide<double> squared = {0, 0};
      for (const Side side : kSides)
        for (int64_t j = 0; j < rank_; ++j) squared[side] += squared_norm({side, i}, j);
      const bool both_moved = work[{Side::A, i}].has_gradient() && work[{Side::B, i}].has_gradient();
      if (!both_moved || !(squared.a > 0) || !(squared.b > 0)) continue;
      const double scale = rule::balancing_scale(squared.a, squared.b);
      const PerSide<double> scales = {scale, 1 / scale};
      for (const Side side : kSides) {
        const FactorId id = {side, i};
        const int64_t size = shape(side).rows * rank_;
        multiply(work[id].view.values, size, scales[side]);
        multiply(momentum_of(work.sides[side], id), size, scales[side]);
        // Side s holds the root of its partner, which is scaled by 1 / scales[s].
        multiply(state.inverse_root + number_of(id) * rank_ * rank_, rank_ * rank_, scales[side]);
      }
      // After both, for what XᵀN is summed in depends on the factor's own root.
      for (const Side side : kSides) sum_rows({side, i}, work, state, threads);
    }
  }

  template <class Number>
  static void multiply(Number* numbers, int64_t size, double factor) {
    for (int64_t e = 0; e < size; ++e) numbers[e] *= static_cast<Number>(factor);
  }

  void remember_way_back(FactorId id, const Work& work, const StateView& state) const {
    const SideWork& side = work.sides[id.side];
    const auto back = work[id].has_gradient()
                          ? rule::way_back(1 - static_cast<double>(side.decay), static_cast<double>(side.rate))
                          : rule::WayBack<double>{1, 0};
    state.previous_scale[number_of(id)] = back.scale;
    state.previous_rate[number_of(id)] = back.rate;
  }

  /// Remembers where the step left a factor.
  void remember(FactorId id, const Work& work, const StateView& state) {
    double* norms = remembered_sums(id, state);
    for (int64_t j = 0; j < rank_; ++j) {
      norms[j] = squared_norm(id, j);
      norms[count_ * rank_ + j] = weighted_sum(id, j);
    }
    const FactorWork& factor = work[id];
    KnownFactor& known = known_[id.side].factors[id.pair];
    known.seen = fingerprint(id, factor.view);
    if (!factor.has_gradient()) return;
    known.double_steps.momentum_map += factor.wide_momentum ? 1 : 0;
    known.double_steps.gradient_map += factor.wide_gradient ? 1 : 0;
    known.double_steps.cross_product += known.wide_cross ? 1 : 0;
  }

  int64_t count_, rank_, padded_;
  PerSide<KnownFactors> known_;
  std::vector<double> weights_;  ///< of the column sums
};

}  // namespace lora_rite::host
