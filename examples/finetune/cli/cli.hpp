#pragma once

namespace finetune {

/// The whole program: parses the command line, runs the subcommand that it names, prints help and errors, and returns
/// the exit code.
int run_command_line(int argc, const char* const* argv);

}  // namespace finetune
