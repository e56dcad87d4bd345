#pragma once

/// A LoRA layer over a layer of LibTorch: its interface, and what all kinds have in common.

#include "lora_rite/nn/lora_layer/implementation.hpp"
#include "lora_rite/nn/lora_layer/interface.hpp"
