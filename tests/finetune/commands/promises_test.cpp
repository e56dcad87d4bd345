// What docs/finetune.md and the --help texts promise of eval and merge, and no other test holds.

#include <algorithm>
#include <cmath>
#include <lora_rite/io/peft.hpp>
#include <lora_rite/io/safetensors.hpp>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "commands/evaluate.hpp"
#include "commands/merge.hpp"
#include "common/files.hpp"
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

fs::path write_texts(const fs::path& path, int64_t size) {
  std::vector<nlohmann::json> values = {
      {{"format", "finetune-tasks 1"}, {"task", "gsm8k"}, {"kind", "text"}, {"encoder_decoder", false}}};
  for (const TextRecord& record : tiny_texts(size, 4)) {
    values.push_back({{"prompt", record.prompt}, {"completion", record.completion}, {"references", record.references}});
  }
  write_bytes(path, lines(values));
  return path;
}

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

// The columns of a table, which are two spaces or more apart.
std::vector<std::string> columns_of(const std::string& line) {
  std::vector<std::string> columns;
  for (size_t begin = line.find_first_not_of(' '); begin != std::string::npos;) {
    const size_t end = std::min(line.find("  ", begin), line.size());
    columns.push_back(line.substr(begin, end - begin));
    begin = line.find_first_not_of(' ', end);
  }
  return columns;
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
  std::istringstream shown(out.str());
  std::vector<std::vector<std::string>> found;
  for (std::string line; std::getline(shown, line);) found.push_back(columns_of(line));
  EXPECT_EQ(found, expected) << out.str();
  for (const char* name : {"acc", "acc_norm", "acc_bytes"}) {
    const double share = choices[name];
    EXPECT_NEAR(choices[std::string(name) + "_error"], std::sqrt(share * (1 - share) / 10), 1e-12) << name;
  }
}

TEST(EvaluatePromises, FilesAreReadBeforeModelAndAdapter) {
  const TemporaryFolder folder;
  EvaluateOptions options;
  options.model = folder / "base";  // a config.json alone
  fs::create_directories(options.model);
  fs::copy_file(model_golden("llama") / "config.json", options.model / "config.json");
  options.adapter = "/nowhere/adapter";
  options.data = {write_texts(folder / "texts.jsonl", 2), folder / "bad.jsonl"};
  write_bytes(folder / "bad.jsonl", "no JSON\n");
  std::ostringstream ignored;
  EXPECT_NE(message_of([&] { evaluate_model(options, ignored); }).find("bad.jsonl"), std::string::npos);
}

TEST(EvaluatePromises, AMergedLanguageModelRefusesItsOwnAdapter) {
  const TemporaryFolder folder;
  MergeOptions merge;
  merge.model = model_golden("llama");
  merge.adapters = {{save_golden_adapter("llama", folder / "adapter"), 1}};
  merge.out = folder / "merged";
  std::ostringstream ignored;
  merge_adapters(merge, ignored);
  EvaluateOptions options;
  options.model = folder / "merged";
  options.adapter = folder / "adapter";
  options.data = {write_texts(folder / "texts.jsonl", 2)};
  EXPECT_NE(message_of([&] { evaluate_model(options, ignored); }).find("was merged into"), std::string::npos);
}

// A base of golden/ in another dtype.
fs::path write_base(const fs::path& folder, const std::string& name, torch::Dtype dtype) {
  fs::create_directories(folder);
  fs::copy_file(model_golden(name) / "config.json", folder / "config.json");
  Tensors tensors = lora_rite::load_sharded(model_golden(name)).tensors;
  for (auto& item : tensors) item.second = item.second.to(dtype);
  save_safetensors(folder / "model.safetensors", tensors, {{"format", "pt"}});
  return folder;
}

std::string merged(const MergeOptions& options) {
  std::ostringstream ignored;
  return message_of([&] { merge_adapters(options, ignored); });
}

