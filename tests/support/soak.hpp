#pragma once

#include <cstdlib>

namespace lora_rite::test {

/// Whether tests may take long (LORA_RITE_SOAK is set, as scripts/soak does): then they leave nothing out.
inline bool is_soak() { return std::getenv("LORA_RITE_SOAK") != nullptr; }

}  // namespace lora_rite::test
