#pragma once

#include <ATen/Context.h>
#include <ATen/core/Generator.h>
#include <c10/util/Exception.h>
#include <c10/util/Type.h>
#include <torch/optim/optimizer.h>
#include <torch/serialize/archive.h>
#include <torch/types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <typeinfo>
#include <utility>
#include <vector>

#include "lora_rite/checkpoint/entries.hpp"
#include "lora_rite/checkpoint/training_state.hpp"

/// The payload of a checkpoint: a whole run as an archive of LibTorch, with its optimizers and random number
/// generators, and back, all of it or nothing.
namespace lora_rite::detail {

/// The class of its options stands for an optimizer's: that of the optimizer itself may differ where the format of what
/// it saves does not.
inline std::string type_of(const torch::optim::Optimizer& optimizer) {
  const torch::optim::OptimizerOptions& options = optimizer.defaults();
  return c10::demangle(typeid(options).name());
}

/// What the optimizer's parameters are called in `tensors`, group by group. Throws c10::Error if one of them is not
/// there: its value would be lost.
inline std::vector<std::string> parameter_names(const torch::optim::Optimizer& optimizer,
                                                const std::map<std::string, torch::Tensor>& tensors) {
  std::map<const void*, std::string> names;
  for (const auto& [name, tensor] : tensors) names.emplace(tensor.unsafeGetTensorImpl(), name);
  std::vector<std::string> result;
  for (size_t group = 0; group < optimizer.param_groups().size(); ++group) {
    const auto& parameters = optimizer.param_groups()[group].params();
    for (size_t i = 0; i < parameters.size(); ++i) {
      const auto found = names.find(parameters[i].unsafeGetTensorImpl());
      TORCH_CHECK(found != names.end(), "parameter ", i, " of group ", group, " of the optimizer with ",
                  type_of(optimizer), " is not among TrainingState::tensors, expected all that an optimizer steps");
      result.push_back(found->second);
    }
  }
  return result;
}

/// LibTorch's default generators: the CPU's, and those of all CUDA devices.
inline std::vector<at::Generator> default_generators() {
  std::vector<at::Generator> result = {at::globalContext().defaultGenerator(at::Device(at::kCPU))};
  if (!at::hasCUDA()) return result;
  for (size_t i = 0; i < at::getNumGPUs(); ++i) {
    const at::Device device(at::kCUDA, static_cast<at::DeviceIndex>(i));
    result.push_back(at::globalContext().defaultGenerator(device));
  }
  return result;
}

/// Their states, by device.
inline std::map<std::string, torch::Tensor> generator_states() {
  std::map<std::string, torch::Tensor> states;
  for (at::Generator& generator : default_generators()) {
    const std::lock_guard<std::mutex> lock(generator.mutex());
    states[generator.device().str()] = generator.get_state();
  }
  return states;
}

/// Sets those whose device is among `states`: a checkpoint can come from a machine with other devices.
inline void set_generator_states(const std::map<std::string, torch::Tensor>& states) {
  for (at::Generator& generator : default_generators()) {
    const auto found = states.find(generator.device().str());
    if (found == states.end()) continue;
    const std::lock_guard<std::mutex> lock(generator.mutex());
    generator.set_state(found->second);
  }
}

inline std::string optimizer_key(size_t index) { return "optimizer" + std::to_string(index); }
inline std::string other_key(size_t index) { return "other" + std::to_string(index); }

inline std::string payload_of(const TrainingState& state) {
  TORCH_CHECK(state.step >= 0, "TrainingState::step is ", state.step, ", expected ≥ 0");
  torch::serialize::OutputArchive archive;
  std::map<std::string, torch::Tensor> tensors;
  // Copies: a view would bring its whole storage along.
  for (const auto& [name, tensor] : state.tensors) {
    TORCH_CHECK(tensor.defined(), "tensor '", name, "' is undefined");
    tensors.emplace(name, tensor.detach().clone());
  }
  write_named(archive, "tensors", tensors);
  archive.write("optimizer_count", c10::IValue(static_cast<int64_t>(state.optimizers.size())));
  for (size_t i = 0; i < state.optimizers.size(); ++i) {
    const torch::optim::Optimizer& optimizer = *state.optimizers[i];
    write_object(archive, optimizer_key(i), type_of(optimizer), parameter_names(optimizer, state.tensors), optimizer);
  }
  archive.write("other_count", c10::IValue(static_cast<int64_t>(state.others.size())));
  for (size_t i = 0; i < state.others.size(); ++i) {
    write_object(archive, other_key(i), state.others[i].type(), {}, state.others[i]);
  }
  write_named(archive, "generators", generator_states());
  archive.write("step", c10::IValue(state.step));
  write_named(archive, "values", state.values);
  return archive_bytes(archive);
}

/// The values for the tensors of a run: the same names, shapes and dtypes, on the devices of the run's.
inline std::map<std::string, torch::Tensor> read_tensors(torch::serialize::InputArchive& archive,
                                                         const std::map<std::string, torch::Tensor>& expected) {
  std::map<std::string, torch::Tensor> result;
  for (const auto& [name, value] : read_named(archive, "tensors")) {
    const auto own = expected.find(name);
    TORCH_CHECK(own != expected.end(), "the file has a tensor '", name, "', which the run lacks");
    const torch::Tensor& found = value.toTensor();
    TORCH_CHECK(found.sizes() == own->second.sizes() && found.scalar_type() == own->second.scalar_type(), "tensor '",
                name, "' is ", found.scalar_type(), found.sizes(), ", expected ", own->second.scalar_type(),
                own->second.sizes());
    result.emplace(name, found.to(own->second.device()));
  }
  for (const auto& [name, tensor] : expected) {
    TORCH_CHECK(result.count(name) == 1, "the file has no tensor '", name, "'");
  }
  return result;
}

inline void check_count(torch::serialize::InputArchive& archive, const std::string& key, size_t expected) {
  const int64_t found = read_value(archive, key).toInt();
  TORCH_CHECK(found == static_cast<int64_t>(expected), key, " is ", found, ", expected ", expected);
}

/// Loads what checks its archive only while it is loaded, or brings all of it back to where it was.
class Restoration {
 public:
  explicit Restoration(TrainingState& state) : state_(state), generators_(generator_states()) {
    for (const Stateful& other : state.others) others_.push_back(saved_object(other));
    for (const torch::optim::Optimizer* optimizer : state.optimizers) optimizers_.push_back(saved_object(*optimizer));
  }

