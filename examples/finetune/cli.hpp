#pragma once

#include <optional>

#include "run_options.hpp"

namespace finetune {

/// What the command line asks for.
struct Command {
  RunOptions options;
  bool resume = false;
};

/// Parses the command line, or with --resume the options saved in the output folder's run.json. Prints help or a usage
/// error itself and then returns no command but an exit code. Throws Error for values that make no sense.
std::optional<Command> parse_command_line(int argc, const char* const* argv, int& exit_code);

}  // namespace finetune
