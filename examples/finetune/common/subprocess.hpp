#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace finetune {

/// Runs a program (looked up in PATH) and waits; its output goes where ours goes. Returns its exit
/// code, 127 if it could not be started, 128 + n if signal n ended it.
int run_program(const std::vector<std::string>& arguments);

/// The Python interpreter: `preferred` if given, else the environment's FINETUNE_PYTHON, else
/// python3.
std::string find_python(const std::string& preferred);

/// Full path of one of the Python scripts that come with the program; an Error if it is gone.
std::filesystem::path script_path(const std::string& name);

}  // namespace finetune
