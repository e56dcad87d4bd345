#pragma once

#include <ATen/ATen.h>
#include <c10/util/accumulate.h>
#include <torch/serialize/archive.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/engine/device/tensor_algebra.hpp"
#include "lora_rite/rule/side.hpp"
#include "lora_rite/rule/types.hpp"
#include "lora_rite/state.hpp"

namespace lora_rite {

/// What is remembered of k pairs whose factors agree in shape. Dimension 0 of size 2 is the side: A, then B; moments of
/// a side are those of that factor, in the basis of the other. One momentum as large as the factors, and O(r²) beside
/// it.
struct PairState {
  rule::Moments<at::Tensor> moments;  ///< V, R⁺ of the partner [2, k, r, r], ρ and t [2, k, 1, 1], double
  PerSide<at::Tensor> momentum;       ///< N [k, factor shape], float or double; undefined before the first gradient
  PerSide<at::Tensor> row_moments;    ///< second moments of the rows [k, n], as N; undefined if never wanted
  PerSide<at::Tensor> master;         ///< float copy of half-type factors [k, factor shape], undefined if not wanted
  at::Tensor column_sums;             ///< of the factors as the last step left them, to notice edits [2, 2, k, r]
  at::Tensor previous_scale;          ///< α and γ of `rule::WayBack` [2, k, 1, 1]: how the last step is undone
  at::Tensor previous_rate;
  at::Tensor unmagnified_norm;  ///< ‖Ḡ‖ in the last step [2, k, 1, 1], for diagnostics; not saved
  at::Tensor clip_factor;       ///< c of the last step [2, k, 1, 1], likewise

  /// f(tensor, dimension along which the pairs lie) for every tensor.
  template <class Self, class Function>
  static void for_each_field(Self& self, const Function& f) {
    rule::Moments<at::Tensor>::for_each_field(self.moments, [&](auto& field) { f(field, 1); });
    f(self.column_sums, 2), f(self.previous_scale, 1), f(self.previous_rate, 1);
    f(self.unmagnified_norm, 1), f(self.clip_factor, 1);
    for (const Side side : kSides) f(self.momentum[side], 0), f(self.row_moments[side], 0), f(self.master[side], 0);
  }

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
    std::vector<at::Tensor> parts;
    for_each_field(*this, [&](const at::Tensor& field, int64_t dimension) {
      parts.push_back(field.defined() ? field.narrow(dimension, index, 1).clone() : at::Tensor());
    });
    PairState state;
    size_t next = 0;
    for_each_field(state, [&](at::Tensor& field, int64_t) { field = std::move(parts[next++]); });
    return state;
  }

  /// A single pair's state (k = 1) for people; nothing if neither factor had a gradient yet. Reads from the device; the
  /// tensors are parts of these here.
  std::optional<StateOfPair> told() const {
    StateOfPair result;
    for (const Side side : kSides) {
      FactorState& factor = side == Side::A ? result.a : result.b;
      const int64_t s = index_of(side);
      factor.steps = moments.step[s].item<int64_t>();
      factor.second_moment = moments.second_moment[s][0];
      factor.inverse_root = moments.inverse_root[s][0];
      factor.escaped_mass = moments.escaped_mass[s].item<double>();
      if (factor.steps > 0 && momentum[side].defined()) factor.momentum = momentum[side][0];
      if (row_moments[side].defined()) factor.rows = row_moments[side][0];
      if (master[side].defined()) factor.master = master[side][0];
    }
    if (result.a.steps == 0 && result.b.steps == 0) return std::nullopt;
    return result;
  }

  /// One state of all the given ones, in their order. Where only some have a momentum, the others' is
  /// `absent_momentum`, one pair's worth. Missing row moments are 1. A missing master copy is NaN, which no factor
  /// equals, so that the next step makes it anew.
  static PairState join(const std::vector<PairState>& states, const PerSide<at::Tensor>& absent_momentum) {
    PairState absent;
    const int64_t rank = states[0].moments.second_moment.size(-1);
    for (const Side side : kSides) {
      const at::Tensor& momentum = absent_momentum[side];
      absent.momentum[side] = momentum;
      absent.row_moments[side] = at::ones({1, momentum.numel() / rank}, momentum.options());
      absent.master[side] = at::full_like(momentum, std::numeric_limits<double>::quiet_NaN());
    }
    std::vector<std::vector<at::Tensor>> of_fields;  // by field and state
    for (const PairState& state : states) {
      size_t next = 0;
      for_each_field(state, [&](const at::Tensor& field, int64_t) {
        of_fields.resize(std::max(of_fields.size(), next + 1));
        of_fields[next++].push_back(field);
      });
    }
    size_t next = 0;
    std::vector<at::Tensor> stand_ins;
    for_each_field(absent, [&](const at::Tensor& field, int64_t) { stand_ins.push_back(field); });
    PairState joined;
    for_each_field(joined, [&](at::Tensor& field, int64_t dimension) {
      std::vector<at::Tensor>& parts = of_fields[next];
      const at::Tensor& stand_in = stand_ins[next++];
      if (std::none_of(parts.begin(), parts.end(), [](const at::Tensor& part) { return part.defined(); })) return;
      for (at::Tensor& part : parts)
        if (!part.defined()) part = stand_in;
      field = at::cat(parts, dimension);
    });
    return joined;
  }

