#pragma once

#include <filesystem>
#include <functional>
#include <ostream>
#include <string>

namespace CLI {
class App;
}

namespace finetune {

/// What `finetune export` is asked for.
struct ExportOptions {
  std::filesystem::path run;    ///< the --out folder of `finetune train`
  std::string from = "last";    ///< "last": checkpoint.pt; "best": the best measurement's adapter
  std::filesystem::path model;  ///< the base's folder; empty = where run.json says
  std::string dtype;            ///< one of dtype_names(); empty = float32, in which factors are trained
  std::filesystem::path out;    ///< a folder that is not there yet, or is empty
};

/// Writes the adapter (and a classifier's head) of a run, finished or interrupted, in PEFT's format: that which the run
/// itself would have written after its last step. The folder appears whole or not at all. Tells `log` what it did.
///
/// Throws Error or c10::Error naming the file if the run's folder, its checkpoint or its base is missing or damaged, or
/// `out` is there already.
void export_adapter(const ExportOptions& options, std::ostream& log);

/// Registers `finetune export`; once it is parsed, `action` does it.
void add_export_command(CLI::App& app, std::function<int()>& action);

}  // namespace finetune