TEST(MergePromises, AHalfBaseKeepsItsDtypeAndEverySumIsRoundedOnce) {
  for (const auto dtype : {torch::kBFloat16, torch::kHalf}) {
    const TemporaryFolder folder;
    MergeOptions options;
    options.model = write_base(folder / "base", "llama", dtype);
    options.adapters = {{save_golden_adapter("llama", folder / "adapter"), 1}};
    options.out = folder / "merged";
    ASSERT_EQ(merged(options), "");
    const Tensors base = lora_rite::load_sharded(options.model).tensors;
    const lora_rite::Adapter adapter = lora_rite::load_adapter(folder / "adapter");
    const double scale = adapter.config.lora_alpha / static_cast<double>(adapter.config.r);
    size_t changed = 0, rounded_twice = 0;
    for (const auto& [name, tensor] : lora_rite::load_sharded(options.out).tensors) {
      ASSERT_EQ(tensor.scalar_type(), dtype) << name;
      const std::string module = name.substr(0, name.rfind('.'));
      const auto a = adapter.tensors.find(module + ".lora_A.weight");
      if (a == adapter.tensors.end()) {
        EXPECT_TRUE(tensor.equal(base.at(name))) << name;
        continue;
      }
      ++changed;
      const torch::Tensor delta = torch::matmul(adapter.tensors.at(module + ".lora_B.weight"), a->second) * scale;
      EXPECT_TRUE(tensor.equal((base.at(name).to(torch::kFloat) + delta).to(dtype))) << name;
      rounded_twice += !tensor.equal(base.at(name) + delta.to(dtype));
    }
    EXPECT_GE(changed, 4U);
    EXPECT_GE(rounded_twice, 4U) << "it can be told from rounding ΔW first";
  }
}

TEST(MergePromises, AnotherDtypeIsSaidOfEveryPartOfTheModel) {
  const TemporaryFolder folder;
  MergeOptions options;
  options.model = write_base(folder / "base", "llama", torch::kFloat);
  nlohmann::json config = read_json(options.model / "config.json");
  config.erase("torch_dtype");
  config["dtype"] = "float32";
  config["text_config"] = {{"torch_dtype", "float32"}};
  config["vision_config"] = {{"dtype", "float32"}};
  config["other"] = {{"width", 3}};
  write_json(options.model / "config.json", config);
  options.adapters = {{save_golden_adapter("llama", folder / "adapter"), 1}};
  options.out = folder / "merged";
  options.dtype = "bfloat16";
  ASSERT_EQ(merged(options), "");
  config["dtype"] = config["text_config"]["torch_dtype"] = config["vision_config"]["dtype"] = "bfloat16";
  EXPECT_EQ(read_json(folder / "merged/config.json"), config);
}

TEST(MergePromises, AModelThatCannotBeTrainedHereWillDo) {
  const TemporaryFolder folder;
  MergeOptions options;
  options.model = write_base(folder / "base", "llama", torch::kFloat);
  nlohmann::json config = read_json(options.model / "config.json");
  config["model_type"] = "olmo9";
  write_json(options.model / "config.json", config);
  options.adapters = {{save_golden_adapter("llama", folder / "adapter"), 1}};
  options.out = folder / "merged";
  ASSERT_EQ(merged(options), "");
  options.model = model_golden("llama");
  options.out = folder / "known";
  ASSERT_EQ(merged(options), "");
  const Tensors known = lora_rite::load_sharded(folder / "known").tensors;
  for (const auto& [name, tensor] : lora_rite::load_sharded(folder / "merged").tensors) {
    EXPECT_TRUE(tensor.equal(known.at(name))) << name;
  }
  EXPECT_EQ(read_json(folder / "merged/config.json")["model_type"], "olmo9");
}

