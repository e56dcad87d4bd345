#include "training/process_group.hpp"

#include <chrono>
#include <cstdlib>
#include <exception>
#include <string>

#include "common/error.hpp"

#ifdef FINETUNE_HAS_GLOO
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#endif

namespace finetune {
namespace {

constexpr std::chrono::hours kAsLongAsItTakes(24);

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

/// A number from `lowest` to `highest` out of the environment.
int read_number(const char* name, int lowest, int highest) {
  const std::string text = environment(name);
  const bool has_digits_only =
      !text.empty() && text.size() < 9 && text.find_first_not_of("0123456789") == std::string::npos;
  const int number = has_digits_only ? std::stoi(text) : -1;
  if (number < lowest || number > highest) {
    fail("the environment's ", name, " is '", text, "': expected a number from ", lowest, " to ", highest,
         "; start the processes with scripts/launch or torchrun, which set it, or unset WORLD_SIZE for one process");
  }
  return number;
}

#ifdef FINETUNE_HAS_GLOO

std::shared_ptr<::gloo::transport::Device> network_device(const std::string& master) {
  const std::string interface = environment("GLOO_SOCKET_IFNAME");
  if (!interface.empty()) return c10d::ProcessGroupGloo::createDeviceForInterface(interface);
  if (master == "127.0.0.1" || master == "localhost") {
    return c10d::ProcessGroupGloo::createDeviceForHostname("127.0.0.1");
  }
  return c10d::ProcessGroupGloo::createDefaultDevice();
}

lora_rite::ProcessGroup connect(int rank, int size, std::chrono::seconds timeout) {
  const std::string host = environment("MASTER_ADDR");
  const int port = read_number("MASTER_PORT", 1, 65535);
  // torchrun keeps the store itself, and one for all its attempts.
  const bool is_torchruns = environment("TORCHELASTIC_USE_AGENT_STORE") == "True";
  try {
    c10d::TCPStoreOptions options;
    options.port = static_cast<uint16_t>(port);
    options.isServer = rank == 0 && !is_torchruns;
    options.numWorkers = static_cast<size_t>(size);
    options.timeout = timeout;
    c10::intrusive_ptr<c10d::Store> store = c10::make_intrusive<c10d::TCPStore>(host, options);
    if (is_torchruns) {
      store = c10::make_intrusive<c10d::PrefixStore>("attempt_" + environment("TORCHELASTIC_RESTART_COUNT"), store);
    }
    auto gloo = c10d::ProcessGroupGloo::Options::create(timeout);
    gloo->devices.push_back(network_device(host));
    return c10::make_intrusive<c10d::ProcessGroupGloo>(store, rank, size, gloo);
  } catch (const std::exception& error) {
    const std::string text = error.what();
    fail("process ", rank, " of ", size, " did not meet the others at ", host, ":", port, " within ", timeout.count(),
         " s (", text.substr(0, text.find('\n')), "); start all of them, with scripts/launch or torchrun");
  }
}

#else

lora_rite::ProcessGroup connect(int, int size, std::chrono::seconds) {
  fail("WORLD_SIZE ", size, ": this program was built without Gloo's headers, so it runs as one process; install them ",
       "(Debian: libgloo-dev) and build it anew, or unset WORLD_SIZE");
}

#endif

}  // namespace

std::vector<int64_t> Processes::part_of(const std::vector<int64_t>& all) const {
  const auto bound = [&](int process) {
    return all.begin() + static_cast<std::ptrdiff_t>(all.size()) * process / size;
  };
  return {bound(rank), bound(rank + 1)};
}

std::vector<double> Processes::sum(const std::vector<double>& own) const {
  if (size == 1) return own;
  const torch::Tensor values = torch::tensor(own, torch::kDouble);
  lora_rite::sum_over_processes(values, group);
  const auto* begin = values.const_data_ptr<double>();
  return {begin, begin + values.numel()};
}

void Processes::check_same(const std::string& lines) const {
  if (size > 1) lora_rite::check_same(lines, group);
}

void Processes::first_alone(const std::function<void()>& action) const {
  if (is_first()) action();
  if (size > 1) {
    c10d::BarrierOptions options;
    options.timeout = kAsLongAsItTakes;
    try {
      group->barrier(options)->wait();
    } catch (const std::exception&) {
      fail("process ", rank, " of ", size, ": another process has left, see its message; nothing was trained");
    }
  }
  if (!is_first()) action();
}

Processes connect_processes(int64_t timeout_seconds) {
  const int size = environment("WORLD_SIZE").empty() ? 1 : read_number("WORLD_SIZE", 1, 100000);
  if (size == 1) return {};
  const int rank = read_number("RANK", 0, size - 1);
  return {rank, size, connect(rank, size, std::chrono::seconds(timeout_seconds))};
}

}  // namespace finetune
