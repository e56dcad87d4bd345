#pragma once

#include <ATen/ATen.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/engine/batch.hpp"
#include "lora_rite/engine/device/batch_acts.hpp"
#include "lora_rite/engine/layout.hpp"
#include "lora_rite/leaf.hpp"
#include "lora_rite/options.hpp"
#include "lora_rite/rule/decide.hpp"
#include "lora_rite/rule/rows.hpp"

/// Acts 1 and 3 with ATen operators. Pairs that agree in shape, dtype and device are one batch, so the number of
/// operator calls grows with the number of distinct shapes. No value is ever read back to the host, so a step also runs
/// on `meta` tensors.
///
/// Shapes: k pairs, factor X of n rows. "Stacked" is [k, factor shape] as the user has it, "tall" [k, n, r] with the
/// rank last. All arithmetic is double, whatever the factors are: products of floats are exact there, which keeps Gram
/// matrices as good as an fp32 QR would.
namespace lora_rite::device {

/// A batch whose tall data are moved by ATen operators.
class DeviceBatch : public engine::Batch {
 public:
  DeviceBatch(std::vector<FactorPair> pairs, std::vector<std::string> labels)
      : Batch(std::move(pairs), std::move(labels)) {
    set_rows(lora_rite::detail::rows_of(pairs_[0]));
  }

  void set_row_shards(engine::RowShards shards) {
    shards_ = std::move(shards);
    set_rows(shards_->rows);
  }

  /// n of both sides [2, 1, 1, 1]
  const at::Tensor& rows() const { return rows_; }

  /// Act 1. Nothing if no pair has a gradient.
  std::optional<BatchObservation> observe(const LoraRiteOptions& options, InverseRoot inverse_root) {
    if (!find_gradients()) return std::nullopt;
    BatchObservation found;
    found.has_gradient = has_gradient_;
    PerSide<at::Tensor> sums;
    for (const Side side : kSides) {
      found.gradients[side] = gather_gradients(side);
      const at::Tensor as_stored = gather(side);
      found.factors[side] = stepped_factors(as_stored, side, options.master_weights());
      sums[side] = column_sums(as_stored, side);
    }
    Grams grams = grams_of(found, options, inverse_root);
    sum_over_shards({&sums, &grams.gram, &grams.cross, &grams.past, &grams.gradient, &grams.unscaled_gradient});
    for (const Side side : kSides) {
      found.edited[side] = sums_changed(side, sums[side]);
      if (!grams.past[side].defined()) continue;
      // An edited factor has no past.
      const int64_t s = index_of(side);
      const at::Tensor scale = state_.previous_scale[s], rate = state_.previous_rate[s];
      const rule::WayBack<at::Tensor> back = {choose(found.edited[side], at::ones_like(scale), scale),
                                              choose(negated(found.edited[side]), rate, 0.0)};
      grams.cross[side] = rule::cross_gram(back, grams.cross[side], grams.past[side]);
    }
    found.statistics = statistics_of(grams, options.row_equilibration());
    return found;
  }

