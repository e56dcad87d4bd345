#include "commands/train.hpp"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <iostream>
#include <memory>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "cli/options.hpp"
#include "common/files.hpp"
#include "common/text.hpp"

namespace finetune {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kMaxTimeout = 24 * 60 * 60;

constexpr const char* kDescription = "Train adapters for a language model or a sentence classifier";

constexpr const char* kFooter =
    "\nModels and their data:\n"
    "  bert (such as MiniLM)    a sentence classifier: adapters, and a linear head on the mean-pooled sentence.\n"
    "                           Files have one example a line, 'label TAB text', with any number of classes.\n"
    "  llama, gemma, gemma2,    a language model, which learns to continue prompts. Files are those that\n"
    "  t5, mt5                  prepare_tasks.py makes of published data sets.\n"
    "\n"
    "What --out receives:\n"
    "  adapter_config.json, adapter_model.safetensors   the adapter after the last step, as Python's PEFT reads it\n"
    "  head.safetensors     classifiers: the head, class names in its metadata\n"
    "  best/                the same files of the best measurement on --validation\n"
    "  metrics.jsonl        one line a step (loss, lr, ms_step, tokens, ...), then a line with \"final\": true\n"
    "  loss.png             the curves (needs Python's matplotlib)\n"
    "  checkpoint.pt, run.json, *.tokens                what --resume needs\n"
    "\n"
    "Ctrl-C finishes the step, saves and says how to go on; the run then ends as if it had never stopped.\n"
    "\n"
    "Several processes: 'scripts/launch 2 finetune train ...' or 'torchrun --no-python --nproc-per-node 2 finetune\n"
    "train ...'. They divide each batch, hence the losses are those of one process. --out is a folder they share.\n"
    "\n"
    "Examples:\n"
    "  finetune train --model .deps/minilm --train train.tsv --test test.tsv --out runs/reviews\n"
    "  finetune train --model smollm2 --train gsm8k.jsonl --validation held-out.jsonl --evaluate-every 50\n"
    "      --patience 3 --dtype bfloat16 --micro-batch 4 --schedule cosine --warmup 20 --out runs/gsm8k\n"
    "  finetune train --config gsm8k.toml --seed 1 --out runs/gsm8k-1\n";

// What the command line says beside the options of a run.
struct Given {
  TrainCommand command;
  std::string config;
  bool print_config = false;
  bool resume = false;
  bool resume_anyway = false;
};

void add_data_options(CLI::App& app, RunOptions& options) {
  const auto file = [&](const char* name, std::string& value, const char* help, const char* type = "FILE") {
    app.add_option(name, value, help)->type_name(type)->group("Data");
  };
  file("--model", options.model, "Folder with config.json, model.safetensors (or shards) and tokenizer.json", "DIR");
  file("--train", options.train, "Examples to train on");
  file("--validation", options.validation,
       "Examples to measure on every --evaluate-every steps, for best/ and --patience");
  file("--test", options.test,
       "Examples to measure on after the last step, and every --evaluate-every steps without --validation. Language "
       "models: optional, and may have choices (prepare_tasks.py --for evaluate)");
  file("--out", options.out, "Folder for the results; made if need be", "DIR");
  add_option(app, "--max-length", options.max_length, "Classifiers: tokens a text is cut to")->group("Data");
  add_option(app, "--generate", options.generate,
             "Language models: also write up to so many tokens after each prompt of --test and score them (ROUGE-L, "
             "exact match, numbers); 0 = off")
      ->group("Data");
}

void add_optimizer_options(CLI::App& app, RunOptions& options) {
  const char* group = "Optimizer";
  add_option(app, "--optimizer", options.optimizer, "One of " + join(optimizer_names()))->group(group);
  add_option(app, "--lr", options.lr, "Peak learning rate of the factors")
      ->default_str(concat(default_lr("rite"), " for rite, ", default_lr("adam"), " for the others"))
      ->group(group);
  add_option(app, "--head-lr", options.head_lr, "Classifiers: peak learning rate of the head")->group(group);
  add_option(app, "--weight-decay", options.weight_decay,
             "On the factors: decoupled for rite, adamw and muon, L2 for adam")
      ->group(group);
  add_option(app, "--beta2", options.beta2, "rite, adam, adamw: decay rate of the second moment")->group(group);
  add_option(app, "--max-grad-norm", options.max_grad_norm,
             "Bound on the norm of all gradients together, for any optimizer, 0 = off. Not a function of ΔW alone: "
             "rite has --clip for that")
      ->group(group);
  add_option(app, "--clip", options.clip, "rite: bound on the norm of the unmagnified gradient, 0 = off")->group(group);
  add_option(app, "--escape", options.escape,
             "rite: keep second moment that leaves the partner's column space (true, false)")
      ->default_str("true")
      ->group(group);
  add_option(app, "--preconditioner-exponent", options.preconditioner_exponent,
             "rite: 0.5 divides each direction by the root of its second moment, as in the paper; 0 divides all alike")
      ->group(group);
  add_option(app, "--max-relative-change", options.max_relative_change,
             "rite: bound on how much a step changes a factor relative to itself, 0 = off")
      ->group(group);
  add_option(app, "--row-equilibration", options.row_equilibration, "rite: adapt from row to row as well (true, false)")
      ->default_str("false")
      ->group(group);
  add_option(app, "--lr-ratio-b", options.lr_ratio_b, "rite: rate of B divided by the rate of A")->group(group);
  app.add_flag("--shard-optimizer", options.shard_optimizer,
               "rite: several processes divide the optimizer's state and work")
      ->group(group);
}

void add_training_options(CLI::App& app, RunOptions& options) {
  const char* group = "Steps";
  add_option(app, "--steps", options.steps, "Training steps")->group(group);
  add_option(app, "--batch", options.batch, "Examples a step, of all processes together")->group(group);
  add_option(app, "--micro-batch", options.micro_batch,
             "Examples a process computes at once; gradients of a step's are added up. 0 = its whole part of the batch")
      ->group(group);
  add_option(app, "--schedule", options.schedule, "How the rate goes on after the warm-up: " + join(schedule_names()))
      ->group(group);
  add_option(app, "--warmup", options.warmup, "Steps over which the rate rises linearly")->group(group);
  add_option(app, "--min-lr-ratio", options.min_lr_ratio,
             "linear, cosine: the rate after the last step, divided by the peak rate")
      ->group(group);
  add_option(app, "--evaluate-every", options.evaluate_every,
             "Steps between measurements on --validation (without it on --test), 0 = only after the last step")
      ->group(group);
  add_option(app, "--patience", options.patience,
             "End the run after so many measurements on --validation in a row that are no better than the best; 0 = "
             "never")
      ->group(group);
  add_option(app, "--seed", options.seed, "Determines the adapters' start, the order of examples and the dropout")
      ->group(group);
}

void add_adapter_options(CLI::App& app, RunOptions& options) {
  const char* group = "Adapter";
  add_option(app, "--rank", options.rank, "Rank r of the adapters")->group(group);
  add_option(app, "--alpha", options.alpha, "Scale of the adapters: ΔW = alpha / rank · B A")
      ->default_str("rank")
      ->group(group);
  app.add_flag("--rslora", options.rslora, "Scale by alpha / √rank instead")->group(group);
  add_option(app, "--dropout", options.dropout, "Dropout on the adapters' inputs")->group(group);
  app.add_option("--target-modules", options.target_modules,
                 "Layers that get one: ends of names with commas between (q_proj,v_proj), all-linear, or re: and a "
                 "regular expression (of Python's) for the whole name. Embeddings can be named, too (embed_tokens). By "
                 "default every linear layer but an output head")
      ->type_name("NAMES")
      ->group(group);
  app.add_option("--exclude-modules", options.exclude_modules, "Layers among them that get none, likewise")
      ->type_name("NAMES")
      ->group(group);
  add_option(app, "--init", options.init,
             "How the factors start: " + join(init_names()) +
                 ". pissa takes the weight's largest singular values, the others ΔW = 0")
      ->group(group);
  add_option(app, "--init-scale", options.init_scale,
             "Multiplies A at the start. ΔW = 0 all the same: an equivalent start for the model, not for every "
             "optimizer. kaiming and gaussian only")
      ->group(group);
}

void add_memory_options(CLI::App& app, RunOptions& options) {
  const char* group = "Memory and device";
  add_option(app, "--dtype", options.dtype, "Of the frozen weights: float32, bfloat16. Factors are float32 always")
      ->group(group);
  add_option(app, "--device", options.device, "cpu, cuda")->group(group);
  app.add_flag("--gradient-checkpointing", options.gradient_checkpointing,
               "Language models: keep the layers' inputs only and compute the rest a second time")
      ->group(group);
  add_option(app, "--memory-limit", options.memory_limit,
             "10⁹ bytes that the run may take, which is reckoned before the model is loaded; 0 = what the machine has, "
             "or with cuda the GPU")
      ->group(group);
  add_option(app, "--threads", options.threads, "CPU threads, 0 = one a core")->group(group);
}

void add_running_options(CLI::App& app, Given& given) {
  RunOptions& options = given.command.options;
  const char* group = "Running";
  app.add_option("--config", given.config,
                 "Options from a file of lines 'name = value', named as here without dashes before; those on the "
                 "command line override it")
      ->type_name("FILE.toml")
      ->configurable(false)
      ->group(group);
  app.add_flag("--print-config", given.print_config, "Print all options as such a file, and end")
      ->configurable(false)
      ->group(group);
  app.add_flag("--resume", given.resume,
               "Go on with the run in --out; every other option comes from its run.json, but that --model, --train, "
               "--validation and --test may say where they have moved. Refused if data, base or tokenizer are others "
               "than it was begun with")
      ->configurable(false)
      ->group(group);
  app.add_flag("--resume-anyway", given.resume_anyway, "The same with whatever data, base and tokenizer are there now")
      ->configurable(false)
      ->group(group);
  app.add_flag("--overwrite", "Replace the results in --out")->configurable(false)->group(group);
  add_option(app, "--checkpoint-every", options.checkpoint_every, "Steps between checkpoints, 0 = only when stopped")
      ->group(group);
  add_option(app, "--timeout", options.timeout, "Seconds after which a process that does not answer counts as gone")
      ->group(group);
  add_option(app, "--log-every", options.log_every, "Steps between lines when the output is no terminal")->group(group);
  app.add_flag("--tensorboard", options.tensorboard,
               "Write event files for TensorBoard to --out after the run (needs Python's tensorboardX)")
      ->group(group);
  app.add_option("--python", options.python, "Interpreter with tokenizers (and matplotlib, tensorboardX)")
      ->default_str("$FINETUNE_PYTHON, else python3")
      ->group(group);
}

// Descriptions in lines of a readable width; CLI11 breaks none.
void wrap_descriptions(CLI::App& app) {
  constexpr size_t kWidth = 84;
  for (CLI::Option* option : app.get_options([](CLI::Option*) { return true; })) {
    std::istringstream words(option->get_description());
    std::string text, line;
    for (std::string word; words >> word;) {
      if (!line.empty() && line.size() + 1 + word.size() > kWidth) {
        text += line + "\n";
        line.clear();
      }
      line += (line.empty() ? "" : " ") + word;
    }
    option->description(text + line);
  }
}

template <class List>
void require_one_of(const List& names, const char* option, const std::string& found) {
  require(std::find(names.begin(), names.end(), found) != names.end(), option, found, join(names));
}

// Comparisons are written so that NaN fails them.
void check_values(const RunOptions& options) {
  const auto at_least = [](double least, const char* option, double found) {
    require(found >= least && std::isfinite(found), option, found, concat("a number of at least ", least));
  };
  const auto above_zero = [](const char* option, double found) {
    require(found > 0 && std::isfinite(found), option, found, "a number above 0");
  };
  const auto count = [](int64_t least, const char* option, int64_t found) {
    require(found >= least, option, found, concat("at least ", least));
  };
  require(options.max_length >= 3, "--max-length", options.max_length, "at least 3: two special tokens and a word");
  count(0, "--generate", options.generate);

  require_one_of(optimizer_names(), "--optimizer", options.optimizer);
  at_least(0, "--lr", options.lr);
  at_least(0, "--head-lr", options.head_lr);
  at_least(0, "--weight-decay", options.weight_decay);
  require(options.beta2 >= 0 && options.beta2 < 1, "--beta2", options.beta2, "a number in [0, 1)");
  at_least(0, "--max-grad-norm", options.max_grad_norm);
  at_least(0, "--clip", options.clip);
  require(options.preconditioner_exponent >= 0 && options.preconditioner_exponent <= 0.5, "--preconditioner-exponent",
          options.preconditioner_exponent, "a number in [0, 0.5]");
  at_least(0, "--max-relative-change", options.max_relative_change);
  above_zero("--lr-ratio-b", options.lr_ratio_b);

  count(1, "--steps", options.steps);
  count(1, "--batch", options.batch);
  count(0, "--micro-batch", options.micro_batch);
  require_one_of(schedule_names(), "--schedule", options.schedule);
  require(options.warmup >= 0 && options.warmup <= options.steps, "--warmup", options.warmup,
          "0 to the number of --steps");
  require(options.min_lr_ratio >= 0 && options.min_lr_ratio <= 1, "--min-lr-ratio", options.min_lr_ratio,
          "a number in [0, 1]");
  count(0, "--evaluate-every", options.evaluate_every);
  count(0, "--patience", options.patience);

  count(1, "--rank", options.rank);
  above_zero("--alpha", options.alpha);
  require(options.dropout >= 0 && options.dropout < 1, "--dropout", options.dropout, "a number in [0, 1)");
  require_one_of(init_names(), "--init", options.init);
  above_zero("--init-scale", options.init_scale);

  require_one_of(std::vector<std::string>{"float32", "bfloat16"}, "--dtype", options.dtype);
  require_one_of(std::vector<std::string>{"cpu", "cuda"}, "--device", options.device);
  at_least(0, "--memory-limit", options.memory_limit);
  require(options.threads >= 0 && options.threads <= kMaxThreads, "--threads", options.threads, "0 to 1024");
  count(0, "--checkpoint-every", options.checkpoint_every);
  require(options.timeout >= 1 && options.timeout <= kMaxTimeout, "--timeout", options.timeout, "1 to 86400");
  count(1, "--log-every", options.log_every);
}

// An option that would be ignored is a mistake. Those that only some models or optimizers have are refused where the
// model or the optimizer is made.
void check_combinations(const RunOptions& options) {
  if (options.schedule == "constant" && options.min_lr_ratio != 0) {
    fail("--min-lr-ratio ", options.min_lr_ratio,
         ": a constant rate has none; leave it out, or choose linear or cosine");
  }
  if (options.patience > 0 && options.validation.empty()) {
    fail("--patience ", options.patience, ": there is nothing to be measured; add --validation");
  }
  if (options.patience > 0 && options.evaluate_every == 0) {
    fail("--patience ", options.patience, ": measured is only after the last step; add --evaluate-every");
  }
  if (options.evaluate_every > 0 && options.validation.empty() && options.test.empty()) {
    fail("--evaluate-every ", options.evaluate_every, ": there is nothing to be measured; add --validation or --test");
  }
  if (options.generate > 0 && options.test.empty()) {
    fail("--generate ", options.generate, ": there are no prompts; add --test");
  }
  if (options.init_scale != 1 && options.init != "kaiming" && options.init != "gaussian") {
    fail("--init-scale ", options.init_scale, ": --init ", options.init,
         " makes it another start, because B is not zero; leave it out, or choose kaiming or gaussian");
  }
}

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

int run_parsed(CLI::App& app, Given& given, const std::function<int(const TrainCommand&)>& run) {
  TrainCommand& command = given.command;
  RunOptions& options = command.options;
  if (given.resume) command.start = Start::Resume;
  if (given.resume_anyway) command.start = Start::ResumeAnyway;
  const bool is_new = command.start == Start::Anew;
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
  command.program = app.get_parent()->get_name();
  return run(command);
}

}  // namespace

void add_train_command(CLI::App& app, std::function<int()>& action,
                       const std::function<int(const TrainCommand&)>& run) {
  CLI::App* command = app.add_subcommand("train", kDescription);
  command->footer(kFooter);
  command->get_formatter()->column_width(34);
  command->allow_config_extras(CLI::config_extras_mode::error);
  const auto given = std::make_shared<Given>();
  RunOptions& options = given->command.options;
  add_data_options(*command, options);
  add_optimizer_options(*command, options);
  add_training_options(*command, options);
  add_adapter_options(*command, options);
  add_memory_options(*command, options);
  add_running_options(*command, *given);
  wrap_descriptions(*command);
  command->callback([command, given, run, &action] {
    if (const std::string config = std::exchange(given->config, ""); !config.empty()) {
      return read_config(*command, config);
    }
    action = [command, given, run] { return run_parsed(*command, *given, run); };
  });
}

}  // namespace finetune
