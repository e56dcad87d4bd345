#include "models/bert.hpp"

#include <cstdlib>
#include <fstream>
#include <lora_rite/nn/nn.hpp>
#include <nlohmann/json.hpp>

#include "common/files.hpp"
#include "data/tokenize.hpp"
#include "finetune/python.hpp"
#include "finetune/support.hpp"

namespace finetune {
namespace {

// Hidden states at padding mean nothing; transformers leaves values there, we leave zeros.
double distance_at_tokens(const torch::Tensor& found, const torch::Tensor& expected, const torch::Tensor& mask) {
  return distance(found * mask.unsqueeze(-1), expected * mask.unsqueeze(-1));
}

std::filesystem::path minilm() { return LORA_RITE_MINILM_DIR; }

bool have_minilm() { return std::filesystem::exists(minilm() / "model.safetensors"); }

TEST(Bert, TinyRandomModelAgreesWithTransformers) {
  const Safetensors expected = load_safetensors(golden("tiny/expected.safetensors"));
  const torch::Tensor mask = expected.tensors.at("mask");
  const auto model = load_bert(golden("tiny"));
  const torch::Tensor hidden = model->forward(expected.tensors.at("tokens"), mask);
  EXPECT_GT(expected.tensors.at("hidden").std().item<double>(), 0.1);
  EXPECT_LT(distance_at_tokens(hidden, expected.tensors.at("hidden"), mask), 1e-5);
  EXPECT_LT(distance(mean_pool(hidden, mask), expected.tensors.at("pooled")), 1e-5);
}

TEST(Bert, MiniLmEmbedsRealSentencesAsTransformersDoes) {
  if (!have_minilm()) GTEST_SKIP() << minilm() << " is not there; run scripts/setup";
  const Safetensors expected = load_safetensors(golden("minilm_expected.safetensors"));
  const torch::Tensor mask = expected.tensors.at("mask");
  const torch::NoGradGuard no_grad;
  const torch::Tensor pooled = mean_pool(load_bert(minilm())->forward(expected.tensors.at("tokens"), mask), mask);
  const double error = distance(pooled, expected.tensors.at("pooled"));
  EXPECT_LT(error, 1e-4);
  RecordProperty("largest_difference", std::to_string(error));
}

TEST(Bert, ASentenceDoesNotDependOnTheOthersInItsBatch) {
  const Safetensors expected = load_safetensors(golden("tiny/expected.safetensors"));
  const torch::Tensor tokens = expected.tensors.at("tokens");
  const auto model = load_bert(golden("tiny"));
  const torch::Tensor alone = model->forward(tokens.slice(0, 1, 2).slice(1, 0, 4), torch::ones({1, 4}, torch::kBool));
  const torch::Tensor batched = model->forward(tokens, expected.tensors.at("mask"))[1].slice(0, 0, 4);
  EXPECT_LT(distance(alone[0], batched), 1e-5);
}

TEST(Bert, TheTokenizerScriptAgreesWithTransformers) {
  if (!have_minilm()) GTEST_SKIP() << minilm() << " is not there; run scripts/setup";
  if (!python_has("tokenizers")) GTEST_SKIP() << "Python has no package 'tokenizers'; run scripts/setup --tests";
  const Safetensors expected = load_safetensors(golden("minilm_expected.safetensors"));
  const auto sentences = nlohmann::json::parse(expected.metadata.at("sentences")).get<std::vector<std::string>>();
  const TemporaryFolder folder;
  const auto tokens = tokenize(sentences, {minilm(), 128, ""}, 30522, folder / "tokens");
  const Dataset data{tokens, std::vector<int64_t>(sentences.size(), 0)};
  const Batch batch = make_batch(data, {0, 1, 2, 3, 4, 5}, 0);
  EXPECT_TRUE(batch.tokens.equal(expected.tensors.at("tokens")));
  EXPECT_TRUE(batch.mask.equal(expected.tensors.at("mask")));

  const auto cut = tokenize(sentences, {minilm(), 6, ""}, 30522, folder / "cut");
  EXPECT_EQ(cut[0].size(), 6U);
  EXPECT_EQ(cut[0].back(), tokens[0].back()) << "the closing special token stays";
}

TEST(Bert, TheBaseIsFrozenAndOnlyAdaptersTrain) {
  const auto model = load_bert(golden("tiny"));
  lora_rite::nn::LoraConfig config;
  config.target_modules = "all-linear";
  lora_rite::nn::inject_lora(*model, config);
  int64_t factors = 0;
  for (const auto& item : model->named_parameters()) {
    const bool is_factor = item.key().find(".lora_") != std::string::npos;
    factors += is_factor ? 1 : 0;
    EXPECT_EQ(item.value().requires_grad(), is_factor) << item.key();
  }
  EXPECT_EQ(factors, 2 * 6 * 2) << "two factors, six linear layers a block, two blocks";
}

TEST(Bert, AnUnsupportedModelIsRefusedByFileAndField) {
  const TemporaryFolder folder;
  std::ofstream(folder / "config.json") << R"({"model_type": "gpt2"})";
  const std::string message = error_of([&] { load_bert(folder.string()); });
  EXPECT_NE(message.find("config.json: 'model_type' is 'gpt2', but only 'bert'"), std::string::npos) << message;
}

TEST(Bert, ATensorThatIsMissingOrMisshapenIsNamed) {
  const TemporaryFolder folder;
  std::filesystem::copy(golden("tiny/config.json"), folder / "config.json");
  Safetensors file = load_safetensors(golden("tiny/model.safetensors"));
  const std::string name = "encoder.layer.1.attention.self.key.weight";
  const torch::Tensor weight = file.tensors.at(name);

  file.tensors[name] = weight.slice(0, 1);
  save_safetensors(folder / "model.safetensors", file.tensors);
  std::string message = error_of([&] { load_bert(folder.string()); });
  EXPECT_NE(message.find(name + "' has shape [15, 16], but config.json asks for [16, 16]"), std::string::npos)
      << message;

  file.tensors.erase(name);
  save_safetensors(folder / "model.safetensors", file.tensors);
  message = error_of([&] { load_bert(folder.string()); });
  EXPECT_NE(message.find("lacks the tensor '" + name), std::string::npos) << message;
}

TEST(Bert, OlderNamesOfTheSameTensorsAreUnderstood) {
  const TemporaryFolder folder;
  std::filesystem::copy(golden("tiny/config.json"), folder / "config.json");
  Safetensors file;
  for (const auto& [name, tensor] : load_safetensors(golden("tiny/model.safetensors")).tensors) {
    std::string old = "bert." + name;
    for (const auto& [now, before] :
         {std::pair{"LayerNorm.weight", "LayerNorm.gamma"}, std::pair{"LayerNorm.bias", "LayerNorm.beta"}}) {
      if (const size_t at = old.find(now); at != std::string::npos) old.replace(at, std::string::npos, before);
    }
    file.tensors[old] = tensor;
  }
  save_safetensors(folder / "model.safetensors", file.tensors);
  const auto expected = load_bert(golden("tiny"))->named_parameters();
  for (const auto& item : load_bert(folder.string())->named_parameters()) {
    EXPECT_TRUE(item.value().equal(expected[item.key()])) << item.key();
  }
}

}  // namespace
}  // namespace finetune
