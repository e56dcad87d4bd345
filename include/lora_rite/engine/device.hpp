#pragma once

#include <ATen/ATen.h>

#include <array>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/choose.hpp"
#include "lora_rite/engine/batch.hpp"
#include "lora_rite/engine/capturable.hpp"
#include "lora_rite/engine/device_numbers.hpp"
#include "lora_rite/engine/joined.hpp"
#include "lora_rite/engine/layout.hpp"
#include "lora_rite/factor_pair.hpp"
#include "lora_rite/options.hpp"
#include "lora_rite/rule.hpp"
#include "lora_rite/state.hpp"

/// Acts 1 and 3 with ATen operators. Pairs that agree in shape, dtype and device are one batch, so the number of
/// operator calls of these acts grows with the number of distinct shapes; act 2 is one for all batches of a rank. No
/// value is ever read back to the host, so a step also runs on `meta` tensors.
///
/// Shapes: k pairs, factor X of n rows. "Stacked" is [k, factor shape] as the user has it, "tall" [k, n, r] with the
/// rank last. Sides: 0 is A, 1 is B; the partner of side s is 1 − s. All arithmetic is double, whatever the factors
/// are: products of floats are exact there, which keeps Gram matrices as good as an fp32 QR would.
namespace lora_rite::engine {

/// A batch whose tall data are moved by ATen operators.
template <class Basis>
class DeviceBatch final : public Batch {
 public:
  DeviceBatch(std::vector<FactorPair> pairs, std::vector<std::string> labels)
      : Batch(std::move(pairs), std::move(labels)) {
    const int64_t rows_a = pairs_[0].a.numel() / rank_, rows_b = pairs_[0].b.numel() / rank_;
    rows_ = at::tensor({rows_a, rows_b}, at::kDouble).view({2, 1, 1, 1}).to(device_);
  }

  /// Batches of one param group that agree in rank, dtype and device do act 2 together: its matrices are small, and
  /// what a device takes for them is a time a call. To be told to each of them; they must live as long as this one
  /// steps.
  void set_companions(std::vector<DeviceBatch*> companions) { companions_ = std::move(companions); }

  void set_row_shards(RowShards shards) override {
    shards_ = std::move(shards);
    rows_ = at::tensor(at::IntArrayRef(shards_->rows), at::kDouble).view({2, 1, 1, 1}).to(device_);
  }

