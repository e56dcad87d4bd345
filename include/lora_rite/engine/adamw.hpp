#pragma once

#include <ATen/ATen.h>
#include <torch/optim/adamw.h>
#include <torch/serialize/archive.h>

#include <exception>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "lora_rite/engine/acts.hpp"
#include "lora_rite/engine/choose.hpp"
#include "lora_rite/engine/device_numbers.hpp"
#include "lora_rite/engine/layout.hpp"
#include "lora_rite/leaf.hpp"
#include "lora_rite/options.hpp"

namespace lora_rite::engine {

/// AdamW for the parameters that are no LoRA factors (heads, norms, biases), with torch's fused kernel. It exists
/// because torch::optim::AdamW steps tensor by tensor, cannot skip a step on the device, and cannot ascend.
///
/// Moments and arithmetic are double for double parameters and float for all others. Gradients are taken in that dtype:
/// half would lose what `GradScaler::unscale_` leaves as float. A bfloat16 or half parameter is stepped as a float copy
/// that is made for the step and written back rounded, so that steps below its resolution are lost, as with torch's
/// own.
class AdamWParameters {
 public:
  /// With `maximize` the steps ascend.
  explicit AdamWParameters(std::vector<at::Tensor> parameters, bool maximize = false)
      : parameters_(std::move(parameters)), maximize_(maximize) {
    state_.resize(parameters_.size());
  }

  const std::vector<at::Tensor>& parameters() const { return parameters_; }
  bool maximize() const { return maximize_; }

  /// Throws c10::Error naming the option, or the parameter (by its place in `label`), if an option is out of its range,
  /// a parameter is not what it was in its first step, or its gradient cannot be used. The fused kernel looks at none
  /// of it: it takes as many elements of every tensor as the parameter has, in the order in which they lie in memory.
  void check_inputs(const torch::optim::AdamWOptions& options, const std::string& label) const {
    detail::check_options_of_adam(options, label);
    for (size_t i = 0; i < parameters_.size(); ++i) {
      const at::Tensor &parameter = parameters_[i], &gradient = parameter.grad(), &mean = state_[i].mean;
      TORCH_CHECK(parameter.is_non_overlapping_and_dense(), label, ": parameter ", i, " has shape ", parameter.sizes(),
                  " and strides ", parameter.strides(), ", expected elements without gaps or overlaps");
      TORCH_CHECK(!mean.defined() || (mean.sizes() == parameter.sizes() && mean.strides() == parameter.strides() &&
                                      mean.scalar_type() == wide_dtype(parameter.scalar_type()) &&
                                      mean.device() == parameter.device()),
                  label, ": parameter ", i, " is now ", parameter.scalar_type(), parameter.sizes(), " with strides ",
                  parameter.strides(), " on ", parameter.device(), ", expected ", mean.sizes(), " with strides ",
                  mean.strides(), " on ", mean.device(), ", of a dtype that is stepped in ", mean.scalar_type(),
                  " as in its first step; build the optimizer after moving or converting the module");
      if (!gradient.defined()) continue;
      detail::check_writable(parameter, label, ": parameter ", i);
      TORCH_CHECK(gradient.layout() == at::kStrided, label, ": the gradient of parameter ", i, " has layout ",
                  gradient.layout(), ", expected a dense one");
      TORCH_CHECK(gradient.sizes() == parameter.sizes() && gradient.device() == parameter.device(), label,
                  ": the gradient of parameter ", i, " has shape ", gradient.sizes(), " on ", gradient.device(),
                  ", expected ", parameter.sizes(), " on ", parameter.device());
    }
  }

  /// Are all gradients finite, in the dtype in which they are used? One scalar a device and dtype; empty if no
  /// parameter has a gradient.
  std::vector<at::Tensor> finite() const {
    std::vector<at::Tensor> result;
    for (const auto& [device_and_dtype, indices] : with_gradient()) {
      std::vector<at::Tensor> gradients;
      for (const size_t i : indices) gradients.push_back(laid_out_as(parameters_[i], parameters_[i].grad()));
      // The largest absolute value: a sum of squares could overflow on finite gradients.
      const auto norms = at::_foreach_norm(gradients, std::numeric_limits<double>::infinity());
      result.push_back(is_finite(at::stack(norms)).all());
    }
    return result;
  }

