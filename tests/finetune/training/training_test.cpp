#include <algorithm>
#include <cmath>
#include <csignal>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "adapters/adapted_model.hpp"
#include "common/files.hpp"
#include "finetune/models/support.hpp"
#include "reports/progress.hpp"
#include "training/best_so_far.hpp"
#include "training/interrupt.hpp"
#include "training/optimizers.hpp"

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

// Largest difference of two loss curves.
double curve_distance(const TinyRun& left, const TinyRun& right) {
  double largest = 0;
  for (size_t index = 0; index < left.records.size(); ++index) {
    largest = std::max(largest, std::abs(left.records[index].loss - right.records[index].loss));
  }
  return largest;
}

// A tiny model, its optimizer, and what else the run does.
struct Case {
  const char* name;
  std::string model;
  const char* optimizer;
};

class Resume : public testing::TestWithParam<Case> {
 protected:
  // With dropout, so that the random number generator matters, a warm-up, so that the schedule does, parts of a batch,
  // a bound on the gradient, and the best of several measurements.
  RunOptions options(const TemporaryFolder& folder) const {
    RunOptions result = tiny_options(folder.string(), GetParam().optimizer);
    result.model = GetParam().model;
    result.lr = 2e-2;
    result.dropout = 0.1;
    result.warmup = 7;
    result.micro_batch = 3;
    result.max_grad_norm = 0.5;
    result.validation = "some";
    result.evaluate_every = 2;
    result.patience = 3;
    return result;
  }

  // Trained weights, the log and the best adapter.
  static void expect_equal(const TinyRun& found, const std::string& found_out, const TinyRun& expected,
                           const std::string& expected_out) {
    ASSERT_FALSE(expected.trained.empty());
    for (const auto& [name, tensor] : expected.trained) EXPECT_TRUE(found.trained.at(name).equal(tensor)) << name;
    const auto lines = read_lines(found_out + "/metrics.jsonl"),
               expected_lines = read_lines(expected_out + "/metrics.jsonl");
    ASSERT_EQ(lines.size(), expected_lines.size());
    for (size_t index = 0; index < lines.size(); ++index) {
      for (const char* field : {"loss", "lr", "tokens", "validation_loss", "best_step", "best_validation_loss",
                                "best_validation_accuracy", "finished_steps", "stopped_early", "test_loss"}) {
        EXPECT_EQ(lines[index].value(field, nlohmann::json()), expected_lines[index].value(field, nlohmann::json()))
            << field << " in line " << index + 1;
      }
    }
    EXPECT_EQ(read_file(found_out + "/best/adapter_model.safetensors"),
              read_file(expected_out + "/best/adapter_model.safetensors"));
  }
};

TEST_P(Resume, AfterCtrlCTheRunIsBitIdenticalToOneThatNeverStopped) {
  const TemporaryFolder whole;
  const TemporaryFolder stopped;
  const TinyRun expected = run_tiny(options(whole));
  EXPECT_EQ(expected.outcome, Outcome::Finished);
  double moved = 0;
  for (const auto& [name, tensor] : expected.trained) {
    if (name.find("lora_B") != std::string::npos) moved = std::max(moved, distance(tensor, torch::zeros(1)));
  }
  EXPECT_GT(moved, 1e-3) << "the factors moved";

  const TinyRun first = run_tiny(options(stopped), false, [](const StepRecord& record) {
    if (record.step == 5) std::raise(SIGINT);
  });
  EXPECT_EQ(first.outcome, Outcome::Interrupted);
  EXPECT_EQ(first.records.size(), 5U) << "the step under way is finished, the next not begun";

  const TinyRun second = run_tiny(options(stopped), true);
  EXPECT_EQ(second.outcome, Outcome::Finished);
  expect_equal(second, stopped.string(), expected, whole.string());
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
  expect_equal(second, crashed.string(), expected, whole.string());
}