  bool observe(const LoraRiteOptions& options) override {
    capturable_ = options.capturable();
    statistics_ = {};  // of a step that failed
    unmagnified_ = {};
    decision_ = {};
    std::array<std::vector<bool>, 2> has_gradient;
    bool any = false;
    for (const size_t side : {0, 1}) {
      for (const auto& pair : pairs_) {
        has_gradient[side].push_back(lora_rite::detail::leaf_of(side == 0 ? pair.a : pair.b).grad().defined());
        any = any || has_gradient[side].back();
      }
    }
    if (!any) return false;
    set_has_gradient(has_gradient);

    std::array<at::Tensor, 2> sums, changed;
    for (const size_t side : {0, 1}) {
      gradients_[side] = gather_gradients(side);
      const at::Tensor as_stored = gather(side);
      factors_[side] = as_stored;
      const bool wants_master = options.master_weights() && dtype_ != at::kFloat && dtype_ != at::kDouble;
      if (wants_master && state_.master[side].defined()) {
        // The copy is compared with the factor it was rounded to: if that changed, it is the user's value that counts.
        const at::Tensor differs = rounded(state_.master[side], dtype_).ne(as_stored).flatten(1).any(-1);
        std::vector<int64_t> broadcast(as_stored.dim(), 1);
        broadcast[0] = count();
        factors_[side] = choose(differs.view(broadcast), as_stored.to(at::kFloat), state_.master[side]);
      } else if (wants_master) {
        factors_[side] = as_stored.to(at::kFloat);
      }
      sums[side] = column_sums(as_stored, side);
    }

    std::array<at::Tensor, 2> x, coordinates, gram, cross, past, gradient_gram, plain_gradient_gram;
    for (const size_t side : {0, 1}) {
      x[side] = wide(tall(factors_[side], side));
      if (dtype_ == at::kDouble) gram[side] = inner_products(x[side], x[side]);
    }
    if (dtype_ == at::kDouble) {
      sum_over_shards({&gram});
      for (const size_t side : {0, 1}) coordinates[side] = inverse_root(finite_or_zero(gram[side]));
    }
    for (const size_t side : {0, 1}) {
      const at::Tensor in_coordinates = coordinates[side].defined() ? at::matmul(x[side], coordinates[side]) : x[side];
      gram[side] = inner_products(in_coordinates, in_coordinates);
      cross[side] = coordinates[side].defined() ? inner_products(in_coordinates, x[side]) : gram[side];
      if (state_.momentum[side].defined()) {
        past[side] = inner_products(in_coordinates, wide(tall(state_.momentum[side], side)));
      }
    }
    x = {};  // half of the memory that this function takes
    for (const size_t side : {0, 1}) {
      const size_t partner = 1 - side;
      if (!gradients_[side].defined()) {
        gradient_gram[side] = plain_gradient_gram[side] = at::zeros_like(gram[side]);
        continue;
      }
      at::Tensor gradient = wide(tall(gradients_[side], side));
      if (coordinates[partner].defined()) gradient = at::matmul(gradient, coordinates[partner]);
      gradient_gram[side] = plain_gradient_gram[side] = inner_products(gradient, gradient);
      if (options.row_equilibration() && state_.rows[side].defined()) {
        gradient = gradient * row_scale(state_.rows[side], 1.0);
        gradient_gram[side] = inner_products(gradient, gradient);
      }
    }
    sum_over_shards({&sums, &gram, &cross, &past, &gradient_gram, &plain_gradient_gram});
    for (const size_t side : {0, 1}) {
      changed[side] = sums_changed(side, sums[side]);
      if (!past[side].defined()) continue;
      // (XC)ᵀ X_old with X_old = α X + γ N; an edited factor has no past.
      const at::Tensor one = at::ones_like(state_.previous_scale[side]);
      const at::Tensor scale = choose(changed[side], one, state_.previous_scale[side]);
      const at::Tensor rate = choose(negated(changed[side]), state_.previous_rate[side], 0.0);
      cross[side] = scale * cross[side] + rate * past[side];
    }
    edited_ = at::stack({changed[0], changed[1]});
    // Statistics of side s are those of its partner's geometry.
    if (coordinates[0].defined()) statistics_.coordinates = at::stack({coordinates[1], coordinates[0]});
    statistics_.gram = at::stack({gram[1], gram[0]});
    statistics_.cross = at::stack({cross[1], cross[0]});
    statistics_.gradient_gram = at::stack({gradient_gram[0], gradient_gram[1]});
    statistics_.steps = at::stack({state_.moments.step[1], state_.moments.step[0]});
    if (options.row_equilibration()) {
      statistics_.plain_gradient_gram = at::stack({plain_gradient_gram[0], plain_gradient_gram[1]});
    }
    return true;
  }

  at::Tensor finite() const override {  // a sum is finite only if every summand is
    return is_finite(statistics_.gram.sum() + statistics_.cross.sum() + statistics_.gradient_gram.sum());
  }

  at::Tensor unmagnify(const at::Tensor& proceed) override {
    if (statistics_.gram.defined()) unmagnify_together(proceed);
    const at::Tensor& seen =
        unmagnified_.plain_gradient_gram.defined() ? unmagnified_.plain_gradient_gram : unmagnified_.gradient_gram;
    fresh_norm_squared_ = seen.diagonal(0, -2, -1).sum(-1).clamp_min(0);
    return fresh_norm_squared_.sum(0);
  }

  void upload_rates(const LoraRiteOptions& options) override {
    rates_.upload({options.lr(), options.lr() * options.lr_ratio_b()}, device_);
  }

