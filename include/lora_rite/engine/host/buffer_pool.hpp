#pragma once

#include <array>
#include <cstddef>
#include <new>
#include <utility>

namespace lora_rite::host {

/// Doubles for matrices in lanes and for work spaces. What a thread frees it keeps for its next request, up to 1 MiB.
/// Beyond that, as at large ranks, whose arithmetic takes far longer than an allocation, it goes back to the allocator.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t size) : data_(recycled().find(size)), size_(size) {
    if (data_ == nullptr) data_ = static_cast<double*>(::operator new(size * sizeof(double), std::align_val_t(64)));
  }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Buffer() {
    if (data_ != nullptr && !recycled().take(data_, size_)) free(data_);
  }

  double* data() const { return data_; }
  size_t size() const { return size_; }

  /// What stays with the calling thread.
  static size_t bytes_kept() { return recycled().size() * sizeof(double); }

 private:
  static void free(double* data) { ::operator delete(data, std::align_val_t(64)); }

  /// Plain arrays, for what is given back must not ask for memory.
  class Recycled {
   public:
    Recycled() = default;
    Recycled(const Recycled&) = delete;
    Recycled& operator=(const Recycled&) = delete;
    ~Recycled() {
      closed() = true;
      while (count_ > 0) free(data_[--count_]);
    }

    /// A block of that size, or none.
    double* find(size_t size) {
      for (size_t i = closed() ? 0 : count_; i-- > 0;) {
        if (sizes_[i] != size) continue;
        double* found = data_[i];
        --count_;
        data_[i] = data_[count_];
        sizes_[i] = sizes_[count_];
        total_ -= size;
        return found;
      }
      return nullptr;
    }
    bool take(double* data, size_t size) {
      if (closed() || count_ >= kMost || total_ + size > kMostDoubles) return false;
      data_[count_] = data;
      sizes_[count_++] = size;
      total_ += size;
      return true;
    }

    size_t size() const { return total_; }

   private:
    static constexpr size_t kMost = 64, kMostDoubles = size_t{1} << 17;

    /// Is the thread at its end? A buffer may outlive what it would be given back to.
    static bool& closed() {
      thread_local bool flag = false;
      return flag;
    }

    std::array<double*, kMost> data_;
    std::array<size_t, kMost> sizes_;
    size_t count_ = 0, total_ = 0;
  };

  static Recycled& recycled() {
    thread_local Recycled own;
    return own;
  }

  double* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace lora_rite::host
