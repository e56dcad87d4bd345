#include "cli/train_options.hpp"

#include <CLI/CLI.hpp>
#include <sstream>

#include "cli/options.hpp"
#include "common/text.hpp"

namespace finetune {
namespace {

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

void add_data_options(CLI::App& app, RunOptions& options) {
  const auto file = [&](const char* name, std::string& value, const char* help, const char* type = "FILE") {
    app.add_option(name, value, help)->type_name(type)->group("Data");
  };
  file("--model", options.model,
       "Folder with config.json and model.safetensors (or shards); a classifier also needs tokenizer.json", "DIR");
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
             "On the factors: decoupled for rite, adamw and muon, L2 for adam and lora+")
      ->group(group);
  add_option(app, "--beta2", options.beta2, "rite, adam, adamw, lora+: decay rate of the second moment")->group(group);
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
             "rite: bound on how much a step changes a factor relative to itself; 0 = off, as in the paper")
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
  add_option(app, "--threads", options.threads, "CPU threads, 0 = LibTorch's default")->group(group);
}

void add_running_options(CLI::App& app, TrainArguments& given) {
  RunOptions& options = given.options;
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

}  // namespace

void add_train_options(CLI::App& app, TrainArguments& given) {
  app.footer(kFooter);
  app.get_formatter()->column_width(34);
  app.allow_config_extras(CLI::config_extras_mode::error);
  add_data_options(app, given.options);
  add_optimizer_options(app, given.options);
  add_training_options(app, given.options);
  add_adapter_options(app, given.options);
  add_memory_options(app, given.options);
  add_running_options(app, given);
  wrap_descriptions(app);
}

}  // namespace finetune
