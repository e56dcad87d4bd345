// What lora_rite::compiled holds: the engines and the bodies of LoraRiteBase, which are most of what a translation unit
// with LoraRite has to compile.

#define LORA_RITE_COMPILING

#include "lora_rite/engine/make_batches.hpp"
#include "lora_rite/step/archive.inc"
#include "lora_rite/step/groups.inc"
#include "lora_rite/step/load_matching.inc"
#include "lora_rite/step/state.inc"
#include "lora_rite/step/step.inc"

namespace lora_rite::engine {

template Batches make_batches<PolarBasis>(const std::vector<PairToPlace>&, size_t, Engine);
template Batches make_batches<QrBasis>(const std::vector<PairToPlace>&, size_t, Engine);

}  // namespace lora_rite::engine
