#include "workloads/sentence_workload.hpp"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/cross_entropy_loss.h>

#include <algorithm>
#include <lora_rite/io/safetensors.hpp>
#include <nlohmann/json.hpp>
#include <utility>

#include "common/error.hpp"
#include "common/fingerprint.hpp"
#include "data/tokenize.hpp"
#include "evaluation/scores.hpp"

namespace finetune {
namespace {

// Large enough for full speed on a CPU, small enough for little padding.
constexpr int64_t kEvaluationBatch = 64;

// The ends of the names of every linear layer. "dense" alone would also hit the pooler that others' BERT has.
const std::vector<std::string> kLinearLayers = {
    "query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"};

// An option that would be ignored is a mistake.
void refuse_options_of_language_models(const RunOptions& options) {
  const auto refuse = [](const char* flag, bool is_given) {
    if (is_given) fail(flag, ": a sentence classifier (model_type bert) has no such option; leave it out");
  };
  refuse("--generate", options.generate != 0);
  refuse("--gradient-checkpointing", options.gradient_checkpointing);
  refuse("--dtype", options.dtype != "float32");
}

Batch batch_on_device(SentenceClassifier& model, const Dataset& data, const std::vector<int64_t>& indices) {
  const torch::Device device = model.head().weight.device();
  const Batch batch = make_batch(data, indices, model.bert().config().pad_token_id);
  return {batch.tokens.to(device), batch.mask.to(device), batch.labels.to(device)};
}

Fingerprint fingerprint(const Dataset& data) {
  Fingerprint result;
  for (const auto& sentence : data.tokens) result.add(sentence);
  result.add(data.labels);
  return result;
}

RunPart class_names_part(const std::vector<std::string>& classes, const std::string& origin) {
  Fingerprint result;
  for (const std::string& name : classes) result.add(name);
  return {"class names", origin, concat(classes.size(), " of fingerprint ", result.text()), true};
}

}  // namespace

void check_max_length(int64_t max_length, const BertConfig& config) {
  if (max_length > config.max_position_embeddings) {
    fail("--max-length ", max_length, ": the model has ", config.max_position_embeddings,
         " positions; choose at most that");
  }
}

Dataset tokenize_rows(const std::vector<LabelledText>& rows, const std::vector<std::string>& classes,
                      const std::filesystem::path& path, const TokenizerOptions& tokenizer, const BertConfig& config,
                      const std::filesystem::path& cache) {
  std::vector<std::string> texts;
  for (const LabelledText& row : rows) texts.push_back(row.text);
  std::vector<int64_t> labels = index_labels(rows, classes, path);
  return {tokenize(texts, tokenizer, config.vocab_size, cache), std::move(labels)};
}

TaskData load_task(const RunOptions& options, const BertConfig& config) {
  if (options.test.empty()) fail("--test is missing: a sentence classifier is measured; see finetune train --help");
  const std::vector<LabelledText> train = read_tsv(options.train);
  TaskData task;
  task.classes = find_classes(train, options.train);
  const auto load = [&](const std::vector<LabelledText>& rows, const std::string& path, const char* cache) {
    return tokenize_rows(rows, task.classes, path, {options.model, options.max_length, options.python}, config,
                         std::filesystem::path(options.out) / cache);
  };
  const std::vector<LabelledText> test = read_tsv(options.test);
  const auto validation = options.validation.empty() ? std::vector<LabelledText>() : read_tsv(options.validation);
  task.train = load(train, options.train, "train.tokens");
  task.test = load(test, options.test, "test.tokens");
  if (!validation.empty()) task.validation = load(validation, options.validation, "validation.tokens");
  return task;
}

Scores evaluate(SentenceClassifier& model, const Dataset& data, const Processes& processes) {
  const at::NoGradGuard no_grad;
  const bool was_training = model.is_training();
  model.eval();
  double loss = 0;
  int64_t correct = 0;
  const auto batches = batches_by_length(data, kEvaluationBatch);
  // One after another, because batches of long sentences take longer.
  for (auto index = static_cast<size_t>(processes.rank); index < batches.size(); index += processes.size) {
    const Batch batch = batch_on_device(model, data, batches[index]);
    const torch::Tensor logits = model.forward(batch.tokens, batch.mask);  // [batch, classes]
    loss += at::cross_entropy_loss(logits, batch.labels, {}, at::Reduction::Sum).item<double>();
    correct += logits.argmax(1).eq(batch.labels).sum().item<int64_t>();
  }
  model.train(was_training);
  const std::vector<double> sums = processes.sum({loss, static_cast<double>(correct)});
  const auto count = static_cast<double>(data.size());
  const double accuracy = sums[1] / count;
  return {{"accuracy", accuracy}, {"accuracy_error", standard_error(accuracy, data.size())}, {"loss", sums[0] / count}};
}

void save_head(const std::filesystem::path& path, const torch::nn::LinearImpl& head,
               const std::vector<std::string>& classes) {
  lora_rite::save_safetensors(path, {{"weight", head.weight}, {"bias", head.bias}},
                              {{"labels", nlohmann::json(classes).dump()}});
}

SentenceWorkload::SentenceWorkload(RunOptions options, std::shared_ptr<BertModel> base, TaskData task)
    : options_(std::move(options)), task_(std::move(task)), order_(task_.train.size(), options_.batch, options_.seed) {
  refuse_options_of_language_models(options_);
  base_ = base_identity(*base, options_.model);  // before a PiSSA start takes its part of the weights
  base->to(torch::Device(options_.device));
  add_adapters(*base, options_, lora_config(options_, kLinearLayers));
  model_ = std::make_shared<SentenceClassifier>(std::move(base), static_cast<int64_t>(task_.classes.size()));
  model_->to(torch::Device(options_.device));
}

int64_t SentenceWorkload::tokens(const std::vector<int64_t>& examples) const {
  int64_t count = 0;
  for (const int64_t index : examples) count += static_cast<int64_t>(task_.train.tokens[index].size());
  return count;
}

torch::Tensor SentenceWorkload::loss_sum(const std::vector<int64_t>& examples) {
  const Batch batch = batch_on_device(*model_, task_.train, examples);
  return at::cross_entropy_loss(model_->forward(batch.tokens, batch.mask), batch.labels, {}, at::Reduction::Sum);
}

Scores SentenceWorkload::evaluate(Split split, const Processes& processes) {
  return finetune::evaluate(*model_, data(split), processes);
}

void SentenceWorkload::save(const std::filesystem::path& folder) const {
  save_adapter_of(model_->bert(), options_, "FEATURE_EXTRACTION", folder);
  save_head(folder / kHeadFile, model_->head(), task_.classes);
}

nlohmann::json SentenceWorkload::summary() const {
  nlohmann::json result = {{"train_examples", task_.train.size()},
                           {"test_examples", task_.test.size()},
                           {"classes", task_.classes},
                           {"head_lr", options_.head_lr}};
  if (task_.validation.size() > 0) result["validation_examples"] = task_.validation.size();
  return result;
}

std::string SentenceWorkload::title() const {
  return concat(task_.train.size(), " examples, ", task_.classes.size(), " classes");
}

RunIdentity SentenceWorkload::identity() const {
  RunIdentity identity = base_;
  identity.push_back(class_names_part(task_.classes, options_.train));
  const auto add = [&](const char* name, const std::string& origin, const Dataset& data) {
    identity.push_back(data_part(name, origin, data.size(), fingerprint(data)));
  };
  add("training data", options_.train, task_.train);
  add("validation data", options_.validation, task_.validation);
  add("test data", options_.test, task_.test);
  return identity;
}

std::unique_ptr<Workload> load_sentence_workload(const RunOptions& options, const Processes& processes) {
  refuse_options_of_language_models(options);
  const BertConfig config = BertConfig::from_file(std::filesystem::path(options.model) / "config.json");
  check_max_length(options.max_length, config);
  TaskData task;
  processes.first_alone([&] { task = load_task(options, config); });  // the others find its tokens
  MemoryQuestion question;
  question.lora = lora_config(options, kLinearLayers);
  question.classes = static_cast<int64_t>(task.classes.size());
  for (const auto& sentence : task.train.tokens) {
    question.length = std::max(question.length, static_cast<int64_t>(sentence.size()));
  }
  check_it_fits(options, question, processes);
  return std::make_unique<SentenceWorkload>(options, load_bert(options.model), std::move(task));
}

}  // namespace finetune