  /// Writes the state of a single pair (k = 1).
  void save(torch::serialize::OutputArchive& archive) const {
    archive.write("second_moment", moments.second_moment, /*is_buffer=*/true);
    archive.write("inverse_root", moments.inverse_root, /*is_buffer=*/true);
    archive.write("column_sums", column_sums, /*is_buffer=*/true);
    archive.write("scalars", at::stack({moments.step, moments.escaped_mass, previous_scale, previous_rate}),
                  /*is_buffer=*/true);
    for (const Side side : kSides) {
      if (momentum[side].defined()) archive.write(key("momentum", side), momentum[side], /*is_buffer=*/true);
      if (row_moments[side].defined()) archive.write(key("rows", side), row_moments[side], /*is_buffer=*/true);
      if (master[side].defined()) archive.write(key("master", side), master[side], /*is_buffer=*/true);
    }
  }

  /// Reads a single pair's state (k = 1) that must fit factors of these shapes; throws c10::Error that names `label`,
  /// the entry, what was found and what was expected. Tensors come to `device`; with `convert` those that are as large
  /// as factors may have another floating dtype.
  static PairState load(torch::serialize::InputArchive& archive, const std::string& label,
                        const PerSide<std::vector<int64_t>>& sizes, int64_t rank, at::ScalarType wide_dtype,
                        at::Device device, bool convert = false) {
    const auto read = [&](const std::string& name, const std::vector<int64_t>& expected, at::ScalarType dtype,
                          bool required) {
      at::Tensor tensor;
      const bool found = archive.try_read(name, tensor, /*is_buffer=*/true);
      TORCH_CHECK(found || !required, "load: ", label, " has no entry '", name, "'");
      if (!found) return at::Tensor();
      const bool right_dtype =
          tensor.scalar_type() == dtype || (convert && !required && at::isFloatingType(tensor.scalar_type()));
      TORCH_CHECK(tensor.defined() && tensor.sizes() == at::IntArrayRef(expected) && right_dtype, "load: ", label,
                  ": entry '", name, "' has shape ", tensor.sizes(), " and dtype ", tensor.scalar_type(),
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
    for (const Side side : kSides) {
      std::vector<int64_t> shape = sizes[side];
      shape.insert(shape.begin(), 1);
      const double steps = scalars[0][index_of(side)].item<double>();
      TORCH_CHECK(!(steps < 0), "load: ", label, ": factor ", name_of(side), " has ", steps,
                  " steps, expected 0 or more");
      const std::string momentum = key("momentum", side);
      state.momentum[side] = read(momentum, shape, wide_dtype, false);
      TORCH_CHECK(state.momentum[side].defined() || steps == 0, "load: ", label, " has no entry '", momentum,
                  "', expected one after the first step");
      state.row_moments[side] =
          read(key("rows", side), {1, c10::multiply_integers(sizes[side]) / rank}, wide_dtype, false);
      state.master[side] = read(key("master", side), shape, wide_dtype, false);
    }
    return state;
  }

  /// Throws c10::Error naming `label` and the entry if what a step takes for finite is not, as in a run that diverged
  /// or a damaged file. Second moments of rows and master copies may be infinite.
  const PairState& check_finite(const std::string& label) const {
    const auto check = [&](const std::string& name, const at::Tensor& tensor) {
      TORCH_CHECK(
          !tensor.defined() || tensor.isfinite().all().item<bool>(), "load: ", label, ": entry '", name,
          "' has a number ",
          "that is NaN or infinite, expected finite ones; the pair's run had diverged (reset_state begins anew)");
    };
    check("second_moment", moments.second_moment);
    check("inverse_root", moments.inverse_root);
    check("column_sums", column_sums);
    for (const at::Tensor& scalar : {moments.step, moments.escaped_mass, previous_scale, previous_rate})
      check("scalars", scalar);
    for (const Side side : kSides) check(key("momentum", side), momentum[side]);
    return *this;
  }

 private:
  /// "momentum_a"
  static std::string key(const char* what, Side side) { return std::string(what) + "_" + name_of(side); }
};

}  // namespace lora_rite
