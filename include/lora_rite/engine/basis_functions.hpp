#pragma once

#include <cstddef>
#include <vector>

#include "lora_rite/options.hpp"
#include "lora_rite/rule/basis.hpp"

namespace lora_rite::engine {

struct Batches;
struct PairToPlace;

/// Places pairs: those that agree in shapes, dtype, device and engine share a batch. Shards do only where their wholes
/// agree, because all processes must place them alike. `pair_count` is the number of the param group's pairs. Throws
/// c10::Error naming the pair if `engine` is Host and the pair does not qualify. (`make_batches.hpp` has the body.)
template <class Basis>
Batches make_batches(const std::vector<PairToPlace>& pairs, size_t pair_count, Engine engine);

#ifdef LORA_RITE_COMPILED
extern template Batches make_batches<PolarBasis>(const std::vector<PairToPlace>&, size_t, Engine);
extern template Batches make_batches<QrBasis>(const std::vector<PairToPlace>&, size_t, Engine);
#endif

/// All that depends on the basis.
struct BasisFunctions {
  const char* name;
  Batches (*make_batches)(const std::vector<PairToPlace>& pairs, size_t pair_count, Engine engine);

  template <class Basis>
  static constexpr BasisFunctions of() {
    return {Basis::name(), &engine::make_batches<Basis>};
  }
};

}  // namespace lora_rite::engine