  /// Computes all new tensors of this batch, which `commit` writes. `decision` is this batch's slice of act 2's,
  /// `rates` η of both sides [2, 1, 1, 1], `squared_norm` ‖Ḡ‖² [2, k].
  BatchPlan plan(BatchObservation found, rule::Decision<at::Tensor> decision, const at::Tensor& squared_norm,
                 const LoraRiteOptions& options, const at::Tensor& rates, const at::Tensor& clip_factor,
                 const at::Tensor& step_allowed) {
    const at::Tensor rate = wide(found.has_gradient) * rates;
    const at::Tensor kept = 1 - rate * options.weight_decay();
    BatchPlan plan = {state_, PendingWrites(step_allowed)};
    PerSide<at::Tensor> moved, momentum, row_moments, sums;
    const auto move = [&](Side side) {
      if (found.gradients[side].defined() || state_.momentum[side].defined())
        momentum[side] = next_momentum(side, found, decision, options, row_moments[side]);
      moved[side] = wide(tall(found.factors[side], side));
      if (!momentum[side].defined()) return;
      const int64_t s = index_of(side);
      if (options.weight_decay() > 0) moved[side] = kept[s] * moved[side];
      moved[side] = at::addcmul(moved[side], rate[s], momentum[side], /*value=*/-1);
    };
    const auto remember = [&](at::Tensor& stored, const at::Tensor& fresh, double at_first) {
      if (!stored.defined()) stored = at::full(fresh.sizes(), at_first, fresh.options());
      plan.writes.replace(stored, fresh);
    };
    const auto write = [&](Side side) {
      // Master copies that were switched off are dropped; row moments wait as they are.
      if (found.factors[side].scalar_type() == dtype_) plan.next.master[side] = at::Tensor();
      at::Tensor x = std::exchange(moved[side], {});
      if (at::Tensor& n = momentum[side]; n.defined())
        remember(plan.next.momentum[side], stacked(std::exchange(n, {}), side, shapes_[side]).to(wide_dtype()), 0);
      if (row_moments[side].defined()) remember(plan.next.row_moments[side], row_moments[side].to(wide_dtype()), 1);
      const at::Tensor stored = found.gradients[side].defined()
                                    ? plan_factors(std::move(x), side, found.factors[side], step_allowed, plan)
                                    : gather(side);
      sums[side] = column_sums(stored, side);
    };
    // One side after the other, so that the doubles of one are there at a time, unless both are needed.
    for (const Side side : kSides) {
      move(side);
      if (!options.balance()) write(side);
    }
    if (options.balance()) {
      balance(found, moved, momentum, decision.moments.inverse_root);
      for (const Side side : kSides) write(side);
    }
    sum_over_shards({&sums});
    const rule::WayBack<at::Tensor> back = rule::way_back(kept, rate);
    plan.writes.replace(state_.column_sums, at::stack({sums.a, sums.b}));
    plan.writes.replace(state_.previous_scale, back.scale);
    plan.writes.replace(state_.previous_rate, back.rate);
    plan.writes.replace(state_.unmagnified_norm, squared_norm.sqrt().view(state_.unmagnified_norm.sizes()));
    plan.writes.replace(state_.clip_factor, clip_factor.expand_as(state_.clip_factor));
    plan_moments(decision.moments, plan);
    return plan;
  }

  void commit(BatchPlan& plan) {
    plan.writes.commit();
    std::swap(state_, plan.next);
  }

 private:
  /// Act 1's r×r sums over the rows, each factor in its own coordinates C.
  struct Grams {
    PerSide<at::Tensor> coordinates;        ///< C, undefined where it is the identity
    PerSide<at::Tensor> gram, cross, past;  ///< (XC)ᵀ(XC), (XC)ᵀX and (XC)ᵀN
    PerSide<at::Tensor> gradient;  ///< (GC)ᵀ(GC), C being the partner's; of scaled rows with row equilibration
    PerSide<at::Tensor> unscaled_gradient;  ///< the same of unscaled rows
  };

  void set_rows(const PerSide<int64_t>& rows) {
    rows_ = at::tensor({rows.a, rows.b}, at::kDouble).view({2, 1, 1, 1}).to(device_);
  }

  Grams grams_of(const BatchObservation& found, const LoraRiteOptions& options, InverseRoot inverse_root) const {
    Grams grams;
    PerSide<at::Tensor> x;
    for (const Side side : kSides) {
      x[side] = wide(tall(found.factors[side], side));
      if (dtype_ == at::kDouble) grams.gram[side] = inner_products(x[side], x[side]);
    }
    if (dtype_ == at::kDouble) {
      sum_over_shards({&grams.gram});
      const double cutoff = rule::relative_cutoff(found.factor_epsilon(), rank_);
      for (const Side side : kSides) grams.coordinates[side] = inverse_root(finite_or_zero(grams.gram[side]), cutoff);
    }
    for (const Side side : kSides) {
      const at::Tensor& c = grams.coordinates[side];
      const at::Tensor xc = c.defined() ? at::matmul(x[side], c) : x[side];
      grams.gram[side] = inner_products(xc, xc);
      grams.cross[side] = c.defined() ? inner_products(xc, x[side]) : grams.gram[side];
      if (state_.momentum[side].defined())
        grams.past[side] = inner_products(xc, wide(tall(state_.momentum[side], side)));
    }
    x = {};  // half of the memory that this function takes
    for (const Side side : kSides) {
      at::Tensor& gram = grams.gradient[side];
      if (!found.gradients[side].defined()) {
        gram = grams.unscaled_gradient[side] = at::zeros_like(grams.gram[side]);
        continue;
      }
      const at::Tensor& c = grams.coordinates[partner_of(side)];
      at::Tensor gradient = wide(tall(found.gradients[side], side));
      if (c.defined()) gradient = at::matmul(gradient, c);
      gram = grams.unscaled_gradient[side] = inner_products(gradient, gradient);
      if (options.row_equilibration() && state_.row_moments[side].defined()) {
        gradient = gradient * row_scale(state_.row_moments[side], 1.0);
        gram = inner_products(gradient, gradient);
      }
    }
    return grams;
  }

