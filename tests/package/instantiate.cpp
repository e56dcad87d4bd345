// Compiled by every compiler and standard that the library promises: each member of each optimizer is instantiated.
#include <lora_rite/lora_rite.hpp>

template class lora_rite::LoraRite<lora_rite::PolarBasis>;
template class lora_rite::LoraRite<lora_rite::QrBasis>;
