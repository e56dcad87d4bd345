// What lora_rite::compiled holds: the engines, which are most of what a translation unit with LoraRite has to compile.

#include "lora_rite/engine/make_batches.hpp"

namespace lora_rite::engine {

template Batches make_batches<PolarBasis>(const std::vector<FactorPair>&, const std::vector<std::string>&, Engine);
template Batches make_batches<QrBasis>(const std::vector<FactorPair>&, const std::vector<std::string>&, Engine);

}  // namespace lora_rite::engine
