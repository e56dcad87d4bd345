#pragma once

#include <c10/util/Exception.h>
#include <torch/serialize/archive.h>
#include <torch/types.h>

#include <cstdint>
#include <exception>
#include <filesystem>
#include <map>
#include <new>
#include <optional>
#include <string>

#include "lora_rite/checkpoint/archive.hpp"
#include "lora_rite/checkpoint/entries.hpp"
#include "lora_rite/checkpoint/file.hpp"
#include "lora_rite/checkpoint/training_state.hpp"
#include "lora_rite/io/files.hpp"

/// Writing and reading a checkpoint: a TrainingState into a file and back, or a part of one. POSIX only.
namespace lora_rite {

namespace detail {

/// Throws c10::Error for what loading a checkpoint threw. A machine without memory and a process that has left say
/// nothing of the file, which may be loaded another time.
[[noreturn]] inline void refuse_checkpoint(const std::filesystem::path& path, const std::string& message,
                                           bool is_for_memory) {
  TORCH_CHECK_WITH(OutOfMemoryError, !is_for_memory, checkpoint_label(path), "cannot be loaded: ", message);
  const bool is_of_others = message.rfind("distributed: ", 0) == 0;
  TORCH_CHECK(false, checkpoint_label(path), is_of_others ? "cannot be loaded: " : "does not fit this run: ", message);
}

/// use(archive) with the content of a checkpoint. Throws c10::Error naming the file, also for what `use` throws.
template <class Use>
void with_archive(const std::filesystem::path& path, std::optional<torch::Device> device, const Use& use) {
  const std::string file = read_checkpoint_file(path);
  try {
    torch::serialize::InputArchive archive;
    archive.load_from(file.data() + kHeaderBytes, file.size() - kHeaderBytes - kChecksumBytes, device);
    use(archive);
  } catch (const c10::OutOfMemoryError& error) {
    refuse_checkpoint(path, error.what_without_backtrace(), /*is_for_memory=*/true);
  } catch (const c10::Error& error) {
    const std::string message = error.what_without_backtrace();
    // LibTorch has no type of its own for this of a CPU.
    refuse_checkpoint(path, message, message.find("DefaultCPUAllocator: ") != std::string::npos);
  } catch (const std::bad_alloc&) {
    refuse_checkpoint(path, "there is no memory for it", /*is_for_memory=*/true);
  } catch (const std::exception& error) {
    refuse_checkpoint(path, error.what(), /*is_for_memory=*/false);
  }
}

}  // namespace detail

/// Writes a checkpoint of the run: to "<path>.tmp" in the same folder, which then takes the place of `path`. Returns
/// when the disk has it. Whatever happens in between, `path` is the old file or the new one, whole. Throws c10::Error
/// naming the file if the system refuses (no such folder, not writable, disk full), an optimizer steps a parameter that
/// is not in `state.tensors`, or something cannot be saved; an old file is untouched then.
inline void save_checkpoint(const std::filesystem::path& path, const TrainingState& state) {
  std::string payload;
  try {
    payload = detail::payload_of(state);
  } catch (const c10::Error& error) {
    TORCH_CHECK(false, detail::checkpoint_label(path), "cannot be saved: ", error.what_without_backtrace());
  }
  detail::replace_file(path, detail::checkpoint_label(path), detail::checkpoint_file(payload));
}

/// Brings a run to where it was when `path` was written: it goes on bit for bit. The run must be built as that one was:
/// tensors of the same names, shapes and dtypes, optimizers and others of the same classes over the same parameters.
/// Optimizer state comes to the device it was saved from, or all of it to `device`, as with torch::load;
/// `state.tensors` stay where they are. Throws c10::Error naming the file, what was found and what was expected if it
/// is missing, damaged, of a later version, or of another run, and c10::OutOfMemoryError, which is one, if there is no
/// memory for it; the run, generators included, is as it was before then. As with torch::load, load only files that you
/// trust.
inline void load_checkpoint(const std::filesystem::path& path, TrainingState& state,
                            std::optional<torch::Device> device = std::nullopt) {
  detail::with_archive(path, device,
                       [&](torch::serialize::InputArchive& archive) { detail::load_archive(archive, state); });
}

/// Copies the tensors of a checkpoint into `tensors`, of the same names, shapes and dtypes, and nothing else: what a
/// run has learned, to be used without its optimizer. Returns the number of finished steps. Throws c10::Error as
/// load_checkpoint; nothing is changed then.
inline int64_t load_checkpoint_tensors(const std::filesystem::path& path,
                                       const std::map<std::string, torch::Tensor>& tensors) {
  int64_t step = 0;
  detail::with_archive(path, torch::Device(torch::kCPU), [&](torch::serialize::InputArchive& archive) {
    const auto found = detail::read_tensors(archive, tensors);
    step = detail::read_value(archive, "step").toInt();
    const at::NoGradGuard no_grad;
    for (const auto& [name, tensor] : tensors) torch::Tensor(tensor).copy_(found.at(name));
  });
  return step;
}

/// The `values` of a checkpoint and nothing else: what a program noted of a run, to be looked at before the run is
/// built or loaded. Throws c10::Error naming the file if it is missing, damaged or of a later version.
inline std::map<std::string, c10::IValue> load_checkpoint_values(const std::filesystem::path& path) {
  std::map<std::string, c10::IValue> values;
  detail::with_archive(path, torch::Device(torch::kCPU), [&](torch::serialize::InputArchive& archive) {
    values = detail::read_named(archive, "values");
  });
  return values;
}

}  // namespace lora_rite
