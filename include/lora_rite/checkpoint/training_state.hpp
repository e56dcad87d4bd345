#pragma once

#include <c10/util/Exception.h>
#include <c10/util/Type.h>
#include <torch/nn/module.h>
#include <torch/optim/optimizer.h>
#include <torch/serialize/archive.h>
#include <torch/types.h>

#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <typeinfo>
#include <utility>
#include <vector>

#include "lora_rite/factor_pair.hpp"
#include "lora_rite/leaf.hpp"
#include "lora_rite/names.hpp"

/// What a checkpoint holds: references to the tensors and objects of a run, and the tensors that training changes, by
/// their names.
namespace lora_rite {

/// A pointer to an object with LibTorch's members `save(OutputArchive&) const` and `load(InputArchive&)`: a
/// WarmupScheduler, a GradScaler, a sampler of torch::data, a class of yours. The object must outlive it.
class Stateful {
 public:
  /// Of the object behind `object`, which must not be null. Implicit, so that a list of pointers is a list of these.
  template <class Object>
  Stateful(Object* object)
      : type_(c10::demangle(typeid(*object).name())),
        save_([object](torch::serialize::OutputArchive& archive) { object->save(archive); }),
        load_([object](torch::serialize::InputArchive& archive) { object->load(archive); }) {}

  /// The object's class, as its namespace and name.
  const std::string& type() const { return type_; }

  /// The object's own `save`.
  void save(torch::serialize::OutputArchive& archive) const { save_(archive); }

  /// The object's own `load`.
  void load(torch::serialize::InputArchive& archive) { load_(archive); }

 private:
  std::string type_;
  std::function<void(torch::serialize::OutputArchive&)> save_;
  std::function<void(torch::serialize::InputArchive&)> load_;
};

/// What changes while a run trains, as references to the run's own tensors and objects. LibTorch's default random
/// number generators, of the CPU and of every CUDA device, belong to a checkpoint without being named here. Gradients
/// do not: save between steps.
struct TrainingState {
  std::map<std::string, torch::Tensor> tensors;      ///< by name, all parameters of the optimizers among them
  std::vector<torch::optim::Optimizer*> optimizers;  ///< of any class that LibTorch can save
  std::vector<Stateful> others;                      ///< schedulers, a GradScaler, samplers
  int64_t step = 0;                                  ///< finished steps, ≥ 0: where in its data the run stands
  std::map<std::string, c10::IValue> values;         ///< whatever else: numbers, strings, tensors, lists of them
};

/// The tensors of a module that training changes: parameters that require a gradient, LoRA factors whether they do or
/// not (an inactive adapter's do not, and LoraRite(module) holds them; a checkpoint fits whichever is active), and all
/// buffers but the factors that nn::LoraInit::Pissa started with: these belong to the base weight, which lacks their
/// product and is not there either, and an injection makes both anew. By the names that LibTorch gives them.
inline std::map<std::string, torch::Tensor> trained_tensors(const torch::nn::Module& module) {
  std::map<std::string, torch::Tensor> result;
  for (const auto& item : module.named_parameters()) {
    const bool is_factor = detail::first_factor_token(item.key()).position != std::string::npos;
    if (is_factor || item.value().requires_grad()) result.emplace(item.key(), item.value());
  }
  for (const auto& item : module.named_buffers()) {
    const bool is_start = detail::ends_with(item.key(), ".initial") &&
                          detail::first_factor_token(item.key()).position != std::string::npos;
    if (!is_start) result.emplace(item.key(), item.value());
  }
  return result;
}

/// The factors of all pairs, as "name.a" and "name.b"; a pair without a name goes by its place in the list. A leaf of
/// which pairs are parts (`expert_pairs`) is there once, whole, by the name of the first of them. Throws c10::Error if
/// two pairs have one name.
inline std::map<std::string, torch::Tensor> trained_tensors(const std::vector<FactorPair>& pairs) {
  std::map<std::string, torch::Tensor> result;
  std::set<std::string> names;
  std::set<const void*> known;  // leaves of which a part was there
  for (size_t i = 0; i < pairs.size(); ++i) {
    const std::string name = pairs[i].name.empty() ? std::to_string(i) : pairs[i].name;
    TORCH_CHECK(names.insert(name).second, "trained_tensors: two pairs are named '", name,
                "', expected a name of its own for each");
    for (const auto& [ending, factor] : {std::pair{".a", pairs[i].a}, std::pair{".b", pairs[i].b}}) {
      const torch::Tensor leaf = detail::leaf_of(factor);
      if (detail::is_part(factor) && !known.insert(leaf.unsafeGetTensorImpl()).second) continue;
      result.emplace(name + ending, leaf);
    }
  }
  return result;
}

}  // namespace lora_rite
