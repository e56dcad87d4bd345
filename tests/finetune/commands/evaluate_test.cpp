#include "commands/evaluate.hpp"

#include <algorithm>
#include <cmath>
#include <lora_rite/io/safetensors.hpp>
#include <nlohmann/json.hpp>
#include <sstream>

#include "adapters/adapted_model.hpp"
#include "commands/merge.hpp"
#include "common/files.hpp"
#include "evaluation/evaluate.hpp"
#include "finetune/python.hpp"
#include "support.hpp"
#include "task_files.hpp"
#include "workloads/sentence_workload.hpp"

namespace finetune {
namespace {

namespace fs = std::filesystem;
using lora_rite::test::read_bytes;
using lora_rite::test::write_bytes;

nlohmann::json evaluated(const EvaluateOptions& options) {
  std::ostringstream ignored;
  return evaluate_model(options, ignored);
}

TEST(Evaluate, LanguageModelsScoreWhatTheFunctionsOfTheTasksSay) {
  for (const std::string name : {"llama", "t5"}) {
    for (const bool adapted : {false, true}) {
      const TemporaryFolder folder;
      const auto model = adapted ? adapted_golden(name) : load_model(model_golden(name));
      const bool encoder_decoder = model->is_encoder_decoder();
      const std::vector<TextRecord> texts = tiny_texts(10, 4);
      const std::vector<ChoiceRecord> choices = tiny_choices();
      write_texts(folder / "texts.jsonl", texts, encoder_decoder);
      write_choices(folder / "choices.jsonl", choices, encoder_decoder);
      EvaluateOptions options;
      options.model = model_golden(name);
      if (adapted) options.adapter = save_golden_adapter(name, folder / "adapter");
      options.data = {folder / "texts.jsonl", folder / "choices.jsonl"};
      options.batch = 4;
      options.out = folder / "scores.json";
      const nlohmann::json report = evaluated(options);
      EXPECT_EQ(read_json(folder / "scores.json"), report);
      EXPECT_EQ(report["adapter"].is_null(), !adapted);
      ASSERT_EQ(report["results"].size(), 2U);

      const CompletionLoss loss = evaluate_completions(*model, texts, 4);
      EXPECT_EQ(report["results"][0]["loss"], loss.loss);
      EXPECT_EQ(report["results"][0]["perplexity"], loss.perplexity);
      EXPECT_EQ(report["results"][0]["task"], "gsm8k");
      EXPECT_EQ(report["results"][0]["examples"], 10);
      const ChoiceScores scores = score_choices(choices, choice_log_likelihoods(*model, choices, 4));
      EXPECT_EQ(report["results"][1]["acc"], scores.acc);
      EXPECT_EQ(report["results"][1]["acc_error"], scores.acc_error);
      EXPECT_EQ(report["results"][1]["acc_norm"], scores.acc_norm);
      EXPECT_EQ(report["results"][1]["acc_bytes"], scores.acc_bytes);
      EXPECT_EQ(report["results"][1]["acc_bytes_error"], scores.acc_bytes_error);
      if (adapted) {
        options.adapter.clear();
        EXPECT_GT(std::abs(evaluated(options)["results"][0]["loss"].get<double>() - loss.loss), 1e-2)
            << "the adapter has an effect";
      }
    }
  }
}

TEST(Evaluate, GeneratedTextsAreScoredAndKept) {
  const TemporaryFolder folder;
  const auto model = load_model(model_golden("llama"));
  std::vector<TextRecord> records = tiny_texts(6, 4);
  const auto ids = generate_completions(*model, records, 16, 3);
  std::vector<std::string> texts;
  for (size_t i = 0; i < ids.size(); ++i) {
    std::string& text = texts.emplace_back();
    for (const int64_t id : ids[i]) text += std::to_string(id) + " ";
    if (i < 2) records[i].references = {text};  // these are right
  }
  write_texts(folder / "texts.jsonl", records, false);
  EvaluateOptions options;
  options.model = model_golden("llama");
  options.data = {folder / "texts.jsonl"};
  options.generate = 3;
  options.texts = folder / "written.jsonl";
  options.python = write_interpreter(folder / "python3").string();
  const nlohmann::json result = evaluated(options)["results"][0];
  const TextScores expected = score_texts(records, texts, stops_of("gsm8k"));
  EXPECT_GE(expected.exact_match, 2.0 / 6);
  EXPECT_EQ(result["rouge_l"], expected.rouge_l);
  EXPECT_EQ(result["exact_match"], expected.exact_match);
  EXPECT_EQ(result["strict_number"], expected.strict_number);
  EXPECT_EQ(result["flexible_number"], expected.flexible_number);
  std::istringstream lines(read_bytes(folder / "written.jsonl"));
  size_t count = 0;
  for (std::string line; std::getline(lines, line); ++count) {
    const nlohmann::json entry = nlohmann::json::parse(line);
    EXPECT_EQ(entry["record"], count);
    EXPECT_EQ(entry["text"], texts.at(count));
  }
  EXPECT_EQ(count, texts.size());
}

TEST(Evaluate, BFloat16IsThatOfTheModelInBFloat16) {
  const TemporaryFolder folder;
  const std::vector<TextRecord> texts = tiny_texts(10, 4);
  write_texts(folder / "texts.jsonl", texts, false);
  EvaluateOptions options;
  options.model = model_golden("llama");
  options.data = {folder / "texts.jsonl"};
  options.dtype = "bfloat16";
  const auto model = load_model(model_golden("llama"), torch::kBFloat16);
  const double loss = evaluate_completions(*model, texts, 16).loss;
  EXPECT_EQ(evaluated(options)["results"][0]["loss"], loss);
  options.dtype = "float32";
  EXPECT_NE(evaluated(options)["results"][0]["loss"], loss);
}

// A classifier of the tiny BERT as a run leaves it, and its data as a TSV file of token ids.
class EvaluateClassifier : public ::testing::Test {
 protected:
  EvaluateClassifier() {
    fs::copy(golden("tiny"), folder_ / "base");
    write_bytes(folder_ / "base/tokenizer.json", "{}");
    RunOptions run = tiny_options((folder_ / "run").string(), "rite");
    fs::create_directories(run.out);
    workload_ = tiny_workload(run);
    torch::manual_seed(3);
    const torch::NoGradGuard no_grad;
    for (const auto& parameter : workload_->model().named_parameters()) {
      if (parameter.key().find("lora_B") != std::string::npos) parameter.value().normal_(0, 0.3);
    }
    workload_->save(folder_ / "run");
    std::string rows;
    for (int64_t i = 0; i < data_.size(); ++i) {
      rows += data_.labels[i] == 1 ? "yes\t" : "no\t";
      for (const int64_t token : data_.tokens[i]) rows += std::to_string(token) + " ";
      rows += "\n";
    }
    write_bytes(folder_ / "test.tsv", rows);
    options_.model = folder_ / "base";
    options_.adapter = folder_ / "run";
    options_.data = {folder_ / "test.tsv"};
    options_.max_length = 16;
    options_.python = write_interpreter(folder_ / "python3").string();
  }

