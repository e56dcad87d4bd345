#include "training/trainer.hpp"

#include <torch/cuda.h>
#include <torch/nn/utils/clip_grad.h>

#include <algorithm>
#include <chrono>
#include <lora_rite/checkpoint.hpp>
#include <lora_rite/distributed.hpp>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <sstream>
#include <utility>

#include "common/error.hpp"
#include "common/files.hpp"
#include "reports/metrics.hpp"
#include "reports/progress.hpp"
#include "reports/report.hpp"
#include "training/best_so_far.hpp"
#include "training/interrupt.hpp"
#include "training/optimizers.hpp"

namespace finetune {
namespace {

// On a GPU the work is done when the device has done it, not when the call returns.
class Stopwatch {
 public:
  explicit Stopwatch(bool on_gpu) : on_gpu_(on_gpu) { wait(); }

  double milliseconds() const {
    wait();
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  void wait() const {
    if (on_gpu_) torch::cuda::synchronize();
  }

  bool on_gpu_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// Leaves gradients of the mean loss over all examples of the step, and returns this process's part of that mean.
double accumulate_gradients(Workload& workload, const std::vector<int64_t>& examples, int64_t micro_batch,
                            const Processes& processes) {
  const std::vector<int64_t> own = processes.part_of(examples);
  const double weight = workload.weight(examples);
  double loss = 0;
  const auto size = static_cast<int64_t>(own.size());
  const int64_t stride = micro_batch > 0 ? micro_batch : size;
  workload.model().zero_grad();
  for (int64_t begin = 0; begin < size; begin += stride) {
    const int64_t end = std::min(begin + stride, size);
    const torch::Tensor part = workload.loss_sum({own.begin() + begin, own.begin() + end}) / weight;
    // The mean over the processes divides by their number.
    (part * processes.size).backward();
    loss += part.item<double>();
  }
  return loss;
}

StepRecord train_step(const RunOptions& options, Workload& workload, const TrainingOptimizer& training,
                      const std::vector<int64_t>& examples, const Processes& processes) {
  const bool on_gpu = options.device == "cuda";
  StepRecord record;
  const Stopwatch step(on_gpu);
  record.lr = training.optimizers[0]->param_groups()[0].options().get_lr();
  record.tokens = workload.tokens(examples);
  const double loss = accumulate_gradients(workload, examples, options.micro_batch, processes);
  if (processes.size > 1) {
    for (const auto& optimizer : training.optimizers) lora_rite::average_gradients(*optimizer, processes.group);
  }
  if (options.max_grad_norm > 0) torch::nn::utils::clip_grad_norm_(training.parameters(), options.max_grad_norm);
  const Stopwatch optimizer_step(on_gpu);
  for (const auto& optimizer : training.optimizers) optimizer->step();
  record.ms_optimizer = optimizer_step.milliseconds();
  record.loss = processes.sum({loss})[0];
  record.ms_step = step.milliseconds();
  return record;
}

// A function of seed, step and process, so that resumed runs need no state of it; examples of different processes get
// masks of their own.
uint64_t dropout_seed(uint64_t seed, int64_t step, int rank) {
  std::seed_seq sequence{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(step),
                         static_cast<uint32_t>(rank)};
  uint32_t result = 0;
  sequence.generate(&result, &result + 1);
  return result;
}

// What all processes start from.
std::string describe_start(Workload& workload, int64_t finished_steps) {
  std::ostringstream text;
  text << finished_steps << " finished steps\n";
  for (const auto& item : workload.model().named_parameters()) {
    if (!item.value().requires_grad()) continue;  // the base is a part of the run's identity
    // A sum of integers: it does not depend on the number of threads.
    text << item.key() << item.value().sizes() << " with bytes that add up to "
         << item.value().detach().contiguous().view(torch::kByte).sum(torch::kLong).item<int64_t>() << '\n';
  }
  return text.str();
}

// All processes take part in saving a state that is divided; the first one writes it.
void save(const std::filesystem::path& path, const lora_rite::TrainingState& state, const Processes& processes) {
  if (processes.is_first()) return lora_rite::save_checkpoint(path, state);
  for (const torch::optim::Optimizer* optimizer : state.optimizers) {
    torch::serialize::OutputArchive unused;
    optimizer->save(unused);
  }
}

// Those of another run, which --overwrite replaces: its checkpoint must not be taken for one of this run.
void remove_files_of_a_run(const std::filesystem::path& folder) {
  std::filesystem::remove(folder / "checkpoint.pt");
  for (const auto& part : {folder, folder / "best"}) {
    for (const char* name : {"adapter_config.json", "adapter_model.safetensors", "head.safetensors"}) {
      std::filesystem::remove(part / name);
    }
  }
  std::error_code not_empty;
  std::filesystem::remove(folder / "best", not_empty);
}

// Whether the run there was begun with what this one has.
void check_identity(const std::filesystem::path& path, const RunIdentity& identity, Start start, std::ostream& out) {
  const RunDifference found = compare(identity, lora_rite::load_checkpoint_values(path));
  if (found.is_unknown) {
    // Refusing would end every run of before, and --resume-anyway could not look closer either.
    out << path.string() << ": does not say what the run was begun with (an older version wrote it), so nobody has "
        << "compared data, base and tokenizer; it goes on" << std::endl;
  } else if (!found.text.empty() && start == Start::ResumeAnyway) {
    out << path.string() << ": goes on with something else than it was begun with: " << found.text << std::endl;
  } else if (!found.text.empty()) {
    fail(path.string(), ": the run was begun with something else (", found.text,
         "); restore that, start a new run in another --out, or go on with what is there now by --resume-anyway");
  }
}

// What the library throws says what is wrong with the file; the way out is this program's to tell.
void resume_from(const std::filesystem::path& path, const RunIdentity& identity, Start start, std::ostream& out,
                 lora_rite::TrainingState& state) {
  try {
    check_identity(path, identity, start, out);
    lora_rite::load_checkpoint(path, state);
  } catch (const c10::Error& error) {
    fail(error.what_without_backtrace(), "; start the run anew, without --resume, in another --out");
  }
}

// The test's scores after the last step: those of the log if it was measured then.
Scores final_test(Workload& workload, const std::optional<MetricsLog>& log, const Processes& processes) {
  const Scores measured = log ? log->records().back().test : Scores();
  if (processes.any(!measured.empty())) return measured;
  return workload.has(Split::Test) ? workload.evaluate(Split::Test, processes) : Scores();
}

}  // namespace

Outcome run_training(const RunOptions& options, Workload& workload, Start start, const Display& display,
                     const Processes& processes) {
  if (options.batch < processes.size) {
    fail("--batch ", options.batch, ": ", processes.size,
         " processes share a batch; give each an example or start fewer");
  }
  const std::filesystem::path folder = options.out;
  const std::filesystem::path checkpoint = folder / "checkpoint.pt";
  const TrainingOptimizer training = make_optimizer(options, workload.model(), processes);
  std::vector<std::unique_ptr<lora_rite::WarmupScheduler>> schedulers;
  lora_rite::TrainingState state;
  state.tensors = lora_rite::trained_tensors(workload.model());
  for (const auto& optimizer : training.optimizers) {
    state.optimizers.push_back(optimizer.get());
    schedulers.push_back(make_scheduler(options, *optimizer));
    state.others.push_back(schedulers.back().get());
  }
  BestSoFar best(workload.headline(), state.values);
  const RunIdentity identity = workload.identity();
  processes.check_same(lines_of(identity));  // before any of them refuses to resume
  if (start != Start::Anew) resume_from(checkpoint, identity, start, display.out, state);
  remember(identity, state.values);
  if (processes.size > 1) processes.check_same(describe_start(workload, state.step));
  std::optional<MetricsLog> log;
  if (processes.is_first()) {
    if (start == Start::Anew) remove_files_of_a_run(folder);
    // Written once nothing can be wrong with the input any more: --resume believes in it.
    write_json(folder / "run.json", options);
    log.emplace(folder / "metrics.jsonl", state.step);
  }

  const bool validates = workload.has(Split::Validation);
  const auto is_due = [&](int64_t step) {
    const bool is_last = step == options.steps;
    return options.evaluate_every > 0 ? is_last || step % options.evaluate_every == 0 : is_last && validates;
  };
  const auto has_ended = [&] {
    return state.step == options.steps || (options.patience > 0 && best.measurements_since() >= options.patience);
  };
  ProgressBar progress(display.out, display.is_terminal, options.steps, options.log_every);
  const InterruptGuard interrupt;
  Stopwatch since_update(/*on_gpu=*/false);  // a step has been waited for by then
  workload.model().train();
  while (!has_ended() && !processes.any(interrupt.requested())) {
    at::manual_seed(dropout_seed(options.seed, state.step, processes.rank));
    StepRecord record = train_step(options, workload, training, workload.examples_of(state.step), processes);
    for (const auto& scheduler : schedulers) scheduler->step();
    record.step = ++state.step;
    std::string news;
    if (is_due(record.step) && validates) {
      record.validation = workload.evaluate(Split::Validation, processes);
      const bool is_best = best.take(record.validation, record.step);
      if (is_best && processes.is_first()) workload.save(folder / "best");
      news =
          concat("step ", record.step, ": validation ", show(record.validation), is_best ? " (the best so far)" : "");
    } else if (is_due(record.step) && workload.has(Split::Test)) {
      record.test = workload.evaluate(Split::Test, processes);
    }
    if (log) log->write(record);
    progress.update(record, since_update.milliseconds());
    since_update = Stopwatch(/*on_gpu=*/false);
    if (!news.empty()) {
      progress.finish();
      display.out << news << std::endl;
    }
    if (options.checkpoint_every > 0 && state.step % options.checkpoint_every == 0) {
      if (log) log->sync();  // a checkpoint with fewer lines of the log than steps would be refused
      save(checkpoint, state, processes);
    }
    if (display.after_step) display.after_step(record);
  }
  progress.finish();
  if (log) log->sync();
  save(checkpoint, state, processes);
  if (!has_ended()) return Outcome::Interrupted;

  if (log) workload.save(folder);  // before the test, which may still fail
  const Scores test = final_test(workload, log, processes);
  const double megabytes = state_megabytes(training);
  if (!log) return Outcome::Finished;
  nlohmann::ordered_json summary = summarize(options, workload, log->records(), processes);
  add_scores(summary, "test", test);
  if (validates) {
    summary["best_step"] = best.step();
    summary["best_validation_" + best.name()] = best.score();
    summary["stopped_early"] = state.step < options.steps;
  }
  summary["optimizer_state_mb"] = megabytes;
  summary["skipped_steps"] = training.skipped_steps();
  log->write_final(summary);
  show_result(summary, options, workload.headline(), test, display.out);
  return Outcome::Finished;
}

}  // namespace finetune
