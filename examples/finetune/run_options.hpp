#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "lora_config.hpp"

namespace finetune {

/// Everything that determines a run: its losses are a function of these and, in round-off and dropout, of the number of
/// threads and processes. They are kept in the output folder's run.json, which is all that `--resume` needs.
struct RunOptions {
  std::string model;  ///< folder with config.json, model.safetensors, tokenizer.json
  std::string train;  ///< TSV file to train on
  std::string test;   ///< TSV file to measure accuracy on, after the last step
  std::string out;    ///< folder for results

  std::string optimizer = "rite";  ///< one of optimizer_names()
  double lr = 5e-4;                ///< peak rate of the factors
  double head_lr = 1e-3;           ///< peak rate of the classifier head
  double weight_decay = 0;         ///< decoupled for rite and adamw, L2 for adam; not on the head
  double beta2 = 0.999;            ///< rite, adam and adamw: decay rate of the second moment
  double clip = 1;                 ///< rite: bound on the unmagnified gradient norm, 0 = off
  bool escape = true;              ///< rite: keep the escaped mass
  double max_relative_change = 0;  ///< rite: bound on a factor's relative change in a step, 0 = off
  bool row_equilibration = false;  ///< rite: adapt from row to row as well
  double lr_ratio_b = 1;           ///< rite: rate of B divided by the rate of A
  int64_t warmup = 0;              ///< steps of linear warm-up
  int64_t steps = 150;
  int64_t batch = 16;
  uint64_t seed = 0;

  int64_t rank = 16;
  double alpha = 16;
  double dropout = 0;     ///< on the adapters' inputs
  double init_scale = 1;  ///< A is multiplied by this at the start; B = 0 stays, hence so does ΔW = 0

  int64_t evaluate_every = 0;  ///< steps between measurements on the test data; 0 = only after the last step

  int64_t max_length = 128;
  int64_t threads = 0;            ///< 0 = one a core
  int64_t checkpoint_every = 50;  ///< steps; 0 = only at the end and when interrupted
  bool shard_optimizer = false;   ///< rite: several processes divide the optimizer's state and work
  int64_t timeout = 60;           ///< seconds after which a process that does not answer counts as gone
  int64_t log_every = 25;         ///< steps between lines where there is no terminal for a progress bar
  std::string python;             ///< interpreter for tokenising and plotting; empty = FINETUNE_PYTHON or python3

  LoraConfig lora() const { return {rank, alpha, dropout}; }
};

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(RunOptions, model, train, test, out, optimizer, lr, head_lr, weight_decay, beta2,
                                   clip, escape, max_relative_change, row_equilibration, lr_ratio_b, warmup, steps,
                                   batch, seed, rank, alpha, dropout, init_scale, evaluate_every, max_length, threads,
                                   checkpoint_every, shard_optimizer, timeout, log_every, python)

/// The names that `optimizer` may have.
std::vector<std::string> optimizer_names();

/// Where one starts without a search: the rate that the one in the README found best on MiniLM for LoRA-RITE, and for
/// all others that for Adam, which need not suit them.
inline double default_lr(const std::string& optimizer) { return optimizer.rfind("rite", 0) == 0 ? 5e-4 : 2e-3; }

}  // namespace finetune
