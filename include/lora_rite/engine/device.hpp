#pragma once

#include <ATen/ATen.h>

#include <array>
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/choose.hpp"
#include "lora_rite/diagnostics.hpp"
#include "lora_rite/engine/layout.hpp"
#include "lora_rite/factor_pair.hpp"
#include "lora_rite/options.hpp"
#include "lora_rite/rule.hpp"
#include "lora_rite/state.hpp"

/// Acts 1 and 3 with ATen operators. Pairs that agree in shape, dtype and device are one batch, so the number of
/// operator calls grows with the number of distinct shapes; no value is ever read back to the host, so a step also runs
/// on `meta` tensors.
///
/// Shapes: k pairs, factor X of n rows. "Stacked" is [k, factor shape] as the user has it, "tall" [k, n, r] with the
/// rank last. Sides: 0 is A, 1 is B; the partner of side s is 1 − s. All arithmetic is double, whatever the factors
/// are: products of floats are exact there, which keeps Gram matrices as good as an fp32 QR would.
namespace lora_rite::engine {

/// k pairs of one param group whose factors agree in shape, dtype and device, and what is remembered of them.
class DeviceBatch {
 public:
  DeviceBatch(std::vector<FactorPair> pairs, std::vector<std::string> labels)
      : pairs_(std::move(pairs)),
        labels_(std::move(labels)),
        shapes_{pairs_[0].a.sizes().vec(), pairs_[0].b.sizes().vec()},
        device_(pairs_[0].a.device()),
        dtype_(pairs_[0].a.scalar_type()),
        rank_(shapes_[0][0]),
        state_(PairState::zeros(count(), rank_, double_options())) {
    const double rows_a = static_cast<double>(pairs_[0].a.numel() / rank_);
    const double rows_b = static_cast<double>(pairs_[0].b.numel() / rank_);
    rows_ = at::tensor({rows_a, rows_b}, at::kDouble).view({2, 1, 1, 1}).to(device_);
    unmagnified_norm_ = at::zeros({2, count()}, double_options());
    clip_factor_ = at::ones({}, double_options());
  }

  int64_t count() const { return static_cast<int64_t>(pairs_.size()); }
  at::Device device() const { return device_; }
  const std::string& label(int64_t index) const { return labels_[index]; }

  /// Throws c10::Error naming the pair if a factor is no longer what this batch was built for, or has a gradient that
  /// cannot be used. Changes nothing.
  void check_inputs() const {
    for (size_t i = 0; i < pairs_.size(); ++i) {
      for (const size_t side : {0, 1}) {
        const at::Tensor& factor = factor_of(i, side);
        const char* which = side == 0 ? "a" : "b";
        TORCH_CHECK(factor.sizes() == at::IntArrayRef(shapes_[side]) && factor.scalar_type() == dtype_ &&
                        factor.device() == device_,
                    labels_[i], ": factor ", which, " is now ", factor.scalar_type(), factor.sizes(), " on ",
                    factor.device(), ", expected ", dtype_, at::IntArrayRef(shapes_[side]), " on ", device_,
                    " as in the first step; build the optimizer after moving or converting the module");
        const at::Tensor& gradient = factor.grad();
        if (!gradient.defined()) continue;
        TORCH_CHECK(gradient.layout() == at::kStrided, labels_[i], ": the gradient of factor ", which, " has layout ",
                    gradient.layout(), ", expected a dense one (for an embedding: sparse(false))");
        TORCH_CHECK(gradient.sizes() == factor.sizes(), labels_[i], ": the gradient of factor ", which, " has shape ",
                    gradient.sizes(), ", expected ", factor.sizes());
      }
    }
  }

