#pragma once

// A run with everything that a checkpoint holds, and what tells two such runs apart.

#include <gtest/gtest.h>
#include <lora_rite/checkpoint.hpp>

#include <filesystem>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "support/pairs.hpp"
#include "support/temporary_folder.hpp"

namespace lora_rite::test {

/// LibTorch on one thread while this lives: with tensors this small others only wait, and a forked process has none.
class OneThread {
 public:
  OneThread() { at::set_num_threads(1); }
  ~OneThread() { at::set_num_threads(threads_); }

 private:
  int threads_ = at::get_num_threads();
};

/// Two groups of pairs, a head by AdamW, a buffer, a schedule, and gradients drawn from the default generator: what a
/// step does depends on all that a checkpoint holds. data/checkpoint-v1.ckpt is one of this run's: a change here needs
/// a new file.
struct TrainingRun {
  TrainingRun() : first_group(seeded_group()) {
    optimizer.add_pairs(second_group, LoraRiteOptions(3e-3).row_equilibration(true).master_weights(true));
    optimizer.add_parameters({head}, torch::optim::AdamWOptions(1e-2));
    scheduler.emplace(optimizer, /*warmup_steps=*/4, /*total_steps=*/2000);
    state.tensors = trained_tensors(first_group);
    state.tensors.merge(trained_tensors(second_group));
    state.tensors["head"] = head;
    state.tensors["mean"] = mean;
    state.optimizers = {&optimizer};
    state.others = {&*scheduler};
  }

  void train(int steps) {
    for (int i = 0; i < steps; ++i) {
      for (auto& [name, tensor] : state.tensors) {
        const auto drawn = torch::rand(tensor.sizes(), torch::kDouble) - 0.5;
        if (tensor.requires_grad()) {
          tensor.mutable_grad() = drawn.to(tensor.scalar_type());
        } else {
          tensor.lerp_(drawn, 0.1);
        }
      }
      optimizer.step();
      scheduler->step();
      ++state.step;
      state.values["examples"] = 32 * state.step;
    }
  }

  static std::vector<FactorPair> seeded_group() {
    torch::manual_seed(21);
    return {random_pair("q", 2, 4, 3, torch::kFloat), random_pair("k", 2, 4, 3, torch::kFloat)};
  }

  OneThread one_thread;
  std::vector<FactorPair> first_group;
  std::vector<FactorPair> second_group = {random_pair("v", 2, 3, 5, torch::kBFloat16)};
  torch::Tensor head = torch::randn({3}).requires_grad_();
  torch::Tensor mean = torch::zeros({2}, torch::kDouble);
  LoraRite<> optimizer = LoraRite<>(first_group, LoraRiteOptions(1e-2));
  std::optional<WarmupCosine> scheduler;
  TrainingState state;
};

/// All that a run is, the generator included, as bytes.
inline std::string fingerprint(const TrainingState& state) {
  std::stringstream bytes;
  for (const auto& [name, tensor] : state.tensors) bytes << name << saved_bytes(tensor.detach());
  for (const auto* optimizer : state.optimizers) bytes << saved_bytes(*optimizer);
  for (const auto& other : state.others) bytes << detail::saved_object(other);
  bytes << saved_bytes(detail::generator_states().at("cpu")) << state.step;
  for (const auto& [name, value] : state.values) bytes << name << value;
  return bytes.str();
}

inline std::set<std::string> names_in(const std::string& folder) {
  std::set<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) names.insert(entry.path().filename());
  return names;
}

}  // namespace lora_rite::test
