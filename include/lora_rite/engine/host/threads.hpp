#pragma once

#include <cstdint>

namespace lora_rite::host {

/// Who runs the tasks of a step: LibTorch's threads (`TorchThreads`), one thread, or a pool of the caller's.
class Threads {
 public:
  virtual ~Threads() = default;

  /// Tasks are told a thread number below this one.
  virtual int64_t count() const = 0;

  /// Calls task(i, thread) for every i below `tasks`, once each, in any order. In `commit` it must neither throw nor
  /// ask for memory; the first call of a step may.
  template <class Task>
  void for_each(int64_t tasks, const Task& task) {
    run(tasks,
        {&task, [](const void* object, int64_t i, int64_t thread) { (*static_cast<const Task*>(object))(i, thread); }});
  }

  /// A task without its type.
  struct AnyTask {
    const void* object;
    void (*call)(const void* object, int64_t task, int64_t thread);

    void operator()(int64_t task, int64_t thread) const { call(object, task, thread); }
  };

 protected:
  virtual void run(int64_t tasks, const AnyTask& task) = 0;
};

/// The calling thread.
class OneThread final : public Threads {
 public:
  int64_t count() const override { return 1; }

 protected:
  void run(int64_t tasks, const AnyTask& task) override {
    for (int64_t i = 0; i < tasks; ++i) task(i, 0);
  }
};

}  // namespace lora_rite::host
