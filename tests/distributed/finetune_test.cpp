// examples/finetune in several processes: what one process trains, to round-off.

#include <netinet/in.h>
#include <sys/socket.h>

#include <cmath>
#include <csignal>
#include <nlohmann/json.hpp>

#include "common/files.hpp"
#include "distributed/processes.hpp"
#include "finetune/support.hpp"
#include "training/optimizers.hpp"

namespace finetune {
namespace {

using lora_rite::test::Process;
using lora_rite::test::Scenario;

/// What a test asks of the processes of a scenario, as settings.json in their folder.
struct Settings {
  RunOptions options;
  bool resume = false;
  int64_t signal_after = 0;  ///< step after which the last process signals itself; 0 = never
  int signal = SIGINT;
};

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Settings, options, resume, signal_after, signal)

Processes processes_of(const Process& process) { return {process.rank, process.size, process.group}; }

std::vector<torch::Tensor> values(const TinyRun& run) {
  std::vector<torch::Tensor> result;
  for (const auto& [name, tensor] : run.trained) result.push_back(tensor);
  return result;
}

const Scenario train("finetune", [](const Process& process) {
  const auto settings = read_json(process.folder / "settings.json").get<Settings>();
  const auto after_step = [&](const StepRecord& record) {
    if (record.step == settings.signal_after && process.rank == process.size - 1) std::raise(settings.signal);
  };
  const TinyRun run = run_tiny(settings.options, settings.resume, after_step, processes_of(process));
  EXPECT_EQ(run.outcome == Outcome::Interrupted, settings.signal_after > 0);
  torch::save(values(run), (process.folder / ("trained" + std::to_string(process.rank))).string());
});

std::vector<nlohmann::json> metrics(const RunOptions& options) {
  std::vector<nlohmann::json> lines;
  std::istringstream file(read_file(std::filesystem::path(options.out) / "metrics.jsonl"));
  for (std::string line; std::getline(file, line);) lines.push_back(nlohmann::json::parse(line));
  return lines;
}

std::vector<double> losses(const RunOptions& options) {
  std::vector<double> result;
  for (const auto& line : metrics(options))
    if (line.contains("step")) result.push_back(line["loss"]);
  return result;
}

// A loss of about 0.7 has a round-off of 6e-8, and so has every sum that is formed in another order; a dozen steps
// carry that on, the more where a direction of the gradient is near what rounding leaves. Other examples in a batch
// change a loss by more than 1e-2.
constexpr double kRoundOff = 3e-5;

void expect_close(const std::vector<double>& found, const std::vector<double>& expected) {
  ASSERT_EQ(found.size(), expected.size());
  for (size_t i = 0; i < found.size(); ++i) EXPECT_NEAR(found[i], expected[i], kRoundOff) << "step " << i + 1;
}

void expect_equal(const std::vector<torch::Tensor>& found, const std::vector<torch::Tensor>& expected) {
  ASSERT_EQ(found.size(), expected.size());
  for (size_t i = 0; i < found.size(); ++i) EXPECT_TRUE(found[i].equal(expected[i])) << "tensor " << i;
}

/// Runs of several processes, and what they leave behind.
class Finetune : public testing::Test {
 protected:
  RunOptions options(const std::string& name, const std::string& optimizer = "rite") const {
    RunOptions result = tiny_options((folder_ / name).string(), optimizer);
    std::filesystem::create_directories(result.out);
    result.warmup = 4;
    return result;
  }

  lora_rite::test::Outcome run(const Settings& settings, int size) const {
    std::filesystem::create_directories(settings.options.out);
    std::ofstream(std::filesystem::path(settings.options.out) / "settings.json") << nlohmann::json(settings);
    return lora_rite::test::run_processes("finetune", size, settings.options.out);
  }

  void expect_success(const Settings& settings, int size) const {
    const auto outcome = run(settings, size);
    for (size_t rank = 0; rank < outcome.status.size(); ++rank)
      EXPECT_EQ(outcome.status[rank], 0) << "process " << rank << ": " << outcome.output[rank];
  }

  std::vector<torch::Tensor> trained(const RunOptions& options, int rank = 0) const {
    std::vector<torch::Tensor> result;
    torch::load(result, (std::filesystem::path(options.out) / ("trained" + std::to_string(rank))).string());
    return result;
  }

