#pragma once

#include <string>

#include "training/run_options.hpp"

namespace CLI {
class App;
}

namespace finetune {

/// What the command line of `finetune train` says.
struct TrainArguments {
  RunOptions options;
  std::string config;  ///< a file with further options; empty = none
  bool print_config = false;
  bool resume = false;
  bool resume_anyway = false;
};

/// Gives the subcommand its help and its options, which write to `given`. The help shows the values there as defaults.
void add_train_options(CLI::App& app, TrainArguments& given);

}  // namespace finetune
