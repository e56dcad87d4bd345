#pragma once

#include <memory>
#include <string>
#include <vector>

#include "lora_rite/basis.hpp"
#include "lora_rite/engine/batch.hpp"
#include "lora_rite/factor_pair.hpp"
#include "lora_rite/options.hpp"

namespace lora_rite::engine {

/// The pairs of a param group, batched, and where each of them is found.
struct Batches {
  struct Place {
    size_t batch;
    int64_t index;
  };
  std::vector<std::unique_ptr<Batch>> all;
  std::vector<Place> places;
};

/// Pairs that agree in shapes, dtype, device and engine share a batch. `labels[i]` names pair i in messages. Throws
/// c10::Error naming the pair if `engine` is Host and the pair is none for it.
template <class Basis>
Batches make_batches(const std::vector<FactorPair>& pairs, const std::vector<std::string>& labels, Engine engine);

}  // namespace lora_rite::engine

#ifdef LORA_RITE_COMPILED  // the target lora_rite::compiled holds the engines; other bases include make_batches.hpp
namespace lora_rite::engine {
extern template Batches make_batches<PolarBasis>(const std::vector<FactorPair>&, const std::vector<std::string>&,
                                                 Engine);
extern template Batches make_batches<QrBasis>(const std::vector<FactorPair>&, const std::vector<std::string>&, Engine);
}  // namespace lora_rite::engine
#else
#include "lora_rite/engine/make_batches.hpp"
#endif
