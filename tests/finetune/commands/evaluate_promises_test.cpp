// What docs/finetune.md and the --help text promise of eval, and no other test holds.

#include "commands/evaluate.hpp"

#include <cmath>
#include <sstream>

#include "support.hpp"

namespace finetune {
namespace {

namespace fs = std::filesystem;
using lora_rite::testing::write_bytes;

std::string lines(const std::vector<nlohmann::json>& values) {
  std::string text;
  for (const nlohmann::json& value : values) text += value.dump() + "\n";
  return text;
}

fs::path write_texts(const fs::path& path, const std::string& task, const std::vector<TextRecord>& records) {
  std::vector<nlohmann::json> values = {
      {{"format", "finetune-tasks 1"}, {"task", task}, {"kind", "text"}, {"encoder_decoder", false}}};
  for (const TextRecord& record : records) {
    values.push_back({{"prompt", record.prompt}, {"completion", record.completion}, {"references", record.references}});
  }
  write_bytes(path, lines(values));
  return path;
}

fs::path write_texts(const fs::path& path, int64_t size) { return write_texts(path, "gsm8k", tiny_texts(size, 4)); }

fs::path write_choices(const fs::path& path, int64_t size) {
  std::vector<nlohmann::json> values = {
      {{"format", "finetune-tasks 1"}, {"task", "arc"}, {"kind", "choices"}, {"encoder_decoder", false}}};
  for (const TextRecord& record : tiny_texts(size, 5)) {
    values.push_back({{"prompts", {record.prompt}},
                      {"choices", {record.completion, {9, 4}}},
                      {"characters", {5, 2}},
                      {"bytes", {6, 2}},
                      {"answer", values.size() % 2}});
  }
  write_bytes(path, lines(values));
  return path;
}

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
  options.data = {write_texts(folder / "texts.jsonl", 6), write_choices(folder / "choices.jsonl", 10)};
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
  options.data = {write_texts(folder / "texts.jsonl", 2), folder / "bad.jsonl"};
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
  options.data = {write_texts(folder / "texts.jsonl", 2)};
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
    options.data = {write_texts(folder / "texts.jsonl", task, records)};
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

}  // namespace
}  // namespace finetune
