#pragma once

#include <ATen/ATen.h>
#include <c10/util/Type.h>
#include <torch/arg.h>
#include <torch/optim/optimizer.h>
#include <torch/optim/serialize.h>
#include <torch/serialize/archive.h>

#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <typeinfo>
#include <utility>
#include <vector>

#include "lora_rite/baselines/spectral.hpp"
#include "lora_rite/optimizer_support.hpp"

/// Optimizers that torch::optim lacks and that a LoRA optimizer is compared with. Each follows its paper; the formula
/// stands in its header.
namespace lora_rite::baselines {

using lora_rite::detail::check_at_least_zero;
using lora_rite::detail::check_decay_rate;
using spectral::norms;

/// What is remembered of a parameter: the steps it made, and tensors by name.
struct State : public torch::optim::OptimizerCloneableParamState<State> {
  int64_t step = 0;                           ///< steps without a gradient do not count
  std::map<std::string, at::Tensor> tensors;  ///< momenta and the like; slices of a batch's

  /// Writes the number of steps, and a copy of each tensor as "tensor.<name>".
  void serialize(torch::serialize::OutputArchive& archive) const override {
    archive.write("step", c10::IValue(step));
    // A tensor here is a slice of a batch: without a copy the whole batch would be written with each.
    for (const auto& [name, tensor] : tensors) archive.write("tensor." + name, tensor.clone(), /*is_buffer=*/true);
  }
  /// Takes over what `serialize` wrote; entries of other names are left alone.
  void serialize(torch::serialize::InputArchive& archive) override {
    const std::string prefix = "tensor.";
    for (const std::string& key : archive.keys()) {
      if (key == "step") {
        c10::IValue value;
        archive.read(key, value);
        step = value.toInt();
      } else if (key.rfind(prefix, 0) == 0) {
        archive.read(key, tensors[key.substr(prefix.size())], /*is_buffer=*/true);
      }
    }
  }
};

/// What the options of all these optimizers have: a learning rate that LibTorch's schedulers can set, and a way into a
/// file. `Options::for_each_saved(options, function)` calls function(name, value) for every one of them.
template <class Options>
struct BaselineOptions : public torch::optim::OptimizerCloneableOptions<Options> {
  /// `lr`, for LibTorch's schedulers.
  double get_lr() const override { return static_cast<const Options&>(*this).lr(); }
  /// Sets `lr`.
  void set_lr(const double value) override { static_cast<Options&>(*this).lr(value); }

  /// Writes every option under its name.
  void serialize(torch::serialize::OutputArchive& archive) const override {
    Options::for_each_saved(static_cast<const Options&>(*this),
                            [&](const char* name, const auto& value) { archive.write(name, c10::IValue(value)); });
  }
  /// Takes over what `serialize` wrote. Throws c10::Error if an option is missing: the file is another optimizer's.
  void serialize(torch::serialize::InputArchive& archive) override {
    Options::for_each_saved(static_cast<Options&>(*this), [&](const char* name, auto& value) {
      c10::IValue found;
      TORCH_CHECK(archive.try_read(name, found), "the saved options have no ", name, ", expected those of ",
                  c10::demangle(typeid(Options).name()));
      value = found.to<std::decay_t<decltype(value)>>();
    });
  }
};

/// Parameters of one shape, dtype, device and number of steps: k of them, stepped by the same operators.
class Batch {
 public:
  /// β's bias correction 1 − β^t.
  double bias_correction(double beta) const { return 1 - std::pow(beta, static_cast<double>(step)); }

