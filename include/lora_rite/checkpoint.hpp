#pragma once

/// Checkpoints of a training run that survive a crash while they are written, and are refused when damaged: see
/// docs/checkpoints.md for the file format. POSIX only.

#include "lora_rite/checkpoint/folder.hpp"
#include "lora_rite/checkpoint/save_load.hpp"
#include "lora_rite/checkpoint/training_state.hpp"
