#pragma once

/// Before the bodies of LoraRiteBase: in headers they are inline; in the library lora_rite::compiled they are not.
#ifdef LORA_RITE_COMPILING
#define LORA_RITE_BODY
#else
#define LORA_RITE_BODY inline
#endif