  void prepare(const LoraRiteOptions& options, const at::Tensor& clip_factor, const at::Tensor& proceed) override {
    upload_rates(options);
    const at::Tensor rates = rates_.tensor().view({2, 1, 1, 1});
    if (!decision_.gradient_map.defined()) decide_together(options, clip_factor, rates);
    const rule::Decision<at::Tensor> decision = std::exchange(decision_, {});
    const at::Tensor rate = wide(has_gradient_) * rates;
    const at::Tensor keep = 1 - rate * options.weight_decay();
    std::array<at::Tensor, 2> moved, momentum, rows;
    for (const size_t side : {0, 1}) {
      if (!gradients_[side].defined() && !state_.momentum[side].defined()) {
        moved[side] = wide(tall(factors_[side], side));
        continue;
      }
      // M = N·momentum_map + G·gradient_map, then N = M R⁺ᵀ: through M the error grows with κ(R), not its square.
      at::Tensor in_basis;
      if (state_.momentum[side].defined()) {
        in_basis = at::matmul(wide(tall(state_.momentum[side], side)), decision.momentum_map[side]);
      }
      if (gradients_[side].defined()) {
        at::Tensor gradient = wide(tall(gradients_[side], side));
        if (options.row_equilibration()) {
          rows[side] = second_moments_of_rows(side, gradient, decision, options);
          gradient = gradient * row_scale(rows[side], 0.0);
        }
        const at::Tensor& map = decision.gradient_map[side];
        in_basis = in_basis.defined() ? at::baddbmm(in_basis, gradient, map) : at::matmul(gradient, map);
      }
      if (options.max_update_rms() > 0) {
        const int64_t s = static_cast<int64_t>(side);
        const at::Tensor rms = (sum_of_squares(in_basis, side) / (rows_[s] * static_cast<double>(rank_))).sqrt();
        in_basis = in_basis / (rms / options.max_update_rms()).clamp_min(1);
      }
      momentum[side] = at::matmul(in_basis, decision.moments.inverse_root[side].mT());
      in_basis = at::Tensor();
      moved[side] = wide(tall(factors_[side], side));
      if (options.weight_decay() > 0) moved[side] = keep[side] * moved[side];
      moved[side] = at::addcmul(moved[side], rate[side], momentum[side], /*value=*/-1);
    }
    at::Tensor inverse_root = decision.moments.inverse_root;
    if (options.balance()) balance(moved, momentum, inverse_root);

    next_ = state_;                   // the same tensors, and those that are new
    for (const size_t side : {0, 1})  // without those that options no longer ask for
      if (factors_[side].scalar_type() == dtype_) next_.master[side] = at::Tensor();
    writes_.clear();
    moved_ = {};
    const auto remember = [&](const at::Tensor& old, const at::Tensor& fresh) {
      writes_.emplace_back(old, choose(proceed, fresh, old).contiguous());
    };
    std::array<at::Tensor, 2> sums;
    for (const size_t side : {0, 1}) {
      if (momentum[side].defined()) {
        at::Tensor& stored = next_.momentum[side];
        const at::Tensor fresh = stacked(momentum[side], side, shapes_[side]).to(wide_dtype());
        if (!stored.defined()) stored = at::zeros(fresh.sizes(), fresh.options());
        remember(stored, fresh);
      }
      if (rows[side].defined()) {
        at::Tensor& stored = next_.rows[side];
        if (!stored.defined()) stored = at::ones(rows[side].sizes(), rows[side].options().dtype(wide_dtype()));
        remember(stored, rows[side].to(wide_dtype()));
      }
      sums[side] =
          column_sums(gradients_[side].defined() ? prepare_factors(moved[side], side, proceed) : gather(side), side);
      moved[side] = momentum[side] = rows[side] = at::Tensor();
    }
    sum_over_shards({&sums});
    const rule::Moments<at::Tensor>& moments = state_.moments;
    remember(moments.second_moment, decision.moments.second_moment);
    remember(moments.escaped_mass, decision.moments.escaped_mass);
    remember(moments.inverse_root, inverse_root);
    remember(moments.step, decision.moments.step);
    remember(state_.column_sums, at::stack({sums[0], sums[1]}));
    remember(state_.previous_scale, keep.reciprocal());
    remember(state_.previous_rate, rate / keep);
    remember(state_.unmagnified_norm, fresh_norm_squared_.sqrt().view(state_.unmagnified_norm.sizes()));
    remember(state_.clip_factor, clip_factor.expand_as(state_.clip_factor));
    factors_ = gradients_ = {};
  }

  void commit(const LoraRiteOptions&) override {
    for (const auto& [old, fresh] : writes_) overwrite(old, fresh);
    for (auto& [factors, destinations] : moved_) {
      if (factors.defined()) write_slices(factors, destinations);
      factors = at::Tensor();
    }
    state_ = std::move(next_);
    writes_.clear();
  }