  /// A step of the parameters that have a gradient, up to the writing; no parameter moves where `step_allowed` (a
  /// scalar on any device) is false. Unlike that of factors, its `commit` asks for some memory within LibTorch: if that
  /// fails, `error` tells.
  std::unique_ptr<Plan> plan(const torch::optim::AdamWOptions& options, const at::Tensor& step_allowed) {
    auto result = std::make_unique<Planned>(*this, options);
    for (const auto& [device_and_dtype, indices] : with_gradient()) {
      Call call = call_for(indices, options, result->next);
      // The fused kernels have no meta version, and a tensor without data has nothing to update.
      if (call.parameters[0].is_meta()) continue;
      const at::Device device = call.parameters[0].device();
      DeviceNumbers& rate = rates_[device_and_dtype.first];
      rate.upload({options.lr()}, device);
      // A CPU takes the rate in double, accelerators read a float.
      call.lr = device.is_cpu() ? rate.tensor()[0] : rate.tensor()[0].to(at::kFloat);
      const at::Tensor counted = on_device(step_allowed, device).to(at::kFloat);
      call.skip = negated(counted).to(at::kFloat);
      call.counted.assign(call.steps.size(), counted);
      for (const at::Tensor& rounded : call.rounded) {
        // A skipped step must leave an infinity where it was.
        const double most = largest_of(rounded.scalar_type());
        call.most.push_back(at::full_like(call.skip, most).masked_fill(call.skip.gt(0), kInfinity));
        call.least.push_back(-call.most.back());
      }
      result->calls.push_back(std::move(call));
    }
    return result;
  }

  /// Hands the rate to the devices; `step` does it, but not the replay of a recorded one.
  void upload_rate(const torch::optim::AdamWOptions& options) {
    for (auto& [device, rate] : rates_) rate.upload({options.lr()}, at::Device(device));
  }

  struct State {
    at::Tensor step;            ///< scalar float on the parameter's device, so that a step can be left out there
    at::Tensor mean;            ///< running mean of the gradient
    at::Tensor square;          ///< running mean of its square
    at::Tensor largest_square;  ///< AMSGrad only
  };

  /// All that a checkpoint keeps.
  struct Memory {
    bool maximize = false;
    std::vector<State> states;  ///< of the parameters, in their order

    /// ", t" of each parameter.
    std::string steps() const {
      std::string text;
      for (const State& state : states)
        text += state.step.defined() ? c10::str(", ", state.step.item<double>()) : std::string(", -");
      return text;
    }

    void save(torch::serialize::OutputArchive& archive) const {
      archive.write("maximize", c10::IValue(maximize));
      for (size_t i = 0; i < states.size(); ++i) {
        torch::serialize::OutputArchive entry(archive.compilation_unit());
        for_each_entry(states[i], [&](const std::string& key, const at::Tensor& tensor) {
          if (tensor.defined()) entry.write(key, tensor, /*is_buffer=*/true);
        });
        archive.write(std::to_string(i), entry);
      }
    }
  };

  void save(torch::serialize::OutputArchive& archive) const { Memory{maximize_, state_}.save(archive); }

  /// Reads what `Memory::save` wrote, in any floating dtype; throws c10::Error naming the first misfit. Nothing is
  /// changed before `restore`.
  Memory read(torch::serialize::InputArchive& archive, const std::string& label) const {
    Memory memory;
    c10::IValue maximize;
    memory.maximize = maximize_;
    if (archive.try_read("maximize", maximize)) {  // which earlier versions lacked
      TORCH_CHECK(maximize.isBool(), "load: ", label, ": entry 'maximize' is ", maximize, ", expected true or false");
      memory.maximize = maximize.toBool();
    }
    for (size_t i = 0; i < parameters_.size(); ++i) {
      const std::string place = label + ", parameter " + std::to_string(i);
      torch::serialize::InputArchive entry;
      TORCH_CHECK(archive.try_read(std::to_string(i), entry), "load: ", place, " is missing in the archive");
      State state;
      for_each_entry(state, [&](const std::string& key, at::Tensor& tensor) {
        at::Tensor found;
        if (!entry.try_read(key, found, /*is_buffer=*/true)) return;
        const auto expected = key == "step" ? at::IntArrayRef() : parameters_[i].sizes();
        TORCH_CHECK(found.sizes() == expected && at::isFloatingType(found.scalar_type()), "load: ", place, ": entry '",
                    key, "' has shape ", found.sizes(), " and dtype ", found.scalar_type(), ", expected shape ",
                    expected, " and a floating dtype");
        // A square may be infinite: that of a gradient near the end of its range.
        const at::Tensor right = key == "mean" ? found.isnan().logical_not() : found.ge(0);
        TORCH_CHECK(right.all().item<bool>(), "load: ", place, ": entry '", key, "' has a number that is NaN",
                    key == "mean" ? "" : " or negative", ", expected none");
        tensor = key == "step" ? found.to(parameters_[i].device(), at::kFloat) : laid_out_as(parameters_[i], found);
      });
      TORCH_CHECK(state.step.defined() == state.mean.defined() && state.mean.defined() == state.square.defined(),
                  "load: ", place, " is incomplete, expected 'step', 'mean' and 'square', or none of them");
      memory.states.push_back(std::move(state));
    }
    return memory;
  }

  void restore(Memory memory) {
    maximize_ = memory.maximize;
    state_ = std::move(memory.states);
  }