INSTANTIATE_TEST_SUITE_P(Runs, Resume,
                         testing::Values(Case{"rite", golden("tiny").string(), "rite"},
                                         Case{"adam", golden("tiny").string(), "adam"},
                                         Case{"adamw", golden("tiny").string(), "adamw"},
                                         Case{"scaled_adam", golden("tiny").string(), "scaled-adam"},
                                         Case{"llama", model_golden("llama").string(), "rite"},
                                         Case{"t5", model_golden("t5").string(), "adam"}),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(EarlyStopping, EndsTheRunAfterSoManyMeasurementsThatAreNoBetter) {
  const TemporaryFolder whole;
  const TemporaryFolder stopped;
  RunOptions options = tiny_options(whole.string(), "adam");
  options.lr = options.head_lr = 0;  // every measurement is that of the start
  options.validation = "some";
  options.evaluate_every = 2;
  options.patience = 3;
  const TinyRun run = run_tiny(options);
  EXPECT_EQ(run.outcome, Outcome::Finished);
  EXPECT_EQ(run.records.back().step, 8) << "the best is that of step 2, those of 4, 6 and 8 are no better";
  const auto final = read_lines(whole / "metrics.jsonl").back();
  EXPECT_EQ(final["best_step"], 2);
  EXPECT_EQ(final["stopped_early"], true);
  EXPECT_EQ(final["finished_steps"], 8);
  EXPECT_NE(run.output.find("ended after step 8"), std::string::npos) << run.output;

  options.out = stopped.string();
  run_tiny(options, false, [](const StepRecord& record) {
    if (record.step == 5) std::raise(SIGINT);
  });
  EXPECT_EQ(run_tiny(options, true).records.back().step, 8) << "what was counted before counts";
  EXPECT_TRUE(run_tiny(options, true).records.empty()) << "and it has ended for good";

  options.out = whole.string();
  options.patience = 0;
  EXPECT_EQ(run_tiny(options).records.back().step, options.steps);
}

// That the files in `folder` hold these trained weights of a model.
void expect_weights(const std::filesystem::path& folder, const std::map<std::string, torch::Tensor>& weights) {
  const auto adapter = load_safetensors(folder / "adapter_model.safetensors").tensors;
  size_t factors = 0;
  for (const auto& [name, tensor] : weights) {
    if (name.find(".lora_") == std::string::npos) continue;
    std::string in_file = name;
    in_file.erase(in_file.find(".default"), std::string(".default").size());
    if (in_file.compare(0, 5, "bert.") == 0) in_file.erase(0, 5);
    EXPECT_TRUE(adapter.at("base_model.model." + in_file).equal(tensor)) << folder << ": " << name;
    ++factors;
  }
  EXPECT_EQ(adapter.size(), factors);
  if (weights.count("head.weight") > 0) {
    EXPECT_TRUE(load_safetensors(folder / "head.safetensors").tensors.at("weight").equal(weights.at("head.weight")));
  }
}

TEST(EarlyStopping, BestHoldsTheWeightsOfTheBestMeasurement) {
  for (const std::string& model : {golden("tiny").string(), model_golden("llama").string()}) {
    const TemporaryFolder folder;
    RunOptions options = tiny_options(folder.string(), "adam");
    options.model = model;
    options.lr = model == golden("tiny").string() ? 0.1 : 1;  // too much: it does not get better for long
    options.schedule = "constant";
    options.validation = "some";
    options.evaluate_every = 1;
    const auto workload = tiny_workload(options);
    std::vector<std::map<std::string, torch::Tensor>> weights;  // after each step
    std::vector<double> scores;
    const Headline headline = workload->headline();
    std::ostringstream ignored;
    run_training(options, *workload, Start::Anew, {ignored, false, [&](const StepRecord& record) {
                                                     scores.push_back(score_of(record.validation, headline.score));
                                                     weights.emplace_back();
                                                     for (const auto& item : workload->model().named_parameters()) {
                                                       if (item.value().requires_grad())
                                                         weights.back()[item.key()] = item.value().detach().clone();
                                                     }
                                                   }});
    const auto place = headline.higher_is_better ? std::max_element(scores.begin(), scores.end())
                                                 : std::min_element(scores.begin(), scores.end());
    const auto best = static_cast<size_t>(place - scores.begin());
    ASSERT_LT(best + 1, scores.size()) << "the last is not the best";
    const auto final = read_lines(folder / "metrics.jsonl").back();
    EXPECT_EQ(final["best_step"], best + 1);
    EXPECT_EQ(final["best_validation_" + headline.score], scores[best]);
    expect_weights(folder / "best", weights[best]);
    expect_weights(folder.string(), weights.back());
  }
}

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

TEST(Training, AccumulationChangesLossesByRoundOffOnly) {
  for (const std::string& model : {golden("tiny").string(), model_golden("llama").string()}) {
    const TemporaryFolder folder;
    RunOptions options = tiny_options(folder.string(), "rite");
    options.model = model;
    const TinyRun whole = run_tiny(options);
    for (const int64_t micro_batch : {1, 3, 8, 100}) {  // 3: parts of 3, 3 and 2
      options.micro_batch = micro_batch;
      const TinyRun parts = run_tiny(options);
      ASSERT_EQ(parts.records.size(), whole.records.size());
      // A dozen steps carry a round-off of 6e-8 of every sum on; another weight of the parts changes more than 1e-2.
      EXPECT_LT(curve_distance(whole, parts), 1e-5) << model << " in parts of " << micro_batch;
    }
  }
}

TEST(Training, EveryScheduleIsFollowed) {
  const auto rates = [](const std::string& schedule, double min_lr_ratio) {
    const TemporaryFolder folder;
    RunOptions options = tiny_options(folder.string(), "adam");
    options.steps = 6;
    options.warmup = 2;
    options.schedule = schedule;
    options.min_lr_ratio = min_lr_ratio;
    std::vector<double> found;
    for (const StepRecord& record : run_tiny(options).records) found.push_back(record.lr / options.lr);
    return found;
  };
  const auto expect = [](const std::vector<double>& found, const std::vector<double>& expected) {
    ASSERT_EQ(found.size(), expected.size());
    for (size_t step = 0; step < found.size(); ++step) EXPECT_NEAR(found[step], expected[step], 1e-12) << step + 1;
  };
  expect(rates("linear", 0), {0.5, 1, 1, 0.75, 0.5, 0.25});
  expect(rates("linear", 0.2), {0.5, 1, 1, 0.8, 0.6, 0.4});
  expect(rates("constant", 0), {0.5, 1, 1, 1, 1, 1});
  const double half = std::sqrt(0.5);
  expect(rates("cosine", 0.2), {0.5, 1, 1, 0.6 + 0.4 * half, 0.6, 0.6 - 0.4 * half});
}

TEST(Training, TheGradientOfAllParametersTogetherIsBounded) {
  const TemporaryFolder folder;
  RunOptions options = tiny_options(folder.string(), "sgd");
  options.model = model_golden("llama").string();
  options.lr = 0.5;
  options.schedule = "constant";
  options.steps = 1;
  const auto start = tiny_workload(options)->model().named_parameters();
  const auto change = [&](double bound) {
    options.max_grad_norm = bound;
    double squares = 0;
    for (const auto& [name, tensor] : run_tiny(options).trained) {
      squares += (tensor - start[name]).to(torch::kDouble).square().sum().item<double>();
    }
    return std::sqrt(squares);
  };
  const double unbounded = change(0);
  EXPECT_NEAR(change(unbounded / options.lr / 4), unbounded / 4, 1e-4 * unbounded);
  EXPECT_NEAR(change(unbounded / options.lr * 4), unbounded, 1e-6 * unbounded) << "a small one is left alone";
}

TEST(Training, ABaseInBfloat16TrainsWithFactorsInFloat) {
  const TemporaryFolder folder;
  RunOptions options = tiny_options(folder.string(), "rite");
  options.model = model_golden("llama").string();
  options.lr = 2e-2;
  options.steps = 30;
  const TinyRun exact = run_tiny(options);
  options.dtype = "bfloat16";
  const TinyRun rounded = run_tiny(options);
  for (const auto& [name, tensor] : rounded.trained) EXPECT_EQ(tensor.scalar_type(), torch::kFloat) << name;
  for (const auto& item : tiny_workload(options)->model().named_parameters()) {
    if (item.value().requires_grad()) continue;
    EXPECT_EQ(item.value().scalar_type(), torch::kBFloat16) << item.key();
  }
  const auto mean_loss = [](const TinyRun& run, size_t begin) {
    double sum = 0;
    for (size_t step = begin; step < begin + 6; ++step) sum += run.records[step].loss / 6;
    return sum;
  };
  EXPECT_LT(mean_loss(rounded, 24), mean_loss(rounded, 0) - 0.1) << "it learns";
  // bfloat16 has 8 bits: what it computes is off by about 2^-8 of a loss of 3.9.
  EXPECT_NEAR(mean_loss(rounded, 24), mean_loss(exact, 24), 0.05);
}

TEST(Training, DropoutActsAndIsAFunctionOfTheSeed) {
  for (const std::string& model : {golden("tiny").string(), model_golden("llama").string()}) {
    const TemporaryFolder folder;
    RunOptions options = tiny_options(folder.string(), "rite");
    options.model = model;
    options.lr = 2e-2;
    options.steps = 6;
    const TinyRun without = run_tiny(options);
    options.dropout = 0.5;
    const TinyRun with = run_tiny(options);
    EXPECT_GT(curve_distance(with, without), 1e-3) << model;
    EXPECT_EQ(curve_distance(run_tiny(options), with), 0) << model;
  }
}

TEST(Training, EmbeddingsAndOutputsLearnAndComeBackFromTheirFiles) {
  for (const char* model : {"llama", "gemma", "t5"}) {  // Gemma's and T5's embedding is the output's matrix
    const TemporaryFolder folder;
    RunOptions options = tiny_options(folder.string(), "rite");
    options.model = model_golden(model).string();
    options.target_modules = "embed_tokens,lm_head";
    options.lr = 2e-2;
    options.steps = 30;
    const TinyRun run = run_tiny(options);
    double first = 0, last = 0;
    for (size_t step = 0; step < 6; ++step) first += run.records[step].loss, last += run.records[24 + step].loss;
    EXPECT_LT(last, first - 0.6) << model << ": it learns";
    const auto read = load_adapted_language_model(options.model, options.out, torch::kFloat, torch::kCPU);
    size_t count = 0;
    for (const auto& item : read->named_parameters()) {
      if (!item.value().requires_grad()) continue;
      ++count;
      EXPECT_GT(item.value().norm().item<double>(), 1e-3) << item.key();
      EXPECT_TRUE(item.value().equal(run.trained.at(item.key()))) << item.key();
    }
    EXPECT_EQ(count, run.trained.size());
    EXPECT_EQ(count, std::string(model) == "t5" ? 6U : 4U);
    // One use of a tied matrix learns alone.
    const auto parameters = read->named_parameters();
    const torch::Tensor base = load_model(options.model)->named_parameters()["lm_head.weight"];
    EXPECT_TRUE(parameters["lm_head.base_layer.weight"].equal(base)) << model;
  }
}

TEST(Training, GradientCheckpointingChangesNothing) {
  for (const char* model : {"llama", "t5"}) {
    const TemporaryFolder folder;
    RunOptions options = tiny_options(folder.string(), "rite");
    options.model = model_golden(model).string();
    options.dropout = 0.1;
    options.steps = 4;
    const TinyRun usual = run_tiny(options);
    options.gradient_checkpointing = true;
    EXPECT_EQ(curve_distance(run_tiny(options), usual), 0) << model;
  }
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

TEST(Overwrite, LeavesNothingOfTheRunBefore) {
  const TemporaryFolder folder;
  RunOptions options = tiny_options(folder.string(), "rite");
  EXPECT_EQ(run_tiny(options).outcome, Outcome::Finished);
  EXPECT_TRUE(std::filesystem::exists(folder / "checkpoint.pt"));
  EXPECT_TRUE(std::filesystem::exists(folder / "adapter_model.safetensors"));

  // Another run in its place, killed before its first checkpoint.
  options.lr *= 2;
  options.checkpoint_every = 0;
  EXPECT_THROW(run_tiny(options, false, [](const StepRecord&) { throw std::runtime_error("killed"); }),
               std::runtime_error);
  EXPECT_FALSE(std::filesystem::exists(folder / "checkpoint.pt"));
  EXPECT_FALSE(std::filesystem::exists(folder / "adapter_model.safetensors"));
  EXPECT_EQ(read_json(folder / "run.json")["lr"], options.lr);
  EXPECT_NE(error_of([&] { run_tiny(options, true); }).find("checkpoint.pt"), std::string::npos);

  // Options that cannot be: the run that is there stays.
  options.optimizer = "adam";
  options.clip = 2;
  const std::string before = read_file(folder / "run.json");
  EXPECT_NE(error_of([&] { run_tiny(options); }).find("--clip"), std::string::npos);
  EXPECT_EQ(read_file(folder / "run.json"), before);
}

TEST(BestSoFar, ADivergedModelIsNoneHoweverManyItsFirstClassGetsRight) {
  std::map<std::string, c10::IValue> values;
  BestSoFar best({"accuracy", /*higher_is_better=*/true}, values);
  EXPECT_FALSE(best.take({{"accuracy", 0.9}, {"loss", std::nan("")}}, 1));
  EXPECT_TRUE(best.take({{"accuracy", 0.2}, {"loss", 1.0}}, 2));
  EXPECT_FALSE(best.take({{"accuracy", 0.9}, {"loss", std::nan("")}}, 3));
  EXPECT_EQ(best.step(), 2);
  EXPECT_EQ(best.measurements_since(), 1);
}

TEST(ProgressBar, ShowsPositionLossAndTimeLeft) {
  std::ostringstream out;
  ProgressBar bar(out, /*is_terminal=*/true, 120, 10);
  bar.update({60, 0.5, 1e-3, 250, 10, 100}, 250);
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
  for (int64_t step = 1; step <= 7; ++step) bar.update({step, 1, 1e-3, 1000, 10, 5}, 1000);
  bar.finish();
  EXPECT_EQ(out.str(),
            "     3/7  loss 1.0000  lr 0.001  1000 ms/step  5 tokens/s  ETA 0:04\n"
            "     6/7  loss 1.0000  lr 0.001  1000 ms/step  5 tokens/s  ETA 0:01\n"
            "     7/7  loss 1.0000  lr 0.001  1000 ms/step  5 tokens/s  ETA 0:00\n");
}

TEST(ProgressBar, CountsMeasurementsToTheTimeLeftAndLeavesOutALossThatIsNoNumber) {
  std::ostringstream out;
  ProgressBar bar(out, /*is_terminal=*/false, 100, 1);
  bar.update({1, 2, 1e-3, 1000, 10, 5}, 1000);
  bar.update({2, std::nan(""), 1e-3, 1000, 10, 5}, 1000);
  bar.update({3, 2, 1e-3, 1000, 10, 5}, 28000);
  EXPECT_NE(out.str().find("3/100  loss 2.0000  lr 0.001  1000 ms/step  5 tokens/s  ETA 16:10"), std::string::npos)
      << out.str();
}

}  // namespace
}  // namespace finetune
