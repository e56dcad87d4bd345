#include "training/trainer.hpp"

#include <algorithm>
#include <lora_rite/checkpoint.hpp>
#include <nlohmann/json.hpp>
#include <optional>
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
#include "training/stopwatch.hpp"
#include "training/train_step.hpp"

namespace finetune {
namespace {

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

// One call of run_training.
class Run {
 public:
  // Begins the run or goes on with it: afterwards everything stands as it did after the last finished step.
  Run(const RunOptions& options, Workload& workload, Start start, const Display& display, const Processes& processes)
      : options_(options),
        workload_(workload),
        display_(display),
        processes_(processes),
        training_(make_optimizer(options, workload.model(), processes)),
        best_(workload.headline(), state_.values),
        validates_(workload.has(Split::Validation)),
        progress_(display.out, display.is_terminal, options.steps, options.log_every) {
    state_.tensors = lora_rite::trained_tensors(workload_.model());
    for (const auto& optimizer : training_.optimizers) {
      state_.optimizers.push_back(optimizer.get());
      schedulers_.push_back(make_scheduler(options_, *optimizer));
      state_.others.push_back(schedulers_.back().get());
    }
    const RunIdentity identity = workload_.identity();
    processes_.check_same(lines_of(identity));  // before any of them refuses to resume
    if (start != Start::Anew) resume_from(checkpoint_, identity, start, display_.out, state_);
    remember(identity, state_.values);
    if (processes_.size > 1) processes_.check_same(describe_start(workload_, state_.step));
    if (processes_.is_first()) open_log(start);
  }

  Outcome train() {
    const InterruptGuard interrupt;
    Stopwatch since_update(/*on_gpu=*/false);  // a step has been waited for by then
    workload_.model().train();
    while (!has_ended() && !processes_.any(interrupt.requested())) {
      at::manual_seed(dropout_seed(options_.seed, state_.step, processes_.rank));
      StepRecord record = train_step(options_, workload_, training_, workload_.examples_of(state_.step), processes_);
      for (const auto& scheduler : schedulers_) scheduler->step();
      record.step = ++state_.step;
      const std::string news = measure(record);
      if (log_) log_->write(record);
      progress_.update(record, since_update.milliseconds());
      since_update = Stopwatch(/*on_gpu=*/false);
      if (!news.empty()) {
        progress_.finish();
        display_.out << news << std::endl;
      }
      if (options_.checkpoint_every > 0 && state_.step % options_.checkpoint_every == 0) write_checkpoint();
      if (display_.after_step) display_.after_step(record);
    }
    progress_.finish();
    write_checkpoint();
    if (!has_ended()) return Outcome::Interrupted;
    finish();
    return Outcome::Finished;
  }

 private:
  void open_log(Start start) {
    if (start == Start::Anew) remove_files_of_a_run(folder_);
    // Written once nothing can be wrong with the input any more: --resume believes in it.
    write_json(folder_ / "run.json", options_);
    log_.emplace(folder_ / "metrics.jsonl", state_.step);
  }

  bool has_ended() const {
    return state_.step == options_.steps || (options_.patience > 0 && best_.measurements_since() >= options_.patience);
  }

  bool is_due(int64_t step) const {
    const bool is_last = step == options_.steps;
    return options_.evaluate_every > 0 ? is_last || step % options_.evaluate_every == 0 : is_last && validates_;
  }

  // Measures where that is due, writes the best adapter, and returns what to tell: nothing as a rule.
  std::string measure(StepRecord& record) {
    if (!is_due(record.step)) return {};
    if (!validates_) {
      if (workload_.has(Split::Test)) record.test = workload_.evaluate(Split::Test, processes_);
      return {};
    }
    record.validation = workload_.evaluate(Split::Validation, processes_);
    const bool is_best = best_.take(record.validation, record.step);
    if (is_best && processes_.is_first()) workload_.save(folder_ / "best");
    return concat("step ", record.step, ": validation ", show(record.validation), is_best ? " (the best so far)" : "");
  }

  void write_checkpoint() {
    if (log_) log_->sync();  // a checkpoint with fewer lines of the log than steps would be refused
    save(checkpoint_, state_, processes_);
  }

  // The adapter, the test and the summary, after the last step.
  void finish() {
    if (log_) workload_.save(folder_);  // before the test, which may still fail
    const Scores test = final_test(workload_, log_, processes_);
    const double megabytes = state_megabytes(training_);
    if (!log_) return;
    nlohmann::ordered_json summary = summarize(options_, workload_, log_->records(), processes_);
    add_scores(summary, "test", test);
    if (validates_) {
      summary["best_step"] = best_.step();
      summary["best_validation_" + best_.name()] = best_.score();
      summary["stopped_early"] = state_.step < options_.steps;
    }
    summary["optimizer_state_mb"] = megabytes;
    summary["skipped_steps"] = training_.skipped_steps();
    log_->write_final(summary);
    show_result(summary, options_, workload_.headline(), test, display_.out);
  }

  const RunOptions& options_;
  Workload& workload_;
  const Display& display_;
  const Processes& processes_;
  const std::filesystem::path folder_ = options_.out;
  const std::filesystem::path checkpoint_ = folder_ / "checkpoint.pt";
  const TrainingOptimizer training_;
  std::vector<std::unique_ptr<lora_rite::WarmupScheduler>> schedulers_;
  lora_rite::TrainingState state_;
  BestSoFar best_;  // its numbers are in the state's values
  const bool validates_;
  std::optional<MetricsLog> log_;  // of the first process
  ProgressBar progress_;
};

}  // namespace

Outcome run_training(const RunOptions& options, Workload& workload, Start start, const Display& display,
                     const Processes& processes) {
  if (options.batch < processes.size) {
    fail("--batch ", options.batch, ": ", processes.size,
         " processes share a batch; give each an example or start fewer");
  }
  return Run(options, workload, start, display, processes).train();
}

}  // namespace finetune
