#include "trainer.hpp"

#include <algorithm>
#include <chrono>
#include <lora_rite/checkpoint.hpp>
#include <lora_rite/distributed.hpp>
#include <lora_rite/nn/inject.hpp>
#include <lora_rite/schedulers.hpp>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <sstream>
#include <utility>

#include "error.hpp"
#include "interrupt.hpp"
#include "optimizers.hpp"
#include "peft_adapter.hpp"
#include "progress.hpp"
#include "tokenize.hpp"

namespace finetune {
namespace {

class Stopwatch {
 public:
  double milliseconds() const {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

Dataset tokenize_rows(const std::vector<LabelledText>& rows, const std::vector<std::string>& classes,
                      const std::string& path, const RunOptions& options, const BertConfig& config,
                      const std::string& cache) {
  std::vector<std::string> texts;
  for (const LabelledText& row : rows) texts.push_back(row.text);
  const TokenizerOptions tokenizer{options.model, options.max_length, options.python};
  return {tokenize(texts, tokenizer, config.vocab_size, std::filesystem::path(options.out) / cache),
          index_labels(rows, classes, path)};
}

StepRecord train_step(SentenceClassifier& model, const TrainingOptimizer& training, const Dataset& data,
                      const std::vector<int64_t>& indices, const Processes& processes) {
  StepRecord record;
  const Stopwatch step;
  record.lr = training.optimizers[0]->param_groups()[0].options().get_lr();
  const std::vector<int64_t> own = processes.part_of(indices);
  const Batch batch = make_batch(data, own, model.bert().config().pad_token_id);
  // 1 where the parts are equal; otherwise it makes the mean over the processes the mean over the examples.
  const double weight = static_cast<double>(own.size()) * processes.size / static_cast<double>(indices.size());
  const torch::Tensor loss = at::cross_entropy_loss(model.forward(batch.tokens, batch.mask), batch.labels) * weight;
  model.zero_grad();
  loss.backward();
  if (processes.size > 1) {
    for (const auto& optimizer : training.optimizers) lora_rite::average_gradients(*optimizer, processes.group);
  }
  const Stopwatch optimizer_step;
  for (const auto& optimizer : training.optimizers) optimizer->step();
  record.ms_optimizer = optimizer_step.milliseconds();
  record.loss = processes.sum({loss.item<double>()})[0] / processes.size;
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

// FNV-1a: it has to notice mistakes only.
uint64_t fingerprint(const Dataset& data) {
  uint64_t hash = 0xcbf29ce484222325;
  const auto add = [&](int64_t number) { hash = (hash ^ static_cast<uint64_t>(number)) * 0x100000001b3; };
  for (const auto& sentence : data.tokens) {
    add(-1);
    for (const int64_t token : sentence) add(token);
  }
  for (const int64_t label : data.labels) add(label);
  return hash;
}

// What all processes start from.
std::string describe_start(const TaskData& task, const SentenceClassifier& model, int64_t finished_steps) {
  std::ostringstream text;
  text << finished_steps << " finished steps\n";
  for (const auto& [name, data] : {std::pair("training", &task.train), std::pair("test", &task.test)})
    text << data->size() << ' ' << name << " examples of fingerprint " << fingerprint(*data) << '\n';
  for (const auto& item : model.named_parameters()) {
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

// The median is not moved by the first steps, which warm up caches, nor by other programs' bursts.
double median(const std::vector<StepRecord>& records, double StepRecord::*field) {
  std::vector<double> values;
  for (const StepRecord& record : records) values.push_back(record.*field);
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

nlohmann::json summarize(const RunOptions& options, const TaskData& task, const SentenceClassifier& model,
                         const std::vector<StepRecord>& records, const Evaluation& test, int processes) {
  int64_t trainable = 0;
  for (const torch::Tensor& parameter : model.parameters()) {
    if (parameter.requires_grad()) trainable += parameter.numel();
  }
  const double ms_step = median(records, &StepRecord::ms_step);
  const double ms_optimizer = median(records, &StepRecord::ms_optimizer);
  return {{"final", true},
          {"optimizer", options.optimizer},
          {"lr", options.lr},
          {"head_lr", options.head_lr},
          {"init_scale", options.init_scale},
          {"rank", options.rank},
          {"alpha", options.alpha},
          {"seed", options.seed},
          {"steps", options.steps},
          {"batch", options.batch},
          {"threads", at::get_num_threads()},
          {"processes", processes},
          {"train_examples", task.train.size()},
          {"test_examples", task.test.size()},
          {"classes", task.classes},
          {"trainable_parameters", trainable},
          {"test_accuracy", test.accuracy},
          {"test_accuracy_error", test.accuracy_error},
          {"test_loss", test.loss},
          {"ms_per_step", ms_step},
          {"ms_optimizer", ms_optimizer},
          {"optimizer_share", ms_optimizer / ms_step}};
}

// What the library throws says what is wrong with the file; the way out is this program's to tell.
void resume_from(const std::filesystem::path& path, lora_rite::TrainingState& state) {
  try {
    lora_rite::load_checkpoint(path, state);
  } catch (const c10::Error& error) {
    fail(error.what_without_backtrace(), "; start the run anew, without --resume, in another --out");
  }
}

}  // namespace

TaskData load_task(const RunOptions& options, const BertConfig& config) {
  const std::vector<LabelledText> train = read_tsv(options.train);
  const std::vector<LabelledText> test = read_tsv(options.test);
  TaskData task;
  task.classes = find_classes(train, options.train);
  task.train = tokenize_rows(train, task.classes, options.train, options, config, "train.tokens");
  task.test = tokenize_rows(test, task.classes, options.test, options, config, "test.tokens");
  return task;
}

std::shared_ptr<SentenceClassifier> make_classifier(const RunOptions& options, std::shared_ptr<BertModel> base,
                                                    int64_t classes) {
  at::manual_seed(options.seed);
  lora_rite::nn::inject_lora(*base, adapter_of(options));
  auto model = std::make_shared<SentenceClassifier>(std::move(base), classes);
  const at::NoGradGuard no_grad;
  for (auto& item : model->named_parameters()) {
    if (item.key().find(".lora_A.") != std::string::npos) item.value().mul_(options.init_scale);
  }
  return model;
}

Outcome run_training(const RunOptions& options, SentenceClassifier& model, const TaskData& task, bool resume,
                     const Display& display, const Processes& processes) {
  if (options.batch < processes.size) {
    fail("--batch ", options.batch, ": ", processes.size,
         " processes share a batch; give each an example or start fewer");
  }
  const std::filesystem::path folder = options.out;
  const std::filesystem::path checkpoint = folder / "checkpoint.pt";
  const TrainingOptimizer training = make_optimizer(options, model, processes);
  std::vector<lora_rite::WarmupLinear> schedulers;
  for (const auto& optimizer : training.optimizers) schedulers.emplace_back(*optimizer, options.warmup, options.steps);
  lora_rite::TrainingState state;
  state.tensors = lora_rite::trained_tensors(model);
  for (const auto& optimizer : training.optimizers) state.optimizers.push_back(optimizer.get());
  for (lora_rite::WarmupLinear& scheduler : schedulers) state.others.push_back(&scheduler);
  if (resume) resume_from(checkpoint, state);
  if (processes.size > 1) processes.check_same(describe_start(task, model, state.step));
  std::optional<MetricsLog> log;
  if (processes.is_first()) log.emplace(folder / "metrics.jsonl", state.step);

  BatchOrder order(task.train.size(), options.batch, options.seed);
  ProgressBar progress(display.out, display.is_terminal, options.steps, options.log_every);
  const InterruptGuard interrupt;
  model.train();
  while (state.step < options.steps && !processes.any(interrupt.requested())) {
    at::manual_seed(dropout_seed(options.seed, state.step, processes.rank));
    StepRecord record = train_step(model, training, task.train, order.indices(state.step), processes);
    for (lora_rite::WarmupLinear& scheduler : schedulers) scheduler.step();
    record.step = ++state.step;
    if (options.evaluate_every > 0 && (state.step % options.evaluate_every == 0 || state.step == options.steps)) {
      record.test = evaluate(model, task.test, processes);
    }
    if (log) log->write(record);
    progress.update(record);
    if (options.checkpoint_every > 0 && state.step % options.checkpoint_every == 0) save(checkpoint, state, processes);
    if (display.after_step) display.after_step(record);
  }
  progress.finish();
  save(checkpoint, state, processes);
  if (state.step < options.steps) return Outcome::Interrupted;

  const std::optional<Evaluation> last = log ? log->records().back().test : std::nullopt;
  const bool is_measured = processes.any(last.has_value());
  const Evaluation test = is_measured ? last.value_or(Evaluation()) : evaluate(model, task.test, processes);
  const double megabytes = state_megabytes(training);
  if (!log) return Outcome::Finished;

  save_adapter(folder, model.bert(), adapter_of(options), options.model);
  save_head(folder / "head.safetensors", model.head(), task.classes);
  nlohmann::json summary = summarize(options, task, model, log->records(), test, processes.size);
  summary["optimizer_state_mb"] = megabytes;
  summary["skipped_steps"] = training.skipped_steps();
  log->write_final(summary);
  display.out << "test accuracy " << fixed(100 * test.accuracy, 1) << " % (± " << fixed(100 * test.accuracy_error, 1)
              << "), test loss " << fixed(test.loss, 4) << "; " << fixed(summary["ms_per_step"], 0)
              << " ms/step, of which the optimizer " << fixed(summary["ms_optimizer"], 1) << " ms; optimizer state "
              << fixed(summary["optimizer_state_mb"], 2) << " MB\n";
  return Outcome::Finished;
}

}  // namespace finetune
