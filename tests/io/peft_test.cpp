#include <gtest/gtest.h>

#include <fstream>
#include <lora_rite/factor_pair.hpp>
#include <lora_rite/io/adapter_modules.hpp>
#include <lora_rite/io/peft.hpp>

#include "support/pairs.hpp"
#include "support/temporary_folder.hpp"
#include "support/torch.hpp"

namespace lora_rite::test {
namespace {

/// A description with every field set to something else than its default.
AdapterConfig full_config() {
  AdapterConfig config;
  config.r = 4;
  config.lora_alpha = 2.5;
  config.lora_dropout = 0.125;
  config.target_modules = std::vector<std::string>{"q", "v"};
  config.exclude_modules = ".*\\.head";
  config.modules_to_save = std::vector<std::string>{"score"};
  config.rank_pattern = {{"^layer.0", 2}, {"ö", 16}};
  config.alpha_pattern = {{"^layer.0", 32}, {"k", 0.1}};
  config.layers_to_transform = {0, 3};
  config.layers_pattern = "layers";
  config.use_rslora = true;
  config.fan_in_fan_out = true;
  config.bias = "lora_only";
  config.init_lora_weights = "gaussian";
  config.task_type = "CAUSAL_LM";
  config.base_model_name_or_path = "a/base";
  config.inference_mode = false;
  config.other["eva_config"] = {{"rho", 2.0}, {"list", {1, -1, nullptr}}};
  return config;
}

Adapter small_adapter() {
  torch::manual_seed(1);
  Adapter adapter;
  adapter.config.r = 2;
  adapter.config.target_modules = std::vector<std::string>{"q", "conv", "words"};
  adapter.tensors = {{"layer.q.lora_A.weight", torch::randn({2, 3})},
                     {"layer.q.lora_B.weight", torch::randn({4, 2})},
                     {"layer.conv.lora_A.weight", torch::randn({2, 3, 5, 5})},
                     {"layer.conv.lora_B.weight", torch::randn({4, 2, 1, 1})},
                     {"words.lora_embedding_A", torch::randn({2, 10})},
                     {"words.lora_embedding_B", torch::randn({3, 2})},
                     {"score.weight", torch::randn({7})}};
  return adapter;
}

TEST(AdapterConfig, OfPeftIsReadAndWrittenWithNothingLost) {
  const std::string text = read_bytes(golden("tiny_adapter/adapter_config.json"));
  const AdapterConfig config = parse_adapter_config(text, "");
  EXPECT_EQ(config.r, 3);
  EXPECT_EQ(config.lora_alpha, 6);
  EXPECT_EQ(config.lora_dropout, 0);
  EXPECT_EQ(std::get<std::vector<std::string>>(config.target_modules).size(), 6U);
  EXPECT_TRUE(std::holds_alternative<std::monostate>(config.exclude_modules));
  EXPECT_FALSE(config.modules_to_save.has_value());
  EXPECT_EQ(std::get<bool>(config.init_lora_weights), true);
  EXPECT_EQ(config.task_type, "FEATURE_EXTRACTION");
  EXPECT_EQ(config.base_model_name_or_path, "tiny");
  EXPECT_TRUE(config.inference_mode);
  EXPECT_EQ(config.other.at("peft_version"), "0.21.2");
  EXPECT_EQ(adapter_config_text(config), text + "\n");
}

TEST(AdapterConfig, KeepsEveryFieldThroughItsText) {
  const AdapterConfig config = full_config();
  const std::string text = adapter_config_text(config);
  const AdapterConfig read = parse_adapter_config(text, "");
  EXPECT_EQ(read.r, config.r);
  EXPECT_EQ(read.lora_alpha, config.lora_alpha);
  EXPECT_EQ(read.lora_dropout, config.lora_dropout);
  EXPECT_EQ(read.target_modules, config.target_modules);
  EXPECT_EQ(read.exclude_modules, config.exclude_modules);
  EXPECT_EQ(read.modules_to_save, config.modules_to_save);
  EXPECT_EQ(read.rank_pattern, config.rank_pattern);
  EXPECT_EQ(read.alpha_pattern, config.alpha_pattern);
  EXPECT_EQ(read.layers_to_transform, config.layers_to_transform);
  EXPECT_EQ(read.layers_pattern, config.layers_pattern);
  EXPECT_EQ(read.use_rslora, config.use_rslora);
  EXPECT_EQ(read.fan_in_fan_out, config.fan_in_fan_out);
  EXPECT_EQ(read.bias, config.bias);
  EXPECT_EQ(read.init_lora_weights, config.init_lora_weights);
  EXPECT_EQ(read.task_type, config.task_type);
  EXPECT_EQ(read.base_model_name_or_path, config.base_model_name_or_path);
  EXPECT_EQ(read.inference_mode, config.inference_mode);
  EXPECT_EQ(read.other, config.other);
  EXPECT_EQ(adapter_config_text(read), text);
}

TEST(AdapterConfig, FieldsThatAreNotThereAreTheDefaults) {
  const AdapterConfig read = parse_adapter_config(R"({"peft_type":"LORA"})", "");
  EXPECT_EQ(adapter_config_text(read), adapter_config_text(AdapterConfig()));
}

TEST(AdapterConfig, ModulesAreAListATextOrNothingAndLayersAListOrANumber) {
  const auto with = [](const std::string& field) {
    return parse_adapter_config(R"({"peft_type":"LORA",)" + field + "}", "");
  };
  EXPECT_EQ(with(R"("target_modules":"all-linear")").target_modules, ModuleNames("all-linear"));
  EXPECT_EQ(with(R"("target_modules":[])").target_modules, ModuleNames(std::vector<std::string>{}));
  EXPECT_EQ(with(R"("target_modules":null)").target_modules, ModuleNames());
  EXPECT_EQ(with(R"("layers_to_transform":3)").layers_to_transform, (std::vector<int64_t>{3}));
  EXPECT_EQ(with(R"("layers_to_transform":null)").layers_to_transform, (std::vector<int64_t>{}));
  EXPECT_EQ(with(R"("rank_pattern":null)").rank_pattern.size(), 0U);
  EXPECT_EQ(with(R"("init_lora_weights":"pissa")").init_lora_weights, (std::variant<bool, std::string>("pissa")));
}

TEST(Adapter, HasARankThatItsDescriptionKnowsAlsoBesideExperts) {
  const TemporaryFolder folder;
  const auto saved = [&](const nlohmann::json& parameters, int64_t rows) {
    Adapter adapter;
    adapter.config.r = 4;
    adapter.config.other["target_parameters"] = parameters;
    adapter.tensors = {{"x.lora_A.weight", torch::zeros({rows, 3})}, {"x.lora_B.weight", torch::zeros({2, rows})}};
    save_adapter(folder / "adapter", adapter);
  };
  saved({"experts.up"}, 12);  // three experts
  EXPECT_EQ(load_adapter(folder / "adapter").tensors.size(), 2U);
  EXPECT_TRUE(mentions(error_of([&] { saved({"experts.up"}, 6); }), "has rank 6, expected r = 4"));
  // PEFT writes an empty list where only modules have factors.
  for (const auto& none : {nlohmann::json::array(), nlohmann::json()}) {
    saved(none, 4);
    EXPECT_TRUE(mentions(error_of([&] { saved(none, 12); }), "has rank 12, expected r = 4"));
  }
}

TEST(AdapterConfig, AFieldAmongTheOthersDoesNotShadowItsOwn) {
  AdapterConfig config;
  config.r = 5;
  config.other["r"] = 7;
  EXPECT_EQ(parse_adapter_config(adapter_config_text(config), "").r, 5);
}

struct BadConfig {
  const char* name;
  std::string text;
  std::string message;
};

class BadAdapterConfig : public testing::TestWithParam<BadConfig> {};

TEST_P(BadAdapterConfig, IsRefusedByFileAndField) {
  const TemporaryFolder folder;
  write_bytes(folder / "adapter_config.json", GetParam().text);
  const std::string message = error_of([&] { load_adapter(folder.string()); });
  EXPECT_TRUE(mentions(message, "adapter description " + (folder / "adapter_config.json").string() + ": "));
  EXPECT_TRUE(mentions(message, GetParam().message));
}

std::string lora(const std::string& field) { return R"({"peft_type":"LORA",)" + field + "}"; }

INSTANTIATE_TEST_SUITE_P(
    Kinds, BadAdapterConfig,
    testing::Values(
        BadConfig{"Empty", "", "is not valid JSON at byte 1"}, BadConfig{"List", "[1]", "is no JSON object"},
        BadConfig{"NoType", "{}", "peft_type is '', expected 'LORA'"},
        BadConfig{"AnotherType", R"({"peft_type":"IA3"})", "peft_type is 'IA3', expected 'LORA'"},
        BadConfig{"TypeNull", R"({"peft_type":null})", "peft_type is 'null', expected a text"},
        BadConfig{"RankZero", lora(R"("r":0)"), "r is '0', expected a whole number ≥ 1"},
        BadConfig{"RankNegative", lora(R"("r":-8)"), "r is '-8', expected a whole number ≥ 1"},
        BadConfig{"RankFraction", lora(R"("r":8.0)"), "r is '8.0', expected a whole number ≥ 1"},
        BadConfig{"RankHuge", lora(R"("r":9223372036854775808)"), "r is '9223372036854775808'"},
        BadConfig{"RankText", lora(R"("r":"8")"), "r is '\"8\"', expected a whole number"},
        BadConfig{"RankTrue", lora(R"("r":true)"), "r is 'true', expected a whole number"},
        BadConfig{"AlphaText", lora(R"("lora_alpha":"16")"), "lora_alpha is '\"16\"', expected a number"},
        BadConfig{"AlphaNaN", lora(R"("lora_alpha":NaN)"), "is not valid JSON at byte"},
        BadConfig{"AlphaInfinite", lora(R"("lora_alpha":1e999)"), "is not valid JSON"},
        BadConfig{"Dropout", lora(R"("lora_dropout":1.5)"), "lora_dropout is 1.5, expected 0 to 1"},
        BadConfig{"Bias", lora(R"("bias":"some")"), "bias is 'some', expected 'none', 'all' or 'lora_only'"},
        BadConfig{"Flag", lora(R"("use_rslora":1)"), "use_rslora is '1', expected true or false"},
        BadConfig{"Modules", lora(R"("target_modules":{})"), "target_modules is '{}', expected a text, a list"},
        BadConfig{"ModulesElement", lora(R"("target_modules":["q",1])"), "target_modules[1] is '1', expected a text"},
        BadConfig{"Saved", lora(R"("modules_to_save":"score")"), "modules_to_save is '\"score\"', expected a list"},
        BadConfig{"Pattern", lora(R"("rank_pattern":{"q":0})"),
                  "rank_pattern['q'] is '0', expected a whole number ≥ 1"},
        BadConfig{"PatternList", lora(R"("rank_pattern":[4])"), "rank_pattern is '[4]', expected an object or null"},
        BadConfig{"AlphaPattern", lora(R"("alpha_pattern":{"q":"x"})"), "alpha_pattern['q'] is '\"x\"'"},
        BadConfig{"Layers", lora(R"("layers_to_transform":[-1])"), "layers_to_transform is '-1'"},
        BadConfig{"Init", lora(R"("init_lora_weights":0)"), "init_lora_weights is '0', expected true, false or a text"},
        BadConfig{"Task", lora(R"("task_type":1)"), "task_type is '1', expected a text or null"},
        BadConfig{"FieldTwice", lora(R"("r":8,"r":8)"), "names 'r' twice"},
        BadConfig{"NestedFieldTwice", lora(R"("x":[{"y":1,"y":2}])"), "names 'y' twice"},
        BadConfig{"Deep", lora(R"("x":)" + std::string(1000000, '[')), "is nested more than 16 deep"},
        BadConfig{"NoUtf8", lora("\"bias\":\"\xFF\""), "is not valid JSON at byte"},
        BadConfig{"NullByte", lora(R"("r":8)") + std::string(1, '\0'), "holds a null byte"},
        BadConfig{"Large", lora(R"("r":8)") + std::string((16 << 20) + 1, ' '), "expected at most 16777216"}),
    [](const auto& info) { return info.param.name; });

TEST(AdapterConfig, OutOfItsRangeIsNotWritten) {
  const auto refusal = [](const std::function<void(AdapterConfig&)>& change) {
    AdapterConfig config = full_config();
    change(config);
    return error_of([&] { adapter_config_text(config); });
  };
  EXPECT_TRUE(mentions(refusal([](auto& config) { config.r = 0; }), "r is 0"));
  EXPECT_TRUE(mentions(refusal([](auto& config) { config.lora_alpha = NAN; }), "lora_alpha is nan"));
  EXPECT_TRUE(
      mentions(refusal([](auto& config) { config.alpha_pattern["q"] = INFINITY; }), "alpha_pattern['q'] is inf"));
  EXPECT_TRUE(mentions(refusal([](auto& config) { config.rank_pattern["q"] = -1; }), "rank_pattern['q'] is -1"));
  EXPECT_TRUE(
      mentions(refusal([](auto& config) { config.layers_to_transform = {-1}; }), "layers_to_transform holds -1"));
  EXPECT_TRUE(mentions(refusal([](auto& config) { config.task_type = "\xFF"; }), "not valid UTF-8"));
  EXPECT_TRUE(mentions(refusal([](auto& config) { config.other = 3; }), "no JSON object"));
}

TEST(Adapter, OfPeftIsReadAndWrittenBitForBit) {
  const TemporaryFolder folder;
  const Adapter adapter = load_adapter(golden("tiny_adapter"));
  EXPECT_EQ(adapter.tensors.size(), 24U);
  EXPECT_EQ(adapter.tensors.at("encoder.layer.0.attention.self.query.lora_A.weight").size(0), 3);
  save_adapter(folder / "new" / "folder", adapter);
  const std::string file = "adapter_model.safetensors";
  const Safetensors ours = load_safetensors(folder / "new" / "folder" / file);
  const Safetensors theirs = load_safetensors(golden("tiny_adapter") / file);
  EXPECT_EQ(ours.metadata, theirs.metadata);
  ASSERT_EQ(ours.tensors.size(), theirs.tensors.size());
  for (const auto& [name, tensor] : theirs.tensors) EXPECT_TRUE(ours.tensors.at(name).equal(tensor)) << name;
}

TEST(Adapter, ComesBackAsItWasSaved) {
  const TemporaryFolder folder;
  const Adapter adapter = small_adapter();
  save_adapter(folder.string(), adapter);
  const Adapter read = load_adapter(folder.string());
  ASSERT_EQ(read.tensors.size(), adapter.tensors.size());
  for (const auto& [name, tensor] : adapter.tensors) EXPECT_TRUE(read.tensors.at(name).equal(tensor)) << name;
  EXPECT_EQ(adapter_config_text(read.config), adapter_config_text(adapter.config));
}

TEST(Adapter, RanksMayBeThoseOfThePattern) {
  const TemporaryFolder folder;
  Adapter adapter = small_adapter();
  adapter.tensors["layer.v.lora_A.weight"] = torch::ones({5, 3});
  adapter.tensors["layer.v.lora_B.weight"] = torch::ones({4, 5});
  EXPECT_TRUE(mentions(error_of([&] { save_adapter(folder.string(), adapter); }),
                       "tensor 'layer.v.lora_A.weight' has rank 5, expected r = 2 or a rank of rank_pattern"));
  adapter.config.rank_pattern["v"] = 5;
  save_adapter(folder.string(), adapter);
  EXPECT_EQ(load_adapter(folder.string()).tensors.size(), adapter.tensors.size());
}

TEST(Adapter, WithFactorsThatDoNotFitIsRefusedOnBothWays) {
  const TemporaryFolder folder;
  const auto refusal = [&](const std::function<void(Adapter&)>& change) {
    Adapter adapter = small_adapter();
    change(adapter);
    const std::string saving = error_of([&] { save_adapter(folder / "new", adapter); });
    EXPECT_FALSE(std::filesystem::exists(folder / "new"));
    std::map<std::string, torch::Tensor> tensors;
    for (const auto& [name, tensor] : adapter.tensors) tensors["base_model.model." + name] = tensor;
    save_safetensors(folder / "adapter_model.safetensors", tensors);
    write_bytes(folder / "adapter_config.json", adapter_config_text(adapter.config));
    const std::string loading = error_of([&] { load_adapter(folder.string()); });
    EXPECT_EQ(saving.substr(saving.find(": ")), loading.substr(loading.find(": ")));
    return loading;
  };
  EXPECT_TRUE(mentions(refusal([](auto& adapter) { adapter.tensors.erase("layer.q.lora_B.weight"); }),
                       "tensor 'layer.q.lora_A.weight' has no partner, expected 'layer.q.lora_B.weight'"));
  EXPECT_TRUE(mentions(refusal([](auto& adapter) { adapter.tensors.erase("layer.q.lora_A.weight"); }),
                       "tensor 'layer.q.lora_B.weight' has no partner, expected 'layer.q.lora_A.weight'"));
  EXPECT_TRUE(mentions(refusal([](auto& adapter) { adapter.tensors.erase("words.lora_embedding_B"); }),
                       "tensor 'words.lora_embedding_A' has no partner"));
  EXPECT_TRUE(mentions(refusal([](auto& adapter) {
                         adapter.tensors["layer.q.lora_B.weight"] = torch::ones({4, 3});
                       }),
                       "is [2, 3], its partner [4, 3], expected the rank"));
  EXPECT_TRUE(mentions(refusal([](auto& adapter) { adapter.tensors["layer.q.lora_A.weight"] = torch::ones({2}); }),
                       "is [2], expected at least two dimensions"));
  EXPECT_TRUE(mentions(refusal([](auto& adapter) {
                         adapter.tensors["layer.q.lora_A.weight"] = torch::ones({2, 0});
                       }),
                       "is [2, 0], expected at least two dimensions, none of them 0"));
}

TEST(Adapter, WithATensorThatIsNoneOfPeftsIsRefused) {
  const TemporaryFolder folder;
  save_adapter(folder.string(), small_adapter());
  for (const char* name : {"layer.q.lora_A.weight", "base_model.model."}) {
    save_safetensors(folder / "adapter_model.safetensors", {{name, torch::ones({2})}});
    EXPECT_TRUE(mentions(error_of([&] { load_adapter(folder.string()); }),
                         std::string("tensor '") + name + "' has a name that does not begin with 'base_model.model.'"));
  }
}

TEST(Adapter, WithoutOneOfItsFilesIsRefusedByThatFile) {
  const TemporaryFolder folder;
  EXPECT_TRUE(mentions(error_of([&] { load_adapter(folder.string()); }), "adapter_config.json: does not exist"));
  save_adapter(folder.string(), small_adapter());
  std::filesystem::remove(folder / "adapter_model.safetensors");
  EXPECT_TRUE(mentions(error_of([&] { load_adapter(folder.string()); }), "adapter_model.safetensors: does not exist"));
}

TEST(Adapter, AsAPickleOfPythonIsRefusedAsSuch) {
  const TemporaryFolder folder;
  save_adapter(folder.string(), small_adapter());
  std::filesystem::rename(folder / "adapter_model.safetensors", folder / "adapter_model.bin");
  EXPECT_TRUE(mentions(error_of([&] { load_adapter(folder.string()); }),
                       "adapter_model.safetensors: does not exist, but adapter_model.bin does"));
}

/// Files that were written from a model's state_dict, or of a compiled model (PEFT writes "_orig_mod" by itself).
TEST(Adapter, HasThePlainNamesWhateverWrappersTheModelHad) {
  const TemporaryFolder folder;
  Adapter adapter = small_adapter();
  adapter.tensors["lora_block.up.weight"] = torch::ones({2});
  const auto saved = [&](const std::map<std::string, std::string>& names) {
    std::map<std::string, torch::Tensor> tensors;
    for (const auto& [name, written] : names) tensors[written] = adapter.tensors.at(name);
    save_adapter(folder.string(), adapter);
    save_safetensors(folder / "adapter_model.safetensors", tensors);
  };
  const std::map<std::string, std::string> names = {
      {"layer.q.lora_A.weight", "base_model.model._orig_mod.layer.q.lora_A.default.weight"},
      {"layer.q.lora_B.weight", "_orig_mod.base_model.model.layer.q.lora_B.default.weight"},
      {"layer.conv.lora_A.weight", "base_model.model.layer._fsdp_wrapped_module.conv.lora_A.weight"},
      {"layer.conv.lora_B.weight", "base_model.model.layer._checkpoint_wrapped_module.conv.lora_B.default.weight"},
      {"words.lora_embedding_A", "base_model.model.words.lora_embedding_A.default"},
      {"words.lora_embedding_B", "base_model.model.words.lora_embedding_B"},
      {"score.weight", "base_model.model.score.modules_to_save.default.weight"},
      {"lora_block.up.weight", "base_model.model.lora_block.up.weight"}};
  saved(names);
  const Adapter read = load_adapter(folder.string());
  ASSERT_EQ(read.tensors.size(), names.size());
  for (const auto& [name, tensor] : adapter.tensors) EXPECT_TRUE(read.tensors.at(name).equal(tensor)) << name;

  auto two = names;
  two["layer.q.lora_B.weight"] = "base_model.model.layer.q.lora_B.other.weight";
  saved(two);
  EXPECT_TRUE(mentions(error_of([&] { load_adapter(folder.string()); }),
                       "holds the adapters 'default' and 'other', expected one"));
  auto twice = names;
  twice["layer.q.lora_B.weight"] = "base_model.model.layer.q.lora_A.weight";
  saved(twice);
  EXPECT_TRUE(mentions(error_of([&] { load_adapter(folder.string()); }),
                       "is there twice, as 'base_model.model.layer.q.lora_A.weight'"));
}

TEST(AdapterModules, SayWhatAFileHoldsOfEachModule) {
  Adapter adapter = small_adapter();
  const auto one = [](double value) { return torch::full({1}, value); };
  adapter.config.modules_to_save = std::vector<std::string>{"score", "classifier", "weird.norm"};
  adapter.tensors["score.bias"] = one(1);
  adapter.tensors["model.classifier.dense.weight"] = one(2);
  adapter.tensors["words.base_layer.weight"] = one(3);
  adapter.tensors["layer.q.base_layer.bias"] = one(4);
  adapter.tensors["norm.bias"] = one(5);
  adapter.tensors["layer.q.lora_magnitude_vector"] = one(6);
  adapter.tensors["layer.q.lora_B.bias"] = one(7);
  adapter.tensors["words.token_adapter.trainable_tokens_delta"] = one(8);
  adapter.tensors["layer.q.lora_velora_embed"] = one(9);
  adapter.tensors["my_score.weight"] = one(10);
  adapter.tensors["my_weird.norm.inner.weight"] = one(11);
  adapter.tensors["score_of.weight"] = one(12);
  adapter.tensors["lora_block.up.bias"] = one(13);
  const auto modules = adapter_modules(adapter);
  std::set<std::string> names;
  for (const auto& item : modules) names.insert(item.first);
  EXPECT_EQ(names, (std::set<std::string>{"layer.q", "layer.conv", "words", "score", "model.classifier.dense", "norm",
                                          "words.token_adapter", "my_score", "my_weird.norm.inner", "score_of",
                                          "lora_block.up"}));
  const AdapterModule& q = modules.at("layer.q");
  EXPECT_TRUE(q.a.equal(adapter.tensors["layer.q.lora_A.weight"]));
  EXPECT_TRUE(q.b.equal(adapter.tensors["layer.q.lora_B.weight"]));
  EXPECT_FALSE(q.embedding);
  EXPECT_TRUE(q.bias.equal(one(4)));
  EXPECT_TRUE(q.magnitude.equal(one(6)));
  EXPECT_FALSE(q.base_weight.defined());
  EXPECT_EQ(q.others, std::vector<std::string>{"layer.q.lora_B.bias"}) << "and nothing of VeLoRA";
  EXPECT_TRUE(modules.at("words").embedding);
  EXPECT_TRUE(modules.at("words").a.equal(adapter.tensors["words.lora_embedding_A"]));
  EXPECT_TRUE(modules.at("words").base_weight.equal(one(3)));
  EXPECT_TRUE(modules.at("score").whole.at("bias").equal(one(1)));
  EXPECT_TRUE(modules.at("score").whole.at("weight").equal(adapter.tensors["score.weight"]));
  EXPECT_TRUE(modules.at("model.classifier.dense").whole.at("weight").equal(one(2)));
  EXPECT_TRUE(modules.at("norm").bias.equal(one(5)));
  EXPECT_FALSE(modules.at("norm").a.defined());
  EXPECT_EQ(modules.at("words.token_adapter").others.size(), 1U);
  // PEFT asks for the end of a name, not for a word in it.
  EXPECT_TRUE(modules.at("my_score").whole.at("weight").equal(one(10)));
  EXPECT_TRUE(modules.at("my_weird.norm.inner").whole.at("weight").equal(one(11)));
  EXPECT_EQ(modules.at("score_of").others, std::vector<std::string>{"score_of.weight"});
}

TEST(AdapterModules, AModuleIsALayerOrAnEmbedding) {
  Adapter adapter = small_adapter();
  adapter.tensors["layer.q.lora_embedding_A"] = torch::ones({2, 3});
  EXPECT_TRUE(mentions(error_of([&] { adapter_modules(adapter); }),
                       "adapter: 'layer.q.' has lora_A or lora_B and lora_embedding_A or lora_embedding_B"));
}

TEST(AdapterTensors, GoByPeftsNamesWithoutTheAdapters) {
  torch::OrderedDict<std::string, torch::Tensor> parameters;
  for (const char* name :
       {"q.weight", "q.lora_A.default.weight", "q.lora_B.default.weight", "q.lora_A.other.weight", "k.lora_A.weight",
        "words.lora_embedding_A.default", "words.lora_embedding_B", "words.lora_embedding_B.other", "lora_A.weight",
        "v.lora_magnitude_vector.default.weight", "default.q.lora_B.default.bias", "lora_layers.q.bias"}) {
    parameters.insert(name, torch::ones({1}));
  }
  const auto names = [&](const std::string& adapter) {
    std::set<std::string> result;
    for (const auto& item : adapter_tensors(parameters, adapter)) result.insert(item.first);
    return result;
  };
  EXPECT_EQ(names("default"),
            (std::set<std::string>{"q.lora_A.weight", "q.lora_B.weight", "k.lora_A.weight", "words.lora_embedding_A",
                                   "words.lora_embedding_B", "lora_A.weight", "v.lora_magnitude_vector",
                                   "default.q.lora_B.bias"}));
  EXPECT_TRUE(mentions(error_of([&] { names("other"); }), "two parameters would be called 'words.lora_embedding_B'"));
}

TEST(AdapterTensors, ModulesAndAdaptersMayHaveNamesThatBeginAsPeftsOwn) {
  torch::OrderedDict<std::string, at::Tensor> parameters;
  for (const char* name : {"lora_block.q.lora_A.lora_x.weight", "lora_block.q.lora_B.lora_x.weight",
                           "lora_block.words.lora_embedding_A.lora_x", "lora_block.q.lora_A.lora_y.weight",
                           "lora_block.q.weight", "lora_block.lora_A.weight"}) {
    parameters.insert(name, torch::zeros({1}));
  }
  std::set<std::string> names;
  for (const auto& item : adapter_tensors(parameters, "lora_x")) names.insert(item.first);
  EXPECT_EQ(names, (std::set<std::string>{"lora_block.q.lora_A.weight", "lora_block.q.lora_B.weight",
                                          "lora_block.words.lora_embedding_A", "lora_block.lora_A.weight"}));
}

}  // namespace
}  // namespace lora_rite::test
