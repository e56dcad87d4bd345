#include "cli.hpp"

#include <fstream>
#include <initializer_list>
#include <nlohmann/json.hpp>

#include "support.hpp"

namespace finetune {
namespace {

Command parse(std::vector<const char*> arguments) {
  arguments.insert(arguments.begin(), "finetune");
  int exit_code = 0;
  const auto command = parse_command_line(static_cast<int>(arguments.size()), arguments.data(), exit_code);
  if (!command) throw std::runtime_error("usage error " + std::to_string(exit_code));
  return *command;
}

const std::vector<const char*> kData = {"--model", "/m", "--train", "/a.tsv", "--test", "/b.tsv", "--out", "/nowhere"};

std::vector<const char*> with(std::initializer_list<const char*> more) {
  std::vector<const char*> arguments = kData;
  arguments.insert(arguments.end(), more);
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
  const std::vector<std::pair<std::vector<const char*>, const char*>> cases = {
      {with({"--optimizer", "adamax"}), "--optimizer adamax: expected rite, rite-qr, adam, adamw"},
      {with({"--lr", "nan"}), "--lr nan: expected"},
      {with({"--lr", "-1"}), "--lr -1: expected"},
      {with({"--rank", "0"}), "--rank 0: expected at least 1"},
      {with({"--warmup", "200"}), "--warmup 200: expected"},
      {with({"--dropout", "1"}), "--dropout 1: expected"},
      {with({"--max-length", "2"}), "--max-length 2: expected"},
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

TEST(CommandLine, ARunIsNotReplacedUnasked) {
  const TemporaryFolder folder;
  std::ofstream(folder / "metrics.jsonl") << "\n";
  const std::string out = folder.string();
  std::vector<const char*> arguments = kData;
  arguments.back() = out.c_str();
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
  const Command command = parse({"--resume", "--out", out.c_str()});
  EXPECT_TRUE(command.resume);
  EXPECT_EQ(command.options.model, "/m");
  EXPECT_EQ(command.options.lr, 0.125);
  EXPECT_EQ(command.options.seed, saved.seed);
  EXPECT_EQ(command.options.out, out);
  EXPECT_EQ(parse({"--resume", "--out", out.c_str(), "--timeout", "5"}).options.timeout, 5)
      << "it belongs to the machines of this run";

  EXPECT_NE(error_of([&] {
              parse({"--resume", "--out", out.c_str(), "--lr", "1"});
            }).find("--lr cannot be combined"),
            std::string::npos);
}

TEST(CommandLine, ResumingWhereNothingIsIsRefused) {
  const TemporaryFolder folder;
  const std::string out = folder.string();
  EXPECT_NE(error_of([&] {
              parse({"--resume", "--out", out.c_str()});
            }).find("run.json: does not exist"),
            std::string::npos);
  std::ofstream(folder / "run.json") << "{}";
  EXPECT_NE(error_of([&] {
              parse({"--resume", "--out", out.c_str()});
            }).find("not the record of a run"),
            std::string::npos);
}

}  // namespace
}  // namespace finetune
