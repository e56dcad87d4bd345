#include "models/config.hpp"

#include <fstream>
#include <nlohmann/json.hpp>

#include "common/files.hpp"
#include "models/bert.hpp"
#include "support.hpp"

namespace finetune {
namespace {

namespace fs = std::filesystem;

// What transformers makes of many config.json: make_config_goldens.py.

TEST(Config, DefaultsAreThoseOfTransformersClasses) {
  const nlohmann::json golden = read_json(model_golden("config_defaults.json"));
  ASSERT_EQ(golden.size(), 6U);
  for (const auto& [type, defaults] : golden.items()) {
    nlohmann::json ours = config_defaults(type);
    for (const auto& [field, value] : ours.items()) EXPECT_TRUE(defaults.contains(field)) << type << ": " << field;
    for (const auto& [field, value] : defaults.items()) {
      if (value.is_null() && !ours.contains(field)) continue;
      ASSERT_TRUE(ours.contains(field)) << type << ": " << field;
      EXPECT_EQ(ours[field], value) << type << ": " << field;
    }
  }
  EXPECT_TRUE(config_defaults("gpt2").empty());
}

// Every 37th value of what the model makes of its golden's batch.
std::vector<float> computed(const std::string& golden, const fs::path& folder) {
  const torch::NoGradGuard no_grad;
  torch::Tensor values;
  if (golden == "bert") {
    const Tensors expected = lora_rite::load_safetensors(finetune::golden("tiny/expected.safetensors")).tensors;
    const torch::Tensor mask = expected.at("mask");
    values = load_bert(folder)->forward(expected.at("tokens"), mask).index({mask});
  } else {
    values = load_model(folder)->forward(input_of(expected_of(golden)));
  }
  values = values.flatten().slice(0, 0, std::nullopt, 37).contiguous();
  return {values.data_ptr<float>(), values.data_ptr<float>() + values.numel()};
}

TEST(Config, FieldsHaveTheMeaningThatTransformersGivesThem) {
  const nlohmann::json variants = read_json(model_golden("config_variants.json"));
  ASSERT_GE(variants.size(), 80U);
  for (const auto& variant : variants) {
    const std::string golden = variant["golden"];
    const std::string what = golden + " with " + variant["changes"].dump() + " without " + variant["gone"].dump() +
                             ", generation_config.json " + variant["generation"].dump();
    const fs::path source = golden == "bert" ? finetune::golden("tiny") : model_golden(golden);
    const TemporaryFolder folder;
    nlohmann::json config = read_json(source / "config.json");
    for (const std::string field : variant["gone"]) config.erase(field);
    config.update(variant["changes"]);
    write_json(folder / "config.json", config);
    if (!variant["generation"].is_null()) write_json(folder / "generation_config.json", variant["generation"]);
    fs::copy_file(source / "model.safetensors", folder / "model.safetensors");
    const nlohmann::json& expected = variant["expected"];
    if (expected.is_null()) continue;  // transformers refuses it

    std::vector<float> found;
    ASSERT_NO_THROW(found = computed(golden, folder.string())) << what;
    const std::vector<float> values = expected["values"];
    ASSERT_EQ(found.size(), values.size()) << what;
    for (size_t i = 0; i < found.size(); ++i) ASSERT_NEAR(found[i], values[i], 2e-5) << what << ", value " << i;
    if (golden == "bert") continue;
    const auto model = load_model(folder.string());
    EXPECT_EQ(model->special_tokens().pad, expected["pad"].is_null() ? -1 : expected["pad"].get<int64_t>()) << what;
    const nlohmann::json& end = expected["end"];
    const auto ends = end.is_null()    ? std::vector<int64_t>()
                      : end.is_array() ? end.get<std::vector<int64_t>>()
                                       : std::vector<int64_t>{end.get<int64_t>()};
    EXPECT_EQ(model->special_tokens().end, ends) << what;
  }
}

TEST(Config, GenerationStopsAtTheTokensOfItsOwnFile) {
  const torch::NoGradGuard no_grad;
  const TemporaryFolder folder;
  fs::copy(model_golden("llama"), folder / "model");
  nlohmann::json config = read_json(folder / "model/config.json");
  config["eos_token_id"] = nullptr;
  write_json(folder / "model/config.json", config);
  const LanguageInput prompt{expected_of("llama").at("tokens").slice(0, 0, 1), {}, {}, {}};
  const auto written = [&] { return load_model(folder / "model")->generate(prompt, 8).flatten(); };
  const torch::Tensor all = written();
  ASSERT_EQ(all.numel(), 8);
  const int64_t third = all[2].item<int64_t>();
  ASSERT_FALSE(all.slice(0, 0, 2).eq(third).any().item<bool>());
  int64_t other = 0;
  while (all.eq(other).any().item<bool>()) ++other;
  write_json(folder / "model/generation_config.json", {{"eos_token_id", {other, third}}});
  EXPECT_TRUE(written().equal(all.slice(0, 0, 3)));

  // Where it names none, there config.json's counts.
  config["eos_token_id"] = third;
  write_json(folder / "model/config.json", config);
  write_json(folder / "model/generation_config.json", {{"do_sample", true}});
  EXPECT_TRUE(written().equal(all.slice(0, 0, 3)));
  write_json(folder / "model/generation_config.json", {{"eos_token_id", "</s>"}});
  EXPECT_NE(error_of([&] { written(); }).find("generation_config.json: 'eos_token_id' is \"</s>\""), std::string::npos);
}

TEST(Config, OtherNamesOfT5sFieldsMustAgree) {
  const TemporaryFolder folder;
  nlohmann::json config = read_json(model_golden("t5") / "config.json");
  config["hidden_size"] = 8;
  write_json(folder / "config.json", config);
  const std::string message = error_of([&] { T5Config::from_file(folder / "config.json"); });
  EXPECT_NE(message.find("'hidden_size' is 8; expected is the same as 'd_model', 16"), std::string::npos) << message;
}

TEST(Config, QuantisedWeightsAreRefusedWhereverTheFileSaysSo) {
  const TemporaryFolder folder;
  const std::vector<std::pair<nlohmann::json, std::string>> cases = {
      {{{"quantization_config", {{"quant_method", "fp8"}}}}, "(fp8)"},
      {{{"quantization_config", {{"quant_method", "gptq"}, {"bits", 4}}}}, "(gptq)"},
      {{{"quantization_config", {{"quant_method", "awq"}}}}, "(awq)"},
      {{{"quantization_config", {{"quant_method", "compressed-tensors"}}}}, "(compressed-tensors)"},
      {{{"compression_config", {{"quant_method", "compressed-tensors"}}}}, "(compressed-tensors)"},
      {{{"quantization_config", {{"load_in_4bit", true}}}}, "load_in_4bit"},
      {{{"quantization", {{"bits", 4}, {"group_size", 64}}}}, "group_size"},
      {{{"text_config", {{"quantization_config", {{"quant_method", "fp8"}}}}}}, "(fp8)"},
  };
  for (const auto& [fields, part] : cases) {
    nlohmann::json config = {{"model_type", "llama"}};
    config.update(fields);
    write_json(folder / "config.json", config);
    const std::string message = error_of([&] { read_model_type(folder / "config.json"); });
    EXPECT_NE(message.find("a quantised checkpoint is not supported"), std::string::npos) << message;
    EXPECT_NE(message.find(part), std::string::npos) << message;
  }
  for (const nlohmann::json& nothing : {nlohmann::json(nullptr), nlohmann::json(false)}) {
    write_json(folder / "config.json", {{"model_type", "llama"}, {"quantization_config", nothing}});
    EXPECT_EQ(read_model_type(folder / "config.json"), "llama");
  }
}

TEST(Config, WhatItMustSayIsNamed) {
  const TemporaryFolder folder;
  const auto refusal = [&](const nlohmann::json& config) {
    write_json(folder / "config.json", config);
    return error_of([&] { read_config(folder / "config.json"); });
  };
  EXPECT_NE(refusal({1}).find("is no JSON object"), std::string::npos);
  EXPECT_NE(refusal({{"vocab_size", 3}}).find("lacks the text 'model_type'"), std::string::npos);
  EXPECT_NE(refusal({{"model_type", "llama"}, {"transformers_weights", "other.safetensors"}}).find("other.safetensors"),
            std::string::npos);
}

TEST(Config, ATieIsSaidHereOrByTheType) {
  const auto ties = [](nlohmann::json config) { return ties_embedding(config); };
  EXPECT_FALSE(ties({{"model_type", "llama"}}));
  EXPECT_TRUE(ties({{"model_type", "bert"}}));
  EXPECT_TRUE(ties({{"model_type", "llama"}, {"tie_word_embeddings", true}}));
  EXPECT_TRUE(ties({{"model_type", "gemma2"}}));
  EXPECT_FALSE(ties({{"model_type", "gemma2"}, {"tie_word_embeddings", false}}));
  EXPECT_TRUE(ties({{"model_type", "mt5"}, {"tie_word_embeddings", false}}));
  EXPECT_FALSE(ties({{"model_type", "bert"}, {"tie_word_embeddings", false}}));
  EXPECT_TRUE(ties({{"model_type", "gpt2"}}));
  EXPECT_FALSE(ties({{"model_type", "qwen2_vl"}}));
  EXPECT_TRUE(ties({{"model_type", "qwen2_vl"}, {"text_config", {{"tie_word_embeddings", true}}}}));
}

}  // namespace
}  // namespace finetune
