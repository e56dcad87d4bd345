#pragma once

#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

namespace lora_rite::engine {

/// Calls task(0) … task(count − 1) on LibTorch's own threads, each once, in any order. A task that takes two arguments
/// gets the number of its thread as well, below at::get_num_threads().
///
/// The first call of a thread asks for memory; those that follow do not, unless the number of threads grows.
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
  thread_local std::unique_ptr<at::TensorIterator> places;
  if (!places || places->numel() != threads) {
    thread_local std::vector<char> memory;  // our own: Batch::commit must ask LibTorch for none
    memory.resize(static_cast<size_t>(threads));
    const at::Tensor elements = at::from_blob(memory.data(), {threads}, at::kByte);
    places = std::make_unique<at::TensorIterator>(
        at::TensorIteratorConfig().set_check_mem_overlap(false).add_output(elements).add_input(elements).build());
  }
  places->for_each([&](char**, const int64_t*, int64_t, int64_t) { work(); }, /*grain_size=*/1);
}

}  // namespace lora_rite::engine
