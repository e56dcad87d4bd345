#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "lora_rite/engine/host/pairs.hpp"
#include "lora_rite/engine/host/precision.hpp"
#include "lora_rite/rule/decide.hpp"
#include "lora_rite/rule/rows.hpp"

/// Act 2 of the host engine: the rule, for eight factors at once.
namespace lora_rite::host {

namespace detail {

/// What the rule reads of one factor's partner and gradient.
inline void load_statistics(const Pairs& pairs, const Work& work, const StateView& state, FactorId id, int64_t lane,
                            rule::Statistics<LaneMatrix>& statistics) {
  const FactorId partner = {partner_of(id.side), id.pair};
  const SideWork& own = work.sides[id.side];
  const int64_t p = pairs.padded_rank(), number = pairs.number_of(partner);
  const double* unscaled = own.gradient_gram.total(id.pair);
  copy_in_upper(own.row_moments == nullptr ? unscaled : own.scaled_gradient_gram.total(id.pair), p,
                statistics.gradient_gram, lane);
  if (work.row_equilibration) copy_in_upper(unscaled, p, statistics.unscaled_gradient_gram, lane);

  const double* products = pairs.products(partner);
  copy_in_upper(products, 2 * p, statistics.gram, lane);
  // An edited factor has no past.
  const rule::WayBack<double> back =
      work[partner].edited ? rule::WayBack<double>{1, 0}
                           : rule::WayBack<double>{state.previous_scale[number], state.previous_rate[number]};
  for (int64_t i = 0; i < pairs.rank(); ++i)
    for (int64_t j = 0; j < pairs.rank(); ++j)
      statistics.cross.at(i, j, lane) =
          rule::cross_gram(back, statistics.gram.at(i, j, lane), products[(2 * i + 1) * p + j]);
  statistics.steps[lane] = state.step[number];
}

/// K of `max_relative_change` for eight factors.
inline LaneMatrix damping(const Pairs& pairs, const Work& work, int64_t g, const Lanes& rows,
                          const rule::Hyperparameters& numbers) {
  LaneMatrix own(pairs.rank());
  Lanes rate;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const FactorId id = pairs.factor_in(g, lane);
    // The partner's lane holds the root of this factor.
    const int64_t partner = pairs.number_of({partner_of(id.side), id.pair});
    const LaneMatrix& root = work.groups[static_cast<size_t>(partner / kLanes)].unmagnified.inverse_root;
    for (int64_t i = 0; i < pairs.rank(); ++i)
      for (int64_t j = 0; j < pairs.rank(); ++j) own.at(i, j, lane) = root.at(i, j, partner % kLanes);
    rate[lane] = rule::rate_of(id.side, numbers);
  }
  return rule::relative_change_damping(work.groups[static_cast<size_t>(g)].unmagnified.inverse_root, own, rate, rows,
                                       numbers.max_relative_change);
}

/// Maps of one factor, from N and G to N at once: N = M R⁺ᵀ. `length` is (1−β₁') c.
inline void store_maps(const Pairs& pairs, FactorId id, int64_t lane, const LaneMatrix& momentum_map,
                       const LaneMatrix& gradient_map, const LaneMatrix& row_map, const Lanes& row_decay,
                       const Lanes& length, double rate, Work& work) {
  SideWork& side = work.sides[id.side];
  FactorWork& factor = work[id];
  const int64_t p = pairs.padded_rank(), r = pairs.rank();
  const size_t begin = id.pair * pairs.square();
  double *of_momentum = side.momentum_maps.data() + begin, *of_gradient = side.gradient_maps.data() + begin;
  copy_out(momentum_map, lane, of_momentum, p);
  copy_out(gradient_map, lane, of_gradient, p);
  factor.wide_momentum = !momentum_map_fits_float(of_momentum, p, r);
  const GradientMap map = {of_gradient,
                           side.gradient_gram.total(id.pair),
                           pairs.products(id),
                           pairs.products({partner_of(id.side), id.pair}),
                           r,
                           p,
                           2 * p,
                           static_cast<double>(pairs.shape(id.side).rows),
                           length[lane],
                           rate};
  factor.wide_gradient = factor.wide_momentum || work.row_equilibration || !map.fits_float();
  if (side.row_moments == nullptr) return;
  copy_out(row_map, lane, side.row_maps.data() + begin, p);
  factor.row_decay = row_decay[lane];
}

/// `rule::Eigenvalues` that does not ask twice: the eigenvalues of V were found one step ago, when its root was taken.
struct RememberedEigenvalues {
  static constexpr double kOfSums = 0;  // lanes and chunks are added up apart: no more than the eigensolver leaves

