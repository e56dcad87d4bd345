#include "memory_plan/machine.hpp"

#include <sys/resource.h>

#include <torch/version.h>
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 11
#include <c10/core/CachingDeviceAllocator.h>
#endif

#include <algorithm>
#include <fstream>
#include <limits>
#include <optional>
#include <sstream>
#include <string>

namespace finetune {
namespace {

namespace fs = std::filesystem;

std::optional<double> read_number(const fs::path& path) {
  std::ifstream file(path);
  double number = 0;
  if (!(file >> number)) return std::nullopt;  // "max" is no number
  return number;
}

// The value behind `name` in lines "name value" or "name: value kB".
std::optional<double> read_field(const fs::path& path, const std::string& name) {
  std::ifstream file(path);
  std::string line;
  while (std::getline(file, line)) {
    std::istringstream words(line);
    std::string key;
    double value = 0;
    if (words >> key >> value && (key == name || key == name + ":")) return value;
  }
  return std::nullopt;
}

// Names of the files in which a control group tells about its memory.
struct GroupFiles {
  const char* limit;
  const char* use;
  const char* reclaimable;  // in memory.stat
};

double room_in_group(const fs::path& group, const GroupFiles& names) {
  const auto limit = read_number(group / names.limit);
  const auto use = read_number(group / names.use);
  if (!limit || !use) return std::numeric_limits<double>::infinity();
  const double reclaimable = read_field(group / "memory.stat", names.reclaimable).value_or(0);
  return std::max(0.0, *limit - std::max(0.0, *use - reclaimable));
}

// The group at `path` below `mount` and those around it. In a container the mount is often the group itself, although
// the path is the machine's.
double room_in_groups(const fs::path& mount, const fs::path& path, const GroupFiles& names) {
  double room = room_in_group(mount, names);
  fs::path group = mount;
  for (const fs::path& part : path.relative_path()) {
    group /= part;
    room = std::min(room, room_in_group(group, names));
  }
  return room;
}

}  // namespace

double available_memory(const MemorySources& sources) {
  double available = std::numeric_limits<double>::infinity();
  if (const auto kilobytes = read_field(sources.meminfo, "MemAvailable")) available = *kilobytes * 1024;
  std::ifstream groups(sources.cgroup);
  std::string line;
  while (std::getline(groups, line)) {
    // "4:memory:/path" in version 1, "0::/path" in version 2
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const fs::path path = line.substr(second + 1);
    if (controllers == ",,") {
      const GroupFiles names{"memory.max", "memory.current", "inactive_file"};
      available = std::min(available, room_in_groups(sources.cgroup_mount, path, names));
    } else if (controllers.find(",memory,") != std::string::npos) {
      const GroupFiles names{"memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"};
      available = std::min(available, room_in_groups(sources.cgroup_mount / "memory", path, names));
    }
  }
  return available;
}

double peak_memory() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_maxrss) * 1024;  // Linux counts kilobytes
}

#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 11

double available_gpu_memory() {
  return static_cast<double>(at::getDeviceAllocator(at::kCUDA)->getMemoryInfo(/*device=*/0).first);
}

double peak_gpu_memory() {
  const auto every = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
  return static_cast<double>(
      at::getDeviceAllocator(at::kCUDA)->getDeviceStats(/*device=*/0).allocated_bytes.at(every).peak);
}

#else

double available_gpu_memory() { return std::numeric_limits<double>::infinity(); }

double peak_gpu_memory() { return 0; }

#endif

}  // namespace finetune
