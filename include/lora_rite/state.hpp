#pragma once

#include <ATen/ATen.h>
#include <c10/util/accumulate.h>
#include <torch/serialize/archive.h>

#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "lora_rite/rule.hpp"

namespace lora_rite {

/// What is remembered of one factor X [n, r] (partner Y), as copies, for people. Symbols are those of
/// `LoraRiteOptions`.
struct FactorState {
  int64_t steps = 0;    ///< t, the steps in which it had a gradient
  at::Tensor momentum;  ///< N in the factor's shape, float or double: a step of rate 1 subtracts it from the factor
                        ///< (before decay and bounds); undefined before the first gradient
  at::Tensor second_moment;  ///< V [r, r], double, in the basis Y R⁺
  at::Tensor inverse_root;   ///< R⁺ of Y [r, r], double
  double escaped_mass = 0;   ///< ρ
  at::Tensor rows;           ///< second moments of the rows [n], float or double; undefined without row_equilibration
  at::Tensor master;         ///< float copy of a half-type factor; undefined without master_weights
};

/// The same of both factors of a pair.
struct StateOfPair {
  FactorState a;
  FactorState b;
};

/// What is remembered of k pairs whose factors agree in shape. Dimension 0 of size 2 is the side: A, then B; moments of
/// a side are those of that factor, in the basis of the other. One momentum as large as the factors and O(r²) beside
/// it.
struct PairState {
  rule::Moments<at::Tensor> moments;   ///< V, R⁺ of the partner [2, k, r, r], ρ and t [2, k, 1, 1], double
  std::array<at::Tensor, 2> momentum;  ///< N [k, factor shape], float or double; undefined before the first gradient
  std::array<at::Tensor, 2> rows;      ///< second moments of the rows [k, n], as N; undefined if not wanted
  std::array<at::Tensor, 2> master;    ///< float copy of half-type factors [k, factor shape], undefined if not wanted
  at::Tensor column_sums;              ///< of the factors as the last step left them, to notice edits [2, 2, k, r]
  at::Tensor previous_scale;           ///< α and γ [2, k, 1, 1] of the last step's way back: X_old = α X + γ N,
  at::Tensor previous_rate;            ///< α = 1 / (1−ηλ), γ = η / (1−ηλ)
  at::Tensor unmagnified_norm;         ///< ‖Ḡ‖ in the last step [2, k, 1, 1], for diagnostics; not saved
  at::Tensor clip_factor;              ///< c of the last step [2, k, 1, 1], likewise

  /// Nothing remembered yet. ρ, t, V and R⁺ are zero, so the first step transports nothing.
  static PairState zeros(int64_t pairs, int64_t rank, const at::TensorOptions& double_on_device) {
    const auto matrices = at::zeros({2, pairs, rank, rank}, double_on_device);
    const auto scalars = at::zeros({2, pairs, 1, 1}, double_on_device);
    PairState state;
    state.moments = {matrices, scalars, matrices.clone(), scalars.clone()};
    state.column_sums = at::zeros({2, 2, pairs, rank}, double_on_device);
    state.previous_scale = at::ones_like(scalars);
    state.previous_rate = scalars.clone();
    state.unmagnified_norm = scalars.clone();
    state.clip_factor = at::ones_like(scalars);
    return state;
  }

  /// The state of pair `index` alone: copies with k = 1.
  PairState pick(int64_t index) const {
    const auto small = [&](const at::Tensor& tensor) { return tensor.narrow(1, index, 1).clone(); };
    const auto large = [&](const at::Tensor& tensor) {
      return tensor.defined() ? tensor.narrow(0, index, 1).clone() : at::Tensor();
    };
    PairState state;
    state.moments = {small(moments.second_moment), small(moments.escaped_mass), small(moments.inverse_root),
                     small(moments.step)};
    for (const size_t side : {0, 1}) {
      state.momentum[side] = large(momentum[side]);
      state.rows[side] = large(rows[side]);
      state.master[side] = large(master[side]);
    }
    state.column_sums = column_sums.narrow(2, index, 1).clone();
    state.previous_scale = small(previous_scale);
    state.previous_rate = small(previous_rate);
    state.unmagnified_norm = small(unmagnified_norm);
    state.clip_factor = small(clip_factor);
    return state;
  }

  /// A single pair's state (k = 1) for people; nothing if neither factor had a gradient yet. Reads from the device; the
  /// tensors are parts of these here.
  std::optional<StateOfPair> told() const {
    StateOfPair result;
    for (const size_t side : {0, 1}) {
      FactorState& factor = side == 0 ? result.a : result.b;
      const auto s = static_cast<int64_t>(side);
      factor.steps = moments.step[s].item<int64_t>();
      factor.second_moment = moments.second_moment[s][0];
      factor.inverse_root = moments.inverse_root[s][0];
      factor.escaped_mass = moments.escaped_mass[s].item<double>();
      if (factor.steps > 0 && momentum[side].defined()) factor.momentum = momentum[side][0];
      if (rows[side].defined()) factor.rows = rows[side][0];
      if (master[side].defined()) factor.master = master[side][0];
    }
    if (result.a.steps == 0 && result.b.steps == 0) return std::nullopt;
    return result;
  }