  /// Statistics of a side are those of its partner's geometry and its own gradient.
  rule::Statistics<at::Tensor> statistics_of(const Grams& grams, bool row_equilibration) const {
    const auto of_partners = [](const PerSide<at::Tensor>& both) { return at::stack({both.b, both.a}); };
    const auto own = [](const PerSide<at::Tensor>& both) { return at::stack({both.a, both.b}); };
    rule::Statistics<at::Tensor> statistics;
    if (grams.coordinates.a.defined()) statistics.coordinates = of_partners(grams.coordinates);
    statistics.gram = of_partners(grams.gram);
    statistics.cross = of_partners(grams.cross);
    statistics.gradient_gram = own(grams.gradient);
    statistics.steps = at::stack({state_.moments.step[1], state_.moments.step[0]});
    if (row_equilibration) statistics.unscaled_gradient_gram = own(grams.unscaled_gradient);
    return statistics;
  }

  /// N of the next step, tall, in double. First M = N·momentum_map + G·gradient_map, then N = M R⁺ᵀ: through M the
  /// error grows with κ(R), not its square.
  at::Tensor next_momentum(Side side, const BatchObservation& found, const rule::Decision<at::Tensor>& decision,
                           const LoraRiteOptions& options, at::Tensor& row_moments) const {
    const int64_t s = index_of(side);
    at::Tensor in_basis;
    if (state_.momentum[side].defined())
      in_basis = at::matmul(wide(tall(state_.momentum[side], side)), decision.momentum_map[s]);
    if (found.gradients[side].defined()) {
      at::Tensor gradient = wide(tall(found.gradients[side], side));
      if (options.row_equilibration()) {
        row_moments = next_row_moments(side, gradient, found, decision, options);
        gradient = gradient * row_scale(row_moments, 0.0);
      }
      const at::Tensor map = decision.gradient_map[s];
      in_basis = in_basis.defined() ? in_basis.baddbmm_(gradient, map) : at::matmul(gradient, map);
    }
    if (options.max_update_rms() > 0) {
      const at::Tensor elements = rows_[s] * static_cast<double>(rank_);
      in_basis = in_basis / rule::rms_excess(sum_of_squares(in_basis, side), elements, options.max_update_rms());
    }
    return at::matmul(in_basis, decision.moments.inverse_root[s].mT());
  }

  /// `rule::row_moment` with S₀ = c Ḡ ((V + ρI)^{1/2} + εI)^{-1} [k, n, r].
  at::Tensor next_row_moments(Side side, const at::Tensor& gradient, const BatchObservation& found,
                              const rule::Decision<at::Tensor>& decision, const LoraRiteOptions& options) const {
    const int64_t s = index_of(side);
    const at::Tensor fresh = at::matmul(gradient, decision.row_map[s]).square().mean(-1);
    const at::Tensor decay =
        rule::bias_corrected_decay(std::get<1>(options.betas()), decision.moments.step[s], found.has_gradient[s])
            .squeeze(-1);
    const at::Tensor old = state_.row_moments[side].defined() ? wide(state_.row_moments[side]) : at::ones_like(fresh);
    return rule::row_moment(decay, old, fresh);
  }

