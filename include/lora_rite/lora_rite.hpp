#pragma once

/// The one include: LoRA-RITE for LibTorch. By themselves come baselines/, checkpoint.hpp (POSIX), distributed.hpp
/// (c10d), grad_scaler.hpp, product_spectrum.hpp, and io/safetensors.hpp and io/peft.hpp (POSIX, nlohmann-json).

#include "lora_rite/diagnostics.hpp"
#include "lora_rite/factor_pair.hpp"
#include "lora_rite/optimizer.hpp"
#include "lora_rite/options.hpp"
#include "lora_rite/rule/basis.hpp"
#include "lora_rite/schedulers.hpp"
#include "lora_rite/state.hpp"
#include "lora_rite/version.hpp"