  /// Act 1: gathers factors and gradients and reduces them to r×r statistics. Returns false if no pair has a gradient:
  /// then there is nothing to do, and acts 2 and 3 must not be called.
  template <class Basis>
  bool observe(const LoraRiteOptions& options) {
    std::array<std::vector<bool>, 2> has_gradient;
    bool any = false;
    for (const size_t side : {0, 1}) {
      for (const auto& pair : pairs_) {
        has_gradient[side].push_back((side == 0 ? pair.a : pair.b).grad().defined());
        any = any || has_gradient[side].back();
      }
    }
    if (!any) return false;
    set_has_gradient(has_gradient);

    std::array<at::Tensor, 2> changed;
    for (const size_t side : {0, 1}) {
      gradients_[side] = gather_gradients(side);
      const at::Tensor as_stored = gather(side);
      factors_[side] = as_stored;
      const bool wants_master = options.master_weights() && dtype_ != at::kFloat && dtype_ != at::kDouble;
      if (!wants_master) state_.master[side] = at::Tensor();
      if (wants_master && state_.master[side].defined()) {
        // The copy is compared with the factor it was rounded to: if that changed, it is the user's value that counts.
        const at::Tensor differs = state_.master[side].to(dtype_).ne(as_stored).flatten(1).any(-1);
        std::vector<int64_t> broadcast(as_stored.dim(), 1);
        broadcast[0] = count();
        factors_[side] = choose(differs.view(broadcast), as_stored.to(at::kFloat), state_.master[side]);
      } else if (wants_master) {
        factors_[side] = as_stored.to(at::kFloat);
      }
      changed[side] = sums_changed(side, column_sums(as_stored, side));
    }
    edited_ = at::stack({changed[0], changed[1]});

    std::array<at::Tensor, 2> coordinates, gram, cross, gradient_gram;
    for (const size_t side : {0, 1}) {
      const at::Tensor x = wide(tall(factors_[side], side));
      if (dtype_ == at::kDouble) coordinates[side] = Basis::inverse_root(finite_or_zero(inner_products(x, x)), cutoff());
      const at::Tensor in_coordinates = coordinates[side].defined() ? at::matmul(x, coordinates[side]) : x;
      gram[side] = inner_products(in_coordinates, in_coordinates);
      // (XC)ᵀ X_old with X_old = α X + γ N; an edited factor has no past.
      cross[side] = coordinates[side].defined() ? inner_products(in_coordinates, x) : gram[side];
      if (state_.momentum[side].defined()) {
        const at::Tensor one = at::ones_like(state_.previous_scale[side]);
        const at::Tensor scale = choose(changed[side], one, state_.previous_scale[side]);
        const at::Tensor rate = choose(negated(changed[side]), state_.previous_rate[side], 0.0);
        const at::Tensor momentum = wide(tall(state_.momentum[side], side));
        cross[side] = scale * cross[side] + rate * inner_products(in_coordinates, momentum);
      }
    }
    for (const size_t side : {0, 1}) {
      const size_t partner = 1 - side;
      if (!gradients_[side].defined()) {
        gradient_gram[side] = at::zeros_like(gram[side]);
        continue;
      }
      at::Tensor gradient = wide(tall(gradients_[side], side));
      if (coordinates[partner].defined()) gradient = at::matmul(gradient, coordinates[partner]);
      gradient_gram[side] = inner_products(gradient, gradient);
    }
    // Statistics of side s are those of its partner's geometry.
    if (coordinates[0].defined()) statistics_.coordinates = at::stack({coordinates[1], coordinates[0]});
    statistics_.gram = at::stack({gram[1], gram[0]});
    statistics_.cross = at::stack({cross[1], cross[0]});
    statistics_.gradient_gram = at::stack({gradient_gram[0], gradient_gram[1]});
    return true;
  }

  /// Are all gradients and factors finite? A scalar on the device: a sum is finite only if every summand is.
  at::Tensor finite() const {
    return is_finite(statistics_.gram.sum() + statistics_.cross.sum() + statistics_.gradient_gram.sum());
  }

