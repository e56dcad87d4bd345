#pragma once

#include <functional>
#include <string>

#include "training/run_options.hpp"

namespace CLI {
class App;
}

namespace finetune {

/// What the command line of `finetune train` asks for.
struct TrainCommand {
  RunOptions options;
  Start start = Start::Anew;
  std::string program = "finetune";  ///< as it was called, for the line that says how to go on
};

/// Trains, writes the results to the options' `out` and returns an exit code: 130 after Ctrl-C.
int train(const TrainCommand& command);

/// Adds the subcommand `train`. When it is parsed, `action` becomes a call of `run` with what it asks for: by options,
/// by a config file, or with --resume by the output folder's run.json. That call throws Error for what makes no sense.
void add_train_command(CLI::App& app, std::function<int()>& action,
                       const std::function<int(const TrainCommand&)>& run = train);

}  // namespace finetune
