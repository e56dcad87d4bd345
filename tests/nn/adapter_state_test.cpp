// adapter_state, load_adapter_state, base_state, load_base_state: the names that files have, and strictness.

#include <gtest/gtest.h>
#include <torch/nn/modules/batchnorm.h>

#include <lora_rite/nn/nn.hpp>
#include <memory>
#include <string>
#include <vector>

#include "nn/support.hpp"
#include "support/pairs.hpp"
#include "support/tensors.hpp"
#include "support/torch.hpp"

namespace lora_rite::test {
namespace {

using nn::inject_lora;
using nn::NamedTensors;

NamedTensors copies_of(const NamedTensors& tensors) {
  NamedTensors copies;
  for (const auto& [name, tensor] : tensors) copies.emplace(name, tensor.detach().clone());
  return copies;
}

const std::vector<std::string> kEverything = {"embed", "conv", "0", "2", "head"};

TEST(AdapterState, CarriesAnAdapterToAnotherModelUnderAnotherName) {
  torch::manual_seed(1);
  Small model;
  auto config = lora_config(2, 4, kEverything);
  config.bias = nn::LoraBias::All;
  inject_lora(*model, config);
  randomize_factors(*model);
  {
    torch::NoGradGuard no_grad;
    model->norm->bias.fill_(3);
    model->head->base_layer()->bias.fill_(2);
  }
  const auto base = copies_of(nn::base_state(*model));
  const auto file = copies_of(nn::adapter_state(*model));
  EXPECT_EQ(file.count("norm.bias") + file.count("head.base_layer.bias"), 2u);

  Small other;
  inject_lora(*other, config, "mine");
  EXPECT_FALSE(same_bits(other->forward(torch::arange(9)), model->forward(torch::arange(9))));
  nn::load_adapter_state(*other, file, "mine");
  EXPECT_EQ(other->norm->bias[0].item<double>(), 3);
  nn::load_base_state(*other, base);
  EXPECT_TRUE(same_bits(other->forward(torch::arange(9)), model->forward(torch::arange(9))));
}

TEST(AdapterState, IsTheModelsOwnTensorsOfThatAdapterOnly) {
  Small model;
  inject_lora(*model, lora_config(2, 4, {"0", "embed"}));
  inject_lora(*model, lora_config(3, 4, {"0"}), "other");
  const auto state = nn::adapter_state(*model, "other");
  EXPECT_EQ(state.size(), 2u);
  EXPECT_EQ(state.at("body.0.lora_A.weight").size(0), 3);
  EXPECT_TRUE(nn::adapter_state(*model).at("embed.lora_embedding_A").is_same(model->embed->adapter("default").a));
}

TEST(AdapterState, IsRefusedWithEveryNameThatIsMissingUnexpectedOrOfAnotherShape) {
  Small model;
  inject_lora(*model, lora_config(2, 4, {"0", "embed"}));
  const auto before = copies_of(nn::adapter_state(*model));
  const auto refused = [&](const char* words, const std::function<void(NamedTensors&)>& change) {
    auto state = copies_of(before);
    for (auto& [name, tensor] : state) tensor.add_(1);
    change(state);
    EXPECT_TRUE(mentions(error_of([&] { nn::load_adapter_state(*model, state); }), words));
    for (const auto& [name, tensor] : nn::adapter_state(*model))
      EXPECT_TRUE(same_bits(tensor, before.at(name))) << words;
  };
  refused("missing: 'embed.lora_embedding_A'; unexpected: none",
          [](NamedTensors& state) { state.erase("embed.lora_embedding_A"); });
  refused("missing: none; unexpected: 'q.lora_A.weight'", [](NamedTensors& state) {
    state.emplace("q.lora_A.weight", torch::zeros({2, 4}));
  });
  refused("'embed.lora_embedding_B' is [4, 3], expected [4, 2]", [](NamedTensors& state) {
    state["embed.lora_embedding_B"] = torch::zeros({4, 3});
  });
  refused("'embed.lora_embedding_B' is []",
          [](NamedTensors& state) { state["embed.lora_embedding_B"] = torch::Tensor(); });
  refused("and 4 more", [](NamedTensors& state) {
    for (int i = 0; i < 12; ++i) state.emplace("x" + std::to_string(i), torch::zeros({1}));
  });
}

TEST(AdapterState, IsCastToTheModelsDtype) {
  Small model;
  inject_lora(*model, lora_config(2, 4, {"0"}));
  auto state = copies_of(nn::adapter_state(*model));
  for (auto& [name, tensor] : state) tensor = torch::ones_like(tensor, torch::kDouble);
  nn::load_adapter_state(*model, state);
  EXPECT_TRUE(torch::equal(nn::adapter_state(*model).at("body.0.lora_B.weight"), torch::ones({6, 2})));
}

TEST(BaseState, KeepsTheNamesOfTheModelWithoutAdapters) {
  torch::manual_seed(2);
  Small plain, model;
  const auto checkpoint = copies_of(nn::base_state(*plain));
  std::vector<std::string> names;
  for (const auto& item : plain->named_parameters()) names.push_back(item.key());
  for (const auto& name : names) EXPECT_EQ(checkpoint.count(name), 1u) << name;
  EXPECT_EQ(checkpoint.size(), names.size());

  const auto indices = torch::arange(9);
  nn::load_base_state(*model, checkpoint);
  EXPECT_TRUE(same_bits(model->forward(indices), plain->forward(indices))) << "before";
  Small late;
  inject_lora(*late, lora_config(2, 4, kEverything));
  EXPECT_EQ(nn::base_state(*late).size(), names.size());
  nn::load_base_state(*late, checkpoint);
  EXPECT_TRUE(torch::equal(late->forward(indices), plain->forward(indices))) << "after";
}

TEST(BaseState, HasBuffersAndBothNamesOfWhatIsThereTwice) {
  torch::nn::Module model("model");
  model.register_module("norm", torch::nn::BatchNorm1d(3));
  nn::LoraLinear shared(2, 2);
  model.register_module("one", shared);
  model.register_module("two", shared);
  const auto state = nn::base_state(model);
  EXPECT_EQ(state.count("norm.running_mean"), 1u);
  EXPECT_EQ(state.count("one.weight") + state.count("two.weight"), 2u);
}

TEST(BaseState, IsRefusedUnlessItFitsAndNonStrictSaysWhatItLeftOut) {
  Small model;
  inject_lora(*model, lora_config(2, 4, {"0"}));
  const auto before = copies_of(nn::base_state(*model));
  auto state = copies_of(before);
  for (auto& [name, tensor] : state) tensor.add_(1);
  state.erase("head.bias");
  state.emplace("pooler.weight", torch::zeros({1}));
  EXPECT_TRUE(mentions(error_of([&] { nn::load_base_state(*model, state); }),
                       "missing: 'head.bias'; unexpected: 'pooler.weight'"));
  EXPECT_TRUE(same_bits(nn::base_state(*model).at("body.0.weight"), before.at("body.0.weight")));
  const auto left_out = nn::load_base_state(*model, state, /*strict=*/false);
  EXPECT_EQ(left_out.missing, std::vector<std::string>{"head.bias"});
  EXPECT_EQ(left_out.unexpected, std::vector<std::string>{"pooler.weight"});
  EXPECT_TRUE(same_bits(nn::base_state(*model).at("body.0.weight"), before.at("body.0.weight") + 1));
  EXPECT_TRUE(same_bits(nn::base_state(*model).at("head.bias"), before.at("head.bias")));
  state["body.0.weight"] = torch::zeros({6, 5});
  EXPECT_TRUE(mentions(error_of([&] { nn::load_base_state(*model, state, false); }),
                       "'body.0.weight' is [6, 5], expected [6, 4]"));
}

TEST(BaseState, IsNotLoadedUnderPissaWhichTookAPartOfIt) {
  Small model;
  auto config = lora_config(2, 4, {"0"});
  config.init = nn::LoraInit::Pissa;
  const auto checkpoint = copies_of(nn::base_state(*model));
  inject_lora(*model, config);
  EXPECT_TRUE(mentions(error_of([&] { nn::load_base_state(*model, checkpoint); }), "LoraInit::Pissa"));
}

}  // namespace
}  // namespace lora_rite::test
