#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace finetune {

/// Everything that determines a run: its losses are a function of these and, in round-off and dropout, of the number of
/// threads and processes. They are kept in the output folder's run.json, which is all that `--resume` needs.
struct RunOptions {
  std::string model;         ///< folder with config.json, model.safetensors, tokenizer.json
  std::string train;         ///< to train on: a TSV file for a classifier, one of prepare_tasks.py for a language model
  std::string validation;    ///< to measure on the way; empty = none
  std::string test;          ///< to measure after the last step; empty = none (language models only)
  std::string out;           ///< folder for results
  int64_t max_length = 128;  ///< classifier: tokens a text is cut to
  int64_t generate = 0;      ///< language model: tokens to write after each test prompt; 0 = none

  std::string optimizer = "rite";        ///< one of optimizer_names()
  double lr = 5e-4;                      ///< peak rate of the factors
  double head_lr = 1e-3;                 ///< classifier: peak rate of the head
  double weight_decay = 0;               ///< decoupled for rite, adamw and muon, L2 for adam and lora+; not on the head
  double beta2 = 0.999;                  ///< rite, adam, adamw and lora+: decay rate of the second moment
  double clip = 1;                       ///< rite: bound on the unmagnified gradient norm, 0 = off
  bool escape = true;                    ///< rite: keep the escaped mass
  double preconditioner_exponent = 0.5;  ///< rite: 1/2 adapts to every direction, 0 to none
  double max_relative_change = 0.3;      ///< rite: bound on a factor's relative change in a step, 0 = off: the paper's
  bool row_equilibration = false;        ///< rite: adapt from row to row as well
  double lr_ratio_b = 1;                 ///< rite: rate of B divided by the rate of A
  bool shard_optimizer = false;          ///< rite: several processes divide the optimizer's state and work

  std::string schedule = "linear";  ///< one of schedule_names(): how the rate goes down after the warm-up
  double min_lr_ratio = 0;          ///< where it ends, divided by the peak rate
  int64_t warmup = 0;               ///< steps of linear warm-up
  int64_t steps = 150;
  int64_t batch = 16;        ///< examples a step, of all processes together
  int64_t micro_batch = 0;   ///< examples that a process computes at once; 0 = its whole part of the batch
  double max_grad_norm = 0;  ///< bound on the norm of all gradients together, 0 = off
  uint64_t seed = 0;
  int64_t evaluate_every = 0;  ///< steps between measurements; 0 = only after the last step
  int64_t patience = 0;        ///< measurements without improvement after which the run ends; 0 = never

  int64_t rank = 16;
  double alpha = 16;
  bool rslora = false;           ///< ΔW = alpha / √rank · B A instead of alpha / rank · B A
  double dropout = 0;            ///< on the adapters' inputs
  std::string init = "kaiming";  ///< one of init_names(): how the factors start
  double init_scale = 1;         ///< A is multiplied by this at the start; where B = 0, so does ΔW = 0 stay
  /// Names or ends of names separated by commas, "re:" and a regular expression for whole names, or "all-linear".
  std::string target_modules;   ///< layers with an adapter; empty = those that are natural for the model
  std::string exclude_modules;  ///< those of them that get none

  std::string dtype = "float32";        ///< of the frozen weights: float32 or bfloat16
  std::string device = "cpu";           ///< cpu or cuda
  bool gradient_checkpointing = false;  ///< language model: keep the layers' inputs only, compute the rest twice
  double memory_limit = 0;              ///< in 10⁹ bytes, what the run may take; 0 = what the machine has

  int64_t threads = 0;            ///< 0 = LibTorch's default
  int64_t checkpoint_every = 50;  ///< steps; 0 = only at the end and when interrupted
  int64_t timeout = 60;           ///< seconds after which a process that does not answer counts as gone
  int64_t log_every = 25;         ///< steps between lines where there is no terminal for a progress bar
  bool tensorboard = false;       ///< write event files for TensorBoard after the run
  std::string python;             ///< interpreter for the scripts; empty = FINETUNE_PYTHON or python3
};

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(RunOptions, model, train, validation, test, out, max_length, generate, optimizer, lr,
                                   head_lr, weight_decay, beta2, clip, escape, preconditioner_exponent,
                                   max_relative_change, row_equilibration, lr_ratio_b, shard_optimizer, schedule,
                                   min_lr_ratio, warmup, steps, batch, micro_batch, max_grad_norm, seed, evaluate_every,
                                   patience, rank, alpha, rslora, dropout, init, init_scale, target_modules,
                                   exclude_modules, dtype, device, gradient_checkpointing, memory_limit, threads,
                                   checkpoint_every, timeout, log_every, tensorboard, python)

/// How a run begins.
enum class Start {
  Anew,
  Resume,        ///< from its checkpoint, if data, base and tokenizer are those that it was begun with
  ResumeAnyway,  ///< from its checkpoint, whatever they are
};

/// The names that `optimizer` may have.
std::vector<std::string> optimizer_names();

/// The names that `schedule` may have.
inline std::vector<std::string> schedule_names() { return {"linear", "cosine", "constant"}; }

/// The names that `init` may have.
inline std::vector<std::string> init_names() { return {"kaiming", "gaussian", "orthogonal", "pissa"}; }

/// Where one starts without a search: the rate that the search in docs/internals/study.md found good on MiniLM for
/// LoRA-RITE, and for all others that for Adam, which need not suit them.
inline double default_lr(const std::string& optimizer) { return optimizer.rfind("rite", 0) == 0 ? 5e-4 : 2e-3; }

}  // namespace finetune
