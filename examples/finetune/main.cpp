// Fine-tunes a sentence classifier with LoRA: see cli.cpp for the options, trainer.cpp for the loop.

#include <ATen/Parallel.h>
#include <unistd.h>

#include <exception>
#include <filesystem>
#include <iostream>
#include <string>
#include <system_error>

#include "bert.hpp"
#include "cli.hpp"
#include "error.hpp"
#include "files.hpp"
#include "process_group.hpp"
#include "subprocess.hpp"
#include "trainer.hpp"

namespace finetune {
namespace {

constexpr int kInterruptedExitCode = 130;  // what a shell reports for Ctrl-C

void plot(const RunOptions& options) {
  const std::string out = options.out;
  const int code = run_program(
      {find_python(options.python), script_path("plot.py").string(), out + "/metrics.jsonl", out + "/loss.png"});
  if (code != 0) {
    std::cerr << concat("warning: ", out, "/loss.png was not drawn (plot.py ended with code ", code,
                        "); for a plot, install matplotlib for '", find_python(options.python), "'\n");
  }
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
std::string describe(const Command& command) {
  nlohmann::json options = command.options;
  for (const char* name : {"python", "threads", "log_every"}) options.erase(name);
  options["resume"] = command.resume;
  return options.dump(2);
}

int run(const Command& command, const std::string& program) {
  const RunOptions& options = command.options;
  const Processes processes = connect_processes(options.timeout);
  processes.check_same(describe(command));
  std::ostream nowhere(nullptr);
  std::ostream& out = processes.is_first() ? std::cout : nowhere;
  std::error_code error;
  std::filesystem::create_directories(options.out, error);
  if (error) fail("--out ", options.out, ": cannot be made (", error.message(), "); choose a folder you can write to");
  if (options.threads > 0) at::set_num_threads(static_cast<int>(options.threads));

  const std::shared_ptr<BertModel> base = load_bert(options.model);
  if (options.max_length > base->config().max_position_embeddings) {
    fail("--max-length ", options.max_length, ": the model has ", base->config().max_position_embeddings,
         " positions; choose at most that");
  }
  TaskData task;
  processes.first_alone([&] { task = load_task(options, base->config()); });  // the others find its tokens
  const auto model = make_classifier(options, base, static_cast<int64_t>(task.classes.size()));
  // Written once nothing can be wrong with the input any more: --resume believes in it.
  if (processes.is_first()) {
    replace_file(options.out + "/run.json",
                 [&](std::ostream& file) { file << nlohmann::json(options).dump(2) << '\n'; });
  }

  out << options.optimizer << " on " << task.train.size() << " examples, " << task.classes.size()
      << " classes: " << options.steps << " steps of " << options.batch << ", rank " << options.rank << ", lr "
      << options.lr << ", " << at::get_num_threads() << " threads"
      << (processes.size > 1 ? concat(", ", processes.size, " processes") : "") << std::endl;
  const Display display{out, isatty(STDOUT_FILENO) != 0};
  if (run_training(options, *model, task, command.resume, display, processes) == Outcome::Interrupted) {
    out << concat("Stopped and saved. Go on with: ", quote(program), " --resume --out ", quote(options.out), "\n");
    return kInterruptedExitCode;
  }
  if (processes.is_first()) plot(options);
  out << concat("The adapter, metrics.jsonl and loss.png are in ", options.out, "\n");
  return 0;
}

}  // namespace
}  // namespace finetune

int main(int argc, char** argv) {
  try {
    int exit_code = 0;
    const auto command = finetune::parse_command_line(argc, argv, exit_code);
    return command ? finetune::run(*command, argv[0]) : exit_code;
  } catch (const finetune::Error& error) {
    std::cerr << "finetune: " << error.what() << '\n';
  } catch (const c10::Error& error) {
    std::cerr << "finetune: " << error.what_without_backtrace() << '\n';
  } catch (const std::exception& error) {
    std::cerr << "finetune: " << error.what() << '\n';
  }
  return 1;
}
