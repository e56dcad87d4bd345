#pragma once

/// LoRA layers for models of LibTorch: docs/layers.md. Not part of lora_rite.hpp, since it includes LibTorch's modules.

#include "lora_rite/nn/adapter_state.hpp"
#include "lora_rite/nn/adapters.hpp"
#include "lora_rite/nn/inject.hpp"
#include "lora_rite/nn/lora_config.hpp"
#include "lora_rite/nn/lora_conv2d.hpp"
#include "lora_rite/nn/lora_embedding.hpp"
#include "lora_rite/nn/lora_layer.hpp"
#include "lora_rite/nn/lora_linear.hpp"