 private:
  /// Act 2, first half, of all companions that have observed something.
  void unmagnify_together(const at::Tensor& proceed) {
    std::vector<DeviceBatch*> waiting;
    std::vector<rule::Statistics<at::Tensor>> statistics;
    for (DeviceBatch* batch : companions_) {
      if (!batch->statistics_.gram.defined()) continue;
      waiting.push_back(batch);
      statistics.push_back(std::exchange(batch->statistics_, {}));
    }
    rule::Statistics<at::Tensor> all = joined(std::move(statistics));
    for (at::Tensor* matrix : {&all.gram, &all.cross, &all.gradient_gram, &all.plain_gradient_gram}) {
      if (matrix->defined()) *matrix = choose(proceed, *matrix, 0.0);
    }
    rule::Unmagnified<at::Tensor> unmagnified = capturable_
                                                    ? rule::unmagnify<PivotedCholesky>(std::move(all), factor_epsilon())
                                                    : rule::unmagnify<Basis>(std::move(all), factor_epsilon());
    int64_t begin = 0;
    for (DeviceBatch* batch : waiting) {
      batch->unmagnified_ = part_of(unmagnified, begin, batch->count());
      begin += batch->count();
    }
  }

  /// Act 2, second half, of all companions that went through the first one.
  void decide_together(const LoraRiteOptions& options, const at::Tensor& clip_factor, const at::Tensor& rates) {
    std::vector<DeviceBatch*> waiting;
    std::vector<rule::Moments<at::Tensor>> moments;
    std::vector<rule::Unmagnified<at::Tensor>> unmagnified;
    std::vector<at::Tensor> rows, has_gradient, partner_edited;
    for (DeviceBatch* batch : companions_) {
      if (!batch->unmagnified_.inverse_root.defined()) continue;
      waiting.push_back(batch);
      moments.push_back(batch->state_.moments);
      unmagnified.push_back(std::exchange(batch->unmagnified_, {}));
      rows.push_back(batch->rows_.expand({2, batch->count(), 1, 1}));
      has_gradient.push_back(batch->has_gradient_);
      // The transport of a side's moments depends on its partner.
      partner_edited.push_back(at::stack({batch->edited_[1], batch->edited_[0]}));
    }
    rule::Unmagnified<at::Tensor> all = joined(std::move(unmagnified));
    const at::Tensor all_rows = joined(rows);
    if (options.max_relative_change() > 0) {
      const at::Tensor& roots = all.inverse_root;  // each side has its partner's
      all.damping = rule::relative_change_damping(roots, at::stack({roots[1], roots[0]}), rates, all_rows,
                                                  options.max_relative_change());
    }
    const auto decide =
        capturable_ ? rule::decide<ProductRoots, at::Tensor> : rule::decide<rule::Eigenvalues, at::Tensor>;
    rule::Decision<at::Tensor> decision =
        decide(joined(std::move(moments)), all, all_rows, clip_factor, joined(has_gradient), joined(partner_edited),
               epsilon_of(dtype_), options);
    int64_t begin = 0;
    for (DeviceBatch* batch : waiting) {
      batch->decision_ = part_of(decision, begin, batch->count());
      begin += batch->count();
    }
  }

  /// The distance from 1 to the next number.
  static double epsilon_of(at::ScalarType dtype) {
    switch (dtype) {
      case at::kDouble:
        return std::numeric_limits<double>::epsilon();
      case at::kFloat:
        return std::numeric_limits<float>::epsilon();
      case at::kHalf:
        return 0x1p-10;
      default:
        return 0x1p-7;  // bfloat16
    }
  }

  /// With a master copy a half factor is known to float precision.
  double factor_epsilon() const { return epsilon_of(factors_[0].scalar_type()); }

  at::Tensor inverse_root(const at::Tensor& gram) const {
    const double cutoff = rule::relative_cutoff(factor_epsilon(), rank_);
    return capturable_ ? PivotedCholesky::inverse_root(gram, cutoff) : Basis::inverse_root(gram, cutoff);
  }

  /// row^{-1/2} [k, n, 1], and `unseen` for rows that never had a gradient.
  static at::Tensor row_scale(const at::Tensor& rows, double unseen) {
    const at::Tensor r = wide(rows).unsqueeze(-1);
    return choose(r > 0, r.rsqrt(), unseen);
  }

  /// row ← β₂' row + (1−β₂') mean_j S₀², S₀ = c Ḡ ((V + ρI)^{1/2} + εI)^{-1} [k, n, r].
  at::Tensor second_moments_of_rows(size_t side, const at::Tensor& gradient, const rule::Decision<at::Tensor>& decision,
                                    const LoraRiteOptions& options) const {
    const at::Tensor fresh = at::matmul(gradient, decision.plain_map[side]).square().mean(-1);
    const at::Tensor decay =
        rule::bias_corrected_decay(std::get<1>(options.betas()), decision.moments.step[side], has_gradient_[side])
            .squeeze(-1);
    const at::Tensor old = state_.rows[side].defined() ? wide(state_.rows[side]) : at::ones_like(fresh);
    return decay * old + (1 - decay) * fresh;
  }

