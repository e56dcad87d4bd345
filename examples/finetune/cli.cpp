#include "cli.hpp"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <filesystem>
#include <memory>
#include <string>

#include "error.hpp"
#include "files.hpp"
#include "text.hpp"

namespace finetune {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kMaxThreads = 1024;  // far more crash in LibTorch
constexpr int64_t kMaxTimeout = 24 * 60 * 60;

constexpr const char* kDescription =
    "Fine-tunes a BERT sentence encoder (such as MiniLM) with LoRA to sort texts into classes.\n"
    "\n"
    "Adapters go on every attention and feed-forward layer and are trained by LoRA-RITE (or Adam) together with a\n"
    "linear head on the mean-pooled sentence; the base model stays frozen.\n"
    "\n"
    "Data files have one example a line, 'label TAB text', with any number of classes.\n";

constexpr const char* kFooter =
    "\nWhat --out receives:\n"
    "  adapter_config.json, adapter_model.safetensors   the adapter, as Python's PEFT reads it\n"
    "  head.safetensors     the classifier head, class names in its metadata\n"
    "  metrics.jsonl        one line a step (loss, lr, ms_step, ms_optimizer), then a line with \"final\": true\n"
    "  loss.png             the loss curve (needs Python's matplotlib)\n"
    "  checkpoint.pt, run.json, *.tokens                what --resume needs\n"
    "\n"
    "Ctrl-C finishes the step, saves and says how to go on.\n"
    "\n"
    "Several processes: 'scripts/launch 2 finetune ...' or 'torchrun --no-python --nproc-per-node 2 finetune ...'.\n"
    "They divide each batch, hence the losses are those of one process. --out is a folder they share.\n"
    "\n"
    "Example:\n"
    "  finetune --model .deps/minilm --train train.tsv --test test.tsv --out runs/first\n";

// One option, with its default printed in the help.
template <class T>
CLI::Option* add(CLI::App& app, const std::string& name, T& value, const std::string& help) {
  return app.add_option(name, value, help)->capture_default_str();
}

void add_options(CLI::App& app, Command& command) {
  RunOptions& options = command.options;
  app.add_option("--model", options.model, "Folder with config.json, model.safetensors and tokenizer.json")
      ->type_name("DIR")
      ->group("Data");
  app.add_option("--train", options.train, "Examples to train on")->type_name("FILE.tsv")->group("Data");
  app.add_option("--test", options.test, "Examples to measure accuracy on, after training")
      ->type_name("FILE.tsv")
      ->group("Data");
  app.add_option("--out", options.out, "Folder for the results; made if need be")->type_name("DIR")->group("Data");
  add(app, "--max-length", options.max_length, "Tokens a text is cut to")->group("Data");

  add(app, "--optimizer", options.optimizer, "One of " + join(optimizer_names()))->group("Training");
  add(app, "--lr", options.lr, "Peak learning rate of the factors")
      ->default_str(concat(default_lr("rite"), " for rite, ", default_lr("adam"), " for the others"))
      ->group("Training");
  add(app, "--head-lr", options.head_lr, "Peak learning rate of the classifier head")->group("Training");
  add(app, "--weight-decay", options.weight_decay, "On the factors: decoupled for rite and adamw, L2 for adam")
      ->group("Training");
  add(app, "--beta2", options.beta2, "rite, adam, adamw: decay rate of the second moment")->group("Training");
  add(app, "--clip", options.clip, "rite: bound on the norm of the unmagnified gradient, 0 = off")->group("Training");
  add(app, "--escape", options.escape, "rite: keep second moment that leaves the partner's column space (true, false)")
      ->group("Training");
  add(app, "--max-relative-change", options.max_relative_change,
      "rite: bound on how much a step changes a factor relative to itself, 0 = off")
      ->group("Training");
  add(app, "--row-equilibration", options.row_equilibration, "rite: adapt from row to row as well (true, false)")
      ->group("Training");
  add(app, "--lr-ratio-b", options.lr_ratio_b, "rite: rate of B divided by the rate of A")->group("Training");
  add(app, "--warmup", options.warmup, "Steps over which the rate rises; it then falls linearly to 0")
      ->group("Training");
  add(app, "--steps", options.steps, "Training steps")->group("Training");
  add(app, "--batch", options.batch, "Examples a step")->group("Training");
  add(app, "--seed", options.seed, "Determines the adapters' start, the order of examples and the dropout")
      ->group("Training");

  add(app, "--rank", options.rank, "Rank r of the adapters")->group("Adapter");
  add(app, "--alpha", options.alpha, "Scale of the adapters: ΔW = alpha / rank · B A")
      ->default_str("rank")
      ->group("Adapter");
  add(app, "--dropout", options.dropout, "Dropout on the adapters' inputs")->group("Adapter");
  add(app, "--init-scale", options.init_scale,
      "Multiplies A at the start. ΔW = 0 all the same: an equivalent start for the model, not for every optimizer")
      ->group("Adapter");

  add(app, "--threads", options.threads, "CPU threads, 0 = one a core")->group("Running");
  app.add_flag("--resume", command.resume, "Go on with the run in --out; every other option comes from its run.json")
      ->group("Running");
  app.add_flag("--overwrite", "Replace the results in --out")->group("Running");
  add(app, "--evaluate-every", options.evaluate_every,
      "Steps between measurements on --test, 0 = only after the last step")
      ->group("Running");
  add(app, "--checkpoint-every", options.checkpoint_every, "Steps between checkpoints, 0 = only when stopped")
      ->group("Running");
  app.add_flag("--shard-optimizer", options.shard_optimizer,
               "rite: several processes divide the optimizer's state and work")
      ->group("Running");
  add(app, "--timeout", options.timeout, "Seconds after which a process that does not answer counts as gone")
      ->group("Running");
  add(app, "--log-every", options.log_every, "Steps between lines when the output is no terminal")->group("Running");
  app.add_option("--python", options.python, "Interpreter with tokenizers (and matplotlib)")
      ->default_str("$FINETUNE_PYTHON, else python3")
      ->group("Running");
}

template <class T>
void require(bool condition, const char* option, const T& found, const std::string& expected) {
  if (!condition) fail(option, " ", found, ": expected ", expected);
}

// Comparisons are written so that NaN fails them.
void check_values(const RunOptions& options) {
  const std::vector<std::string> names = optimizer_names();
  require(std::find(names.begin(), names.end(), options.optimizer) != names.end(), "--optimizer", options.optimizer,
          join(names));
  require(options.lr >= 0, "--lr", options.lr, "a number of at least 0");
  require(options.head_lr >= 0, "--head-lr", options.head_lr, "a number of at least 0");
  require(options.weight_decay >= 0, "--weight-decay", options.weight_decay, "a number of at least 0");
  require(options.beta2 >= 0 && options.beta2 < 1, "--beta2", options.beta2, "a number in [0, 1)");
  require(options.max_relative_change >= 0, "--max-relative-change", options.max_relative_change, "at least 0");
  require(options.lr_ratio_b > 0, "--lr-ratio-b", options.lr_ratio_b, "a number above 0");
  require(options.clip >= 0, "--clip", options.clip, "a number of at least 0");
  require(options.steps >= 1, "--steps", options.steps, "at least 1");
  require(options.warmup >= 0 && options.warmup <= options.steps, "--warmup", options.warmup,
          "0 to the number of --steps");
  require(options.batch >= 1, "--batch", options.batch, "at least 1");
  require(options.rank >= 1, "--rank", options.rank, "at least 1");
  require(options.alpha > 0, "--alpha", options.alpha, "a number above 0");
  require(options.dropout >= 0 && options.dropout < 1, "--dropout", options.dropout, "a number in [0, 1)");
  require(options.init_scale > 0, "--init-scale", options.init_scale, "a number above 0");
  require(options.max_length >= 3, "--max-length", options.max_length, "at least 3: two special tokens and a word");
  require(options.threads >= 0 && options.threads <= kMaxThreads, "--threads", options.threads, "0 to 1024");
  require(options.evaluate_every >= 0, "--evaluate-every", options.evaluate_every, "at least 0");
  require(options.checkpoint_every >= 0, "--checkpoint-every", options.checkpoint_every, "at least 0");
  require(options.timeout >= 1 && options.timeout <= kMaxTimeout, "--timeout", options.timeout, "1 to 86400");
  require(options.log_every >= 1, "--log-every", options.log_every, "at least 1");
}

// The options of the run in `folder`. Those of the machine it runs on may have changed, nothing else.
RunOptions saved_options(const CLI::App& app, const RunOptions& given) {
  for (const CLI::Option* option : app.get_options()) {
    const std::string name = option->get_name();
    const bool allowed =
        name == "--resume" || name == "--out" || name == "--python" || name == "--log-every" || name == "--timeout";
    if (option->count() > 0 && !allowed) {
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
    fail(path.string(), ": is not the record of a run (", error.what(), "); start a new run in another --out");
  }
  saved.out = given.out;
  if (app.count("--python") > 0) saved.python = given.python;
  if (app.count("--log-every") > 0) saved.log_every = given.log_every;
  if (app.count("--timeout") > 0) saved.timeout = given.timeout;
  return saved;
}

void complete(const CLI::App& app, RunOptions& options) {
  for (const char* name : {"--model", "--train", "--test"}) {
    if (app.count(name) == 0) fail(name, " is missing; see finetune --help");
  }
  if (app.count("--lr") == 0) options.lr = default_lr(options.optimizer);
  if (app.count("--alpha") == 0) options.alpha = static_cast<double>(options.rank);
  // Absolute, so that --resume works from any folder.
  for (std::string* path : {&options.model, &options.train, &options.test}) *path = fs::absolute(*path).string();
  if (fs::exists(fs::path(options.out) / "metrics.jsonl") && app.count("--overwrite") == 0) {
    fail(options.out,
         ": holds a run already; go on with it by --resume, replace it by --overwrite, or choose another --out");
  }
}

}  // namespace

std::optional<Command> parse_command_line(int argc, const char* const* argv, int& exit_code) {
  Command command;
  CLI::App app(kDescription, "finetune");
  app.footer(kFooter);
  app.get_formatter()->column_width(34);
  add_options(app, command);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    exit_code = app.exit(error);
    return std::nullopt;
  }
  if (app.count("--out") == 0) fail("--out is missing; see finetune --help");
  if (command.resume) {
    command.options = saved_options(app, command.options);
  } else {
    complete(app, command.options);
  }
  check_values(command.options);
  return command;
}

}  // namespace finetune
