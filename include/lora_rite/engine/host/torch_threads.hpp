#pragma once

#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "lora_rite/engine/host/threads.hpp"

namespace lora_rite::host {

namespace detail {

/// An iterator with one element for each of `threads` threads, at most at::get_num_threads(). The first call makes
/// those for fewer threads as well, because `commit` must ask for no memory.
inline at::TensorIterator& iterator_for(int64_t threads) {
  struct Slots {
    std::vector<char> memory;
    std::unique_ptr<at::TensorIterator> iterator;
  };
  thread_local std::vector<Slots> of_count;  // by the number of threads less one
  while (static_cast<int64_t>(of_count.size()) < std::max<int64_t>(threads, at::get_num_threads())) {
    const int64_t count = static_cast<int64_t>(of_count.size()) + 1;
    Slots slots = {std::vector<char>(static_cast<size_t>(count)), nullptr};
    const at::Tensor elements = at::from_blob(slots.memory.data(), {count}, at::kByte);
    slots.iterator = std::make_unique<at::TensorIterator>(
        at::TensorIteratorConfig().set_check_mem_overlap(false).add_output(elements).add_input(elements).build());
    of_count.push_back(std::move(slots));
  }
  return *of_count[static_cast<size_t>(threads - 1)].iterator;
}

}  // namespace detail

/// LibTorch's own threads. The first call in a thread asks for memory; later ones do not, unless LibTorch's number of
/// threads has grown.
///
/// `at::parallel_for` is a template: in code that is compiled without -fopenmp it runs on one thread, and a second
/// OpenMP runtime or a pool of our own would fight with LibTorch's over the cores. A TensorIterator runs its loop on
/// the threads of the compiled library, whatever our flags are. Its elements here are no data but one for each thread.
class TorchThreads final : public Threads {
 public:
  int64_t count() const override { return at::get_num_threads(); }

 protected:
  void run(int64_t tasks, const AnyTask& task) override {
    const int64_t threads = std::min<int64_t>(tasks, count());
    std::atomic<int64_t> next{0}, next_thread{0};
    const auto work = [&] {
      const int64_t thread = next_thread.fetch_add(1, std::memory_order_relaxed);
      for (int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < tasks;
           i = next.fetch_add(1, std::memory_order_relaxed)) {
        task(i, thread);
      }
    };
    if (threads <= 1 || at::in_parallel_region()) return work();
    detail::iterator_for(threads).for_each([&](char**, const int64_t*, int64_t, int64_t) { work(); },
                                           /*grain_size=*/1);
  }
};

/// For those who have no object at hand.
inline TorchThreads& torch_threads() {
  static TorchThreads threads;
  return threads;
}

}  // namespace lora_rite::host
