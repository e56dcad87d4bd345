#pragma once

#include <filesystem>

namespace finetune {

/// Where the system tells about memory.
struct MemorySources {
  std::filesystem::path meminfo = "/proc/meminfo";
  std::filesystem::path cgroup = "/proc/self/cgroup";
  std::filesystem::path cgroup_mount = "/sys/fs/cgroup";
};

/// How many bytes the process may still take: the least of what the machine has (MemAvailable) and, for each control
/// group around the process (of version 1 or 2), its limit less its use; pages of files that are not in use count as
/// free. Infinite where the system tells nothing.
double available_memory(const MemorySources& sources = {});

/// The most bytes that the process has held until now, files' pages and all.
double peak_memory();

/// The same two of the GPU: what it has free, and the most that tensors have taken of it. Infinite and 0 with a
/// LibTorch before 2.11, which does not tell.
double available_gpu_memory();
double peak_gpu_memory();

}  // namespace finetune
