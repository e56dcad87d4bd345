#pragma once

#include <ATen/ATen.h>

#include <utility>
#include <vector>

#include "lora_rite/engine/choose.hpp"
#include "lora_rite/engine/layout.hpp"

namespace lora_rite::device {

/// New values of tensors that stay where they are, so that a recorded step finds them there. Collected first, written
/// together: on a CPU without asking for memory.
class PendingWrites {
 public:
  /// Where `step_allowed` is false the tensors keep their values.
  explicit PendingWrites(at::Tensor step_allowed) : step_allowed_(std::move(step_allowed)) {}

  /// tensor ← fresh, of the tensor's dtype.
  void replace(const at::Tensor& tensor, const at::Tensor& fresh) {
    writes_.emplace_back(tensor, choose(step_allowed_, fresh, tensor).contiguous());
  }

  /// destinations[i] ← slice i of `stacked` [k, shape], which already is what they keep where no step is allowed.
  void replace_slices(at::Tensor stacked, std::vector<at::Tensor> destinations) {
    slices_.emplace_back(stacked.contiguous(), std::move(destinations));
  }
  /// tensor ← fresh, which already is what it keeps where no step is allowed.
  void overwrite(const at::Tensor& tensor, const at::Tensor& fresh) {
    writes_.emplace_back(tensor, fresh.contiguous());
  }

  void commit() {
    for (const auto& [tensor, fresh] : writes_) engine::overwrite(tensor, fresh);
    for (const auto& [stacked, destinations] : slices_) engine::write_slices(stacked, destinations);
  }

 private:
  at::Tensor step_allowed_;
  std::vector<std::pair<at::Tensor, at::Tensor>> writes_;
  std::vector<std::pair<at::Tensor, std::vector<at::Tensor>>> slices_;
};

}  // namespace lora_rite::device