TEST(MergePromises, TrainedBiasesAmongSeveralAdaptersAreRefused) {
  const TemporaryFolder folder;
  const auto model = load_model(model_golden("llama_linear_biases"));
  lora_rite::nn::LoraConfig config;
  config.bias = lora_rite::nn::LoraBias::LoraOnly;
  config.target_modules = std::vector<std::string>{"q_proj"};
  lora_rite::nn::inject_lora(*model, config);
  lora_rite::Adapter trained = lora_rite::nn::peft_adapter(*model);
  for (auto& [name, tensor] : trained.tensors)
    if (name.find(".bias") != std::string::npos) tensor = tensor + 1;
  lora_rite::save_adapter(folder / "biases", trained);
  MergeOptions options;
  options.model = model_golden("llama_linear_biases");
  options.adapters = {{folder / "biases", 1}, {save_golden_adapter("llama_linear_biases", folder / "other"), 1}};
  options.out = folder / "merged";
  EXPECT_NE(merged(options).find("has trained biases"), std::string::npos);
  EXPECT_FALSE(fs::exists(options.out));
}

TEST(MergePromises, EveryFilesMetadataListsWhatWasMerged) {
  const TemporaryFolder folder;
  MergeOptions options;
  options.model = model_golden("llama");
  options.adapters = {{save_golden_adapter("llama", folder / "adapter"), 1}};
  options.out = folder / "merged";
  options.shard_size = 8000 / 1e9;
  ASSERT_EQ(merged(options), "");
  std::set<std::string> lists;
  size_t files = 0;
  for (const auto& entry : fs::directory_iterator(options.out)) {
    if (entry.path().extension() != ".safetensors") continue;
    ++files;
    lists.insert(load_safetensors(entry.path()).metadata.at("merged_adapters"));
  }
  EXPECT_GE(files, 3U);
  ASSERT_EQ(lists.size(), 1U);
  EXPECT_EQ(nlohmann::json::parse(*lists.begin()).size(), 1U);
}

// As LoRA-FA trains: A stays where it began, and requires no gradient.
TEST(AdapterFiles, OfATrainingThatFreezesAHoldBothFactors) {
  const TemporaryFolder folder;
  const auto model = adapted_golden("llama");
  const lora_rite::Adapter usual = lora_rite::nn::peft_adapter(*model);
  for (const auto& parameter : model->named_parameters()) {
    if (parameter.key().find("lora_A") != std::string::npos) parameter.value().set_requires_grad(false);
  }
  lora_rite::save_adapter(folder / "adapter", lora_rite::nn::peft_adapter(*model));
  const lora_rite::Adapter found = lora_rite::load_adapter(folder / "adapter");
  ASSERT_EQ(found.tensors.size(), usual.tensors.size());
  for (const auto& [name, tensor] : usual.tensors) EXPECT_TRUE(found.tensors.at(name).equal(tensor)) << name;
}

// The expressions that two trainers write into target_modules, and what Python's re.fullmatch takes of a Llama's
// layers.
TEST(AdapterExpressions, OfUnslothAndMsSwiftMeanWhatTheyMeanInPython) {
  const std::string unsloth =
      R"((?:.*?(?:vision|image|visual|patch_embed|language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|)"
      R"(dense).*?(?:q_proj|v_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|)"
      R"(feed_forward|ffn|dense)\.(?:(?:q_proj|v_proj|down_proj))))";
  const std::string swift = R"(^(model(?=\.).*\.(q_proj|v_proj|down_proj))$)";
  for (const std::string& expression : {unsloth, swift}) {
    const auto model = load_model(model_golden("llama"));
    const auto layers = read_json(model_golden("llama") / "config.json")["num_hidden_layers"].get<int64_t>();
    lora_rite::nn::LoraConfig config;
    config.target_modules = expression;
    lora_rite::nn::inject_lora(*model, config);
    std::set<std::string> found, expected;
    for (const auto& pair : lora_rite::nn::factor_pairs(*model)) found.insert(pair.name);
    for (int64_t layer = 0; layer < layers; ++layer) {
      for (const char* name : {"self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"}) {
        expected.insert(concat("model.layers.", layer, ".", name));
      }
    }
    ASSERT_EQ(found.size(), expected.size()) << expression;
    for (const std::string& name : expected) {
      EXPECT_TRUE(std::any_of(found.begin(), found.end(), [&](const auto& each) { return each.find(name) == 0; }))
          << name;
    }
  }
}

}  // namespace
}  // namespace finetune
