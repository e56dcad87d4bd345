// What docs/finetune.md and the --help text promise of eval, and no other test holds.

#include "commands/evaluate.hpp"

#include <ATen/Parallel.h>
#include <torch/cuda.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <sstream>

#include "finetune/python.hpp"
#include "support.hpp"
#include "task_files.hpp"

namespace finetune {
namespace {

namespace fs = std::filesystem;
using lora_rite::test::write_bytes;

// Losses of the tiny models, whose products have up to 48 terms, when they are summed in another order.
constexpr double kSameSums = 1e-5;

// A model's folder without weights.
fs::path write_config_alone(const fs::path& folder) {
  fs::create_directories(folder);
  fs::copy_file(model_golden("llama") / "config.json", folder / "config.json");
  return folder;
}

TEST(EvaluatePromises, OneLineAFileAndScoreAndAllOfThemInTheJson) {
  const TemporaryFolder folder;
  EvaluateOptions options;
  options.model = model_golden("llama");
  options.adapter = save_golden_adapter("llama", folder / "adapter");
  options.data = {write_texts(folder / "texts.jsonl", tiny_texts(6, 4)),
                  write_choices(folder / "choices.jsonl", tiny_choices(10))};
  options.out = folder / "scores.json";
  options.dtype = "bfloat16";
  std::ostringstream out;
  evaluate_model(options, out);

  nlohmann::json report = read_json(options.out);
  EXPECT_EQ(report["model"], options.model.string());
  EXPECT_EQ(report["adapter"], options.adapter.string());
  EXPECT_EQ(report["dtype"], "bfloat16");
  ASSERT_EQ(report["results"].size(), 2U);
  const nlohmann::json &texts = report["results"][0], &choices = report["results"][1];
  EXPECT_EQ(texts["data"], options.data[0].string());
  EXPECT_EQ(choices["data"], options.data[1].string());

  const auto percent = [&](const char* name) { return fixed(100 * choices[name].get<double>(), 2); };
  const std::vector<std::vector<std::string>> expected = {
      {"data", "task", "examples", "score", "value", "±"},
      {"texts.jsonl", "gsm8k", "6", "loss", fixed(texts["loss"], 4)},
      {"texts.jsonl", "gsm8k", "6", "perplexity", fixed(texts["perplexity"], 4)},
      {"choices.jsonl", "arc", "10", "acc", percent("acc") + " %", percent("acc_error")},
      {"choices.jsonl", "arc", "10", "acc_norm", percent("acc_norm") + " %", percent("acc_norm_error")},
      {"choices.jsonl", "arc", "10", "acc_bytes", percent("acc_bytes") + " %", percent("acc_bytes_error")}};
  EXPECT_EQ(table_in(out.str()), expected) << out.str();
  for (const char* name : {"acc", "acc_norm", "acc_bytes"}) {
    const double share = choices[name];
    EXPECT_NEAR(choices[std::string(name) + "_error"], std::sqrt(share * (1 - share) / 10), 1e-12) << name;
  }
}

TEST(EvaluatePromises, FilesAreReadBeforeModelAndAdapter) {
  const TemporaryFolder folder;
  EvaluateOptions options;
  options.model = write_config_alone(folder / "base");
  options.adapter = "/nowhere/adapter";
  options.data = {write_texts(folder / "texts.jsonl", tiny_texts(2, 4)), folder / "bad.jsonl"};
  write_bytes(folder / "bad.jsonl", "no JSON\n");
  std::ostringstream ignored;
  EXPECT_NE(message_of([&] { evaluate_model(options, ignored); }).find("bad.jsonl"), std::string::npos);
}

TEST(EvaluatePromises, AMergedLanguageModelRefusesItsOwnAdapter) {
  const TemporaryFolder folder;
  const fs::path adapter = save_golden_adapter("llama", folder / "adapter");
  ASSERT_EQ(merge_message(model_golden("llama"), {{adapter, 1}}, folder / "merged"), "");
  EvaluateOptions options;
  options.model = folder / "merged";
  options.adapter = adapter;
  options.data = {write_texts(folder / "texts.jsonl", tiny_texts(2, 4))};
  std::ostringstream ignored;
  EXPECT_NE(message_of([&] { evaluate_model(options, ignored); }).find("was merged into"), std::string::npos);
}

// In place of Python and its tokenizer: of the texts that the model wrote, the n-th is "#### n".
std::string write_counter(const fs::path& path) {
  const char* lines = "n=0; while read -r line; do n=$((n+1)); echo \"\\\"#### $n\\\"\"; done <\"$5\" >\"$7\"\n";
  return write_program(path, lines).string();
}

TEST(EvaluatePromises, SharesOfGeneratedTextsHaveStandardErrors) {
  const TemporaryFolder folder;
  std::vector<TextRecord> records = tiny_texts(6, 4);
  for (TextRecord& record : records) record.references = {"#### 99"};
  records[0].references = {"#### 1"};
  records[1].references = {"#### 2"};
  records[3].references = {"so #### 4"};  // the number alone
  EvaluateOptions options;
  options.model = model_golden("llama");
  options.generate = 2;
  options.python = write_counter(folder / "python3");
  for (const std::string task : {"gsm8k", "super_ni"}) {
    options.data = {write_texts(folder / "texts.jsonl", records, false, task)};
    std::ostringstream out;
    const nlohmann::json result = evaluate_model(options, out)["results"][0];
    std::vector<std::vector<std::string>> shares = {{"texts.jsonl", task, "6", "exact_match", "33.33 %", "19.25"}};
    if (task == "gsm8k") {
      shares.push_back({"texts.jsonl", task, "6", "strict_number", "50.00 %", "20.41"});
      shares.push_back({"texts.jsonl", task, "6", "flexible_number", "50.00 %", "20.41"});
    }
    const std::vector<std::vector<std::string>> table = table_in(out.str());
    ASSERT_EQ(table.size(), 4 + shares.size()) << out.str();  // header, loss, perplexity, rouge_l
    EXPECT_EQ(table[3], (std::vector<std::string>{"texts.jsonl", task, "6", "rouge_l", fixed(result["rouge_l"], 4)}));
    for (size_t i = 0; i < shares.size(); ++i) {
      EXPECT_EQ(table[4 + i], shares[i]) << out.str();
      const std::string name = shares[i][3];
      const double share = name == "exact_match" ? 2.0 / 6 : 0.5;
      EXPECT_EQ(result[name], share) << name;
      EXPECT_NEAR(result.value(name + "_error", -1.0), std::sqrt(share * (1 - share) / 6), 1e-12) << name;
    }
    for (const char* name : {"strict_number", "strict_number_error", "flexible_number"}) {
      EXPECT_EQ(result.contains(name), task == "gsm8k") << task << " " << name;
    }
    for (const char* name : {"loss_error", "rouge_l_error"}) EXPECT_FALSE(result.contains(name)) << "no share";
  }
}

TEST(EvaluatePromises, FoldersOfResultsAreLookedForBeforeAnythingIsRead) {
  const TemporaryFolder folder;
  EvaluateOptions options;
  options.model = write_config_alone(folder / "base");
  options.data = {"/nowhere.jsonl"};
  options.generate = 2;
  const auto message = [&] {
    std::ostringstream ignored;
    return message_of([&] { evaluate_model(options, ignored); });
  };
  EXPECT_NE(message().find("/nowhere.jsonl"), std::string::npos);
  options.out = folder / "none/scores.json";
  EXPECT_NE(message().find("--out " + options.out.string() + ": there is no folder"), std::string::npos) << message();
  options.out = options.model;
  EXPECT_NE(message().find("--out " + options.out.string() + ": is a folder"), std::string::npos) << message();
  options.out = "scores.json";  // the folder is the current one
  EXPECT_NE(message().find("/nowhere.jsonl"), std::string::npos) << message();
  options.texts = folder / "none/texts.jsonl";
  EXPECT_NE(message().find("--texts " + options.texts.string() + ": there is no folder"), std::string::npos);
}

std::string evaluation_message(const EvaluateOptions& options) {
  std::ostringstream ignored;
  return message_of([&] { evaluate_model(options, ignored); });
}

// The golden Llama with its adapter, on texts and on questions.
EvaluateOptions tiny_evaluation(const TemporaryFolder& folder) {
  EvaluateOptions options;
  options.model = model_golden("llama");
  options.adapter = save_golden_adapter("llama", folder / "adapter");
  options.data = {write_texts(folder / "texts.jsonl", tiny_texts(11, 4)),
                  write_choices(folder / "choices.jsonl", tiny_choices())};
  return options;
}

// The same scores up to the order of sums.
void expect_same_results(const nlohmann::json& found, const nlohmann::json& expected) {
  ASSERT_EQ(found.size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    ASSERT_EQ(found[i].size(), expected[i].size());
    for (const auto& [name, value] : expected[i].items()) {
      if (name == "loss" || name == "perplexity") {
        EXPECT_NEAR(found[i][name].get<double>(), value.get<double>(), kSameSums * value.get<double>()) << name;
      } else {
        EXPECT_EQ(found[i][name], value) << name;
      }
    }
  }
}

// LibTorch's number of threads, put back at the end.
struct Threads {
  Threads() = default;
  ~Threads() { at::set_num_threads(before); }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

