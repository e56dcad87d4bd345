// latest_in_all and load_checkpoint of several processes: all go on from one step, or none does.

#include "distributed/support.hpp"

namespace lora_rite::test {
namespace {

/// A run of this process with a folder of its own.
struct ShardedRun {
  explicit ShardedRun(const Process& process, const std::string& folder)
      : checkpoints(process.folder / (folder + std::to_string(process.rank)), /*keep=*/9),
        optimizer(process.group, pairs, some_options()),
        state{trained_tensors(pairs), {&optimizer}, {}, 0, {}} {}

  void train_and_save(int64_t steps) {
    for (int64_t i = 0; i < steps; ++i) {
      run_steps(optimizer, pairs, state.step, state.step + 1);
      ++state.step;
      checkpoints.save(state);
    }
  }

  std::vector<FactorPair> pairs = some_pairs(torch::kFloat);
  CheckpointFolder checkpoints;
  ShardedLoraRite<> optimizer;
  TrainingState state;
};

const Scenario latest("latest in all", [](const Process& process) {
  const bool last = process.rank == process.size - 1;
  ShardedRun run(process, "latest");
  const auto found = [&] { return latest_in_all(run.checkpoints, process.group); };
  EXPECT_FALSE(found()) << "no process has any";
  run.train_and_save(5);
  EXPECT_EQ(found(), run.checkpoints.path_of(5));
  // The last process died while it saved step 5; step 4 is damaged in the first one, step 3 in the last.
  if (last) std::filesystem::remove(run.checkpoints.path_of(5));
  std::ofstream(run.checkpoints.path_of(last ? 3 : 4), std::ios::trunc) << "damaged";
  EXPECT_EQ(found(), run.checkpoints.path_of(2));

  // The run goes on from there as if nothing had been, and the optimizer's state is that of all processes.
  const auto expected = clone_pairs(run.pairs);
  load_checkpoint(*found(), run.state, process.group);
  EXPECT_EQ(run.state.step, 2);
  EXPECT_FALSE(equal_factors(run.pairs, expected));
  run.train_and_save(3);
  EXPECT_TRUE(equal_factors(run.pairs, expected));
  EXPECT_EQ(found(), run.checkpoints.path_of(5));

  // A folder that cannot be read, in one process.
  const auto in_the_way = run.checkpoints.path_of(6);
  if (last) std::filesystem::create_directory(in_the_way);
  expect_error(last ? "step-6.ckpt: cannot be read: it is a folder" : "distributed: process 1: checkpoint ", found);
  if (last) std::filesystem::remove(in_the_way);
  // None in one process: the others' must not be written over.
  if (last) std::filesystem::remove_all(in_the_way.parent_path());
  expect_error("latest_in_all: process 1 has no whole checkpoint of a step that all others have", found);
});

TEST(CheckpointsOfProcesses, AllGoOnFromTheLatestStepThatAllHave) {
  expect_success("latest in all", 2, fresh_folder("latest"), /*timeout_seconds=*/20);
}

const Scenario loads("load in all", [](const Process& process) {
  const bool last = process.rank == process.size - 1;
  ShardedRun run(process, "load");
  run.train_and_save(3);
  const auto before = clone_pairs(run.pairs);
  const std::string bytes = saved_bytes(run.optimizer);
  const auto refused = [&](const std::string& in_last, const std::string& in_others, int64_t step_of_last) {
    expect_error(last ? in_last : in_others,
                 [&] { load_checkpoint(run.checkpoints.path_of(last ? step_of_last : 2), run.state, process.group); });
    EXPECT_TRUE(equal_factors(run.pairs, before));
    EXPECT_EQ(saved_bytes(run.optimizer), bytes);
    EXPECT_EQ(run.state.step, 3);
  };
  refused("step-7.ckpt: does not exist", "distributed: process 1: checkpoint ", 7);
  const std::string differ = "cannot be loaded: distributed: process 1 has 'step 1' where process 0 has 'step 2'";
  refused(differ, differ, 1);
  if (last) run.state.tensors.erase("small.a");
  refused("does not fit this run: the file has a tensor 'small.a', which the run lacks",
          "distributed: process 1: checkpoint ", 2);
  if (last) run.state.tensors = trained_tensors(run.pairs);
  load_checkpoint(run.checkpoints.path_of(2), run.state, process.group);
  EXPECT_EQ(run.state.step, 2);
  EXPECT_FALSE(equal_factors(run.pairs, before));
  run.train_and_save(1);
  EXPECT_TRUE(equal_factors(run.pairs, before));
});

/// Within far less than the timeout: nobody waits for the one that refused.
TEST(CheckpointsOfProcesses, WhatOneCannotLoadNoneDoes) {
  const Outcome outcome = run_processes("load in all", 2, fresh_folder("load"), /*timeout_seconds=*/120);
  for (size_t rank = 0; rank < outcome.status.size(); ++rank)
    EXPECT_EQ(outcome.status[rank], 0) << outcome.output[rank];
  EXPECT_LT(outcome.seconds, 100);
}

}  // namespace
}  // namespace lora_rite::test