  const LaneValues& known;  ///< of V, ascending
  LaneValues& found;        ///< of the next V

  Lanes escaping_mass(const LaneMatrix& second_moment, const LaneMatrix& transported) const {
    return rule::Eigenvalues::escaping_mass(known, second_moment, transported);
  }
  LaneMatrix preconditioner(const LaneMatrix& second_moment, const Lanes& escaped_mass,
                            const rule::RoundOff<LaneMatrix>* round_off, const rule::Hyperparameters& numbers) const {
    auto spectrum = eigh(second_moment);
    LaneMatrix result = rule::Eigenvalues::preconditioner(spectrum, second_moment, escaped_mass, round_off, numbers);
    found = ascending(std::move(spectrum.values));
    return result;
  }
};

/// The eigenvalues of eight second moments, from memory if all of them are known. Else by the solver that finds those
/// of the next step: a run that is resumed gets the same bits.
inline LaneValues eigenvalues_of(const Pairs& pairs, int64_t g, const LaneMatrix& second_moment) {
  LaneValues values(pairs.rank());
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const double* known = pairs.eigenvalues(pairs.factor_in(g, lane));
    if (known == nullptr) return ascending(std::move(eigh(second_moment).values));
    for (int64_t i = 0; i < pairs.rank(); ++i) values.at(i, lane) = known[i];
  }
  return values;
}

/// The rule for eight factors.
inline void decide(const Pairs& pairs, int64_t g, const StateView& state, const rule::Hyperparameters& numbers,
                   double clip, Work& work) {
  const int64_t rank = pairs.rank();
  rule::Moments<LaneMatrix> old = {LaneMatrix(rank), {}, LaneMatrix(rank), {}};
  Lanes rows, has_gradient, partner_edited;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const FactorId id = pairs.factor_in(g, lane);
    const int64_t number = pairs.number_of(id);
    copy_in(state.second_moment + number * rank * rank, rank, old.second_moment, lane);
    copy_in(state.inverse_root + number * rank * rank, rank, old.inverse_root, lane);
    old.escaped_mass[lane] = state.escaped_mass[number];
    old.step[lane] = state.step[number];
    rows[lane] = static_cast<double>(pairs.shape(id.side).rows);
    has_gradient[lane] = work[id].has_gradient() ? 1 : 0;
    partner_edited[lane] = work[{partner_of(id.side), id.pair}].edited ? 1 : 0;
  }
  LaneGroup& group = work.groups[static_cast<size_t>(g)];
  if (numbers.max_relative_change > 0) group.unmagnified.damping = damping(pairs, work, g, rows, numbers);
  const LaneValues eigenvalues = numbers.escape ? eigenvalues_of(pairs, g, old.second_moment) : LaneValues();
  const RememberedEigenvalues roots = {eigenvalues, group.eigenvalues};
  auto decision = rule::decide(old, group.unmagnified, rows, Lanes(clip), has_gradient, partner_edited, Pairs::kEpsilon,
                               numbers, roots);
  const LaneMatrix& root = decision.moments.inverse_root;
  const LaneMatrix momentum_map = matmul(decision.momentum_map, transpose(root));
  const LaneMatrix gradient_map = matmul(decision.gradient_map, transpose(root));
  const Lanes length = (1.0 - rule::bias_corrected_decay(numbers.beta1, decision.moments.step, has_gradient)) * clip;
  Lanes row_decay;
  if (work.row_equilibration)
    row_decay = rule::bias_corrected_decay(numbers.beta2, decision.moments.step, has_gradient);
  const int64_t lanes = std::min<int64_t>(kLanes, 2 * pairs.count() - g * kLanes);
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const FactorId id = pairs.factor_in(g, lane);
    store_maps(pairs, id, lane, momentum_map, gradient_map, decision.row_map, row_decay, length,
               rule::rate_of(id.side, numbers), work);
  }
  group.second_moment = std::move(decision.moments.second_moment);
  group.escaped_mass = decision.moments.escaped_mass;
  group.step = decision.moments.step;
}