  /// One state of all the given ones, in their order. Where only some have a momentum, the others' is
  /// `absent_momentum[side]`, one pair's worth; a missing master copy is NaN, which no factor agrees with, so that the
  /// next step makes it anew.
  static PairState join(const std::vector<PairState>& states, const std::array<at::Tensor, 2>& absent_momentum) {
    const auto cat = [&](auto member, int64_t dimension) {
      std::vector<at::Tensor> tensors;
      for (const auto& state : states) tensors.push_back(member(state));
      return at::cat(tensors, dimension);
    };
    const auto cat_where_any = [&](auto member, const at::Tensor& absent) {
      bool any = false;
      for (const auto& state : states) any = any || member(state).defined();
      if (!any) return at::Tensor();
      return cat([&](const PairState& state) { return member(state).defined() ? member(state) : absent; }, 0);
    };
    PairState joined;
    joined.moments.second_moment = cat([](const PairState& s) { return s.moments.second_moment; }, 1);
    joined.moments.escaped_mass = cat([](const PairState& s) { return s.moments.escaped_mass; }, 1);
    joined.moments.inverse_root = cat([](const PairState& s) { return s.moments.inverse_root; }, 1);
    joined.moments.step = cat([](const PairState& s) { return s.moments.step; }, 1);
    joined.column_sums = cat([](const PairState& s) { return s.column_sums; }, 2);
    joined.previous_scale = cat([](const PairState& s) { return s.previous_scale; }, 1);
    joined.previous_rate = cat([](const PairState& s) { return s.previous_rate; }, 1);
    joined.unmagnified_norm = cat([](const PairState& s) { return s.unmagnified_norm; }, 1);
    joined.clip_factor = cat([](const PairState& s) { return s.clip_factor; }, 1);
    for (const size_t side : {0, 1}) {
      joined.momentum[side] =
          cat_where_any([side](const PairState& s) { return s.momentum[side]; }, absent_momentum[side]);
      const int64_t rank = joined.moments.second_moment.size(-1);
      joined.rows[side] =
          cat_where_any([side](const PairState& s) { return s.rows[side]; },
                        at::ones({1, absent_momentum[side].numel() / rank}, absent_momentum[side].options()));
      joined.master[side] =
          cat_where_any([side](const PairState& s) { return s.master[side]; },
                        at::full_like(absent_momentum[side], std::numeric_limits<double>::quiet_NaN()));
    }
    return joined;
  }

  /// Writes the state of a single pair (k = 1).
  void save(torch::serialize::OutputArchive& archive) const {
    archive.write("second_moment", moments.second_moment, /*is_buffer=*/true);
    archive.write("inverse_root", moments.inverse_root, /*is_buffer=*/true);
    archive.write("column_sums", column_sums, /*is_buffer=*/true);
    archive.write("scalars", at::stack({moments.step, moments.escaped_mass, previous_scale, previous_rate}),
                  /*is_buffer=*/true);
    for (const size_t side : {0, 1}) {
      if (momentum[side].defined()) archive.write(momentum_key(side), momentum[side], /*is_buffer=*/true);
      if (rows[side].defined()) archive.write(rows_key(side), rows[side], /*is_buffer=*/true);
      if (master[side].defined()) archive.write(master_key(side), master[side], /*is_buffer=*/true);
    }
  }

  /// Reads a single pair's state (k = 1) that must fit factors of these shapes; throws c10::Error that names `label`,
  /// the entry, what was found and what was expected. Tensors come to `device`; with `convert` those that are as large
  /// as factors may have another floating dtype.
  static PairState load(torch::serialize::InputArchive& archive, const std::string& label,
                        const std::array<std::vector<int64_t>, 2>& sizes, int64_t rank, at::ScalarType wide_dtype,
                        at::Device device, bool convert = false) {
    const auto read = [&](const std::string& key, const std::vector<int64_t>& expected, at::ScalarType dtype,
                          bool required) {
      at::Tensor tensor;
      const bool found = archive.try_read(key, tensor, /*is_buffer=*/true);
      TORCH_CHECK(found || !required, "load: ", label, " has no entry '", key, "'");
      if (!found) return at::Tensor();
      const bool right_dtype =
          tensor.scalar_type() == dtype || (convert && !required && at::isFloatingType(tensor.scalar_type()));
      TORCH_CHECK(tensor.defined() && tensor.sizes() == at::IntArrayRef(expected) && right_dtype, "load: ", label,
                  ": entry '", key, "' has shape ", tensor.sizes(), " and dtype ", tensor.scalar_type(),
                  ", expected shape ", at::IntArrayRef(expected), " and dtype ", dtype);
      return tensor.to(device, dtype);
    };
    PairState state;
    const at::Tensor scalars = read("scalars", {4, 2, 1, 1, 1}, at::kDouble, true);
    state.moments.step = scalars[0].clone();
    state.moments.escaped_mass = scalars[1].clone();
    state.previous_scale = scalars[2].clone();
    state.previous_rate = scalars[3].clone();
    state.unmagnified_norm = at::zeros_like(state.previous_rate);
    state.clip_factor = at::ones_like(state.previous_rate);
    state.moments.second_moment = read("second_moment", {2, 1, rank, rank}, at::kDouble, true);
    state.moments.inverse_root = read("inverse_root", {2, 1, rank, rank}, at::kDouble, true);
    state.column_sums = read("column_sums", {2, 2, 1, rank}, at::kDouble, true);
    for (const size_t side : {0, 1}) {
      std::vector<int64_t> shape = sizes[side];
      shape.insert(shape.begin(), 1);
      state.momentum[side] = read(momentum_key(side), shape, wide_dtype, false);
      state.rows[side] = read(rows_key(side), {1, c10::multiply_integers(sizes[side]) / rank}, wide_dtype, false);
      state.master[side] = read(master_key(side), shape, wide_dtype, false);
    }
    return state;
  }

 private:
  static std::string momentum_key(size_t side) { return side == 0 ? "momentum_a" : "momentum_b"; }
  static std::string rows_key(size_t side) { return side == 0 ? "rows_a" : "rows_b"; }
  static std::string master_key(size_t side) { return side == 0 ? "master_a" : "master_b"; }
};

}  // namespace lora_rite
