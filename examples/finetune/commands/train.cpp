#include "commands/train.hpp"

#include <CLI/CLI.hpp>
#include <filesystem>
#include <iostream>
#include <memory>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "cli/train_checks.hpp"
#include "cli/train_options.hpp"
#include "common/error.hpp"
#include "common/files.hpp"
#include "common/text.hpp"

namespace finetune {
namespace {

namespace fs = std::filesystem;

// The options that say where a run's base and data lie.
std::vector<std::pair<std::string, std::string RunOptions::*>> places() {
  return {{"--model", &RunOptions::model},
          {"--train", &RunOptions::train},
          {"--validation", &RunOptions::validation},
          {"--test", &RunOptions::test}};
}

// Absolute, so that --resume works from any folder.
void make_absolute(std::string& path) {
  if (!path.empty()) path = fs::absolute(path).string();
}

// The options of the run in `given.out`. Those of the machine it runs on may have changed and files may have moved,
// nothing else.
RunOptions saved_options(const CLI::App& app, const RunOptions& given) {
  std::set<std::string> allowed = {"--resume",    "--resume-anyway", "--out",         "--python",
                                   "--log-every", "--timeout",       "--memory-limit"};
  for (const auto& item : places()) allowed.insert(item.first);
  for (const CLI::Option* option : app.get_options()) {
    const std::string name = option->get_name();
    if (option->count() > 0 && allowed.count(name) == 0) {
      fail(name, " cannot be combined with --resume, which takes it from ", given.out,
           "/run.json; leave it out, or start a new run in another --out");
    }
  }
  const fs::path path = fs::path(given.out) / "run.json";
  if (!fs::exists(path)) {
    fail(path.string(),
         ": does not exist, so there is nothing to resume; check --out or start the run without --resume");
  }
  RunOptions saved;
  try {
    saved = read_json(path).get<RunOptions>();
  } catch (const nlohmann::json::exception& error) {
    fail(path.string(), ": is not the record of a run of this version (", error.what(),
         "); start a new run in another --out");
  }
  saved.out = given.out;
  if (app.count("--python") > 0) saved.python = given.python;
  if (app.count("--log-every") > 0) saved.log_every = given.log_every;
  if (app.count("--timeout") > 0) saved.timeout = given.timeout;
  if (app.count("--memory-limit") > 0) saved.memory_limit = given.memory_limit;
  for (const auto& [name, place] : places()) {
    if (app.count(name) == 0) continue;
    if ((saved.*place).empty()) fail(name, " cannot be given with --resume: ", path.string(), " has none");
    make_absolute(saved.*place = given.*place);
  }
  return saved;
}

// The defaults that depend on other options.
void complete(const CLI::App& app, RunOptions& options) {
  if (app.count("--lr") == 0) options.lr = default_lr(options.optimizer);
  if (app.count("--alpha") == 0) options.alpha = static_cast<double>(options.rank);
}

void check_files(const CLI::App& app, RunOptions& options) {
  for (const auto& [name, path] : {std::pair("--model", options.model), std::pair("--train", options.train)}) {
    if (path.empty()) fail(name, " is missing; see finetune train --help");
  }
  for (const auto& item : places()) make_absolute(options.*item.second);
  if (fs::exists(fs::path(options.out) / "metrics.jsonl") && app.count("--overwrite") == 0) {
    fail(options.out,
         ": holds a run already; go on with it by --resume, replace it by --overwrite, or choose another --out");
  }
}

void print_config(CLI::App& app, const RunOptions& options) {
  // Defaults that the help has in words.
  app.get_option("--lr")->default_str(concat(options.lr));
  app.get_option("--alpha")->default_str(concat(options.alpha));
  app.get_option("--python")->default_str("");
  std::cout << app.config_to_str(/*default_also=*/true, /*write_description=*/true);
}

// Fills in what the command line does not say; CLI11 then calls the subcommand's callback once more.
void read_config(CLI::App& app, const std::string& path) {
  std::istringstream file(read_file(path));
  try {
    app.parse_from_stream(file);
  } catch (const CLI::ParseError& error) {
    fail(path, ": ", error.what(), "; expected are lines 'name = value' with names of finetune train --help");
  }
}

int run_parsed(CLI::App& app, TrainArguments& given, const std::function<int(const TrainCommand&)>& run) {
  RunOptions& options = given.options;
  Start start = Start::Anew;
  if (given.resume) start = Start::Resume;
  if (given.resume_anyway) start = Start::ResumeAnyway;
  const bool is_new = start == Start::Anew;
  if (is_new) complete(app, options);
  if (given.print_config) {
    check_values(options);
    print_config(app, options);
    return 0;
  }
  if (options.out.empty()) fail("--out is missing; see finetune train --help");
  if (is_new) {
    check_files(app, options);
  } else {
    options = saved_options(app, options);
  }
  check_values(options);
  check_combinations(options);
  return run({options, start, app.get_parent()->get_name()});
}

}  // namespace

void add_train_command(CLI::App& app, std::function<int()>& action,
                       const std::function<int(const TrainCommand&)>& run) {
  CLI::App* command = app.add_subcommand("train", "Train adapters for a language model or a sentence classifier");
  const auto given = std::make_shared<TrainArguments>();
  add_train_options(*command, *given);
  command->callback([command, given, run, &action] {
    if (const std::string config = std::exchange(given->config, ""); !config.empty()) {
      return read_config(*command, config);
    }
    action = [command, given, run] { return run_parsed(*command, *given, run); };
  });
}

}  // namespace finetune
