#pragma once

#include <filesystem>
#include <functional>
#include <ostream>
#include <string>
#include <vector>

namespace CLI {
class App;
}

namespace finetune {

/// An adapter to be merged and the factor on its ΔW.
struct WeightedAdapter {
  std::filesystem::path folder;
  double weight = 1;
};

/// What `finetune merge` is asked for.
struct MergeOptions {
  std::filesystem::path model;  ///< the base's folder
  std::vector<WeightedAdapter> adapters;
  std::filesystem::path out;  ///< a folder that is not there yet, or is empty
  std::string dtype;          ///< one of dtype_names(); empty = each tensor keeps its own
  double shard_size = 5;      ///< in 10⁹ bytes: larger weights of an unsharded base become several files
};

/// "DIR" or "DIR=WEIGHT". Throws Error if what stands behind the last '=' is no finite number and no folder is called
/// by the whole text.
WeightedAdapter parse_weighted_adapter(const std::string& text);

/// Writes a checkpoint of the base's tensors by their names, W + Σ weight · ΔW where an adapter changes one, all others
/// untouched, with config.json, a classifier's head (the adapters', else the base's) and all that lies in the base's
/// folder and is no weight file beside them, subfolders included. Sums are made in float (in double for a double base)
/// and rounded once. The folder appears whole or not at all. Progress
/// goes to `log`, and so does what was left out: weights in other formats (those of sentence-transformers' modules are
/// copied), what belongs to adapters and runs, hidden files.
///
/// Throws Error or c10::Error naming file and tensor if an adapter does not fit the base, was merged into it before, or
/// is no plain LoRA, if adapters bring different heads or one with a weight, if the base is quantised (see
/// BaseCheckpoint), if a value that is finite in the base would not be in the result, if `out` is there already, or the
/// system refuses.
void merge_adapters(const MergeOptions& options, std::ostream& log);

/// Registers `finetune merge`; once it is parsed, `action` does it.
void add_merge_command(CLI::App& app, std::function<int()>& action);

}  // namespace finetune