  // Optimizers after the schedulers, which set rates of their own: a rate is what it was when it was saved.
  void load(std::vector<torch::serialize::InputArchive>& others,
            std::vector<torch::serialize::InputArchive>& optimizers,
            const std::map<std::string, torch::Tensor>& generators) {
    try {
      for (size_t i = 0; i < others.size(); ++i) load_object(state_.others[i], others[i]);
      for (size_t i = 0; i < optimizers.size(); ++i) load_object(*state_.optimizers[i], optimizers[i]);
      set_generator_states(generators);
    } catch (...) {
      undo();
      throw;
    }
  }

 private:
  void undo() {
    const auto restore = [](auto& object, const std::string& bytes) {
      torch::serialize::InputArchive archive;
      archive.load_from(bytes.data(), bytes.size());
      load_object(object, archive);
    };
    for (size_t i = 0; i < others_.size(); ++i) restore(state_.others[i], others_[i]);
    for (size_t i = 0; i < optimizers_.size(); ++i) restore(*state_.optimizers[i], optimizers_[i]);
    set_generator_states(generators_);
  }

  TrainingState& state_;
  std::vector<std::string> others_, optimizers_;
  std::map<std::string, torch::Tensor> generators_;
};

/// Everything that can be refused comes first; what follows cannot fail. In between `agree(step)` is called, if given:
/// optimizers of several processes wait for each other in what follows.
inline void load_archive(torch::serialize::InputArchive& archive, TrainingState& state,
                         const std::function<void(int64_t)>& agree = nullptr) {
  const auto tensors = read_tensors(archive, state.tensors);
  check_count(archive, "optimizer_count", state.optimizers.size());
  check_count(archive, "other_count", state.others.size());
  std::vector<torch::serialize::InputArchive> optimizers, others;
  for (size_t i = 0; i < state.optimizers.size(); ++i) {
    const torch::optim::Optimizer& optimizer = *state.optimizers[i];
    optimizers.push_back(
        read_object(archive, optimizer_key(i), type_of(optimizer), parameter_names(optimizer, state.tensors)));
  }
  for (size_t i = 0; i < state.others.size(); ++i) {
    others.push_back(read_object(archive, other_key(i), state.others[i].type(), {}));
  }
  std::map<std::string, torch::Tensor> generators;
  for (const auto& [device, value] : read_named(archive, "generators"))
    generators.emplace(device, value.toTensor().cpu());
  const int64_t step = read_value(archive, "step").toInt();
  auto values = read_named(archive, "values");

  if (agree) agree(step);
  Restoration(state).load(others, optimizers, generators);
  const at::NoGradGuard no_grad;
  for (auto& [name, tensor] : state.tensors) tensor.copy_(tensors.at(name));
  state.step = step;
  state.values = std::move(values);
}

}  // namespace lora_rite::detail
