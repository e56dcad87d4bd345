#include <csignal>
#include <fstream>
#include <nlohmann/json.hpp>

#include "files.hpp"
#include "interrupt.hpp"
#include "optimizers.hpp"
#include "progress.hpp"
#include "support.hpp"

namespace finetune {
namespace {

std::vector<nlohmann::json> read_lines(const std::filesystem::path& path) {
  std::vector<nlohmann::json> lines;
  std::istringstream file(read_file(path));
  for (std::string line; std::getline(file, line);) lines.push_back(nlohmann::json::parse(line));
  return lines;
}

// The losses in a run's metrics.jsonl, without its final line.
std::vector<double> logged_losses(const std::string& out) {
  std::vector<double> losses;
  for (const auto& line : read_lines(std::filesystem::path(out) / "metrics.jsonl")) {
    if (line.contains("step")) losses.push_back(line["loss"]);
  }
  return losses;
}

class Resume : public testing::TestWithParam<const char*> {
 protected:
  // With dropout, so that the random number generator matters, and a warm-up, so that the schedule does.
  RunOptions options(const TemporaryFolder& folder) const {
    RunOptions result = tiny_options(folder.string(), GetParam());
    result.dropout = 0.1;
    result.warmup = 7;
    return result;
  }

  static void expect_equal(const TinyRun& found, const TinyRun& expected) {
    for (const auto& [name, tensor] : expected.trained) EXPECT_TRUE(found.trained.at(name).equal(tensor)) << name;
  }
};

TEST_P(Resume, AfterCtrlCTheRunIsBitIdenticalToOneThatNeverStopped) {
  const TemporaryFolder whole;
  const TemporaryFolder stopped;
  const TinyRun expected = run_tiny(options(whole));
  EXPECT_EQ(expected.outcome, Outcome::Finished);
  EXPECT_GT(
      distance(expected.trained.at("bert.encoder.layer.0.attention.self.query.lora_B.default.weight"), torch::zeros(1)),
      1e-4)
      << "the factors moved";

  const TinyRun first = run_tiny(options(stopped), false, [](const StepRecord& record) {
    if (record.step == 5) std::raise(SIGINT);
  });
  EXPECT_EQ(first.outcome, Outcome::Interrupted);
  EXPECT_EQ(first.records.size(), 5U) << "the step under way is finished, the next not begun";

  const TinyRun second = run_tiny(options(stopped), true);
  EXPECT_EQ(second.outcome, Outcome::Finished);
  EXPECT_EQ(logged_losses(stopped.string()), logged_losses(whole.string()));
  expect_equal(second, expected);
}

TEST_P(Resume, AfterACrashStepsBehindTheCheckpointAreRepeated) {
  const TemporaryFolder whole;
  const TemporaryFolder crashed;
  const TinyRun expected = run_tiny(options(whole));
  RunOptions with_checkpoints = options(crashed);
  with_checkpoints.checkpoint_every = 4;
  struct Crash {};
  EXPECT_THROW(run_tiny(with_checkpoints, false,
                        [](const StepRecord& record) {
                          if (record.step == 6) throw Crash();
                        }),
               Crash);
  EXPECT_EQ(logged_losses(crashed.string()).size(), 6U);

  const TinyRun second = run_tiny(with_checkpoints, true);
  EXPECT_EQ(second.records.front().step, 5);
  EXPECT_EQ(logged_losses(crashed.string()), logged_losses(whole.string()));
  expect_equal(second, expected);
}

INSTANTIATE_TEST_SUITE_P(Optimizers, Resume, testing::Values("rite", "adam", "adamw", "scaled-adam"),
                         [](const auto& info) {
                           return std::string(info.param) == "scaled-adam" ? std::string("scaled_adam")
                                                                           : std::string(info.param);
                         });

TEST(Training, EveryOptimizerOfTheRegistryTrainsFactorsAndHead) {
  for (const std::string& optimizer : optimizer_names()) {
    const TemporaryFolder folder;
    RunOptions options = tiny_options(folder.string(), optimizer.c_str());
    options.steps = 2;
    const auto workload = tiny_workload(options);
    const auto start = workload->model().named_parameters();
    const TinyRun run = run_tiny(options);
    for (const char* name : {"bert.encoder.layer.0.attention.self.query.lora_B.default.weight", "head.weight"}) {
      EXPECT_FALSE(run.trained.at(name).equal(start[name])) << optimizer << " leaves " << name;
    }
  }
}

TEST(Training, MeasurementsOnTheWayAreLoggedAndChangeNothing) {
  const TemporaryFolder watched, unwatched;
  RunOptions options = tiny_options(watched.string(), "rite");
  options.dropout = 0.1;  // an evaluation that left the model in its mode would change the next step
  options.steps = 7;
  options.evaluate_every = 3;
  const TinyRun with = run_tiny(options);
  options.out = unwatched.string();
  options.evaluate_every = 0;
  const TinyRun without = run_tiny(options);
  EXPECT_EQ(logged_losses(watched.string()), logged_losses(unwatched.string()));
  const auto lines = read_lines(watched / "metrics.jsonl");
  for (const auto& line : lines) {
    const int64_t step = line.value("step", int64_t{0});
    EXPECT_EQ(line.contains("test_accuracy"), step == 0 || step == 3 || step == 6 || step == 7) << line;
  }
  EXPECT_EQ(lines[6]["test_loss"], lines[7]["test_loss"]) << "the last step's is the run's";
  EXPECT_EQ(lines[7]["test_loss"], read_lines(unwatched / "metrics.jsonl")[7]["test_loss"]);
}

TEST(Training, LossFallsAndTheResultsAreWritten) {
  const TemporaryFolder folder;
  RunOptions options = tiny_options(folder.string(), "rite");
  options.steps = 60;
  options.batch = 16;
  options.lr = 2e-2;
  options.head_lr = 2e-2;
  run_tiny(options);
  const auto lines = read_lines(folder / "metrics.jsonl");
  ASSERT_EQ(lines.size(), 61U);
  const auto mean = [&](size_t begin) {
    double sum = 0;
    for (size_t index = begin; index < begin + 10; ++index) sum += lines[index]["loss"].get<double>();
    return sum / 10;
  };
  EXPECT_LT(mean(50), 0.8 * mean(0));
  EXPECT_EQ(lines[0]["step"], 1);
  EXPECT_EQ(lines[0]["lr"], options.lr);
  EXPECT_NEAR(lines[59]["lr"].get<double>(), options.lr / 60, 1e-12) << "it falls linearly to 0";

  const nlohmann::json& final = lines.back();
  EXPECT_EQ(final["final"], true);
  for (const char* field : {"test_accuracy", "test_loss", "ms_per_step", "optimizer_share", "optimizer_state_mb"}) {
    EXPECT_TRUE(final[field].is_number()) << field;
  }
  EXPECT_EQ(final["skipped_steps"], 0);
  for (const char* name : {"adapter_config.json", "adapter_model.safetensors", "head.safetensors", "checkpoint.pt"}) {
    EXPECT_TRUE(std::filesystem::exists(folder / name)) << name;
  }
}

// Largest difference of two loss curves.
double curve_distance(const TinyRun& left, const TinyRun& right) {
  double largest = 0;
  for (size_t index = 0; index < left.records.size(); ++index) {
    largest = std::max(largest, std::abs(left.records[index].loss - right.records[index].loss));
  }
  return largest;
}

TEST(Training, AnEquivalentStartChangesAdamsCurveButNotRites) {
  for (const char* optimizer : {"rite", "adam"}) {
    const TemporaryFolder folder;
    RunOptions options = tiny_options(folder.string(), optimizer);
    options.steps = 30;
    const TinyRun usual = run_tiny(options);
    options.init_scale = 8;
    const TinyRun scaled = run_tiny(options);
    EXPECT_GT(std::abs(usual.records.back().loss - usual.records.front().loss), 1e-3) << "something was learnt";
    if (std::string(optimizer) == "rite") {
      EXPECT_LT(curve_distance(usual, scaled), 1e-5);
    } else {
      EXPECT_GT(curve_distance(usual, scaled), 1e-3);
    }
  }
}

TEST(Training, ACheckpointOfAnotherModelIsRefusedByName) {
  const TemporaryFolder folder;
  RunOptions options = tiny_options(folder.string(), "rite");
  options.steps = 2;
  run_tiny(options);
  options.rank = 2;
  const std::string message = error_of([&] { run_tiny(options, true); });
  EXPECT_NE(message.find("checkpoint.pt: does not fit this run"), std::string::npos) << message;
}

TEST(Training, ResumingWithoutACheckpointIsRefused) {
  const TemporaryFolder folder;
  const std::string message = error_of([&] { run_tiny(tiny_options(folder.string(), "rite"), true); });
  EXPECT_NE(message.find("checkpoint.pt: does not exist"), std::string::npos) << message;
}

TEST(Training, AMetricsFileThatDoesNotReachTheCheckpointIsRefused) {
  const TemporaryFolder folder;
  RunOptions options = tiny_options(folder.string(), "adam");
  options.steps = 3;
  run_tiny(options);
  std::ofstream(folder / "metrics.jsonl")
      << R"({"step":1,"loss":1.0,"lr":0.1,"ms_step":1,"ms_optimizer":1,"tokens":5})" << '\n';
  const std::string message = error_of([&] { run_tiny(options, true); });
  EXPECT_NE(message.find("metrics.jsonl: holds 1 steps, but the checkpoint is at step 3"), std::string::npos)
      << message;
}

TEST(Optimizers, StateIsThatOfTheMomentsItKeeps) {
  const TemporaryFolder folder;
  const RunOptions options = tiny_options(folder.string(), "adam");
  const auto workload = tiny_workload(options);
  double bytes = 0;
  for (const torch::Tensor& parameter : workload->model().parameters()) {
    if (!parameter.requires_grad()) continue;
    parameter.mutable_grad() = torch::ones_like(parameter);
    bytes += 2.0 * static_cast<double>(parameter.nbytes());
  }
  const TrainingOptimizer adam = make_optimizer(options, workload->model());
  EXPECT_LT(state_megabytes(adam), 1e-4) << "nothing but its options yet";
  for (const auto& optimizer : adam.optimizers) optimizer->step();
  EXPECT_NEAR(state_megabytes(adam), bytes / 1e6, 0.01 * bytes / 1e6);
}

TEST(Optimizers, AnUnknownNameIsRefused) {
  const TemporaryFolder folder;
  const RunOptions options = tiny_options(folder.string(), "adamax");
  const auto workload = tiny_workload(options);
  EXPECT_THROW(make_optimizer(options, workload->model()), c10::Error);
}

TEST(InterruptGuard, OneSignalAsksAndItsEffectEndsWithTheGuard) {
  {
    const InterruptGuard guard;
    EXPECT_FALSE(guard.requested());
    std::raise(SIGTERM);
    EXPECT_TRUE(guard.requested());
  }
  const InterruptGuard fresh;
  EXPECT_FALSE(fresh.requested());
  struct sigaction now = {};
  std::raise(SIGINT);
  sigaction(SIGINT, nullptr, &now);
  EXPECT_EQ(now.sa_handler, SIG_DFL) << "a second Ctrl-C ends the program";
}

TEST(ProgressBar, ShowsPositionLossAndTimeLeft) {
  std::ostringstream out;
  ProgressBar bar(out, /*is_terminal=*/true, 120, 10);
  bar.update({60, 0.5, 1e-3, 250, 10, 100});
  EXPECT_EQ(
      out.str(),
      "\r\x1b[?7l[===============>              ]   60/120  loss 0.5000  lr 0.001  250 ms/step  400 tokens/s  ETA "
      "0:15\x1b[K\x1b[?7h");
  bar.finish();
  EXPECT_EQ(out.str().back(), '\n');
}

TEST(ProgressBar, PrintsPlainLinesWhereThereIsNoTerminal) {
  std::ostringstream out;
  ProgressBar bar(out, /*is_terminal=*/false, 7, 3);
  for (int64_t step = 1; step <= 7; ++step) bar.update({step, 1, 1e-3, 1000, 10, 5});
  bar.finish();
  EXPECT_EQ(out.str(),
            "     3/7  loss 1.0000  lr 0.001  1000 ms/step  5 tokens/s  ETA 0:04\n"
            "     6/7  loss 1.0000  lr 0.001  1000 ms/step  5 tokens/s  ETA 0:01\n"
            "     7/7  loss 1.0000  lr 0.001  1000 ms/step  5 tokens/s  ETA 0:00\n");
}

}  // namespace
}  // namespace finetune
