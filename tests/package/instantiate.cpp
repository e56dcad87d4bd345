// Compiled by every compiler and standard that the library promises: all headers, and each member of each optimizer
// that is a template is instantiated.
#include <lora_rite/baselines/registry.hpp>
#include <lora_rite/checkpoint.hpp>
#include <lora_rite/distributed.hpp>
#include <lora_rite/grad_scaler.hpp>
#include <lora_rite/io/peft.hpp>
#include <lora_rite/lora_rite.hpp>
#include <lora_rite/nn/nn.hpp>
#include <lora_rite/nn/peft.hpp>
#include <lora_rite/product_spectrum.hpp>

template class lora_rite::LoraRite<lora_rite::PolarBasis>;
template class lora_rite::LoraRite<lora_rite::QrBasis>;
template class lora_rite::ShardedLoraRite<lora_rite::PolarBasis>;
template class lora_rite::RowShardedLoraRite<lora_rite::PolarBasis>;