  /// Adds up over the processes what are sums over rows; one message. Whole factors count once.
  void sum_over_shards(std::initializer_list<std::array<at::Tensor, 2>*> sums) const {
    if (!shards_) return;
    std::vector<at::Tensor*> parts;
    std::vector<at::Tensor> flat;
    for (std::array<at::Tensor, 2>* both : sums) {
      for (const size_t side : {0, 1}) {
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
  at::Tensor sum_of_squares(const at::Tensor& x, size_t side) const {
    std::array<at::Tensor, 2> sums;
    sums[side] = x.square().sum({-2, -1}, /*keepdim=*/true);
    sum_over_shards({&sums});
    return sums[side];
  }

  at::Tensor gather(size_t side) const {
    std::vector<at::Tensor> tensors;
    for (int64_t i = 0; i < count(); ++i) tensors.push_back(factor_of(i, side));
    return at::stack(tensors);
  }

  /// Gradients [k, shape], zeros standing in for missing ones; undefined if all are missing.
  at::Tensor gather_gradients(size_t side) const {
    std::vector<at::Tensor> tensors;
    lora_rite::detail::Gradients gradients;
    at::Tensor zero;
    bool any = false;
    for (int64_t i = 0; i < count(); ++i) {
      const at::Tensor gradient = gradients.of(factor_of(i, side));
      any = any || gradient.defined();
      if (!gradient.defined() && !zero.defined()) zero = at::zeros(shapes_[side], double_options().dtype(dtype_));
      tensors.push_back(gradient.defined() ? gradient : zero);
    }
    return any ? at::stack(tensors) : at::Tensor();
  }

  /// Uploads who has a gradient, if that changed: [2, k, 1, 1] bool, and their indices.
  void set_has_gradient(const std::array<std::vector<bool>, 2>& has_gradient) {
    if (has_gradient == known_has_gradient_ && has_gradient_.defined()) return;
    at::Tensor flags = at::zeros({2, count(), 1, 1}, at::kBool);
    bool* data = flags.data_ptr<bool>();
    for (const size_t side : {0, 1}) {
      for (const bool flag : has_gradient[side]) *data++ = flag;
    }
    std::array<at::Tensor, 2> with_gradient;
    for (const size_t side : {0, 1}) {
      std::vector<int64_t> indices;
      for (int64_t i = 0; i < count(); ++i)
        if (has_gradient[side][i]) indices.push_back(i);
      with_gradient[side] = at::tensor(indices, at::kLong).to(device_);
    }
    has_gradient_ = flags.to(device_);
    with_gradient_ = std::move(with_gradient);
    known_has_gradient_ = has_gradient;
  }

  /// What is remembered of stacked factors as they are stored, to notice an edit: of each column the square of its norm
  /// and a weighted sum [2, k, r].
  at::Tensor column_sums(const at::Tensor& stored, size_t side) const {
    const at::Tensor x = wide(tall(stored, side));
    const at::Tensor weights = column_weights(x.size(1), x.options(), shards_ ? shards_->begin[side] : 0);
    return at::stack({x.square().sum(-2), at::matmul(weights, x)});
  }

  /// Did someone write to these factors since the last step? [k, 1, 1]. The sums are formed in the same way each time,
  /// so they agree to round-off unless the values changed. (Version counters and pointers would miss writes through
  /// `.data()`, and cannot be seen by the device.)
  at::Tensor sums_changed(size_t side, const at::Tensor& sums) const {
    const at::Tensor& known = state_.column_sums[static_cast<int64_t>(side)];
    // |wᵀx| ≤ ‖w‖ ‖x‖ and ‖w‖ ≈ √n bounds what round-off can do to the second sum.
    const at::Tensor scale = at::stack({known[0], (known[0] * rows_[static_cast<int64_t>(side)].squeeze()).sqrt()});
    const at::Tensor difference = at::maximum(sums - known, known - sums);  // ATen's abs has no meta kernel
    return (difference > kRoundOff * scale).any(-1).any(0).view({count(), 1, 1});
  }

  /// In a dtype of a factor, within its range.
  static at::Tensor rounded(const at::Tensor& x, at::ScalarType dtype) {
    const double most = largest_of(dtype);
    return (most < std::numeric_limits<double>::infinity() ? x.clamp(-most, most) : x).to(dtype);
  }

  static at::Tensor finite_or_zero(const at::Tensor& gram) {
    return choose(is_finite(gram.sum({-2, -1}, /*keepdim=*/true)), gram, 0.0);
  }

  /// A ← s A, B ← B / s with s = (‖B‖/‖A‖)^{1/2}: equal norms, the same product. Momenta are vectors in the factors'
  /// own coordinates and go along; R⁺ of a factor scales inversely. Pairs of which one factor is zero, or did not move,
  /// are left alone.
  void balance(std::array<at::Tensor, 2>& moved, std::array<at::Tensor, 2>& momentum, at::Tensor& inverse_root) const {
    const at::Tensor norm_a = sum_of_squares(moved[0], 0).sqrt(), norm_b = sum_of_squares(moved[1], 1).sqrt();
    const at::Tensor allowed = (norm_a > 0) & (norm_b > 0) & has_gradient_[0] & has_gradient_[1];
    const at::Tensor scale = choose(allowed, (norm_b / norm_a).sqrt(), 1.0);
    const std::array<at::Tensor, 2> scales = {scale, scale.reciprocal()};
    for (const size_t side : {0, 1}) {
      moved[side] = moved[side] * scales[side];
      if (momentum[side].defined()) momentum[side] = momentum[side] * scales[side];
    }
    inverse_root = inverse_root * at::stack({scales[0], scales[1]});  // side s holds the root of its partner
  }

  /// Makes ready the moved factors, those with a gradient only, and returns all factors as they will be stored.
  at::Tensor prepare_factors(const at::Tensor& moved, size_t side, const at::Tensor& proceed) {
    const at::Tensor fresh = rounded(stacked(moved, side, shapes_[side]), factors_[side].scalar_type());
    const at::Tensor kept = choose(proceed, fresh, factors_[side]);
    if (factors_[side].scalar_type() != dtype_) {
      at::Tensor& master = next_.master[side];
      if (!master.defined()) master = at::empty_like(kept);
      // In place, as all that is remembered: a recorded step reads it there.
      writes_.emplace_back(master, kept.contiguous());
    }
    at::Tensor stored = rounded(kept, dtype_).contiguous();
    const std::vector<bool>& has_gradient = known_has_gradient_[side];
    std::vector<at::Tensor> destinations;
    for (int64_t i = 0; i < count(); ++i)
      if (has_gradient[i]) destinations.push_back(factor_of(i, side));
    const bool all = static_cast<int64_t>(destinations.size()) == count();
    moved_[side] = {all ? stored : stored.index_select(0, with_gradient_[side]), std::move(destinations)};
    return stored;
  }

  at::Tensor rows_;  ///< n of both sides [2, 1, 1, 1]
  std::optional<RowShards> shards_;

  std::array<std::vector<bool>, 2> known_has_gradient_;
  at::Tensor has_gradient_;                  ///< [2, k, 1, 1]
  std::array<at::Tensor, 2> with_gradient_;  ///< indices of the pairs that have one
  DeviceNumbers rates_;                      ///< of A and B [2]
  bool capturable_ = false;
  std::vector<DeviceBatch*> companions_ = {this};

  // From act to act within one step.
  std::array<at::Tensor, 2> factors_;          ///< stacked, in the dtype that is stepped (float for a master copy)
  std::array<at::Tensor, 2> gradients_;        ///< stacked, undefined where no pair has one
  at::Tensor edited_;                          ///< [2, k, 1, 1]
  rule::Statistics<at::Tensor> statistics_;    ///< [2, k, r, r]
  rule::Unmagnified<at::Tensor> unmagnified_;  ///< [2, k, r, r], until it is decided upon
  rule::Decision<at::Tensor> decision_;        ///< [2, k, r, r], until this batch prepares
  at::Tensor fresh_norm_squared_;              ///< [2, k]

  // From `prepare` to `commit`.
  PairState next_;                                                       ///< the state, new tensors among it
  std::vector<std::pair<at::Tensor, at::Tensor>> writes_;                ///< a tensor of the state, and what it becomes
  std::array<std::pair<at::Tensor, std::vector<at::Tensor>>, 2> moved_;  ///< stacked, and the factors they become
};

}  // namespace lora_rite::engine
