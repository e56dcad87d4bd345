#pragma once

// The test program's own operator new, of which a call can be made to fail. The sanitizers have one already.

#include <cstdint>

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#if defined(__has_feature)
#if !__has_feature(address_sanitizer) && !__has_feature(thread_sanitizer)
#define LORA_RITE_FAILING_NEW
#endif
#else
#define LORA_RITE_FAILING_NEW
#endif
#endif

namespace lora_rite::test {

/// Calls of operator new in this thread until one throws std::bad_alloc; below zero: none does.
int64_t& news_left();

}  // namespace lora_rite::test
