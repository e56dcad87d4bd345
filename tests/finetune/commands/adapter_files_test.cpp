// What other trainers write, and what is written of them.

#include <algorithm>
#include <lora_rite/io/peft.hpp>
#include <set>

#include "support.hpp"

namespace finetune {
namespace {

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
