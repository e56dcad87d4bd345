#pragma once

#include <c10/util/Exception.h>
#include <torch/nn/module.h>
#include <torch/serialize/input-archive.h>
#include <torch/types.h>

#include <cstdint>
#include <optional>
#include <string>

/// Parameters of modules and their values, as LoRA layers need them: written, copied, widened, compared with a file's,
/// and seen to change.
namespace lora_rite::nn::detail {

/// The parameters a module has registered, to be written: Module lets only its descendants do so.
struct ParameterAccess : torch::nn::Module {
  static torch::OrderedDict<std::string, torch::Tensor>& of(torch::nn::Module& module) {
    return module.*(&ParameterAccess::parameters_);
  }
};

/// A module that only holds others' or its own parameters under their names. It is copied by the layer it belongs to.
using Holder = torch::nn::Module;

/// A copy with memory of its own on `device` (or where it is), trainable if the original is.
inline torch::Tensor copy_parameter(const torch::Tensor& tensor, const std::optional<torch::Device>& device) {
  if (!tensor.defined()) return tensor;
  const torch::Tensor copy = tensor.detach().to(device.value_or(tensor.device()), tensor.scalar_type(),
                                                /*non_blocking=*/false, /*copy=*/true);
  return copy.set_requires_grad(tensor.requires_grad());
}

inline bool is_half(torch::Dtype dtype) { return dtype == torch::kHalf || dtype == torch::kBFloat16; }

/// In float where it is half or bfloat16: products of such factors are not rounded to 8 bits before they are added.
inline torch::Tensor widened(const torch::Tensor& tensor) {
  return is_half(tensor.scalar_type()) ? tensor.to(torch::kFloat) : tensor;
}

/// Throws c10::Error if the file has a parameter of another shape than the module. LibTorch's own load takes the file's
/// shape over, and factors of another rank would then be multiplied by the scale of this one.
inline void check_shapes(const std::string& label, const torch::nn::Module& module,
                         torch::serialize::InputArchive& file) {
  for (const auto& parameter : module.named_parameters(/*recurse=*/false)) {
    torch::Tensor read;
    if (!file.try_read(parameter.key(), read)) continue;  // Module::load says so
    TORCH_CHECK(read.sizes() == parameter->sizes(), label, parameter.key(), " is ", read.sizes(),
                " in the file, expected ", parameter->sizes(),
                ": load it into a model with the layers and adapters of the one that was saved");
  }
  for (const auto& child : module.named_children()) {
    torch::serialize::InputArchive part;
    if (file.try_read(child.key(), part)) check_shapes(label + child.key() + '.', *child.value(), part);
  }
}

/// What tells that a tensor has other values now: its memory, its version, its dtype.
class Fingerprint {
 public:
  explicit Fingerprint(const torch::Tensor& tensor)
      : storage_(tensor.storage().getWeakStorageImpl()),
        version_(tensor.is_inference() ? 0 : tensor._version()),
        dtype_(tensor.scalar_type()) {}

  bool operator==(const Fingerprint& other) const {
    return storage_ == other.storage_ && version_ == other.version_ && dtype_ == other.dtype_;
  }

 private:
  c10::weak_intrusive_ptr<c10::StorageImpl> storage_;  // weak: an address that is freed and used again is another one
  int64_t version_;
  torch::Dtype dtype_;
};

}  // namespace lora_rite::nn::detail