  const int before = at::get_num_threads();
};

TEST(EvaluatePromises, ThreadsAreTakenAndChangeNoScore) {
  const Threads threads;
  const TemporaryFolder folder;
  EvaluateOptions options = tiny_evaluation(folder);
  std::ostringstream ignored;
  options.threads = 1;
  const nlohmann::json alone = evaluate_model(options, ignored)["results"];
  EXPECT_EQ(at::get_num_threads(), 1);
  for (const int count : {3, 2}) {
    options.threads = count;
    expect_same_results(evaluate_model(options, ignored)["results"], alone);
    EXPECT_EQ(at::get_num_threads(), count);
  }
  options.threads = 0;
  evaluate_model(options, ignored);
  EXPECT_EQ(at::get_num_threads(), 2) << "what LibTorch had";
  options.threads = 1025;
  EXPECT_NE(evaluation_message(options), "");
  EXPECT_EQ(at::get_num_threads(), 2) << "nothing was changed";
}

TEST(EvaluatePromises, TheBatchChangesNoScoreAndNoText) {
  const TemporaryFolder folder;
  EvaluateOptions options = tiny_evaluation(folder);
  EvaluateOptions writing = options;
  writing.data.resize(1);
  writing.generate = 4;
  writing.texts = folder / "written.jsonl";
  writing.python = write_interpreter(folder / "python3").string();
  nlohmann::json scores, written;
  std::string texts;
  for (const int64_t batch : {16, 1, 3, 1000}) {
    options.batch = writing.batch = batch;
    std::ostringstream ignored;
    const nlohmann::json own = evaluate_model(options, ignored)["results"];
    const nlohmann::json own_written = evaluate_model(writing, ignored)["results"];
    const std::string own_texts = lora_rite::test::read_bytes(writing.texts);
    if (scores.is_null()) {
      scores = own;
      written = own_written;
      texts = own_texts;
      EXPECT_EQ(std::count(texts.begin(), texts.end(), '\n'), 11);
    }
    expect_same_results(own, scores);
    expect_same_results(own_written, written);
    EXPECT_EQ(own_texts, texts) << batch;
  }
}

TEST(EvaluatePromises, ADeviceThatIsNotThereIsSaidBeforeAnythingIsRead) {
  if (torch::cuda::is_available()) GTEST_SKIP() << "there is a GPU; tests/cuda measures on it";
  EvaluateOptions options;
  options.model = model_golden("llama");
  options.data = {"/nowhere.jsonl"};
  options.device = "cuda";
  expect_words("--device cuda: LibTorch finds no GPU here; choose cpu", evaluation_message(options));
}

// Interpreters that fail, each with a code of its own: the message has it.
TEST(EvaluatePromises, PythonIsThatOfTheEnvironmentElsePython3) {
  const TemporaryFolder folder;
  fs::create_directories(folder / "bin");
  EvaluateOptions options = tiny_evaluation(folder);
  options.data.resize(1);
  options.generate = 1;
  const std::string named = write_program(folder / "named", "exit 11\n").string();
  const std::string given = write_program(folder / "given", "exit 12\n").string();
  write_program(folder / "bin/python3", "exit 13\n");
  const Environment path("PATH", (folder / "bin").string());
  {
    const Environment variable("FINETUNE_PYTHON", named);
    expect_words(named + " decode_tokens.py' ended with code 11;", evaluation_message(options));
    options.python = given;
    expect_words(given + " decode_tokens.py' ended with code 12;", evaluation_message(options));
  }
  const Environment variable("FINETUNE_PYTHON", std::nullopt);
  expect_words(given + " decode_tokens.py' ended with code 12;", evaluation_message(options));
  options.python.clear();
  expect_words("'python3 decode_tokens.py' ended with code 13;", evaluation_message(options));
}

TEST(EvaluatePromises, EveryOptionReachesItFromTheCommandLine) {
  const Threads threads;
  const TemporaryFolder folder;
  EvaluateOptions options = tiny_evaluation(folder);
  options.data.resize(1);
  options.dtype = "bfloat16";
  options.generate = 3;
  options.python = write_interpreter(folder / "python3").string();
  options.texts = folder / "own.jsonl";
  std::ostringstream table;
  const nlohmann::json expected = evaluate_model(options, table);
  const std::vector<std::string> plain = {"eval", "--model", options.model.string(), "--data",
                                          options.data[0].string()};
  const auto run = [&](const std::vector<std::string>& more) {
    std::vector<std::string> arguments = plain;
    arguments.insert(arguments.end(), more.begin(), more.end());
    ::testing::internal::CaptureStdout();
    const std::string message = message_of([&] { EXPECT_EQ(run_command(&add_evaluate_command, arguments), 0); });
    const std::string output = ::testing::internal::GetCapturedStdout();
    return message.empty() ? output : message;
  };
  EXPECT_EQ(run({"--adapter", options.adapter.string(), "--dtype", "bfloat16", "--generate", "3", "--python",
                 options.python, "--texts", (folder / "texts").string(), "--device", "cpu", "--threads", "1", "--out",
                 (folder / "scores.json").string()}),
            table.str());
  EXPECT_EQ(read_json(folder / "scores.json"), expected);
  EXPECT_EQ(lora_rite::test::read_bytes(folder / "texts"), lora_rite::test::read_bytes(options.texts));
  EXPECT_EQ(at::get_num_threads(), 1);
  EvaluateOptions defaults;
  defaults.model = options.model;
  defaults.data = options.data;
  std::ostringstream own;
  evaluate_model(defaults, own);
  EXPECT_EQ(run({}), own.str()) << "the defaults";
  // What leaves no trace in the scores.
  expect_words("--batch 0:", run({"--batch", "0"}));
  expect_words("--max-length 5:", run({"--max-length", "5"}));
  expect_words("--device gpu:", run({"--device", "gpu"}));
}

TEST(EvaluatePromises, AModelMergedInBFloat16ScoresAsTheSumsRoundedOnce) {
  const TemporaryFolder folder;
  EvaluateOptions options = tiny_evaluation(folder);
  ASSERT_EQ(merge_message(options.model, {{options.adapter, 1}}, folder / "merged", "bfloat16"), "");
  Tensors rounded = tensors_of(options.model);
  for (const auto& [name, delta] : deltas_of(options.adapter)) rounded.at(name) = rounded.at(name) + delta;
  for (auto& item : rounded) item.second = item.second.to(torch::kBFloat16).to(torch::kFloat);
  write_model(folder / "rounded", read_json(options.model / "config.json"), rounded);
  const auto scores = [&](const fs::path& model, const fs::path& adapter, const std::string& dtype) {
    options.model = model;
    options.adapter = adapter;
    options.dtype = dtype;
    std::ostringstream ignored;
    return evaluate_model(options, ignored)["results"];
  };
  const nlohmann::json beside = scores(options.model, options.adapter, "float32");
  for (const char* dtype : {"float32", "bfloat16"}) {
    const nlohmann::json merged = scores(folder / "merged", {}, dtype);
    EXPECT_EQ(merged[0]["loss"], scores(folder / "rounded", {}, dtype)[0]["loss"]) << dtype;
    EXPECT_EQ(merged[1]["acc"], scores(folder / "rounded", {}, dtype)[1]["acc"]) << dtype;
    EXPECT_NE(merged[0]["loss"], beside[0]["loss"]) << "rounding shows";
    // Each of 15 products one behind the other is off by a share of 2^-8, or twice that if it is computed in bfloat16.
    const double loss = beside[0]["loss"];
    EXPECT_NEAR(merged[0]["loss"].get<double>(), loss, 2 * 15 * 0x1p-8 * loss) << dtype;
  }
}

}  // namespace
}  // namespace finetune