  /// The state `name` of all parameters [k, sizes], to be changed in place; zeros at first. The slices are the states'
  /// tensors. Throws c10::Error if one has other sizes: LibTorch loads whatever an archive has at a parameter's place.
  at::Tensor state(const std::string& name, at::IntArrayRef sizes) {
    const int64_t count = static_cast<int64_t>(states.size());
    for (State* one : states) {
      const at::Tensor& slice = one->tensors[name];
      TORCH_CHECK(!slice.defined() || slice.sizes() == sizes, c10::demangle(typeid(*optimizer).name()), ": the state '",
                  name, "' of a parameter ", gradient.sizes().slice(1), " is ", slice.sizes(), ", expected ", sizes,
                  "; it was loaded from an optimizer of other parameters");
    }
    std::vector<int64_t> all = sizes.vec();
    all.insert(all.begin(), count);
    at::Tensor& first = states[0]->tensors[name];
    int64_t size = 1;
    for (const int64_t s : sizes) size *= s;
    bool one_batch = first.defined() && first.is_contiguous();
    for (int64_t i = 0; i < count && one_batch; ++i) {
      const at::Tensor& slice = states[static_cast<size_t>(i)]->tensors[name];
      one_batch =
          slice.defined() && slice.is_alias_of(first) && slice.storage_offset() == first.storage_offset() + i * size;
    }
    if (one_batch) {
      std::vector<int64_t> strides = first.strides().vec();
      strides.insert(strides.begin(), size);
      return first.as_strided(all, strides, first.storage_offset());
    }
    at::Tensor batch = at::zeros(all, gradient.options());
    for (int64_t i = 0; i < count; ++i) {
      at::Tensor& slice = states[static_cast<size_t>(i)]->tensors[name];
      if (slice.defined()) batch[i].copy_(slice);
      slice = batch[i];
    }
    return batch;
  }
  /// The same in the parameters' shape.
  at::Tensor state(const std::string& name) { return state(name, gradient.sizes().slice(1)); }

  /// A copy of the parameters [k, shape].
  at::Tensor parameter() const { return at::stack(parameters); }

  /// parameter ← parameter · keep − update [k, shape]
  void move(double keep, const at::Tensor& update) {
    if (keep != 1) at::_foreach_mul_(parameters, keep);
    at::_foreach_sub_(parameters, update.unbind(0));
  }

  std::vector<at::Tensor> parameters;                  ///< k of them
  at::Tensor gradient;                                 ///< [k, shape]
  std::vector<State*> states;                          ///< what is remembered of each parameter, never null
  int64_t step = 0;                                    ///< t, this one included
  const torch::optim::Optimizer* optimizer = nullptr;  ///< whose batch it is, for errors
};

/// torch::optim::Optimizer over param groups, each stepped with options of its own.
template <class Options>
class OverGroups : public torch::optim::Optimizer {
 public:
  /// A group without options has the defaults.
  void add_param_group(const torch::optim::OptimizerParamGroup& group) {
    const auto& options = static_cast<const Options&>(group.has_options() ? group.options() : defaults());
    options.check();
    lora_rite::detail::add_group(*this, group.params(), std::make_unique<Options>(options));
  }

  /// One step of every group. Returns the loss of the closure, which it calls first with gradients enabled; undefined
  /// without a closure. Throws c10::Error if an option is out of its range or a gradient is not dense.
  torch::Tensor step(LossClosure closure = nullptr) override {
    torch::Tensor loss = lora_rite::detail::loss_of(closure);
    at::NoGradGuard no_grad;
    for (auto& group : param_groups_) {
      const auto& options = static_cast<const Options&>(group.options());
      options.check();
      step_group(group, options);
    }
    return loss;
  }

  /// Writes the options of all groups and the states of their parameters.
  void save(torch::serialize::OutputArchive& archive) const override {
    torch::optim::serialize<State, Options>(archive, *this);
  }
  /// Takes over what `save` wrote. Throws c10::Error if the archive is another optimizer's or its groups differ in
  /// size.
  void load(torch::serialize::InputArchive& archive) override {
    torch::optim::serialize<State, Options>(archive, *this);
  }

 protected:
  /// Each group by `add_param_group`.
  OverGroups(const std::vector<torch::optim::OptimizerParamGroup>& groups, const Options& defaults)
      : Optimizer(std::vector<torch::optim::OptimizerParamGroup>{}, std::make_unique<Options>(defaults)) {
    for (const auto& group : groups) add_param_group(group);
  }

