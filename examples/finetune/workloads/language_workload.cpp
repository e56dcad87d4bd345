#include "workloads/language_workload.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "common/dtypes.hpp"
#include "common/error.hpp"
#include "common/fingerprint.hpp"
#include "evaluation/evaluate.hpp"
#include "models/config.hpp"
#include "models/load_model.hpp"

namespace finetune {
namespace {

constexpr const char* kNaturalLayers = "all-linear";

// An option that would be ignored is a mistake.
void refuse_options_of_classifiers(const RunOptions& options) {
  const RunOptions usual;
  const auto refuse = [](const char* flag, const char* reason, bool is_given) {
    if (is_given) fail(flag, ": a language model has no such option (", reason, "); leave it out");
  };
  refuse("--head-lr", "nothing but the adapters is trained", options.head_lr != usual.head_lr);
  refuse("--max-length", "prepare_tasks.py cuts the texts", options.max_length != usual.max_length);
}

Fingerprint fingerprint(const std::string& task, const std::vector<TextRecord>& texts,
                        const std::vector<ChoiceRecord>& choices) {
  Fingerprint result;
  result.add(task);  // it decides what is scored
  for (const TextRecord& record : texts) {
    result.add(record.prompt);
    result.add(record.completion);
    for (const std::string& reference : record.references) result.add(reference);
  }
  for (const ChoiceRecord& record : choices) {
    for (const auto& prompt : record.prompts) result.add(prompt);
    for (const auto& choice : record.choices) result.add(choice);
    result.add(record.characters);
    result.add(record.bytes);
    result.add(record.answer);
  }
  return result;
}

}  // namespace

TaskReading reading_of(const std::filesystem::path& config) {
  const std::string type = read_model_type(config);
  if (type == "t5" || type == "mt5") return {T5Config::from_file(config).vocab_size, /*encoder_decoder=*/true};
  return {DecoderConfig::from_file(config).vocab_size, /*encoder_decoder=*/false};
}

LanguageData load_language_data(const RunOptions& options, const TaskReading& reading) {
  auto train = read_text_records(options.train, reading);
  LanguageData data{train.task, std::move(train.records), {}, {}};
  if (!options.validation.empty()) data.validation = read_language_test(options.validation, reading);
  if (!options.test.empty()) data.test = read_language_test(options.test, reading);
  if (options.generate > 0 && data.test.has_choices()) {
    fail("--generate ", options.generate, ": ", options.test,
         " has choices, after which there is nothing to write; leave it out, or make the file with --for train");
  }
  return data;
}

LanguageWorkload::LanguageWorkload(RunOptions options, std::shared_ptr<LanguageModel> model, LanguageData data)
    : options_(std::move(options)),
      data_(std::move(data)),
      buckets_(record_lengths(data_.train, model->is_encoder_decoder()), options_.batch, options_.seed),
      model_(std::move(model)) {
  refuse_options_of_classifiers(options_);
  base_ = base_identity(*model_, options_.model);  // before a PiSSA start takes its part of the weights
  model_->to(torch::Device(options_.device));
  add_adapters(*model_, options_, lora_config(options_, kNaturalLayers));
  model_->set_gradient_checkpointing(options_.gradient_checkpointing);
}

double LanguageWorkload::weight(const std::vector<int64_t>& examples) const {
  size_t count = 0;
  for (const int64_t index : examples) count += data_.train[index].completion.size();
  return static_cast<double>(count);
}

int64_t LanguageWorkload::tokens(const std::vector<int64_t>& examples) const {
  size_t count = 0;
  for (const int64_t index : examples) count += data_.train[index].prompt.size() + data_.train[index].completion.size();
  return static_cast<int64_t>(count);
}

torch::Tensor LanguageWorkload::loss_sum(const std::vector<int64_t>& examples) {
  return completion_loss(*model_, make_language_batch(data_.train, examples, model_->is_encoder_decoder(),
                                                      model_->special_tokens(), device_of(*model_)));
}

Scores LanguageWorkload::evaluate(Split split, const Processes& processes) {
  // As many rows as in training: they are known to fit.
  const int64_t batch = rows_at_once(options_, processes);
  Scores scores = measure(*model_, data(split), batch, processes);
  if (split == Split::Test && options_.generate > 0) {
    const TokenizerOptions tokenizer{options_.model, options_.max_length, options_.python};
    const Scores written = measure_generation(*model_, data_.test, batch, options_.generate, tokenizer,
                                              std::filesystem::path(options_.out) / "generated", processes);
    scores.insert(scores.end(), written.begin(), written.end());
  }
  return scores;
}

Headline LanguageWorkload::headline() const {
  if (data_.validation.has_choices()) return {"acc", /*higher_is_better=*/true};
  return {"loss", /*higher_is_better=*/false};
}

void LanguageWorkload::save(const std::filesystem::path& folder) const {
  save_adapter_of(*model_, options_, model_->is_encoder_decoder() ? "SEQ_2_SEQ_LM" : "CAUSAL_LM", folder);
}

nlohmann::json LanguageWorkload::summary() const {
  nlohmann::json result = {{"task", data_.task}, {"train_examples", data_.train.size()}, {"dtype", options_.dtype}};
  if (has(Split::Validation)) result["validation_examples"] = data_.validation.size();
  if (has(Split::Test)) result["test_examples"] = data_.test.size();
  return result;
}

std::string LanguageWorkload::title() const { return concat(data_.train.size(), " examples of ", data_.task); }

RunIdentity LanguageWorkload::identity() const {
  RunIdentity identity = base_;
  identity.push_back(data_part("training data", options_.train, static_cast<int64_t>(data_.train.size()),
                               fingerprint(data_.task, data_.train, {})));
  const auto add = [&](const char* name, const std::string& origin, const LanguageTest& test) {
    identity.push_back(data_part(name, origin, test.size(), fingerprint(test.task, test.texts, test.choices)));
  };
  add("validation data", options_.validation, data_.validation);
  add("test data", options_.test, data_.test);
  return identity;
}

std::unique_ptr<Workload> load_language_workload(const RunOptions& options, const Processes& processes) {
  refuse_options_of_classifiers(options);
  const TaskReading reading = reading_of(std::filesystem::path(options.model) / "config.json");
  LanguageData data = load_language_data(options, reading);
  MemoryQuestion question;
  question.dtype = parse_dtype("--dtype", options.dtype);
  question.lora = lora_config(options, kNaturalLayers);
  for (const TextRecord& record : data.train) {
    const auto prompt = static_cast<int64_t>(record.prompt.size());
    const auto completion = static_cast<int64_t>(record.completion.size());
    question.length = std::max(question.length, reading.encoder_decoder ? prompt : prompt + completion);
    question.completion = std::max(question.completion, completion);
  }
  check_it_fits(options, question, processes);
  if (options.generate > 0) {  // rather now than after the training
    const std::filesystem::path scratch = std::filesystem::path(options.out) / concat("tried.", processes.rank);
    decode_tokens({{0}}, {options.model, options.max_length, options.python}, scratch);
  }
  return std::make_unique<LanguageWorkload>(options, load_model(options.model, question.dtype), std::move(data));
}

}  // namespace finetune
