#include "memory_plan/machine.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>

#include "support/temporary_folder.hpp"
#include "support/torch.hpp"

namespace finetune {
namespace {

using lora_rite::test::TemporaryFolder;

// Files of the system, as they look.
class System {
 public:
  System() {
    sources_.meminfo = write("meminfo", "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    800 kB\n");
    sources_.cgroup = folder_ / "cgroup";
    sources_.cgroup_mount = folder_ / "mount";
  }

  std::filesystem::path write(const std::string& name, const std::string& text) {
    const std::filesystem::path path = folder_ / name;
    std::filesystem::create_directories(path.parent_path());
    std::ofstream(path) << text;
    return path;
  }

  double available() const { return available_memory(sources_); }

 private:
  TemporaryFolder folder_;
  MemorySources sources_;
};

TEST(AvailableMemory, WithoutGroupsIsTheMachines) { EXPECT_EQ(System().available(), 800 * 1024); }

TEST(AvailableMemory, IsTheLeastOfAllGroupsAroundOfVersion2) {
  System system;
  system.write("cgroup", "0::/user/job\n");
  system.write("mount/user/job/memory.max", "max\n");
  system.write("mount/user/job/memory.current", "1000\n");
  EXPECT_EQ(system.available(), 800 * 1024);
  system.write("mount/user/job/memory.max", "500000\n");
  EXPECT_EQ(system.available(), 499000);
  system.write("mount/user/job/memory.stat", "anon 300\ninactive_file 600\nactive_file 100\n");
  EXPECT_EQ(system.available(), 499600);
  system.write("mount/user/memory.max", "300000\n");
  system.write("mount/user/memory.current", "1\n");
  EXPECT_EQ(system.available(), 299999);
  system.write("mount/memory.max", "200\n");  // the mount is the group itself, as in a container
  system.write("mount/memory.current", "300\n");
  EXPECT_EQ(system.available(), 0);
}

TEST(AvailableMemory, IsTheLeastOfAllGroupsAroundOfVersion1) {
  System system;
  system.write("cgroup", "5:cpu,cpuacct:/job\n4:blkio,memory:/job\n0::/\n");
  system.write("mount/memory/job/memory.limit_in_bytes", "9223372036854771712\n");
  system.write("mount/memory/job/memory.usage_in_bytes", "5000\n");
  EXPECT_EQ(system.available(), 800 * 1024);
  system.write("mount/memory/job/memory.limit_in_bytes", "400000\n");
  EXPECT_EQ(system.available(), 395000);
  system.write("mount/memory/job/memory.stat", "inactive_file 1\ntotal_inactive_file 2000\n");
  EXPECT_EQ(system.available(), 397000);
}

TEST(AvailableMemory, OfThisMachineIsMoreThanNothing) {
  EXPECT_GT(available_memory(), 1e6);
  EXPECT_TRUE(std::isinf(available_memory({"/nowhere", "/nowhere", "/nowhere"})));
}

TEST(PeakMemory, Grows) {
  const double before = peak_memory();
  EXPECT_GT(before, 1e6);
  // Beyond every peak until now, whatever was freed since.
  const torch::Tensor large = torch::ones({static_cast<int64_t>(before / 4) + 16'000'000});
  EXPECT_GE(peak_memory(), 4.0 * static_cast<double>(large.numel()));
}

}  // namespace
}  // namespace finetune
