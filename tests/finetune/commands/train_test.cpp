#include "commands/train.hpp"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>

#include "common/files.hpp"
#include "finetune/support.hpp"

namespace finetune {
namespace {

// What `finetune train` would be called with.
TrainCommand parse(const std::vector<std::string>& arguments) {
  CLI::App app("", "finetune");
  std::optional<TrainCommand> parsed;
  std::function<int()> action;
  add_train_command(app, action, [&](const TrainCommand& command) {
    parsed = command;
    return 0;
  });
  std::vector<const char*> line = {"finetune", "train"};
  for (const std::string& argument : arguments) line.push_back(argument.c_str());
  app.parse(static_cast<int>(line.size()), line.data());
  action();
  if (!parsed) throw std::runtime_error("nothing was to be run");
  return *parsed;
}

const std::vector<std::string> kData = {"--model", "/m", "--train", "/a.tsv", "--test", "/b.tsv", "--out", "/nowhere"};

std::vector<std::string> with(const std::vector<std::string>& more) {
  std::vector<std::string> arguments = kData;
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

TEST(CommandLine, TheRateAndAlphaFollowOptimizerAndRank) {
  EXPECT_EQ(parse(kData).options.lr, default_lr("rite"));
  EXPECT_EQ(parse(with({"--optimizer", "adam"})).options.lr, default_lr("adam"));
  EXPECT_EQ(parse(with({"--optimizer", "adam", "--lr", "0.1"})).options.lr, 0.1);
  EXPECT_EQ(parse(with({"--rank", "8"})).options.alpha, 8);
  EXPECT_EQ(parse(with({"--rank", "8", "--alpha", "32"})).options.alpha, 32);
}

TEST(CommandLine, ValuesThatMakeNoSenseAreNamed) {
  const std::vector<std::pair<std::vector<std::string>, const char*>> cases = {
      {with({"--optimizer", "adamax"}), "--optimizer adamax: expected rite, rite-qr, adam, adamw"},
      {with({"--lr", "nan"}), "--lr nan: expected"},
      {with({"--lr", "-1"}), "--lr -1: expected"},
      {with({"--rank", "0"}), "--rank 0: expected at least 1"},
      {with({"--warmup", "200"}), "--warmup 200: expected"},
      {with({"--dropout", "1"}), "--dropout 1: expected"},
      {with({"--max-length", "2"}), "--max-length 2: expected"},
      {with({"--init", "zeros"}), "--init zeros: expected kaiming, gaussian, orthogonal, pissa"},
      {with({"--schedule", "step"}), "--schedule step: expected linear, cosine, constant"},
      {with({"--dtype", "float16"}), "--dtype float16: expected float32, bfloat16"},
      {with({"--device", "tpu"}), "--device tpu: expected cpu, cuda"},
      {with({"--min-lr-ratio", "1.5"}), "--min-lr-ratio 1.5: expected a number in [0, 1]"},
      {with({"--max-grad-norm", "inf"}), "--max-grad-norm inf: expected a number of at least 0"},
      {with({"--micro-batch", "-1"}), "--micro-batch -1: expected at least 0"},
      {with({"--threads", "100000"}), "--threads 100000: expected 0 to 1024"},
      {with({"--timeout", "0"}), "--timeout 0: expected 1 to 86400"},
      {{"--out", "/nowhere"}, "--model is missing"},
      {{"--model", "/m"}, "--out is missing"},
  };
  for (const auto& [arguments, expected] : cases) {
    const std::string message = error_of([&, &arguments = arguments] { parse(arguments); });
    EXPECT_NE(message.find(expected), std::string::npos) << message;
  }
}

TEST(CommandLine, OptionsThatWouldDoNothingAreRefused) {
  const std::vector<std::string> kAlone = {"--model", "/m", "--train", "/a", "--out", "/nowhere"};
  const auto alone = [&](const std::vector<std::string>& more) {
    std::vector<std::string> arguments = kAlone;
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  };
  const std::vector<std::pair<std::vector<std::string>, const char*>> cases = {
      {with({"--schedule", "constant", "--min-lr-ratio", "0.1"}), "--min-lr-ratio 0.1: a constant rate has none"},
      {with({"--patience", "2", "--evaluate-every", "5"}), "--patience 2: there is nothing to be measured"},
      {with({"--patience", "2", "--validation", "/v"}), "--patience 2: measured is only after the last step"},
      {alone({"--evaluate-every", "5"}), "--evaluate-every 5: there is nothing to be measured"},
      {alone({"--generate", "5"}), "--generate 5: there are no prompts"},
      {with({"--init", "pissa", "--init-scale", "8"}), "--init-scale 8: --init pissa makes it another start"},
  };
  for (const auto& [arguments, expected] : cases) {
    const std::string message = error_of([&, &arguments = arguments] { parse(arguments); });
    EXPECT_NE(message.find(expected), std::string::npos) << message;
  }
}

TEST(CommandLine, AConfigFileHasEveryOptionAndTheCommandLineOverridesIt) {
  const TemporaryFolder folder;
  const std::string config = (folder / "run.toml").string();
  std::ofstream(config)
      << "# a comment\nmodel = \"/m\"\ntrain = \"/t\"\nlr = 0.25\nsteps = 7\nescape = false\nrslora = true\n"
         "target-modules = \"q_proj,v_proj\"\nexclude-modules = 're:.*\\.0\\..*'\n";
  const auto arguments = [&](std::vector<std::string> more) {
    more.insert(more.end(), {"--config", config, "--out", "/nowhere"});
    return more;
  };
  const RunOptions read = parse(arguments({})).options;
  EXPECT_EQ(read.model, "/m");
  EXPECT_EQ(read.lr, 0.25);
  EXPECT_EQ(read.steps, 7);
  EXPECT_FALSE(read.escape);
  EXPECT_TRUE(read.rslora);
  EXPECT_EQ(read.target_modules, "q_proj,v_proj");
  EXPECT_EQ(read.exclude_modules, "re:.*\\.0\\..*");
  EXPECT_EQ(read.batch, RunOptions().batch) << "what the file leaves out keeps its default";

  const RunOptions given =
      parse(arguments({"--lr", "3", "--rslora=false", "--escape", "true", "--target-modules", "o_proj"})).options;
  EXPECT_EQ(given.lr, 3);
  EXPECT_FALSE(given.rslora);
  EXPECT_TRUE(given.escape);
  EXPECT_EQ(given.target_modules, "o_proj");
  EXPECT_EQ(given.steps, 7);

  const auto message = [&](const std::string& text) {
    std::ofstream(config) << text;
    return error_of([&] { parse(arguments({})); });
  };
  EXPECT_NE(message("rank = 4\nlearning-rate = 1\n").find("run.toml: INI was not able to parse learning-rate"),
            std::string::npos);
  EXPECT_NE(message("steps = many\n").find("run.toml: Could not convert: --steps = many"), std::string::npos);
  EXPECT_NE(message("resume = true\n").find("run.toml: "), std::string::npos);
}

TEST(CommandLine, ThePrintedConfigMakesTheSameRun) {
  const TemporaryFolder folder;
  const std::vector<std::string> given = {"--model",
                                          "/m",
                                          "--train",
                                          "/t",
                                          "--validation",
                                          "/v",
                                          "--test",
                                          "/x",
                                          "--out",
                                          "/y",
                                          "--optimizer",
                                          "adam",
                                          "--lr",
                                          "1e-5",
                                          "--rank",
                                          "8",
                                          "--rslora",
                                          "--steps",
                                          "9",
                                          "--seed",
                                          "18446744073709551615",
                                          "--evaluate-every",
                                          "3",
                                          "--patience",
                                          "2",
                                          "--target-modules",
                                          "re:.*[qv]_proj",
                                          "--dtype",
                                          "bfloat16",
                                          "--init",
                                          "orthogonal",
                                          "--python",
                                          "/usr/bin/python3",
                                          "--escape",
                                          "false",
                                          "--tensorboard",
                                          "--min-lr-ratio",
                                          "0.1"};
  std::vector<std::string> printing = given;
  printing.push_back("--print-config");
  testing::internal::CaptureStdout();
  EXPECT_THROW(parse(printing), std::runtime_error) << "it prints and ends";
  const std::string config = (folder / "run.toml").string();
  std::ofstream(config) << testing::internal::GetCapturedStdout();
  const nlohmann::json expected = parse(given).options;
  EXPECT_EQ(nlohmann::json(parse({"--config", config}).options), expected);
  const std::string text = read_file(config);
  for (const auto& [name, value] : expected.items()) {
    std::string option = name;
    std::replace(option.begin(), option.end(), '_', '-');
    EXPECT_NE(text.find("\n" + option + "="), std::string::npos) << option;
  }
}

TEST(CommandLine, ARunIsNotReplacedUnasked) {
  const TemporaryFolder folder;
  std::ofstream(folder / "metrics.jsonl") << "\n";
  const std::string out = folder.string();
  std::vector<std::string> arguments = kData;
  arguments.back() = out;
  EXPECT_NE(error_of([&] { parse(arguments); }).find("holds a run already"), std::string::npos);
  arguments.push_back("--overwrite");
  EXPECT_EQ(parse(arguments).options.out, out);
}

TEST(CommandLine, ResumeTakesEveryOptionFromTheRun) {
  const TemporaryFolder folder;
  const std::string out = folder.string();
  RunOptions saved;
  saved.model = "/m";
  saved.lr = 0.125;
  saved.seed = 18446744073709551615U;
  saved.out = "/moved/since";
  std::ofstream(folder / "run.json") << nlohmann::json(saved);
  const TrainCommand command = parse({"--resume", "--out", out});
  EXPECT_EQ(command.start, Start::Resume);
  EXPECT_EQ(parse({"--resume-anyway", "--out", out}).start, Start::ResumeAnyway);
  EXPECT_EQ(parse({"--resume", "--resume-anyway", "--out", out}).start, Start::ResumeAnyway);
  EXPECT_EQ(command.options.model, "/m");
  EXPECT_EQ(command.options.lr, 0.125);
  EXPECT_EQ(command.options.seed, saved.seed);
  EXPECT_EQ(command.options.out, out);
  EXPECT_EQ(parse({"--resume", "--out", out, "--timeout", "5"}).options.timeout, 5)
      << "it belongs to the machines of this run";

  EXPECT_EQ(parse({"--resume", "--out", out, "--model", "/moved"}).options.model, "/moved");
  EXPECT_EQ(parse({"--resume", "--out", out, "--model", "here"}).options.model,
            (std::filesystem::current_path() / "here").string());
  EXPECT_NE(error_of([&] {
              parse({"--resume", "--out", out, "--validation", "new.jsonl"});
            }).find("run.json has none"),
            std::string::npos);
  EXPECT_NE(error_of([&] {
              parse({"--resume", "--out", out, "--lr", "1"});
            }).find("--lr cannot be combined"),
            std::string::npos);
}

TEST(CommandLine, ResumingWhereNothingIsIsRefused) {
  const TemporaryFolder folder;
  const std::string out = folder.string();
  EXPECT_NE(error_of([&] { parse({"--resume", "--out", out}); }).find("run.json: does not exist"), std::string::npos);
  std::ofstream(folder / "run.json") << "{}";
  EXPECT_NE(error_of([&] { parse({"--resume", "--out", out}); }).find("not the record of a run"), std::string::npos);
}

}  // namespace
}  // namespace finetune
