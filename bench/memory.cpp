// Memory that an optimizer takes: what stays with it after some steps, and what a step needs beyond that for a while.
// Each contender runs in a process of its own, whose resident memory the kernel counts.

#include <malloc.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "contenders.hpp"

namespace {

using namespace bench;

/// A line of /proc/self/status in bytes.
double status(const std::string& key) {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);)
    if (line.rfind(key + ":", 0) == 0) return 1024.0 * std::stod(line.substr(key.size() + 1));
  return 0;
}

/// What was given back to the allocator stays with the process otherwise, for whoever asks next.
void give_back_to_the_system() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

struct Memory {
  double state, peak;  ///< bytes beyond factors and gradients
};

Memory measure(const Shape& shape, const Make& make) {
  {
    Step warm_up = make(make_pairs({{2, 64, 64, shape.rank}}, torch::kFloat));  // threads, code pages
    for (int i = 0; i < 3; ++i) warm_up();
  }
  const std::vector<FactorPair> pairs = make_pairs({shape}, torch::kFloat);
  give_back_to_the_system();
  const double before = status("VmRSS");
  const Step step = make(pairs);
  step();
  std::ofstream("/proc/self/clear_refs") << 5;  // the peak counts from here
  for (int i = 0; i < 3; ++i) step();
  const double peak = status("VmHWM");
  give_back_to_the_system();
  return {status("VmRSS") - before, peak - before};
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<Shape> shapes = {
      {126, 512, 512, 8}, {126, 2048, 2048, 16}, {32, 2048, 2048, 32}, {32, 2048, 2048, 64}};
  std::vector<std::pair<std::string, Make>> contenders = {{"rite", rite()}};
  for (const char* name : {"adamw", "polora", "lora-muon", "lora-tsd", "altlora"})
    contenders.emplace_back(name, named(name));
  nlohmann::json results = nlohmann::json::array();
  for (const Shape& shape : shapes) {
    for (const auto& [name, make] : contenders) {
      int ends[2];
      if (pipe(ends) != 0) return 1;
      const pid_t child = fork();
      if (child < 0) return 1;
      if (child == 0) {
        torch::set_num_threads(2);
        const Memory memory = measure(shape, make);
        const bool written = write(ends[1], &memory, sizeof(memory)) == sizeof(memory);
        _exit(written ? 0 : 1);
      }
      Memory memory = {};
      const bool whole = read(ends[0], &memory, sizeof(memory)) == sizeof(memory);
      waitpid(child, nullptr, 0);
      if (!whole) return 1;
      const double parameters = 4.0 * static_cast<double>(shape.parameters());
      std::printf("%s %s: %.1f MB of state (%.2f times the factors), %.1f MB at the peak of a step\n",
                  shape.name().c_str(), name.c_str(), memory.state / 1e6, memory.state / parameters, memory.peak / 1e6);
      results.push_back({{"case", shape.name()},
                         {"contender", name},
                         {"factor_bytes", parameters},
                         {"state_bytes", memory.state},
                         {"peak_bytes", memory.peak}});
    }
  }
  if (argc > 1) std::ofstream(argv[1]) << results.dump(1) << '\n';
  return 0;
}
