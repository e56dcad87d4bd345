// The program's optimizers: what they take and what they refuse.

#include "training/optimizers.hpp"

#include <gtest/gtest.h>

#include <lora_rite/baselines/muon.hpp>
#include <lora_rite/options.hpp>

#include "finetune/support.hpp"

namespace finetune {
namespace {

TEST(Optimizers, RefuseOptionsThatTheyWouldIgnore) {
  const TemporaryFolder folder;
  const RunOptions usual = tiny_options(folder.string(), "rite");
  const auto workload = tiny_workload(usual);
  const auto message = [&](const std::string& optimizer, const std::function<void(RunOptions&)>& change) {
    RunOptions options = usual;
    options.optimizer = optimizer;
    change(options);
    return error_of([&] { make_optimizer(options, workload->model()); });
  };
  const std::vector<std::pair<std::string, std::function<void(RunOptions&)>>> only_for_rite = {
      {"--clip", [](RunOptions& options) { options.clip = 0; }},
      {"--escape", [](RunOptions& options) { options.escape = false; }},
      {"--preconditioner-exponent", [](RunOptions& options) { options.preconditioner_exponent = 0.25; }},
      {"--max-relative-change", [](RunOptions& options) { options.max_relative_change = 0.5; }},
      {"--row-equilibration", [](RunOptions& options) { options.row_equilibration = true; }},
      {"--lr-ratio-b", [](RunOptions& options) { options.lr_ratio_b = 4; }},
      {"--shard-optimizer", [](RunOptions& options) { options.shard_optimizer = true; }}};
  for (const auto& [flag, change] : only_for_rite) {
    EXPECT_EQ(message("adam", change).find(flag + ": adam has no such option"), 0u) << flag;
    RunOptions options = usual;
    change(options);
    EXPECT_NO_THROW(make_optimizer(options, workload->model())) << flag;
  }
  EXPECT_EQ(message("sgd", [](RunOptions& options) { options.beta2 = 0.9; }).find("--beta2 0.9: sgd"), 0u);
  EXPECT_EQ(message("sgd", [](RunOptions& options) { options.weight_decay = 0.1; }).find("--weight-decay 0.1: sgd"),
            0u);
}

// Folders of before the bound was the default hold a 0, and a script may give all runs the same options.
TEST(Optimizers, OthersTakeTheBoundOfZeroWhichIsNone) {
  const TemporaryFolder folder;
  RunOptions options = tiny_options(folder.string(), "adam");
  options.max_relative_change = 0;
  EXPECT_NO_THROW(make_optimizer(options, tiny_workload(options)->model()));
}

TEST(Optimizers, RiteIsBoundedUnlessTheOptionSaysZero) {
  const TemporaryFolder folder;
  RunOptions options = tiny_options(folder.string(), "rite");
  const auto workload = tiny_workload(options);
  const auto bound = [&] {
    const TrainingOptimizer training = make_optimizer(options, workload->model());
    const auto& group = training.optimizers[0]->param_groups()[0];
    return static_cast<const lora_rite::LoraRiteOptions&>(group.options()).max_relative_change();
  };
  EXPECT_EQ(bound(), 0.3);
  options.max_relative_change = 0;
  EXPECT_EQ(bound(), 0);
}

TEST(Optimizers, MuonDecaysWeightsByThatOptionAlone) {
  const TemporaryFolder folder;
  RunOptions options = tiny_options(folder.string(), "muon");
  const auto workload = tiny_workload(options);
  const auto decay = [&] {
    const TrainingOptimizer training = make_optimizer(options, workload->model());
    const auto& group = training.optimizers[0]->param_groups()[0];
    return static_cast<const lora_rite::baselines::MuonOptions&>(group.options()).weight_decay();
  };
  EXPECT_EQ(decay(), 0) << "which is --weight-decay's default, and not Muon's";
  options.weight_decay = 0.25;
  EXPECT_EQ(decay(), 0.25);
}

}  // namespace
}  // namespace finetune
