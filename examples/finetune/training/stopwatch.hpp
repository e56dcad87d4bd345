#pragma once

#include <torch/cuda.h>

#include <chrono>

namespace finetune {

/// Measures time. On a GPU the work is done when the device has done it, not when the call returns.
class Stopwatch {
 public:
  explicit Stopwatch(bool on_gpu) : on_gpu_(on_gpu) { wait(); }

  double milliseconds() const {
    wait();
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  void wait() const {
    if (on_gpu_) torch::cuda::synchronize();
  }

  bool on_gpu_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace finetune