  /// `rule::balancing_scale`. Pairs of which one factor is zero, or did not move, are left alone.
  void balance(const BatchObservation& found, PerSide<at::Tensor>& moved, PerSide<at::Tensor>& momentum,
               at::Tensor& inverse_root) const {
    const at::Tensor squared_a = sum_of_squares(moved.a, Side::A), squared_b = sum_of_squares(moved.b, Side::B);
    const at::Tensor allowed = (squared_a > 0) & (squared_b > 0) & found.has_gradient[0] & found.has_gradient[1];
    const at::Tensor scale = choose(allowed, rule::balancing_scale(squared_a, squared_b), 1.0);
    const PerSide<at::Tensor> scales = {scale, scale.reciprocal()};
    for (const Side side : kSides) {
      moved[side] = moved[side] * scales[side];
      if (momentum[side].defined()) momentum[side] = momentum[side] * scales[side];
    }
    inverse_root = inverse_root * at::stack({scales.a, scales.b});  // a side holds the root of its partner
  }

  void plan_moments(const rule::Moments<at::Tensor>& fresh, BatchPlan& plan) const {
    plan.writes.replace(state_.moments.second_moment, fresh.second_moment);
    plan.writes.replace(state_.moments.escaped_mass, fresh.escaped_mass);
    plan.writes.replace(state_.moments.inverse_root, fresh.inverse_root);
    plan.writes.replace(state_.moments.step, fresh.step);
  }

  /// Plans the writes of moved factors, those with a gradient only, and returns all factors as they will be stored.
  at::Tensor plan_factors(at::Tensor moved, Side side, const at::Tensor& old, const at::Tensor& step_allowed,
                          BatchPlan& plan) const {
    const at::Tensor fresh = rounded(stacked(std::exchange(moved, {}), side, shapes_[side]), old.scalar_type());
    const at::Tensor kept = choose(step_allowed, fresh, old);
    if (old.scalar_type() != dtype_) {
      at::Tensor& master = plan.next.master[side];
      if (!master.defined()) master = at::empty_like(kept);
      plan.writes.overwrite(master, kept);
    }
    at::Tensor stored = rounded(kept, dtype_).contiguous();
    std::vector<at::Tensor> destinations;
    for (size_t i = 0; i < pairs_.size(); ++i)
      if (known_has_gradient_[side][i]) destinations.push_back(pairs_[i].factor(side));
    const bool all = destinations.size() == pairs_.size();
    if (!destinations.empty())
      plan.writes.replace_slices(all ? stored : stored.index_select(0, with_gradient_[side]), std::move(destinations));
    return stored;
  }

  /// The factors that are stepped: those that are stored, or their master copies. A copy is compared with the factor it
  /// was rounded to. If that changed, it is the user's value that counts.
  at::Tensor stepped_factors(const at::Tensor& as_stored, Side side, bool master_weights) const {
    if (!master_weights || dtype_ == at::kFloat || dtype_ == at::kDouble) return as_stored;
    const at::Tensor& master = state_.master[side];
    if (!master.defined()) return as_stored.to(at::kFloat);
    const at::Tensor differs = rounded(master, dtype_).ne(as_stored).flatten(1).any(-1);
    std::vector<int64_t> broadcast(static_cast<size_t>(as_stored.dim()), 1);
    broadcast[0] = count();
    return choose(differs.view(broadcast), as_stored.to(at::kFloat), master);
  }

  /// Adds up over the processes what are sums over rows; one message. Whole factors count once.
  void sum_over_shards(std::initializer_list<PerSide<at::Tensor>*> sums) const {
    if (!shards_) return;
    std::vector<at::Tensor*> parts;
    std::vector<at::Tensor> flat;
    for (PerSide<at::Tensor>* both : sums) {
      for (const Side side : kSides) {
        at::Tensor& part = (*both)[side];
        if (!part.defined()) continue;
        parts.push_back(&part);
        flat.push_back(shards_->sharded[side] || shards_->first ? part.flatten() : at::zeros_like(part).flatten());
      }
    }
    at::Tensor message = at::cat(flat);
    shards_->sum(message);
    int64_t begin = 0;
    for (at::Tensor* part : parts) {
      const int64_t size = part->numel();
      *part = message.narrow(0, begin, size).view(part->sizes());
      begin += size;
    }
  }

