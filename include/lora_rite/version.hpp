#pragma once

/// The version of the library, the only place where it stands: CMake reads it from here.
#define LORA_RITE_VERSION_MAJOR 0
#define LORA_RITE_VERSION_MINOR 1
#define LORA_RITE_VERSION_PATCH 0
