#include <ATen/Parallel.h>
#include <unistd.h>

#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <system_error>

#include "commands/train.hpp"
#include "common/error.hpp"
#include "common/subprocess.hpp"
#include "training/process_group.hpp"
#include "training/trainer.hpp"
#include "workloads/workload.hpp"

namespace finetune {
namespace {

constexpr int kInterruptedExitCode = 130;  // what a shell reports for Ctrl-C

// Calls one of the Python scripts with the run's metrics; what it makes is nice to have and no reason to fail.
bool make_with(const RunOptions& options, const char* script, const std::string& result, const char* package) {
  const std::string python = find_python(options.python);
  const int code = run_program({python, script_path(script).string(), options.out + "/metrics.jsonl", result});
  if (code != 0) {
    std::cerr << concat("warning: ", result, " was not made (", script, " ended with code ", code, "); it needs '",
                        python, " -m pip install ", package, "'\n");
  }
  return code == 0;
}

// As a shell reads it back.
std::string quote(const std::string& text) {
  const char* plain = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789/._-+:@%,";
  if (!text.empty() && text.find_first_not_of(plain) == std::string::npos) return text;
  std::string quoted = "'";
  for (const char character : text) {
    if (character == '\'') {
      quoted += "'\\''";
    } else {
      quoted += character;
    }
  }
  return quoted + "'";
}

// What must be the same for all processes. Their machines may differ, and only the first one shows anything.
std::string describe(const TrainCommand& command) {
  nlohmann::json options = command.options;
  for (const char* name : {"python", "threads", "log_every"}) options.erase(name);
  options["start"] = command.start;
  return options.dump(2);
}

}  // namespace

int train(const TrainCommand& command) {
  const RunOptions& options = command.options;
  const Processes processes = connect_processes(options.timeout);
  processes.check_same(describe(command));
  std::ostream nowhere(nullptr);
  std::ostream& out = processes.is_first() ? std::cout : nowhere;
  std::error_code error;
  std::filesystem::create_directories(options.out, error);
  if (error) fail("--out ", options.out, ": cannot be made (", error.message(), "); choose a folder you can write to");
  if (options.threads > 0) at::set_num_threads(static_cast<int>(options.threads));

  const std::unique_ptr<Workload> workload = make_workload(options, processes);
  out << options.optimizer << " on " << workload->title() << ": " << options.steps << " steps of " << options.batch
      << ", rank " << options.rank << ", lr " << options.lr << ", " << at::get_num_threads() << " threads"
      << (processes.size > 1 ? concat(", ", processes.size, " processes") : "") << std::endl;
  const Display display{out, isatty(STDOUT_FILENO) != 0};
  if (run_training(options, *workload, command.start, display, processes) == Outcome::Interrupted) {
    out << concat("Stopped and saved. Go on with: ", quote(command.program), " train --resume --out ",
                  quote(options.out), "\n");
    return kInterruptedExitCode;
  }
  if (!processes.is_first()) return 0;
  make_with(options, "plot.py", options.out + "/loss.png", "matplotlib");
  if (options.tensorboard && make_with(options, "tensorboard.py", options.out + "/tensorboard", "tensorboardX")) {
    out << concat("For TensorBoard: tensorboard --logdir ", quote(options.out + "/tensorboard"), "\n");
  }
  out << concat("The adapter, metrics.jsonl and loss.png are in ", options.out, "\n");
  return 0;
}

}  // namespace finetune