  /// As before the first step.
  void forget() { state_.assign(parameters_.size(), State()); }

 private:
  /// The tensor in the parameter's wide dtype, with its device and strides, as the fused kernel wants it.
  static at::Tensor laid_out_as(const at::Tensor& parameter, const at::Tensor& tensor) {
    const at::ScalarType dtype = wide_dtype(parameter.scalar_type());
    at::Tensor converted = tensor.to(parameter.device(), dtype);
    if (converted.strides() == parameter.strides()) return converted;
    return at::empty_like(parameter, parameter.options().dtype(dtype).requires_grad(false)).copy_(converted);
  }

  /// The entries of a State and their keys in an archive.
  template <class AnyState, class Function>
  static void for_each_entry(AnyState& state, Function function) {
    function("step", state.step);
    function("mean", state.mean);
    function("square", state.square);
    function("largest_square", state.largest_square);
  }

  static constexpr double kInfinity = std::numeric_limits<double>::infinity();

  using DeviceAndDtype = std::pair<std::string, at::ScalarType>;

  /// Indices of the parameters with elements and a gradient; the fused kernel wants one device and dtype a call.
  std::map<DeviceAndDtype, std::vector<size_t>> with_gradient() const {
    std::map<DeviceAndDtype, std::vector<size_t>> result;
    for (size_t i = 0; i < parameters_.size(); ++i) {
      if (!parameters_[i].grad().defined() || parameters_[i].numel() == 0) continue;
      result[{parameters_[i].device().str(), wide_dtype(parameters_[i].scalar_type())}].push_back(i);
    }
    return result;
  }

  /// What one call of the fused kernel takes.
  struct Call {
    std::vector<at::Tensor> parameters, gradients, means, squares, largest_squares, steps;
    std::vector<at::Tensor> copies, rounded;  ///< those of `parameters` that are copies, and what they are copies of
    std::vector<at::Tensor> least, most;      ///< scalars between which a rounded one is held
    std::vector<at::Tensor> counted;          ///< what is added to the steps, 1 or 0
    at::Tensor lr, skip;
  };

  /// For these parameters; `next` gets the states that are new.
  Call call_for(const std::vector<size_t>& indices, const torch::optim::AdamWOptions& options,
                std::vector<State>& next) const {
    Call call;
    for (const size_t i : indices) {
      State& state = next[i];
      const at::Tensor& parameter = parameters_[i];
      if (!state.mean.defined()) {
        const auto own = parameter.options().requires_grad(false);
        state.step = at::zeros({}, own.dtype(at::kFloat));
        state.mean = at::zeros_like(parameter, own.dtype(wide_dtype(parameter.scalar_type())));
        state.square = at::zeros_like(state.mean);
      }
      if (options.amsgrad() && !state.largest_square.defined()) state.largest_square = state.square.clone();
      call.parameters.push_back(laid_out_as(parameter, parameter));
      if (parameter.scalar_type() != wide_dtype(parameter.scalar_type())) {
        call.copies.push_back(call.parameters.back());
        call.rounded.push_back(parameter);
      }
      call.gradients.push_back(laid_out_as(parameter, parameter.grad()));
      call.means.push_back(state.mean);
      call.squares.push_back(state.square);
      if (options.amsgrad()) call.largest_squares.push_back(state.largest_square);
      call.steps.push_back(state.step);
    }
    return call;
  }

  class Planned final : public Plan {
   public:
    Planned(AdamWParameters& owner, torch::optim::AdamWOptions options)
        : next(owner.state_), owner_(owner), options_(std::move(options)), maximize_(owner.maximize_) {}

    void commit() noexcept override {
      try {
        for (Call& call : calls) run(call);
      } catch (...) {
        error_ = std::current_exception();
      }
      if (!error_) owner_.state_.swap(next);
    }

    std::vector<State> next;  ///< the state's tensors, and new ones among them
    std::vector<Call> calls;

   private:
    void run(Call& call) {
      at::_foreach_add_(call.steps, call.counted);
      at::_fused_adamw_(call.parameters, call.gradients, call.means, call.squares, call.largest_squares, call.steps,
                        call.lr, std::get<0>(options_.betas()), std::get<1>(options_.betas()), options_.weight_decay(),
                        options_.eps(), options_.amsgrad(), maximize_, /*grad_scale=*/{}, /*found_inf=*/call.skip);
      // A skipped step writes back what was read.
      for (size_t i = 0; i < call.copies.size(); ++i)
        call.rounded[i].copy_(call.copies[i].clamp_(call.least[i], call.most[i]));
    }

    AdamWParameters& owner_;
    torch::optim::AdamWOptions options_;
    bool maximize_;
  };

  std::vector<at::Tensor> parameters_;
  bool maximize_;
  std::vector<State> state_;
  std::map<std::string, DeviceNumbers> rates_;  ///< by device
};

}  // namespace lora_rite::engine
