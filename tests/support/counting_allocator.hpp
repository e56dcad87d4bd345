#pragma once

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <unordered_map>

namespace lora_rite::test {

/// LibTorch's memory for CPU tensors, counted.
class CountingAllocator final : public c10::Allocator {
 public:
  static CountingAllocator& instance() {
    static CountingAllocator allocator;
    return allocator;
  }

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, c10::Device(c10::kCPU)};
    void* data = c10::alloc_cpu(bytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    sizes_[data] = bytes;
    now_ += static_cast<double>(bytes);
    peak_ = std::max(peak_, now_);
    return {data, data, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  /// The most that was held at a time while `action` ran, beyond what was held before.
  double peak_of(const std::function<void()>& action) {
    c10::Allocator* usual = c10::GetCPUAllocator();
    c10::SetCPUAllocator(this, kPriority);
    const double before = now_;
    peak_ = now_;
    action();
    c10::SetCPUAllocator(usual, kPriority);
    return peak_ - before;
  }

 private:
  static constexpr uint8_t kPriority = 1;  // that of other allocators of tests: equal ones replace each other

  static void release(void* data) {
    if (data == nullptr) return;
    CountingAllocator& self = instance();
    {
      const std::lock_guard<std::mutex> lock(self.mutex_);
      const auto found = self.sizes_.find(data);
      self.now_ -= static_cast<double>(found->second);
      self.sizes_.erase(found);
    }
    c10::free_cpu(data);
  }

  std::mutex mutex_;
  std::unordered_map<void*, size_t> sizes_;
  double now_ = 0, peak_ = 0;
};

}  // namespace lora_rite::test
