#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <ostream>
#include <string>
#include <vector>

namespace CLI {
class App;
}

namespace finetune {

/// What `finetune eval` is asked for.
struct EvaluateOptions {
  std::filesystem::path model;
  std::filesystem::path adapter;            ///< empty = the model alone
  std::vector<std::filesystem::path> data;  ///< files of prepare_tasks.py; for a classifier TSV files
  int64_t generate = 0;                     ///< language model: tokens to write after each prompt; 0 = none
  std::filesystem::path texts;              ///< where what it wrote goes; empty = nowhere
  int64_t batch = 16;                       ///< language model: rows at a time
  int64_t max_length = 128;                 ///< classifier: tokens a text is cut to
  std::string dtype = "float32";            ///< of the model's weights: float32 or bfloat16
  std::string device = "cpu";               ///< cpu or cuda
  int64_t threads = 0;                      ///< 0 = LibTorch's default
  std::filesystem::path out;                ///< where the scores go as JSON; empty = nowhere
  std::string python;                       ///< interpreter with tokenizers
};

/// Measures a model on every file and prints a table to `out`; returns what --out receives:
/// {"model", "adapter", "dtype", "results": [{"data", "task", "examples", scores…}]}. Throws Error or c10::Error naming
/// option, file and what was expected if something is missing, damaged or does not fit; nothing is written then.
nlohmann::json evaluate_model(const EvaluateOptions& options, std::ostream& out);

/// Registers `finetune eval`; once it is parsed, `action` does it.
void add_evaluate_command(CLI::App& app, std::function<int()>& action);

}  // namespace finetune
