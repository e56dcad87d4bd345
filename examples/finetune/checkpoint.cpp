#include "checkpoint.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <torch/serialize/input-archive.h>
#include <torch/serialize/output-archive.h>

#include <mutex>
#include <string>

#include "error.hpp"
#include "files.hpp"

namespace finetune {
namespace {

// Archive keys are attribute names, in which a dot has a meaning of its own.
std::string archive_key(std::string name) {
  for (char& character : name) {
    if (character == '.') character = '/';
  }
  return name;
}

torch::Tensor generator_state() {
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  const std::lock_guard<std::mutex> lock(generator.mutex());
  return generator.get_state();
}

void set_generator_state(const torch::Tensor& state) {
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  const std::lock_guard<std::mutex> lock(generator.mutex());
  generator.set_state(state);
}

}  // namespace

void save_checkpoint(const std::filesystem::path& path, const TrainingState& state) {
  torch::serialize::OutputArchive parameters, archive;
  for (const auto& item : state.model.named_parameters()) {
    if (item.value().requires_grad()) parameters.write(archive_key(item.key()), item.value());
  }
  archive.write("parameters", parameters);
  for (size_t index = 0; index < state.optimizers.size(); ++index) {
    torch::serialize::OutputArchive optimizer, scheduler;
    state.optimizers[index]->save(optimizer);
    state.schedulers[index].save(scheduler);
    archive.write(concat("optimizer", index), optimizer);
    archive.write(concat("scheduler", index), scheduler);
  }
  archive.write("step", c10::IValue(state.step));
  archive.write("generator", generator_state(), /*is_buffer=*/true);
  replace_file(path, [&](std::ostream& file) { archive.save_to(file); });
}

void load_checkpoint(const std::filesystem::path& path, TrainingState& state) {
  if (!std::filesystem::exists(path)) {
    fail(path.string(), ": does not exist, so there is nothing to resume; start the run without --resume");
  }
  try {
    torch::serialize::InputArchive archive, parameters;
    archive.load_from(path.string());
    archive.read("parameters", parameters);
    const at::NoGradGuard no_grad;
    for (auto& item : state.model.named_parameters()) {
      if (!item.value().requires_grad()) continue;
      torch::Tensor saved;
      parameters.read(archive_key(item.key()), saved);
      item.value().copy_(saved);
    }
    for (size_t index = 0; index < state.optimizers.size(); ++index) {
      torch::serialize::InputArchive optimizer, scheduler;
      archive.read(concat("optimizer", index), optimizer);
      archive.read(concat("scheduler", index), scheduler);
      state.optimizers[index]->load(optimizer);
      state.schedulers[index].load(scheduler);
    }
    c10::IValue step;
    archive.read("step", step);
    state.step = step.toInt();
    torch::Tensor generator;
    archive.read("generator", generator, /*is_buffer=*/true);
    set_generator_state(generator);
  } catch (const c10::Error& error) {
    fail(path.string(), ": does not fit this run (", error.what_without_backtrace(),
         "); start the run anew in another --out");
  }
}

}  // namespace finetune