  /// One step of a group, whose options were checked.
  virtual void step_group(const torch::optim::OptimizerParamGroup& group, const Options& options) = 0;

  /// What is remembered of a parameter, made when it is asked for first.
  State& state_of(const at::Tensor& parameter) {
    auto& state = state_[parameter.unsafeGetTensorImpl()];
    if (!state) state = std::make_unique<State>();
    return static_cast<State&>(*state);
  }

  /// These parameters and gradients as a batch, one step further. `Kind` is Batch or derived from it.
  template <class Kind>
  void fill(Kind& batch, const std::vector<at::Tensor>& parameters, const std::vector<at::Tensor>& gradients,
            const std::vector<size_t>& indices) {
    std::vector<at::Tensor> of_batch;
    for (const size_t i : indices) {
      batch.parameters.push_back(parameters[i]);
      of_batch.push_back(gradients[i]);
      batch.states.push_back(&state_of(parameters[i]));
      ++batch.states.back()->step;
    }
    batch.step = batch.states[0]->step;
    batch.optimizer = this;
    batch.gradient = at::stack(of_batch);
  }

  /// Throws c10::Error unless the gradient of the group's parameter `index` is dense.
  static void check_dense(const at::Tensor& gradient, size_t index) {
    TORCH_CHECK(gradient.layout() == at::kStrided, "the gradient of parameter ", index, " has layout ",
                gradient.layout(), ", expected a dense one");
  }
};

/// A rule for single parameters, over batches of equal ones. Parameters without a gradient rest.
template <class Options>
class Baseline : public OverGroups<Options> {
 protected:
  using OverGroups<Options>::OverGroups;

  /// The gradients that the rule sees, undefined where there is none.
  virtual std::vector<at::Tensor> gradients(const torch::optim::OptimizerParamGroup& group, const Options&) {
    std::vector<at::Tensor> result;
    for (const auto& parameter : group.params()) result.push_back(parameter.grad());
    return result;
  }

  /// One step of a batch.
  virtual void update(const Options& options, Batch& batch) = 0;

  /// Calls `update` for each batch of parameters that agree in shape, dtype, device and number of steps.
  void step_group(const torch::optim::OptimizerParamGroup& group, const Options& options) override {
    const std::vector<at::Tensor> gradients = this->gradients(group, options);
    std::map<std::string, std::vector<size_t>> batches;
    for (size_t i = 0; i < gradients.size(); ++i) {
      if (!gradients[i].defined()) continue;
      const at::Tensor& parameter = group.params()[i];
      this->check_dense(gradients[i], i);
      batches[c10::str(parameter.sizes(), parameter.scalar_type(), parameter.device(), this->state_of(parameter).step)]
          .push_back(i);
    }
    for (const auto& [key, indices] : batches) {
      Batch batch;
      this->fill(batch, group.params(), gradients, indices);
      update(options, batch);
    }
  }
};

/// Adam's direction m̂ / (√v̂ + ε) for a batch; the moments are the states exp_avg and exp_avg_sq.
inline at::Tensor adam_direction(Batch& batch, const at::Tensor& gradient, double beta1, double beta2, double eps) {
  at::Tensor mean = batch.state("exp_avg"), square = batch.state("exp_avg_sq");
  mean.lerp_(gradient, 1 - beta1);
  square.mul_(beta2).addcmul_(gradient, gradient, 1 - beta2);
  return (mean / batch.bias_correction(beta1)) / ((square / batch.bias_correction(beta2)).sqrt_().add_(eps));
}

/// Tensors [k, shape] as matrices [k, m, n]: the first dimension of a parameter against all others.
inline at::Tensor matrices(const at::Tensor& batch) {
  return batch.dim() <= 2 ? batch.unsqueeze(-1) : batch.flatten(2);
}

}  // namespace lora_rite::baselines
