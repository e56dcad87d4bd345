#pragma once

#include <ATen/ATen.h>

#include <vector>

namespace lora_rite::engine {

/// The tensor on a device. The host waits for what comes to it, since it reads it at once; others do not.
inline at::Tensor on_device(const at::Tensor& tensor, at::Device device) {
  return tensor.to(device, /*non_blocking=*/!device.is_cpu());
}

/// Numbers that the host sets and the device reads, uploaded when they change: a recorded step takes new ones over.
class DeviceNumbers {
 public:
  void upload(const std::vector<double>& values, at::Device device) {
    if (tensor_.defined() && values == values_) return;
    const at::Tensor fresh = at::tensor(values, at::kDouble);
    if (tensor_.defined()) {
      tensor_.copy_(fresh);
    } else {
      tensor_ = fresh.to(device);
    }
    values_ = values;
  }

  /// [n], double, on the device; the same tensor after every upload.
  const at::Tensor& tensor() const { return tensor_; }

 private:
  std::vector<double> values_;
  at::Tensor tensor_;
};

}  // namespace lora_rite::engine
