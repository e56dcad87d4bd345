#pragma once

#include <torch/nn/module.h>
#include <torch/types.h>

#include <cstdint>
#include <filesystem>
#include <lora_rite/nn/lora_config.hpp>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "memory_plan/plan.hpp"
#include "reports/step_record.hpp"
#include "training/process_group.hpp"
#include "training/run_identity.hpp"
#include "training/run_options.hpp"

namespace finetune {

/// The data that a model is measured on.
enum class Split {
  Validation,  ///< on the way, to choose the best checkpoint
  Test,
};

/// The score by which one measurement is better than another.
struct Headline {
  std::string score;
  bool higher_is_better = false;

  /// Whether `found` is better than `best`. NaN is not.
  bool improves(double found, double best) const { return higher_is_better ? found > best : found < best; }
};

/// What a run trains: a model with adapters, its data, and how examples become a loss. The trainer knows nothing else.
class Workload {
 public:
  virtual ~Workload() = default;

  /// The model, of which the adapters' factors, and a head if there is one, are trainable.
  virtual torch::nn::Module& model() = 0;

  /// Indices of the examples that `step` (from 0) takes: a pure function of the data, the run's seed and the step.
  virtual std::vector<int64_t> examples_of(int64_t step) = 0;

  /// What the summed loss of these examples is divided by: their number, or that of the tokens that have a loss.
  virtual double weight(const std::vector<int64_t>& examples) const = 0;

  /// The tokens that the model reads in these examples, without padding.
  virtual int64_t tokens(const std::vector<int64_t>& examples) const = 0;

  /// The summed loss of these examples, at least one: a scalar in the graph.
  virtual torch::Tensor loss_sum(const std::vector<int64_t>& examples) = 0;

  /// Whether the run has such data.
  virtual bool has(Split split) const = 0;

  /// Measures the model, without dropout and gradients, and leaves it in the mode it was in. The processes divide the
  /// work and have the same result.
  virtual Scores evaluate(Split split, const Processes& processes) = 0;

  /// Which of the validation's scores says what is best.
  virtual Headline headline() const = 0;

  /// Writes the adapter in PEFT's format, and the head where there is one.
  virtual void save(const std::filesystem::path& folder) const = 0;

  /// Facts about model and data for the last line of metrics.jsonl.
  virtual nlohmann::json summary() const = 0;

  /// The same in a few words for people: "3,000 examples, 2 classes".
  virtual std::string title() const = 0;

  /// The run's data, and the base and tokenizer as they were loaded.
  virtual RunIdentity identity() const = 0;
};

/// The adapters that `options` ask for; on the layers `natural` unless they name others. Throws Error for a list of
/// modules that makes no sense.
lora_rite::nn::LoraConfig lora_config(const RunOptions& options, const lora_rite::nn::ModuleNames& natural);

/// Gives the model fresh adapters, drawn from the run's seed.
void add_adapters(torch::nn::Module& model, const RunOptions& options, const lora_rite::nn::LoraConfig& config);

/// The rows that a process computes at a time: --micro-batch, or its part of the batch if that is less.
int64_t rows_at_once(const RunOptions& options, const Processes& processes);

/// Throws Error if LibTorch cannot use the --device of this name.
void check_device(const std::string& device);

/// Writes the adapter of a model as PEFT reads it. `task_type` is PEFT's name for what the model is for.
void save_adapter_of(const torch::nn::Module& model, const RunOptions& options, const std::string& task_type,
                     const std::filesystem::path& folder);

/// Throws Error, with the arithmetic, if the run would take more memory than --memory-limit allows, or without one than
/// the machine has for each of the processes. `question` says what the data are like, `options` the rest.
void check_it_fits(const RunOptions& options, MemoryQuestion question, const Processes& processes);

/// What `options` ask for: a sentence classifier where config.json's model_type is "bert", else a language model. Reads
/// the data, loads the model, moves it to the device and gives it adapters drawn from the run's seed. Throws Error for
/// options that this kind of model has not.
std::unique_ptr<Workload> make_workload(const RunOptions& options, const Processes& processes);

}  // namespace finetune