  /// Act 2, first half: the partner's basis and ḠᵀḠ. Returns Σ ‖Ḡ‖² over the batch. Where the step will be skipped
  /// (`proceed` false) zeros stand in, for an eigensolver must not see a NaN.
  template <class Basis>
  at::Tensor unmagnify(const at::Tensor& proceed) {
    for (at::Tensor* matrix : {&statistics_.gram, &statistics_.cross, &statistics_.gradient_gram}) {
      *matrix = choose(proceed, *matrix, 0.0);
    }
    unmagnified_ = rule::unmagnify<Basis>(statistics_, cutoff());
    statistics_ = {};
    fresh_norm_squared_ = unmagnified_.gradient_gram.diagonal(0, -2, -1).sum(-1).clamp_min(0);
    return fresh_norm_squared_.sum();
  }

  /// Act 2, second half, and act 3: decides with the clip factor c (scalar), moves factors and momenta, and remembers.
  /// Where `proceed` is false everything stays bit for bit.
  void apply(const LoraRiteOptions& options, const at::Tensor& clip_factor, const at::Tensor& proceed) {
    // The transport of a side's moments depends on its partner.
    const at::Tensor partner_edited = at::stack({edited_[1], edited_[0]});
    const rule::Decision decision =
        rule::decide(state_.moments, unmagnified_, rows_, clip_factor, has_gradient_, partner_edited, options);

    const double rate_a = options.lr(), rate_b = options.lr() * options.lr_ratio_b();
    const at::Tensor moves = wide(has_gradient_);  // in double before a rate comes near it
    const at::Tensor rate = at::stack({moves[0] * rate_a, moves[1] * rate_b});
    const at::Tensor keep = 1 - rate * options.weight_decay();
    std::array<at::Tensor, 2> moved, momentum;
    for (const size_t side : {0, 1}) {
      moved[side] = wide(tall(factors_[side], side));
      if (!gradients_[side].defined() && !state_.momentum[side].defined()) continue;
      // M = N·momentum_map + G·gradient_map, then N = M R⁺ᵀ: through M the error grows with κ(R), not its square.
      at::Tensor in_basis;
      if (state_.momentum[side].defined()) {
        in_basis = at::matmul(wide(tall(state_.momentum[side], side)), decision.momentum_map[side]);
      }
      if (gradients_[side].defined()) {
        const at::Tensor gradient = wide(tall(gradients_[side], side));
        const at::Tensor& map = decision.gradient_map[side];
        in_basis = in_basis.defined() ? at::baddbmm(in_basis, gradient, map) : at::matmul(gradient, map);
      }
      if (options.max_update_rms() > 0) {
        const at::Tensor rms = in_basis.square().mean({-2, -1}, /*keepdim=*/true).sqrt();
        in_basis = in_basis / (rms / options.max_update_rms()).clamp_min(1);
      }
      momentum[side] = at::matmul(in_basis, decision.moments.inverse_root[side].mT());
      if (options.weight_decay() > 0) moved[side] = keep[side] * moved[side];
      moved[side] = at::addcmul(moved[side], rate[side], momentum[side], /*value=*/-1);
    }
    at::Tensor inverse_root = decision.moments.inverse_root;
    if (options.balance()) balance(moved, momentum, inverse_root);

    const auto remember = [&](at::Tensor& old, const at::Tensor& fresh) { old.copy_(choose(proceed, fresh, old)); };
    std::array<at::Tensor, 2> sums;
    for (const size_t side : {0, 1}) {
      if (momentum[side].defined()) {
        at::Tensor& stored = state_.momentum[side];
        const at::Tensor fresh = stacked(momentum[side], side, shapes_[side]).to(wide_dtype());
        if (!stored.defined()) stored = at::zeros(fresh.sizes(), fresh.options());
        remember(stored, fresh);
      }
      sums[side] =
          gradients_[side].defined() ? write_back(moved[side], side, proceed) : column_sums(gather(side), side);
    }
    rule::Moments& moments = state_.moments;
    remember(moments.second_moment, decision.moments.second_moment);
    remember(moments.escaped_mass, decision.moments.escaped_mass);
    remember(moments.inverse_root, inverse_root);
    remember(moments.step, decision.moments.step);
    remember(state_.column_sums, at::stack({sums[0], sums[1]}));
    remember(state_.previous_scale, keep.reciprocal());
    remember(state_.previous_rate, rate / keep);
    remember(unmagnified_norm_, fresh_norm_squared_.sqrt());
    remember(clip_factor_, clip_factor);
    unmagnified_ = {};
    factors_ = gradients_ = {};
  }