  TemporaryFolder folder_;
  Dataset data_ = tiny_dataset(90, 6);
  std::unique_ptr<Workload> workload_;
  EvaluateOptions options_;
};

TEST_F(EvaluateClassifier, ScoresAreThoseOfTheTrainedModel) {
  const nlohmann::json result = evaluated(options_)["results"][0];
  const Scores expected = evaluate(dynamic_cast<SentenceWorkload&>(*workload_).model(), data_);
  EXPECT_EQ(result["examples"], 90);
  for (const auto& [name, value] : expected) EXPECT_EQ(result[name], value) << name;
}

TEST_F(EvaluateClassifier, AccuracyAndLossAreThoseOfTheLogits) {
  const nlohmann::json result = evaluated(options_)["results"][0];
  SentenceClassifier& model = dynamic_cast<SentenceWorkload&>(*workload_).model();
  model.eval();
  const torch::NoGradGuard no_grad;
  double loss = 0;
  int64_t right = 0;
  for (int64_t i = 0; i < data_.size(); ++i) {  // each alone
    const torch::Tensor tokens = torch::tensor(data_.tokens[i], torch::kLong).unsqueeze(0);
    const torch::Tensor logits = model.forward(tokens, torch::ones_like(tokens, torch::kBool))[0].to(torch::kDouble);
    const int64_t label = data_.labels[i];
    const double own = logits[label].item<double>(), other = logits[1 - label].item<double>();
    loss += std::log1p(std::exp(other - own));
    right += own > other;
  }
  const auto count = static_cast<double>(data_.size());
  const double accuracy = static_cast<double>(right) / count;
  EXPECT_GT(right, 0);
  EXPECT_LT(right, data_.size());
  EXPECT_DOUBLE_EQ(result["accuracy"], accuracy);
  EXPECT_DOUBLE_EQ(result["accuracy_error"], std::sqrt(accuracy * (1 - accuracy) / count));
  EXPECT_NEAR(result["loss"].get<double>(), loss / count, 1e-5);  // padding: sums in another order
}

TEST_F(EvaluateClassifier, TextsAreCutToMaxLength) {
  SentenceClassifier& model = dynamic_cast<SentenceWorkload&>(*workload_).model();
  Dataset cut = data_;
  for (std::vector<int64_t>& tokens : cut.tokens) tokens.resize(std::min<size_t>(tokens.size(), 4));
  ASSERT_NE(evaluate(model, cut), evaluate(model, data_)) << "the rest matters";
  options_.max_length = 4;
  const nlohmann::json result = evaluated(options_)["results"][0];
  for (const auto& [name, value] : evaluate(model, cut)) EXPECT_EQ(result[name], value) << name;
}

// A tokenizer that knows the numbers 3 to 63 as words, and puts 1 before a text and 2 behind it.
void write_tokenizer(const fs::path& path) {
  nlohmann::json vocabulary = {{"[UNK]", 0}, {"[CLS]", 1}, {"[SEP]", 2}};
  for (int id = 3; id < 64; ++id) vocabulary[std::to_string(id)] = id;
  write_json(path, {{"version", "1.0"},
                    {"added_tokens", nlohmann::json::array()},
                    {"pre_tokenizer", {{"type", "WhitespaceSplit"}}},
                    {"post_processor", {{"type", "BertProcessing"}, {"sep", {"[SEP]", 2}}, {"cls", {"[CLS]", 1}}}},
                    {"model", {{"type", "WordLevel"}, {"vocab", vocabulary}, {"unk_token", "[UNK]"}}}});
}

TEST_F(EvaluateClassifier, MaxLengthCountsTheTokenizersSpecialTokens) {
  if (!python_has("tokenizers")) GTEST_SKIP() << "Python has no package 'tokenizers'; run scripts/setup --tests";
  write_tokenizer(folder_ / "base/tokenizer.json");
  options_.python.clear();
  SentenceClassifier& model = dynamic_cast<SentenceWorkload&>(*workload_).model();
  std::vector<Scores> all;
  for (const size_t limit : {3, 6, 24}) {  // the least and the most that this model takes, and one between them
    Dataset cut = data_;
    for (std::vector<int64_t>& tokens : cut.tokens) {
      tokens.resize(std::min(tokens.size(), limit - 2));
      tokens.insert(tokens.begin(), 1);
      tokens.push_back(2);
    }
    all.push_back(evaluate(model, cut));
    options_.max_length = static_cast<int64_t>(limit);
    const nlohmann::json result = evaluated(options_)["results"][0];
    for (const auto& [name, value] : all.back()) EXPECT_EQ(result[name], value) << limit << " " << name;
  }
  EXPECT_NE(all[0], all[1]);
  EXPECT_NE(all[1], all[2]);
}

TEST_F(EvaluateClassifier, LabelsOfAllFilesAreLookedAtBeforeTextsAreTokenisedAndTheModelIsRead) {
  fs::remove(folder_ / "base/model.safetensors");
  write_bytes(folder_ / "bad.tsv", "yes\t8 9\nmaybe\t8 9\n");
  options_.python = "/nowhere/python3";
  EXPECT_NE(message_of([&] { evaluated(options_); }).find("/nowhere/python3"), std::string::npos);
  options_.data.push_back(folder_ / "bad.tsv");
  const std::string message = message_of([&] { evaluated(options_); });
  EXPECT_NE(message.find("bad.tsv:2: the label 'maybe' does not occur"), std::string::npos) << message;
}

TEST_F(EvaluateClassifier, AMergedModelNeedsNoAdapterAndRefusesItsOwn) {
  const double loss = evaluated(options_)["results"][0]["loss"];
  MergeOptions merge;
  merge.model = options_.model;
  merge.adapters = {{options_.adapter, 1}};
  merge.out = folder_ / "merged";
  std::ostringstream ignored;
  merge_adapters(merge, ignored);
  options_.model = folder_ / "merged";
  const std::string message = message_of([&] { evaluated(options_); });
  EXPECT_NE(message.find("was merged into"), std::string::npos) << message;
  options_.adapter.clear();
  // Sums in another order: a dozen layers' round-off, of a loss around 1.
  EXPECT_NEAR(evaluated(options_)["results"][0]["loss"].get<double>(), loss, 1e-5);
}

TEST_F(EvaluateClassifier, NonsenseIsRefusedAndNothingWritten) {
  options_.out = folder_ / "scores.json";
  const auto refusal = [&](const std::function<void(EvaluateOptions&)>& change) {
    EvaluateOptions options = options_;
    change(options);
    const std::string message = message_of([&] { evaluated(options); });
    EXPECT_FALSE(fs::exists(folder_ / "scores.json")) << message;
    return message;
  };
  const auto expect = [&](const std::string& expected, const std::function<void(EvaluateOptions&)>& change) {
    const std::string message = refusal(change);
    EXPECT_NE(message.find(expected), std::string::npos) << message;
  };
  expect("--generate: a sentence classifier", [](auto& options) { options.generate = 3; });
  expect("--dtype bfloat16: a sentence classifier", [](auto& options) { options.dtype = "bfloat16"; });
  expect("--batch 5: a sentence classifier", [](auto& options) { options.batch = 5; });
  expect("head.safetensors: does not exist", [](auto& options) { options.adapter.clear(); });
  expect("--max-length 25: the model has 24 positions; choose at most that",
         [](auto& options) { options.max_length = 25; });
  expect("--max-length 2: expected at least 3", [](auto& options) { options.max_length = 2; });
  expect("--data", [](auto& options) { options.data.clear(); });
  expect("does not occur in the training data", [&](auto& options) {
    write_bytes(folder_ / "other.tsv", "maybe\t8 9\n");
    options.data = {folder_ / "other.tsv"};
  });
  expect("/nowhere.tsv", [&](auto& options) {  // before the model and its adapter are looked for
    options.data.emplace_back("/nowhere.tsv");
    options.adapter = folder_ / "no-adapter";
  });
  const Safetensors head = load_safetensors(folder_ / "run/head.safetensors");
  save_safetensors(folder_ / "run/head.safetensors", head.tensors);
  expect("has no JSON list 'labels'", [](auto&) {});
  save_safetensors(folder_ / "run/head.safetensors", head.tensors, {{"labels", R"(["maybe","no","yes"])"}});
  expect("tensor 'weight' is of shape [2, ", [](auto&) {});
  save_safetensors(folder_ / "run/head.safetensors", {{"weight", head.tensors.at("weight")}}, head.metadata);
  expect("tensor 'bias' is missing", [](auto&) {});

  EvaluateOptions language = options_;
  language.model = model_golden("llama");
  language.adapter.clear();
  write_texts(folder_ / "texts.jsonl", tiny_texts(3, 1), false);
  write_choices(folder_ / "choices.jsonl", tiny_choices(), false);
  language.data = {folder_ / "texts.jsonl"};
  language.max_length = EvaluateOptions().max_length;
  options_ = language;
  expect("--batch 0: expected at least 1", [](auto& options) { options.batch = 0; });
  expect("--batch -1: expected at least 1", [](auto& options) { options.batch = -1; });
  expect("--threads -1: expected 0 to 1024", [](auto& options) { options.threads = -1; });
  expect("--threads 1025: expected 0 to 1024", [](auto& options) { options.threads = 1025; });
  expect("--dtype float16", [](auto& options) { options.dtype = "float16"; });
  expect("--device gpu", [](auto& options) { options.device = "gpu"; });
  expect("nothing is written without --generate", [](auto& options) { options.texts = "texts"; });
  expect("--max-length 16: prepare_tasks.py", [](auto& options) { options.max_length = 16; });
  expect("has choices, after which there is nothing to write", [&](auto& options) {
    options.generate = 3;
    options.data.push_back(folder_ / "choices.jsonl");
  });
  expect("/nowhere", [](auto& options) { options.data.emplace_back("/nowhere"); });
  expect("AdapterConfig", [&](auto& options) {
    lora_rite::Adapter dora = lora_rite::load_adapter(save_golden_adapter("llama", folder_ / "dora"));
    dora.config.other["use_dora"] = true;
    lora_rite::save_adapter(folder_ / "dora", dora);
    options.adapter = folder_ / "dora";
  });
  expect("names no module of the model", [&](auto& options) { options.adapter = folder_ / "run"; });  // of BERT
}

TEST_F(EvaluateClassifier, TheCommandLineReachesItAndShowsPercents) {
  ::testing::internal::CaptureStdout();
  run_command(&add_evaluate_command,
              {"eval", "--model", options_.model.string(), "--adapter", options_.adapter.string(), "--data",
               options_.data[0].string(), options_.data[0].string(), "--max-length", "16", "--python", options_.python,
               "--out", (folder_ / "scores.json").string()});
  const std::string output = ::testing::internal::GetCapturedStdout();
  const nlohmann::json report = read_json(folder_ / "scores.json");
  ASSERT_EQ(report["results"].size(), 2U);
  EXPECT_EQ(report["results"][0], report["results"][1]);
  EXPECT_EQ(report["results"][0]["accuracy"], evaluated(options_)["results"][0]["accuracy"]);
  const double accuracy = report["results"][0]["accuracy"];
  EXPECT_NE(output.find(fixed(100 * accuracy, 2) + " %"), std::string::npos) << output;
  EXPECT_EQ(output.find("accuracy_error"), std::string::npos) << output;
}

}  // namespace
}  // namespace finetune