  /// Σ x² over rows and columns [k, 1, 1] of tall x.
  at::Tensor sum_of_squares(const at::Tensor& x, Side side) const {
    PerSide<at::Tensor> sums;
    sums[side] = x.square().sum({-2, -1}, /*keepdim=*/true);
    sum_over_shards({&sums});
    return sums[side];
  }

  at::Tensor gather(Side side) const {
    std::vector<at::Tensor> tensors;
    for (const FactorPair& pair : pairs_) tensors.push_back(pair.factor(side));
    return at::stack(tensors);
  }

  /// Gradients [k, shape], zeros standing in for missing ones; undefined if all are missing.
  at::Tensor gather_gradients(Side side) const {
    std::vector<at::Tensor> tensors;
    lora_rite::detail::Gradients gradients;
    at::Tensor zero;
    bool any = false;
    for (const FactorPair& pair : pairs_) {
      const at::Tensor gradient = gradients.of(pair.factor(side));
      any = any || gradient.defined();
      if (!gradient.defined() && !zero.defined()) zero = at::zeros(shapes_[side], double_options().dtype(dtype_));
      tensors.push_back(gradient.defined() ? gradient : zero);
    }
    return any ? at::stack(tensors) : at::Tensor();
  }

  /// Who has a gradient? Uploads it if that changed. Returns whether anyone has.
  bool find_gradients() {
    PerSide<std::vector<bool>> found;
    bool any = false;
    for (const Side side : kSides) {
      for (const FactorPair& pair : pairs_) {
        found[side].push_back(lora_rite::detail::leaf_of(pair.factor(side)).grad().defined());
        any = any || found[side].back();
      }
    }
    const bool is_known =
        has_gradient_.defined() && found.a == known_has_gradient_.a && found.b == known_has_gradient_.b;
    if (!any || is_known) return any;
    at::Tensor flags = at::zeros({2, count(), 1, 1}, at::kBool);
    bool* data = flags.data_ptr<bool>();
    PerSide<at::Tensor> indices;
    for (const Side side : kSides) {
      std::vector<int64_t> with_gradient;
      for (int64_t i = 0; i < count(); ++i) {
        *data++ = found[side][static_cast<size_t>(i)];
        if (found[side][static_cast<size_t>(i)]) with_gradient.push_back(i);
      }
      indices[side] = at::tensor(with_gradient, at::kLong).to(device_);
    }
    has_gradient_ = flags.to(device_);
    with_gradient_ = std::move(indices);
    known_has_gradient_ = std::move(found);
    return any;
  }

  /// What is remembered of stacked factors as they are stored, to notice an edit: of each column ‖x‖² and Σ w x
  /// [2, k, r].
  at::Tensor column_sums(const at::Tensor& stored, Side side) const {
    const at::Tensor x = wide(tall(stored, side));
    const at::Tensor weights = engine::column_weights(x.size(1), x.options(), shards_ ? shards_->begin[side] : 0);
    return at::stack({x.square().sum(-2), at::matmul(weights, x)});
  }

  /// Did someone write to these factors since the last step? [k, 1, 1]. The sums are formed in the same way each time,
  /// so they agree to round-off unless the values changed. (Version counters and pointers would miss writes through
  /// `.data()`, and a device cannot see them.)
  at::Tensor sums_changed(Side side, const at::Tensor& sums) const {
    const int64_t s = index_of(side);
    const at::Tensor known = state_.column_sums[s], rows = rows_[s].squeeze();
    const at::Tensor changed =
        rule::norm_changed(known[0], sums[0]) | rule::weighted_sum_changed(known[0], rows, known[1], sums[1]);
    return changed.any(-1).view({count(), 1, 1});
  }

  static at::Tensor finite_or_zero(const at::Tensor& gram) {
    return choose(is_finite(gram.sum({-2, -1}, /*keepdim=*/true)), gram, 0.0);
  }

  at::Tensor rows_;  ///< n of both sides [2, 1, 1, 1]
  std::optional<engine::RowShards> shards_;

  // Who had a gradient in the last step: uploaded again only if that changes.
  PerSide<std::vector<bool>> known_has_gradient_;
  at::Tensor has_gradient_;            ///< [2, k, 1, 1]
  PerSide<at::Tensor> with_gradient_;  ///< indices of the pairs that have one
};

}  // namespace lora_rite::device
