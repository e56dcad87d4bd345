#include "models/layers/recompute.hpp"

#include <ATen/autocast_mode.h>
#include <torch/autograd.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <mutex>

namespace finetune {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The default generator of a device at one moment.
class RandomState {
 public:
  explicit RandomState(at::Device device) : generator_(at::globalContext().defaultGenerator(device)) {
    const std::lock_guard<std::mutex> lock(generator_.mutex());
    state_ = generator_.get_state();
  }

  void restore() {
    const std::lock_guard<std::mutex> lock(generator_.mutex());
    generator_.set_state(state_);
  }

 private:
  at::Generator generator_;
  torch::Tensor state_;
};

// Whether and how operators on a device cast by themselves.
class AutocastState {
 public:
  explicit AutocastState(at::Device device)
      : type_(device.type()),
        enabled_(at::autocast::is_autocast_enabled(type_)),
        dtype_(at::autocast::get_autocast_dtype(type_)) {}

  void restore() const {
    at::autocast::set_autocast_enabled(type_, enabled_);
    at::autocast::set_autocast_dtype(type_, dtype_);
  }

 private:
  at::DeviceType type_;
  bool enabled_;
  at::ScalarType dtype_;
};

struct Surroundings {
  explicit Surroundings(at::Device device) : random(device), autocast(device) {}

  void restore() {
    random.restore();
    autocast.restore();
  }

  RandomState random;
  AutocastState autocast;
};

// Puts the surroundings of the first run in place and afterwards those found.
class SameSurroundings {
 public:
  SameSurroundings(Surroundings first, at::Device device) : found_(device) { first.restore(); }
  ~SameSurroundings() { found_.restore(); }
  SameSurroundings(const SameSurroundings&) = delete;
  SameSurroundings& operator=(const SameSurroundings&) = delete;

 private:
  Surroundings found_;
};

// What the backward pass needs besides tensors.
struct Recipe : torch::CustomClassHolder {
  Recipe(Recomputable part, size_t inputs, at::Device device)
      : part(std::move(part)), inputs(inputs), device(device), surroundings(device) {}

  Recomputable part;
  size_t inputs;  // how many of the saved tensors are inputs; parameters follow
  at::Device device;
  Surroundings surroundings;
};

class Recompute : public torch::autograd::Function<Recompute> {
 public:
  static torch::Tensor forward(AutogradContext* context, const c10::intrusive_ptr<Recipe>& recipe,
                               at::TensorList tensors) {
    context->save_for_backward(tensors.vec());
    context->saved_data["recipe"] = c10::IValue::make_capsule(recipe);
    return recipe->part(tensors.slice(0, recipe->inputs).vec());
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto recipe = c10::static_intrusive_pointer_cast<Recipe>(context->saved_data["recipe"].toCapsule());
    const variable_list saved = context->get_saved_variables();

    variable_list inputs;
    for (size_t i = 0; i < recipe->inputs; ++i) {
      inputs.push_back(saved[i].detach().requires_grad_(saved[i].requires_grad()));
    }
    variable_list wanted;
    std::vector<size_t> places;  // of the wanted ones among all saved tensors
    for (size_t i = 0; i < saved.size(); ++i) {
      const torch::Tensor& tensor = i < recipe->inputs ? inputs[i] : saved[i];
      if (!tensor.requires_grad()) continue;
      wanted.push_back(tensor);
      places.push_back(i);
    }

    torch::Tensor output;
    const torch::AutoGradMode with_gradients(true);
    {
      const SameSurroundings guard(recipe->surroundings, recipe->device);
      output = recipe->part(inputs);
    }
    const variable_list found = torch::autograd::grad({output}, wanted, gradients, /*retain_graph=*/std::nullopt,
                                                      /*create_graph=*/false, /*allow_unused=*/true);
    variable_list result(1 + saved.size());  // the recipe has none
    for (size_t i = 0; i < found.size(); ++i) result[1 + places[i]] = found[i];
    return result;
  }
};

}  // namespace

torch::Tensor recompute(const Recomputable& part, const std::vector<torch::Tensor>& inputs,
                        const std::vector<torch::Tensor>& parameters) {
  TORCH_CHECK(!inputs.empty(), "recompute: no inputs; pass at least the tensor that the part works on");
  if (!torch::GradMode::is_enabled()) return part(inputs);
  std::vector<torch::Tensor> tensors = inputs;
  tensors.insert(tensors.end(), parameters.begin(), parameters.end());
  const auto recipe = c10::make_intrusive<Recipe>(part, inputs.size(), inputs.front().device());
  return Recompute::apply(recipe, at::TensorList(tensors));
}

}  // namespace finetune
