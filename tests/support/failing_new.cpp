// A file of its own: a compiler that sees through operator new complains of what it is made of.

#include "support/failing_new.hpp"

#include <cstddef>
#include <cstdlib>
#include <new>

namespace lora_rite::test {

int64_t& news_left() {
  thread_local int64_t left = -1;
  return left;
}

}  // namespace lora_rite::test

#ifdef LORA_RITE_FAILING_NEW
namespace {

void* allocate(size_t size, size_t alignment) {
  int64_t& left = lora_rite::test::news_left();
  if (left >= 0 && left-- == 0) throw std::bad_alloc();
  // A multiple of the alignment, and more than nothing.
  void* memory = std::aligned_alloc(alignment, (size / alignment + 1) * alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

void* operator new(size_t size) { return allocate(size, alignof(std::max_align_t)); }
void* operator new(size_t size, std::align_val_t alignment) { return allocate(size, static_cast<size_t>(alignment)); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
#endif
