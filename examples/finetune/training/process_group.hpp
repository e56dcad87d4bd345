#pragma once

#include <cstdint>
#include <functional>
#include <lora_rite/distributed.hpp>
#include <string>
#include <vector>

namespace finetune {

/// The processes that train together, and which of them this one is. Unless said otherwise all of them make the same
/// calls in the same order; a process that leaves makes the others throw c10::Error. With one process nothing is sent.
struct Processes {
  int rank = 0;
  int size = 1;
  lora_rite::ProcessGroup group = nullptr;  ///< null where there is one process

  /// The first one writes the results and shows how training goes.
  bool is_first() const { return rank == 0; }

  /// This process's part of a list: the parts lie in the order of the processes and differ in length by one at most.
  std::vector<int64_t> part_of(const std::vector<int64_t>& all) const;

  /// Each value added up over the processes.
  std::vector<double> sum(const std::vector<double>& own) const;

  /// Whether any of them says so.
  bool any(bool own) const { return sum({own ? 1.0 : 0.0})[0] > 0; }

  /// Throws c10::Error in all, naming the first line that differs, unless all have the same lines.
  void check_same(const std::string& lines) const;

  /// Runs `action` in the first process, then in all others, which wait for as long as that takes.
  void first_alone(const std::function<void()>& action) const;
};

/// Connects to the other processes as the environment tells, which torchrun or scripts/launch set: WORLD_SIZE
/// processes, of which this one is RANK, meet at MASTER_ADDR:MASTER_PORT. Without WORLD_SIZE, or if it is 1, there is
/// one. A process that does not answer for `timeout_seconds` counts as gone. Throws Error if the environment makes no
/// sense, the others do not come in that time, or this program was built without Gloo.
Processes connect_processes(int64_t timeout_seconds);

}  // namespace finetune
