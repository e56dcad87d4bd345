#pragma once

/// Before what lora_rite::compiled compiles, LoraRiteBase's functions and `kernel_name`: in headers they are inline;
/// with the library lora_rite::compiled they are not. Its virtual functions say so in the class as well: were one of
/// them not inline there, it would be the class' key function, and every translation unit that includes the header
/// would compile the vtable and all that it needs.
#if defined(LORA_RITE_COMPILED) || defined(LORA_RITE_COMPILING)
#define LORA_RITE_BODY
#else
#define LORA_RITE_BODY inline
#endif
