#pragma once

/// Safetensors files, single and sharded: see docs/files.md. Needs nlohmann-json; POSIX and little-endian machines
/// only.

#include "lora_rite/io/safetensors/read.hpp"
#include "lora_rite/io/safetensors/sharded.hpp"
#include "lora_rite/io/safetensors/write.hpp"
