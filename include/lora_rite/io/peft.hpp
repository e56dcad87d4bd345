#pragma once

/// LoRA adapters in the format of the Python library PEFT: see docs/files.md. Needs nlohmann-json; POSIX and
/// little-endian machines only.

#include "lora_rite/io/adapter.hpp"
#include "lora_rite/io/adapter_config.hpp"
