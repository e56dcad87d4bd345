// Engine::Cuda for a GPU: the front over kernels.cu, on LibTorch's current stream.

#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "launches.hpp"
#include "lora_rite/engine/cuda/cuda_group.hpp"
#include "lora_rite/engine/cuda_engine.hpp"

namespace lora_rite {
namespace cuda {
namespace {

/// launch(stream) on the device.
template <class Launch>
const char* on(int device, const Launch& launch) {
  const auto index = static_cast<c10::DeviceIndex>(device);
  const c10::DeviceGuard guard(c10::Device(c10::kCUDA, index));
  return launch(c10::cuda::getCurrentCUDAStream(index).stream());
}

constexpr Kernels kGpuKernels = {
    /*on_gpu=*/true,
    &gpu::takes,
    &gpu::spill,
    [](const Arguments& step, const AllPointers& pointers, int device) {
      return on(device, [&](gpu::Stream stream) { return gpu::observe(step, pointers, stream); });
    },
    [](const Arguments& step, const AllPointers& pointers, int device) {
      return on(device, [&](gpu::Stream stream) { return gpu::unmagnify(step, pointers, device, stream); });
    },
    [](const Arguments& step, const AllPointers& pointers, int device) {
      return on(device, [&](gpu::Stream stream) { return gpu::decide(step, pointers, device, stream); });
    },
    [](const Arguments& step, const AllPointers& pointers, int device) {
      return on(device, [&](gpu::Stream stream) { return gpu::apply(step, pointers, stream); });
    },
    [](const Arguments& step, const AllPointers& pointers, int device) {
      return on(device, [&](gpu::Stream stream) { return gpu::remember(step, pointers, stream); });
    },
};

}  // namespace
}  // namespace cuda

namespace engine {

extern const CudaEngine kCudaEngine = cuda::engine_of<cuda::kGpuKernels>();

}  // namespace engine
}  // namespace lora_rite
