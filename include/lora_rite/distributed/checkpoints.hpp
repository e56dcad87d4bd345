#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <torch/serialize/archive.h>
#include <torch/types.h>

#include <cstdint>
#include <exception>
#include <filesystem>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "lora_rite/checkpoint/archive.hpp"
#include "lora_rite/checkpoint/folder.hpp"
#include "lora_rite/checkpoint/save_load.hpp"
#include "lora_rite/checkpoint/training_state.hpp"
#include "lora_rite/distributed/process_group.hpp"

/// Checkpoints of several processes, each with files of its own: all go on from one step, or none does. POSIX only.
namespace lora_rite {

/// This process's checkpoint of the latest step that is whole in the folders of all processes: where one of them died
/// while it saved, the others may have a later one. Nothing if none of them has any. Collective. Throws c10::Error in
/// all processes if one of them cannot read its folder (CheckpointFolder::latest), or if some have checkpoints and no
/// step is whole in all: a run that began anew would write over them. `device` is one of the group's.
inline std::optional<std::filesystem::path> latest_in_all(const CheckpointFolder& folder, const ProcessGroup& group,
                                                          torch::Device device = torch::kCPU) {
  constexpr int64_t kNone = -1;
  detail::Collectives collectives(group);
  for (int64_t most = std::numeric_limits<int64_t>::max();;) {
    int64_t own = kNone;
    const auto complaint = detail::complaint_of([&] { own = folder.latest_step(most).value_or(kNone); });
    collectives.agree("call: latest_in_all\n", device, complaint);
    const auto steps = collectives.gather(at::tensor({own}, at::kLong).to(device), "comparing checkpoints");
    const at::Tensor all = at::cat(steps).cpu();
    const int64_t least = all.min().item<int64_t>(), latest = all.max().item<int64_t>();
    TORCH_CHECK(least != kNone || (latest == kNone && most == std::numeric_limits<int64_t>::max()),
                "latest_in_all: process ", all.argmin().item<int64_t>(), " has no whole checkpoint of a step that ",
                "all others have, expected one in every process; remove all of them to begin anew");
    if (least == latest) return least == kNone ? std::nullopt : std::optional(folder.path_of(own));
    most = least;  // where that one is damaged or gone in another process, a yet earlier one
  }
}

/// load_checkpoint in all processes, each from a file of its own, or in none: what one of them refuses before anything
/// is changed (no such file, damage, another run) all do, where load_checkpoint by itself would leave the others
/// waiting for it. Collective. Throws c10::Error as load_checkpoint, and if the files are of different steps.
inline void load_checkpoint(const std::filesystem::path& path, TrainingState& state, const ProcessGroup& group,
                            std::optional<torch::Device> device = std::nullopt) {
  detail::Collectives collectives(group);
  std::vector<at::Tensor> tensors;
  for (const auto& [name, tensor] : state.tensors) tensors.push_back(tensor);
  const at::Device place = detail::device_of(tensors);
  const std::string call = "call: load_checkpoint\n";
  bool is_waited_for = true;
  const auto agree = [&](int64_t step) {
    is_waited_for = false;
    collectives.agree(call + "step " + std::to_string(step) + "\n", place);
  };
  const auto complaint = detail::complaint_of([&] {
    detail::with_archive(path, device,
                         [&](torch::serialize::InputArchive& archive) { detail::load_archive(archive, state, agree); });
  });
  if (complaint && is_waited_for) collectives.agree(call, place, complaint);
  if (complaint) std::rethrow_exception(complaint);
}

}  // namespace lora_rite