  /// The remembered state of pair `index` (k = 1), for a checkpoint.
  PairState pick(int64_t index) const { return state_.pick(index); }

  /// Reads a pair's state that must fit this batch; see PairState::load. Without an archive: nothing remembered.
  PairState read(torch::serialize::InputArchive* archive, int64_t index) const {
    if (archive == nullptr) return PairState::zeros(1, rank_, double_options());
    return PairState::load(*archive, labels_[index], shapes_, rank_, wide_dtype(), device_);
  }

  /// Takes over the states of all pairs, as `pick` gave them.
  void restore(const std::vector<PairState>& states) {
    std::array<at::Tensor, 2> absent;
    for (const size_t side : {0, 1}) {
      std::vector<int64_t> shape = shapes_[side];
      shape.insert(shape.begin(), 1);
      absent[side] = at::zeros(shape, double_options().dtype(wide_dtype()));
    }
    state_ = PairState::join(states, absent);
  }

  /// Reads to the host; for people, not for the step.
  PairDiagnostics diagnose(int64_t index) const {
    PairDiagnostics result;
    result.name = pairs_[index].name;
    result.clip_factor = clip_factor_.item<double>();
    for (const size_t side : {0, 1}) {
      FactorDiagnostics& factor = side == 0 ? result.a : result.b;
      const int64_t s = static_cast<int64_t>(side);
      const at::Tensor x = wide(tall(factor_of(index, side).detach().unsqueeze(0), side)).squeeze(0).cpu();
      const at::Tensor singular = at::linalg_svdvals(x);
      const double largest = singular[0].item<double>();
      // A factor with fewer rows than r has a null space by its shape.
      const double smallest = x.size(0) < rank_ ? 0.0 : singular[-1].item<double>();
      factor.condition_number = largest / smallest;
      factor.unmagnified_gradient_norm = unmagnified_norm_[s][index].item<double>();
      factor.escaped_mass = state_.moments.escaped_mass[s][index].item<double>();
      const at::Tensor v = state_.moments.second_moment[s][index];
      const double total = v.trace().item<double>();
      factor.effective_rank = total > 0 ? total * total / v.square().sum().item<double>() : 0.0;
      if (state_.momentum[side].defined()) {
        // M = N Rᵀ, R being the pseudo-inverse of what is stored.
        const at::Tensor n = wide(tall(state_.momentum[side].narrow(0, index, 1), side)).squeeze(0);
        const at::Tensor root = at::linalg_pinv(state_.moments.inverse_root[s][index]);
        factor.update_rms = at::matmul(n, root.mT()).square().mean().sqrt().item<double>();
      }
    }
    return result;
  }

 private:
  at::TensorOptions double_options() const { return at::TensorOptions().dtype(at::kDouble).device(device_); }

  /// Momenta and master copies of the half types are float.
  at::ScalarType wide_dtype() const { return dtype_ == at::kDouble ? at::kDouble : at::kFloat; }