 private:
  TemporaryFolder folder_;
};

TEST_F(Finetune, LossesAndMeasurementsAreThoseOfOneProcess) {
  for (const std::string optimizer : {"rite", "adam"}) {
    RunOptions alone = options("alone " + optimizer, optimizer);
    alone.evaluate_every = 5;
    run_tiny(alone);
    for (const int size : {2, 3}) {  // 3: parts of 2, 3 and 3 examples
      Settings settings{alone};
      settings.options.out = options(optimizer + std::to_string(size)).out;
      expect_success(settings, size);
      expect_close(losses(settings.options), losses(alone));
      for (int rank = 1; rank < size; ++rank) expect_equal(trained(settings.options, rank), trained(settings.options));
      const auto found = metrics(settings.options), expected = metrics(alone);
      ASSERT_EQ(found.size(), expected.size());
      for (const size_t line : {4, 9, 11, 12}) {
        EXPECT_EQ(found[line]["test_accuracy"], expected[line]["test_accuracy"]) << line;
        EXPECT_NEAR(found[line]["test_loss"].get<double>(), expected[line]["test_loss"].get<double>(), kRoundOff);
      }
      EXPECT_EQ(found.back()["processes"], size);
    }
  }
}

TEST_F(Finetune, ALanguageModelsLossesAndMeasurementsAreThoseOfOneProcess) {
  RunOptions alone = options("alone");
  alone.model = golden("../models/golden/llama").string();
  alone.validation = "some";
  alone.evaluate_every = 5;
  alone.max_grad_norm = 0.5;
  run_tiny(alone);
  for (const int size : {2, 3}) {  // an epoch of 45 examples ends in a batch of 5: parts of 1, 2 and 2
    Settings settings{alone};
    settings.options.out = options("llama" + std::to_string(size)).out;
    settings.options.micro_batch = 2;
    expect_success(settings, size);
    expect_close(losses(settings.options), losses(alone));
    for (int rank = 1; rank < size; ++rank) expect_equal(trained(settings.options, rank), trained(settings.options));
    const auto found = metrics(settings.options), expected = metrics(alone);
    ASSERT_EQ(found.size(), expected.size());
    for (const size_t line : {4, 9, 11}) {
      EXPECT_EQ(found[line]["tokens"], expected[line]["tokens"]);
      EXPECT_NEAR(found[line]["validation_loss"].get<double>(), expected[line]["validation_loss"].get<double>(),
                  kRoundOff);
    }
    EXPECT_NEAR(found.back()["test_loss"].get<double>(), expected.back()["test_loss"].get<double>(), kRoundOff);
    EXPECT_EQ(found.back()["best_step"], expected.back()["best_step"]);
  }
}

TEST_F(Finetune, ALanguageModelStoppedInOneProcessGoesOnBitForBitWithWhatWasCounted) {
  Settings whole{options("whole")};
  whole.options.model = golden("../models/golden/t5").string();
  whole.options.dropout = 0.1;
  whole.options.validation = "some";
  whole.options.evaluate_every = 2;
  whole.options.patience = 2;
  whole.options.lr = 0.3;
  expect_success(whole, 2);
  Settings stopped = whole;
  stopped.options.out = options("stopped").out;
  stopped.signal_after = 5;
  expect_success(stopped, 2);
  stopped.signal_after = 0;
  stopped.resume = true;
  expect_success(stopped, 2);
  EXPECT_EQ(losses(stopped.options), losses(whole.options));
  expect_equal(trained(stopped.options), trained(whole.options));
  EXPECT_EQ(metrics(stopped.options).back()["best_step"], metrics(whole.options).back()["best_step"]);
}

TEST_F(Finetune, ADividedOptimizerTrainsTheSameBitForBit) {
  Settings whole{options("whole")}, divided{options("divided")};
  divided.options.shard_optimizer = true;
  expect_success(whole, 2);
  expect_success(divided, 2);
  EXPECT_EQ(losses(divided.options), losses(whole.options));
  expect_equal(trained(divided.options), trained(whole.options));
  EXPECT_EQ(metrics(divided.options).back()["optimizer_state_mb"], metrics(whole.options).back()["optimizer_state_mb"]);
}

TEST_F(Finetune, AfterCtrlCInOneProcessAllStopAndResumeBitForBitOrAsOneProcess) {
  Settings whole{options("whole")};
  whole.options.dropout = 0.1;  // masks are those of the step and the process
  whole.options.shard_optimizer = true;
  expect_success(whole, 2);

  Settings stopped = whole;
  stopped.options.out = options("stopped").out;
  stopped.signal_after = 5;
  expect_success(stopped, 2);
  // The other process may have asked already when the signal came.
  const size_t steps = losses(stopped.options).size();
  EXPECT_TRUE(steps == 5 || steps == 6) << steps;
  stopped.signal_after = 0;
  stopped.resume = true;
  expect_success(stopped, 2);
  EXPECT_EQ(losses(stopped.options), losses(whole.options));
  expect_equal(trained(stopped.options), trained(whole.options));

  RunOptions alone = options("alone");
  run_tiny(alone);
  Settings first{options("2 to 1")};
  first.options.shard_optimizer = true;
  first.signal_after = 5;
  expect_success(first, 2);
  run_tiny(first.options, /*resume=*/true);
  expect_close(losses(first.options), losses(alone));
}

TEST_F(Finetune, AfterAProcessWasKilledTheRunGoesOnFromItsCheckpoint) {
  Settings whole{options("whole")}, killed{options("killed")};
  expect_success(whole, 2);
  killed.options.checkpoint_every = 4;
  killed.signal_after = 6;
  killed.signal = SIGKILL;
  const auto outcome = run(killed, 2);
  EXPECT_EQ(outcome.status, (std::vector<int>{1, 128 + SIGKILL}));
  EXPECT_NE(outcome.output[0].find("another process has left"), std::string::npos) << outcome.output[0];
  EXPECT_EQ(losses(killed.options).size(), 6U);
  killed.signal_after = 0;
  killed.resume = true;
  expect_success(killed, 2);
  EXPECT_EQ(losses(killed.options), losses(whole.options));
  expect_equal(trained(killed.options), trained(whole.options));
}

const Scenario dividing("finetune divides", [](const Process& process) {
  RunOptions options = tiny_options(process.folder.string(), "rite");
  const auto workload = tiny_workload(options);
  const auto divided = [&](const Processes& processes) {
    const TrainingOptimizer training = make_optimizer(options, workload->model(), processes);
    const auto* optimizer = dynamic_cast<lora_rite::ShardedLoraRite<>*>(training.optimizers[0].get());
    return optimizer != nullptr && optimizer->owner(0, 0) != optimizer->owner(0, 1);
  };
  EXPECT_FALSE(divided(processes_of(process)));
  options.shard_optimizer = true;
  EXPECT_TRUE(divided(processes_of(process)));
  EXPECT_FALSE(divided({})) << "one process divides nothing";
});

TEST(FinetuneProcesses, DivideTheOptimizerWhenAsked) {
  lora_rite::test::expect_success("finetune divides", 2, lora_rite::test::fresh_folder("finetune"));
}

const Scenario measuring("finetune measures", [](const Process& process) {
  const auto model = load_model(golden("../models/golden/llama"));
  LanguageTest test{"arc", {}, {}};
  for (const TextRecord& text : tiny_texts(7, 5)) {
    ChoiceRecord record{{text.prompt}, {text.completion, {3, 4}, {5}}, {3, 2, 1}, {4, 2, 1}, 0};
    record.answer = static_cast<int64_t>(test.choices.size() % 3);
    test.choices.push_back(record);
  }
  const auto expect_same = [&](const LanguageTest& own) {
    const Scores alone = measure(*model, own, 4), together = measure(*model, own, 4, processes_of(process));
    ASSERT_EQ(together.size(), alone.size());
    for (size_t i = 0; i < alone.size(); ++i) {
      EXPECT_EQ(together[i].first, alone[i].first);
      EXPECT_NEAR(together[i].second, alone[i].second, kRoundOff * std::abs(alone[i].second)) << alone[i].first;
    }
  };
  expect_same(test);
  expect_same({"gsm8k", tiny_texts(7, 5), {}});
  expect_same({"gsm8k", tiny_texts(1, 5), {}});  // the last process has none
});

TEST(FinetuneProcesses, MeasureALanguageModelAsOne) {
  lora_rite::test::expect_success("finetune measures", 2, lora_rite::test::fresh_folder("finetune"));
}

const Scenario differences("finetune differences", [](const Process& process) {
  const bool is_last = process.rank == process.size - 1;
  const Processes processes = processes_of(process);
  const auto message = [&](const RunOptions& options, const TaskData& task) {
    SentenceWorkload workload(options, load_bert(options.model), task);
    std::ostringstream ignored;
    try {
      run_training(options, workload, Start::Anew, {ignored}, processes);
    } catch (const c10::Error& error) {
      return std::string(error.what_without_backtrace());
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  const auto expect = [](const std::string& found, const std::string& expected) {
    EXPECT_NE(found.find(expected), std::string::npos) << found;
  };
  RunOptions options = tiny_options(process.folder.string(), "rite");
  TaskData task = tiny_task();
  if (is_last) std::swap(task.train.labels.front(), task.train.tokens.front()[0]);
  expect(message(options, task), "process 1 has 'training data: 50 examples of fingerprint");
  RunOptions other = options;
  if (is_last) other.seed = 1;
  expect(message(other, tiny_task()), "process 1 has 'bert.encoder.layer.0.attention.self.query.lora_A.default.weight");
  options.batch = 1;
  expect(message(options, tiny_task()), "--batch 1: 2 processes share a batch");
  EXPECT_FALSE(std::filesystem::exists(process.folder / "metrics.jsonl"));
});

TEST(FinetuneProcesses, ThatDifferAreTold) {
  lora_rite::test::expect_success("finetune differences", 2, lora_rite::test::fresh_folder("finetune"));
}

// --- Connecting as the environment tells -----------------------------------------------------------------------------

int free_port() {
  const int listener = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  bind(listener, reinterpret_cast<sockaddr*>(&address), size);
  getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size);
  close(listener);
  return ntohs(address.sin_port);
}

void set_environment(int rank, int size, int port) {
  setenv("RANK", std::to_string(rank).c_str(), 1);
  setenv("WORLD_SIZE", std::to_string(size).c_str(), 1);
  setenv("MASTER_ADDR", "127.0.0.1", 1);
  setenv("MASTER_PORT", std::to_string(port).c_str(), 1);
}

const Scenario connecting("finetune connects", [](const Process& process) {
  set_environment(process.rank, process.size, std::atoi(read_file(process.folder / "port").c_str()));
  const Processes processes = connect_processes(60);
  EXPECT_EQ(processes.rank, process.rank);
  EXPECT_EQ(processes.size, process.size);
  EXPECT_EQ(processes.sum({1, processes.rank + 0.5}), (std::vector<double>{2, 2}));
  EXPECT_TRUE(processes.any(processes.rank == 1));
  EXPECT_FALSE(processes.any(false));
  const auto mark = process.folder / "first was here";
  processes.first_alone([&] {
    EXPECT_EQ(std::filesystem::exists(mark), !processes.is_first());
    usleep(200000);
    if (processes.is_first()) std::ofstream(mark) << "yes";
  });
});

TEST(FinetuneProcesses, MeetWhereTheEnvironmentTells) {
  const auto folder = lora_rite::test::fresh_folder("connects");
  std::ofstream(folder / "port") << free_port();
  lora_rite::test::expect_success("finetune connects", 2, folder);
}

TEST(FinetuneProcesses, AnEnvironmentThatMakesNoSenseIsTold) {
  const auto expect = [](const std::string& expected) {
    const std::string message = error_of([] { connect_processes(1); });
    EXPECT_NE(message.find(expected), std::string::npos) << message;
  };
  unsetenv("WORLD_SIZE");
  EXPECT_EQ(connect_processes(1).size, 1);
  set_environment(0, 1, 1);
  EXPECT_EQ(connect_processes(1).size, 1);
  setenv("WORLD_SIZE", "two", 1);
  expect("WORLD_SIZE is 'two': expected a number from 1");
  set_environment(2, 2, 1);
  expect("RANK is '2': expected a number from 0 to 1");
  set_environment(0, 2, 70000);
  expect("MASTER_PORT is '70000': expected a number from 1 to 65535");
  set_environment(0, 2, free_port());
  expect("process 0 of 2 did not meet the others at 127.0.0.1:");
  for (const char* name : {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}) unsetenv(name);
}

TEST(FinetuneProcesses, PartsOfABatchAreAllOfIt) {
  const std::vector<int64_t> batch = {5, 3, 8, 1, 9, 2, 7};
  for (const int size : {1, 2, 3, 7}) {
    std::vector<int64_t> all;
    for (int rank = 0; rank < size; ++rank) {
      const auto part = Processes{rank, size}.part_of(batch);
      EXPECT_GE(part.size(), 7U / static_cast<size_t>(size));
      EXPECT_LE(part.size(), 7U / static_cast<size_t>(size) + 1);
      all.insert(all.end(), part.begin(), part.end());
    }
    EXPECT_EQ(all, batch);
  }
}

}  // namespace
}  // namespace finetune