/// Scales both maps where the RMS of M exceeds `bound`. One more pass over the rows finds ‖M‖² = tr(NᵀN YᵀY).
inline void bound_update_rms(const Pairs& pairs, double bound, Work& work, Threads& threads) {
  PerSide<ChunkedSums> grams = {pairs.sums_of_rows(Side::A, pairs.square()),
                                pairs.sums_of_rows(Side::B, pairs.square())};
  pairs.for_each_chunk(work, threads, [&](FactorId id, int64_t chunk, int64_t first, int64_t end, const auto& blocks) {
    const SideWork& side = work.sides[id.side];
    if (side.momentum == nullptr) return;
    kernels::best().update_gram(pairs.momentum_of(side, id), work[id].view.gradient, pairs.shape(id.side), first, end,
                                pairs.maps_of(id, work), blocks, grams[id.side].emptied_part(id.pair, chunk));
  });
  const int64_t p = pairs.padded_rank(), r = pairs.rank();
  for (int64_t number = 0; number < 2 * pairs.count(); ++number) {
    const FactorId id = pairs.factor_of(number);
    SideWork& side = work.sides[id.side];
    grams[id.side].add_up(id.pair);
    const double* gram = grams[id.side].total(id.pair);
    const double* products = pairs.products({partner_of(id.side), id.pair});
    double squared = 0;
    for (int64_t i = 0; i < r; ++i)
      for (int64_t j = i; j < r; ++j) squared += (i == j ? 1 : 2) * gram[i * p + j] * products[i * 2 * p + j];
    const auto elements = static_cast<double>(pairs.shape(id.side).rows * r);
    const double excess = rule::rms_excess(std::max(squared, 0.0), elements, bound);
    if (!(excess > 1)) continue;
    for (size_t e = id.pair * pairs.square(); e < (id.pair + 1) * pairs.square(); ++e) {
      side.momentum_maps[e] /= excess;
      side.gradient_maps[e] /= excess;
    }
  }
}

}  // namespace detail

/// Act 2, first half: the partner's basis and ‖Ḡ‖² of every factor. Everything must be finite.
template <class Basis>
void unmagnify(const Pairs& pairs, Observation& observation, const StateView& state, Threads& threads) {
  Work& work = *observation.work;
  threads.for_each(pairs.group_count(), [&](int64_t g, int64_t) {
    const int64_t rank = pairs.rank();
    rule::Statistics<LaneMatrix> statistics = {{}, LaneMatrix(rank), LaneMatrix(rank), LaneMatrix(rank), {}, {}};
    if (work.row_equilibration) statistics.unscaled_gradient_gram = LaneMatrix(rank);
    for (int64_t lane = 0; lane < kLanes; ++lane)
      detail::load_statistics(pairs, work, state, pairs.factor_in(g, lane), lane, statistics);
    auto& unmagnified = work.groups[static_cast<size_t>(g)].unmagnified;
    unmagnified = rule::unmagnify<Basis>(std::move(statistics), Pairs::kEpsilon);
    const Lanes squared = at_least(
        trace_of(work.row_equilibration ? unmagnified.unscaled_gradient_gram : unmagnified.gradient_gram), 0.0);
    for (int64_t lane = 0; lane < kLanes; ++lane) work[pairs.factor_in(g, lane)].unmagnified_squared = squared[lane];
  });
}

/// Act 2, second half, with the clip factor c. `state` has momenta and row moments for every side that has a gradient:
/// new ones are zero and one.
inline Plan plan(const Pairs& pairs, Observation&& observation, const StateView& state,
                 const rule::Hyperparameters& numbers, double clip, Threads& threads) {
  Plan result{std::move(observation.work)};
  Work& work = *result.work;
  for (const Side side : kSides) {
    SideWork& own = work.sides[side];
    const double rate = rule::rate_of(side, numbers);
    own.rate = static_cast<float>(rate);
    own.decay = static_cast<float>(rate * numbers.weight_decay);
    own.momentum = state.momentum[side];
    own.row_moments = work.row_equilibration ? state.row_moments[side] : nullptr;
  }
  threads.for_each(pairs.group_count(),
                   [&](int64_t g, int64_t) { detail::decide(pairs, g, state, numbers, clip, work); });
  if (numbers.max_update_rms > 0) detail::bound_update_rms(pairs, numbers.max_update_rms, work, threads);
  return result;
}

}  // namespace lora_rite::host
