#pragma once

#include <csignal>

namespace finetune {

/// While one exists, Ctrl-C (SIGINT) and SIGTERM ask the training to stop after its current step instead of ending the
/// process. A second signal ends it at once.
class InterruptGuard {
 public:
  InterruptGuard();
  ~InterruptGuard();
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;

  bool requested() const;

 private:
  struct sigaction old_interrupt_ = {};
  struct sigaction old_terminate_ = {};
};

}  // namespace finetune
