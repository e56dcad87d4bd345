#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <limits>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "lora_rite/checkpoint/file.hpp"
#include "lora_rite/checkpoint/save_load.hpp"
#include "lora_rite/checkpoint/training_state.hpp"
#include "lora_rite/io/files.hpp"

/// A folder that keeps the last checkpoints of a run, and finds the latest whole one. POSIX only.
namespace lora_rite {

/// The last checkpoints of one run in a folder, as `step-100.ckpt` and so on.
class CheckpointFolder {
 public:
  /// Keeps the last `keep` ≥ 1 checkpoints; c10::Error otherwise. The folder is made when something is saved.
  explicit CheckpointFolder(std::filesystem::path folder, int64_t keep = 3) : folder_(std::move(folder)), keep_(keep) {
    TORCH_CHECK(keep >= 1, "CheckpointFolder: keep is ", keep, ", expected ≥ 1");
  }

  /// save_checkpoint to step-<state.step>.ckpt; then all but the last `keep` up to this step are removed. Files of
  /// later steps stay: a run that went back to an earlier step writes over them when it comes there. Returns the file's
  /// path. Throws as save_checkpoint does, and c10::Error if the folder cannot be made; nothing is removed then.
  std::filesystem::path save(const TrainingState& state) const {
    detail::make_folders(folder_, label());
    std::filesystem::path path = path_of(state.step);
    save_checkpoint(path, state);
    // A file that cannot be removed, or found, does no harm to the new one, hence no error.
    std::error_code error;
    std::vector<int64_t> old = steps_of(kEnding, error);
    old.erase(std::upper_bound(old.begin(), old.end(), state.step), old.end());
    for (int64_t i = 0; i < static_cast<int64_t>(old.size()) - keep_; ++i) {
      std::filesystem::remove(path_of(old[static_cast<size_t>(i)]), error);
    }
    for (const int64_t step : steps_of(kUnfinishedEnding, error)) {
      std::filesystem::remove(path_of(step, kUnfinishedEnding), error);
    }
    return path;
  }

  /// The checkpoint of the latest step, of those up to `max_step`, that is neither truncated nor damaged nor of a later
  /// version; nothing if there is none, or no folder. Reads the whole file. Throws c10::Error naming the file or the
  /// folder if the system does not let it be read (no permission, too many open files, no memory): it may be whole, and
  /// a run that went on without it would write over it.
  std::optional<std::filesystem::path> latest(int64_t max_step = std::numeric_limits<int64_t>::max()) const {
    const std::optional<int64_t> step = latest_step(max_step);
    return step ? std::optional(path_of(*step)) : std::nullopt;
  }

  /// The step of that checkpoint. Of several processes each may find another one: `latest_in_all`.
  std::optional<int64_t> latest_step(int64_t max_step = std::numeric_limits<int64_t>::max()) const {
    std::error_code error;
    const std::vector<int64_t> steps = steps_of(kEnding, error);
    TORCH_CHECK(!error, label(), "cannot be read: ", error.message());
    for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
      if (*step > max_step) continue;
      const std::string name = detail::checkpoint_label(path_of(*step));
      const std::string file = detail::read_file(path_of(*step), name);
      try {
        detail::check_checkpoint_file(file, name);
        return *step;
      } catch (const c10::Error&) {  // the next older one, then
      }
    }
    return std::nullopt;
  }

  /// The file of a step, whether it is there or not.
  std::filesystem::path path_of(int64_t step) const { return path_of(step, kEnding); }

 private:
  static constexpr const char* kEnding = ".ckpt";
  static constexpr const char* kUnfinishedEnding = ".ckpt.tmp";  ///< what a save that was killed leaves

  std::string label() const { return "checkpoint folder " + folder_.string() + ": "; }

  std::filesystem::path path_of(int64_t step, const char* ending) const {
    return folder_ / ("step-" + std::to_string(step) + ending);
  }

  /// The steps of all files that are named like that, in ascending order; of a folder that is not there none.
  std::vector<int64_t> steps_of(const char* ending, std::error_code& error) const {
    std::vector<int64_t> result;
    std::filesystem::directory_iterator entry(folder_, error);
    if (error == std::errc::no_such_file_or_directory) error.clear();
    for (; entry != std::filesystem::directory_iterator(); entry.increment(error)) {
      const std::string name = entry->path().filename().string();
      if (name.rfind("step-", 0) != 0) continue;
      const int64_t step = std::strtoll(name.c_str() + 5, nullptr, 10);
      if (path_of(step, ending).filename() == name) result.push_back(step);
    }
    std::sort(result.begin(), result.end());
    return result;
  }

  std::filesystem::path folder_;
  int64_t keep_;
};

}  // namespace lora_rite
