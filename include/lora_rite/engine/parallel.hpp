#pragma once

#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

namespace lora_rite::engine {

/// Places for so many threads, at most at::get_num_threads(). The first call makes those for fewer as well:
/// Batch::commit must ask for no memory.
inline at::TensorIterator& places_for(int64_t threads) {
  struct Places {
    std::vector<char> memory;
    std::unique_ptr<at::TensorIterator> iterator;
  };
  thread_local std::vector<Places> of_count;  // by the number of threads less one
  while (static_cast<int64_t>(of_count.size()) < std::max<int64_t>(threads, at::get_num_threads())) {
    const int64_t count = static_cast<int64_t>(of_count.size()) + 1;
    Places places = {std::vector<char>(static_cast<size_t>(count)), nullptr};
    const at::Tensor elements = at::from_blob(places.memory.data(), {count}, at::kByte);
    places.iterator = std::make_unique<at::TensorIterator>(
        at::TensorIteratorConfig().set_check_mem_overlap(false).add_output(elements).add_input(elements).build());
    of_count.push_back(std::move(places));
  }
  return *of_count[static_cast<size_t>(threads - 1)].iterator;
}

/// Calls task(0) … task(count − 1) on LibTorch's own threads, each once, in any order. A task that takes two arguments
/// gets the number of its thread as well, below at::get_num_threads().
///
/// The first call of a thread asks for memory; those that follow do not, unless LibTorch's number of threads has grown.
///
/// `at::parallel_for` is a template: in code that is compiled without -fopenmp it runs on one thread, and a second
/// OpenMP runtime or a pool of our own would fight with LibTorch's over the cores. A TensorIterator runs its loop on
/// the threads of the compiled library, whatever our flags are; here its elements are not data but places for a thread.
template <class Task>
void parallel_tasks(int64_t count, const Task& task) {
  const int64_t threads = std::min<int64_t>(count, at::get_num_threads());
  std::atomic<int64_t> next{0}, next_thread{0};
  const auto work = [&] {
    const int64_t thread = next_thread.fetch_add(1, std::memory_order_relaxed);
    for (int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < count;
         i = next.fetch_add(1, std::memory_order_relaxed)) {
      if constexpr (std::is_invocable_v<Task, int64_t, int64_t>) {
        task(i, thread);
      } else {
        static_cast<void>(thread);
        task(i);
      }
    }
  };
  if (threads <= 1 || at::in_parallel_region()) return work();
  places_for(threads).for_each([&](char**, const int64_t*, int64_t, int64_t) { work(); }, /*grain_size=*/1);
}

}  // namespace lora_rite::engine
