#include <cstddef>
#include <new>

#include "targets.hpp"

// LibTorch makes room for what a pickle announces, a string or the table of its memo, before it reads on: up to 64 GiB
// on the word of an archive. A machine that has less refuses, and operator new throws; the sanitizer's ends the process
// instead. So this one takes its place, and refuses sooner.
void* operator new(size_t size) {
  constexpr size_t kMost = size_t{1} << 30;
  void* memory = size <= kMost ? operator new(size, std::nothrow) : nullptr;
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  lora_rite::fuzz::checkpoint({reinterpret_cast<const char*>(data), size});
  return 0;
}