  /// Of this share of its largest eigenvalue on, a Gram matrix is no round-off.
  double cutoff() const {
    switch (factors_[0].scalar_type()) {  // with a master copy a half factor is known to float precision
      case at::kDouble:
        return rule::relative_cutoff(std::numeric_limits<double>::epsilon(), rank_);
      case at::kFloat:
        return rule::relative_cutoff(std::numeric_limits<float>::epsilon(), rank_);
      case at::kHalf:
        return rule::relative_cutoff(0x1p-10, rank_);
      default:
        return rule::relative_cutoff(0x1p-7, rank_);  // bfloat16
    }
  }

  const at::Tensor& factor_of(int64_t index, size_t side) const {
    return side == 0 ? pairs_[index].a : pairs_[index].b;
  }

  at::Tensor gather(size_t side) const {
    std::vector<at::Tensor> tensors;
    for (int64_t i = 0; i < count(); ++i) tensors.push_back(factor_of(i, side));
    return at::stack(tensors);
  }

  /// Gradients [k, shape], zeros standing in for missing ones; undefined if all are missing.
  at::Tensor gather_gradients(size_t side) const {
    std::vector<at::Tensor> tensors;
    at::Tensor zero;
    bool any = false;
    for (int64_t i = 0; i < count(); ++i) {
      const at::Tensor& gradient = factor_of(i, side).grad();
      any = any || gradient.defined();
      if (!gradient.defined() && !zero.defined()) zero = at::zeros(shapes_[side], double_options().dtype(dtype_));
      tensors.push_back(gradient.defined() ? gradient : zero);
    }
    return any ? at::stack(tensors) : at::Tensor();
  }

  /// Uploads who has a gradient, if that changed: [2, k, 1, 1] bool.
  void set_has_gradient(const std::array<std::vector<bool>, 2>& has_gradient) {
    if (has_gradient == known_has_gradient_ && has_gradient_.defined()) return;
    at::Tensor flags = at::zeros({2, count(), 1, 1}, at::kBool);
    bool* data = flags.data_ptr<bool>();
    for (const size_t side : {0, 1}) {
      for (const bool flag : has_gradient[side]) *data++ = flag;
    }
    has_gradient_ = flags.to(device_);
    known_has_gradient_ = has_gradient;
  }

  /// What is remembered of stacked factors as they are stored, to notice an edit: of each column the square of its norm
  /// and a weighted sum [2, k, r]. The weights are the fractions of i·φ, irregular: no change of sign and no exchange of
  /// rows passes.
  static at::Tensor column_sums(const at::Tensor& stored, size_t side) {
    const at::Tensor x = wide(tall(stored, side));
    const at::Tensor weights = (at::arange(x.size(1), x.options()) * 0.61803398874989485).frac() + 0.5;
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
    return (difference > 1e-12 * scale).any(-1).any(0).view({count(), 1, 1});
  }

  static at::Tensor finite_or_zero(const at::Tensor& gram) {
    return choose(is_finite(gram.sum({-2, -1}, /*keepdim=*/true)), gram, 0.0);
  }

  /// A ← s A, B ← B / s with s = (‖B‖/‖A‖)^{1/2}: equal norms, the same product. Momenta are vectors in the factors'
  /// own coordinates and go along; R⁺ of a factor scales inversely. Pairs of which one factor is zero, or did not move,
  /// are left alone.
  void balance(std::array<at::Tensor, 2>& moved, std::array<at::Tensor, 2>& momentum, at::Tensor& inverse_root) const {
    const auto norm = [&](size_t side) { return moved[side].square().sum({-2, -1}, /*keepdim=*/true).sqrt(); };
    const at::Tensor norm_a = norm(0), norm_b = norm(1);
    const at::Tensor allowed = (norm_a > 0) & (norm_b > 0) & has_gradient_[0] & has_gradient_[1];
    const at::Tensor scale = choose(allowed, (norm_b / norm_a).sqrt(), 1.0);
    const std::array<at::Tensor, 2> scales = {scale, scale.reciprocal()};
    for (const size_t side : {0, 1}) {
      moved[side] = moved[side] * scales[side];
      if (momentum[side].defined()) momentum[side] = momentum[side] * scales[side];
    }
    inverse_root = inverse_root * at::stack({scales[0], scales[1]});  // side s holds the root of its partner
  }

