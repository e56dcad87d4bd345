#pragma once

#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <lora_rite/distributed.hpp>

#include <sys/wait.h>
#include <unistd.h>
#include <torch/csrc/distributed/c10d/FileStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <sstream>
#include <string>
#include <vector>

/// Tests of several processes: the test binary starts itself once for each, over Gloo on this machine.
namespace lora_rite::test {

/// What a process of a scenario knows.
struct Process {
  int rank, size;
  std::filesystem::path folder;  ///< shared by the processes of a scenario
  ProcessGroup group;
};

/// Scenarios by name. One fails by throwing, or by a failed expectation.
inline std::map<std::string, std::function<void(const Process&)>>& scenarios() {
  static std::map<std::string, std::function<void(const Process&)>> all;
  return all;
}

struct Scenario {
  Scenario(const std::string& name, std::function<void(const Process&)> body) { scenarios()[name] = std::move(body); }
};

inline ProcessGroup connect(const std::filesystem::path& folder, int rank, int size, int timeout_seconds) {
  auto options = c10d::ProcessGroupGloo::Options::create(std::chrono::seconds(timeout_seconds));
  options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname("127.0.0.1"));
  auto store = c10::make_intrusive<c10d::FileStore>((folder / "store").string(), size);
  return c10::make_intrusive<c10d::ProcessGroupGloo>(store, rank, size, options);
}

/// How the processes of a scenario ended.
struct Outcome {
  std::vector<int> status;          ///< exit status, or 128 + the signal
  std::vector<std::string> output;  ///< of stdout and stderr
  double seconds;
};

/// Runs a scenario in `size` processes; `folder` outlives it, for what one scenario leaves to another.
inline Outcome run_processes(const std::string& scenario, int size, const std::filesystem::path& folder,
                             int timeout_seconds = 60) {
  std::filesystem::create_directories(folder);
  std::filesystem::remove(folder / "store");
  const auto start = std::chrono::steady_clock::now();
  std::vector<pid_t> children;
  for (int rank = 0; rank < size; ++rank) {
    const std::string log = (folder / ("output" + std::to_string(rank))).string();
    const pid_t child = fork();
    if (child == 0) {
      setenv("LORA_RITE_SCENARIO", scenario.c_str(), 1);
      setenv("LORA_RITE_FOLDER", folder.c_str(), 1);
      setenv("LORA_RITE_RANK", std::to_string(rank).c_str(), 1);
      setenv("LORA_RITE_SIZE", std::to_string(size).c_str(), 1);
      setenv("LORA_RITE_TIMEOUT", std::to_string(timeout_seconds).c_str(), 1);
      if (std::freopen(log.c_str(), "w", stdout) == nullptr || dup2(fileno(stdout), STDERR_FILENO) < 0) _exit(3);
      execl("/proc/self/exe", "scenario", nullptr);
      _exit(3);
    }
    children.push_back(child);
  }
  Outcome outcome;
  for (int rank = 0; rank < size; ++rank) {
    int status = 0;
    waitpid(children[static_cast<size_t>(rank)], &status, 0);
    outcome.status.push_back(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    std::ostringstream text;
    text << std::ifstream(folder / ("output" + std::to_string(rank))).rdbuf();
    outcome.output.push_back(text.str());
  }
  outcome.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return outcome;
}

/// Expects that a scenario ends well in all processes, none of which waits for another longer than the timeout.
inline void expect_success(const std::string& scenario, int size, const std::filesystem::path& folder,
                           int timeout_seconds = 60) {
  const Outcome outcome = run_processes(scenario, size, folder, timeout_seconds);
  for (size_t rank = 0; rank < outcome.status.size(); ++rank)
    EXPECT_EQ(outcome.status[rank], 0) << scenario << ", process " << rank << ": " << outcome.output[rank];
}

/// An empty folder for one test.
inline std::filesystem::path fresh_folder(const std::string& name) {
  const auto folder = std::filesystem::temp_directory_path() / ("lora_rite_" + std::to_string(getpid()) + "_" + name);
  std::filesystem::remove_all(folder);
  std::filesystem::create_directories(folder);
  return folder;
}

/// main() of the binary: a scenario where the environment asks for one, else the tests.
inline int run_tests_or_scenario(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  const char* name = std::getenv("LORA_RITE_SCENARIO");
  if (name == nullptr) return RUN_ALL_TESTS();
  at::set_num_threads(1);
  const std::filesystem::path folder = std::getenv("LORA_RITE_FOLDER");
  const int rank = std::atoi(std::getenv("LORA_RITE_RANK")), size = std::atoi(std::getenv("LORA_RITE_SIZE"));
  try {
    const ProcessGroup group = connect(folder, rank, size, std::atoi(std::getenv("LORA_RITE_TIMEOUT")));
    scenarios().at(name)({rank, size, folder, group});
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "%s\n", error.what_without_backtrace());
    return 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return testing::UnitTest::GetInstance()->ad_hoc_test_result().Failed() ? 2 : 0;
}

}  // namespace lora_rite::test
