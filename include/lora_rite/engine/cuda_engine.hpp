#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "lora_rite/engine/acts.hpp"
#include "lora_rite/engine/batch.hpp"
#include "lora_rite/factor_pair.hpp"
#include "lora_rite/rule/basis.hpp"

/// Where Engine::Cuda is found: it is compiled apart, and who does not link it pays nothing.
namespace lora_rite::engine {

/// The engine of our own kernels, as `make_batches` calls it. `cuda/cuda_group.hpp` makes one.
struct CudaEngine {
  using Batches = std::vector<Batch*>;

  bool on_gpu;  ///< for factors on CUDA devices; else on a CPU, as the tests run it
  bool (*takes)(const FactorPair& pair);
  std::unique_ptr<Batch> (*make_batch)(std::vector<FactorPair> pairs, std::vector<std::string> labels);
  /// Batches that agree in rank, dtype and device, and their places among all of the param group.
  std::unique_ptr<BatchGroup> (*make_polar_group)(const Batches& batches, std::vector<size_t> places);
  std::unique_ptr<BatchGroup> (*make_qr_group)(const Batches& batches, std::vector<size_t> places);

  /// Null for a basis that the kernels do not know.
  template <class Basis>
  auto make_group() const {
    if constexpr (std::is_same_v<Basis, PolarBasis>) return make_polar_group;
    if constexpr (std::is_same_v<Basis, QrBasis>) return make_qr_group;
    return decltype(make_polar_group){nullptr};
  }
};

/// This program's; null where `lora_rite::cuda` is not linked.
inline const CudaEngine* cuda_engine = nullptr;

#ifdef LORA_RITE_CUDA
extern const CudaEngine kCudaEngine;
inline const bool cuda_engine_is_linked = (cuda_engine = &kCudaEngine, true);
#endif

}  // namespace lora_rite::engine