  /// Stores the moved factors, those with a gradient only, and returns the column sums of what is stored then.
  at::Tensor write_back(const at::Tensor& moved, size_t side, const at::Tensor& proceed) {
    const at::Tensor fresh = stacked(moved, side, shapes_[side]).to(factors_[side].scalar_type());
    const at::Tensor kept = choose(proceed, fresh, factors_[side]);
    if (factors_[side].scalar_type() != dtype_) state_.master[side] = kept;
    at::Tensor stored = kept.to(dtype_);
    const std::vector<bool>& has_gradient = known_has_gradient_[side];
    std::vector<at::Tensor> destinations;
    std::vector<int64_t> written;
    for (int64_t i = 0; i < count(); ++i) {
      if (!has_gradient[i]) continue;
      destinations.push_back(factor_of(i, side));
      written.push_back(i);
    }
    const bool all = static_cast<int64_t>(written.size()) == count();
    write_slices(all ? stored : stored.index({at::tensor(written).to(device_)}), destinations);
    return column_sums(all ? stored : gather(side), side);
  }

  std::vector<FactorPair> pairs_;
  std::vector<std::string> labels_;
  std::array<std::vector<int64_t>, 2> shapes_;
  at::Device device_;
  at::ScalarType dtype_;
  int64_t rank_;
  PairState state_;
  at::Tensor rows_;              ///< n of both sides [2, 1, 1, 1]
  at::Tensor unmagnified_norm_;  ///< ‖Ḡ‖ of the last step [2, k]
  at::Tensor clip_factor_;       ///< c of the last step, scalar

  std::array<std::vector<bool>, 2> known_has_gradient_;
  at::Tensor has_gradient_;  ///< [2, k, 1, 1]

  // From act to act within one step.
  std::array<at::Tensor, 2> factors_;    ///< stacked, in the dtype that is stepped (float for a master copy)
  std::array<at::Tensor, 2> gradients_;  ///< stacked, undefined where no pair has one
  at::Tensor edited_;                    ///< [2, k, 1, 1]
  rule::Statistics statistics_;          ///< [2, k, r, r]
  rule::Unmagnified unmagnified_;        ///< [2, k, r, r]
  at::Tensor fresh_norm_squared_;        ///< [2, k]
};

/// The pairs of a param group, batched, and where each of them is found.
struct DeviceBatches {
  struct Place {
    size_t batch;
    int64_t index;
  };
  std::vector<DeviceBatch> batches;
  std::vector<Place> places;

  /// Pairs that agree in shapes, dtype and device share a batch. `labels[i]` names pair i in messages.
  static DeviceBatches of(const std::vector<FactorPair>& pairs, const std::vector<std::string>& labels) {
    std::map<std::string, size_t> known;
    std::vector<std::vector<FactorPair>> members;
    std::vector<std::vector<std::string>> member_labels;
    DeviceBatches result;
    for (size_t i = 0; i < pairs.size(); ++i) {
      const auto& [name, a, b] = pairs[i];
      const std::string key = c10::str(a.sizes(), b.sizes(), a.scalar_type(), a.device());
      const size_t batch = known.emplace(key, members.size()).first->second;
      if (batch == members.size()) {
        members.emplace_back();
        member_labels.emplace_back();
      }
      result.places.push_back({batch, static_cast<int64_t>(members[batch].size())});
      members[batch].push_back(pairs[i]);
      member_labels[batch].push_back(labels[i]);
    }
    for (size_t batch = 0; batch < members.size(); ++batch) {
      result.batches.emplace_back(std::move(members[batch]), std::move(member_labels[batch]));
    }
    return result;
  }
};

}  // namespace lora_rite::engine
