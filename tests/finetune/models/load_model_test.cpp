#include "models/load_model.hpp"

#include <fstream>
#include <nlohmann/json.hpp>

#include "models/decoder.hpp"
#include "models/t5.hpp"
#include "support.hpp"

namespace finetune {
namespace {

// A golden in a folder of its own, to be spoilt.
class Checkpoint {
 public:
  explicit Checkpoint(const std::string& golden) {
    std::ifstream(model_golden(golden) / "config.json") >> config;
    tensors = lora_rite::load_safetensors(model_golden(golden) / "model.safetensors").tensors;
  }

  std::shared_ptr<LanguageModel> load(c10::ScalarType dtype = torch::kFloat) const {
    std::ofstream(folder_ / "config.json") << config;
    lora_rite::save_safetensors(folder_ / "model.safetensors", tensors);
    return load_model(folder_.string(), dtype);
  }

  nlohmann::json config;
  Tensors tensors;

 private:
  TemporaryFolder folder_;
};

// What is wrong once `change` was made to a golden.
std::string error_after(const std::string& golden, const std::function<void(Checkpoint&)>& change) {
  Checkpoint checkpoint(golden);
  change(checkpoint);
  return error_of([&] { checkpoint.load(); });
}

void expect_part(const std::string& message, const std::string& part) {
  EXPECT_NE(message.find(part), std::string::npos) << message << "\nlacks: " << part;
}

TEST(LoadModel, ShardsAreReadAsOne) {
  const auto whole = load_model(model_golden("llama"))->named_parameters();
  const auto sharded = load_model(model_golden("llama_sharded"))->named_parameters();
  EXPECT_EQ(sharded.size(), whole.size());
  for (const auto& item : sharded) EXPECT_TRUE(item.value().equal(whole[item.key()])) << item.key();
}

TEST(LoadModel, ATiedOutputIsTheEmbeddingItself) {
  for (const std::string name : {"llama_tied_llama3", "gemma", "gemma2", "t5"}) {
    const auto model = load_model(model_golden(name), name == "t5" ? torch::kBFloat16 : torch::kFloat);
    const auto parameters = model->named_parameters();
    const torch::Tensor embedding = parameters[name == "t5" ? "shared.weight" : "model.embed_tokens.weight"];
    EXPECT_TRUE(parameters["lm_head.weight"].is_same(embedding)) << name;
  }
  EXPECT_NE(load_model(model_golden("llama"))->named_parameters()["lm_head.weight"].data_ptr(),
            load_model(model_golden("llama"))->named_parameters()["model.embed_tokens.weight"].data_ptr());
}

TEST(LoadModel, ATieFollowsTheFile) {
  Checkpoint checkpoint("llama_tied_llama3");
  const torch::Tensor embedding = checkpoint.tensors.at("model.embed_tokens.weight").clone();
  const torch::Tensor other = embedding + 1;
  const auto tie_of = [&]() {
    const auto parameters = checkpoint.load()->named_parameters();
    return std::pair(parameters["model.embed_tokens.weight"], parameters["lm_head.weight"]);
  };
  checkpoint.tensors["lm_head.weight"] = embedding;  // a copy
  auto [left, right] = tie_of();
  EXPECT_TRUE(left.is_same(right));

  checkpoint.tensors["lm_head.weight"] = other;  // the file contradicts config.json, as that of mT5 does
  std::tie(left, right) = tie_of();
  EXPECT_TRUE(left.equal(embedding) && right.equal(other));

  checkpoint.tensors.erase("model.embed_tokens.weight");  // one of the pair is enough
  std::tie(left, right) = tie_of();
  EXPECT_TRUE(left.equal(other) && left.is_same(right));
}

TEST(LoadModel, WeightsOfTheRightDtypeAreMappedAndNotCopied) {
  // Two parameters whose distance in memory is that in the file lie in one mapping of it.
  const lora_rite::SafetensorsFile file(model_golden("llama") / "model.safetensors");
  const auto parameters = load_model(model_golden("llama"))->named_parameters();
  const auto address = [](const torch::Tensor& tensor) { return static_cast<const char*>(tensor.const_data_ptr()); };
  const std::string first = "model.layers.0.mlp.up_proj.weight", second = "model.layers.1.mlp.up_proj.weight";
  EXPECT_EQ(address(parameters[second]) - address(parameters[first]),
            address(file.tensor(second)) - address(file.tensor(first)));
  for (const auto& item : load_model(model_golden("llama"), torch::kBFloat16)->named_parameters()) {
    EXPECT_EQ(item.value().scalar_type(), torch::kBFloat16) << item.key();
    EXPECT_TRUE(item.value().is_contiguous()) << item.key();
  }
}

TEST(LoadModel, OlderConfigsMeanTheSame) {
  const torch::NoGradGuard no_grad;
  for (const std::string name : {"llama_tied_llama3", "llama_linear_biases", "llama_dynamic"}) {
    Checkpoint checkpoint(name);
    // Before transformers 5: rope_theta by itself, the rest in rope_scaling, the kind once called "type".
    nlohmann::json scaling = checkpoint.config["rope_parameters"];
    checkpoint.config.erase("rope_parameters");
    checkpoint.config["rope_theta"] = scaling["rope_theta"];
    scaling.erase("rope_theta");
    if (name == "llama_linear_biases") {
      scaling["type"] = scaling["rope_type"];
      scaling.erase("rope_type");
    }
    checkpoint.config["rope_scaling"] = scaling;
    const Tensors expected = expected_of(name);
    const torch::Tensor logits = checkpoint.load()->forward(input_of(expected));
    EXPECT_LT(relative_distance(logits, expected.at("logits")), 1e-5) << name;
  }
}

TEST(LoadModel, OlderCheckpointsMeanTheSame) {
  const torch::NoGradGuard no_grad;
  Checkpoint llama("llama_tied_llama3");
  Tensors headless;
  for (const auto& [name, tensor] : llama.tensors) headless[name.substr(std::string("model.").size())] = tensor;
  headless["layers.0.self_attn.rotary_emb.inv_freq"] = torch::zeros({2});
  llama.tensors = headless;
  EXPECT_LT(relative_distance(llama.load()->forward(input_of(expected_of("llama_tied_llama3"))),
                              expected_of("llama_tied_llama3").at("logits")),
            1e-5);

  Checkpoint t5("t5");
  t5.tensors["encoder.embed_tokens.weight"] = t5.tensors.at("shared.weight").clone();
  t5.tensors["decoder.embed_tokens.weight"] = t5.tensors.at("shared.weight").clone();
  t5.tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch::ones({8, 4});
  EXPECT_LT(relative_distance(t5.load()->forward(input_of(expected_of("t5"))), expected_of("t5").at("logits")), 1e-5);
}

TEST(LoadModel, NewerT5SaysItselfWhetherItScales) {
  const torch::NoGradGuard no_grad;
  Checkpoint t5("t5_gated");
  t5.config["tie_word_embeddings"] = true;
  t5.config["scale_decoder_outputs"] = false;
  const Tensors expected = expected_of("t5_gated");
  EXPECT_LT(relative_distance(t5.load()->forward(input_of(expected)), expected.at("logits")), 1e-5);
}

TEST(LoadModel, AnUnsupportedModelIsRefusedWithTheSupportedOnes) {
  const std::string message = error_after("llama", [](Checkpoint& spoilt) { spoilt.config["model_type"] = "gpt2"; });
  expect_part(message, "config.json: 'model_type' is 'gpt2', but only llama, gemma, gemma2, t5 and mt5 are supported");
  expect_part(error_of([] { load_model(model_golden("llama"), torch::kHalf); }), "dtype is Half, but only Float and");
}

TEST(LoadModel, WhatTheModelCannotDoIsRefused) {
  using Change = std::function<void(nlohmann::json&)>;
  const std::vector<std::tuple<std::string, Change, std::string>> cases = {
      {"llama",
       [](auto& c) {
         c["rope_parameters"] = {{"rope_type", "yarn"}, {"factor", 2.0}};
       },
       "rope_parameters: 'rope_type' is 'yarn', but only default, linear, dynamic and llama3"},
      {"llama",
       [](auto& c) {
         c["rope_scaling"] = {{"type", "longrope"}};
       },
       "rope_scaling: 'type' is 'longrope'"},
      {"llama",
       [](auto& c) {
         c["rope_parameters"] = {{"rope_type", "linear"}};
       },
       "lacks the number 'factor'"},
      {"llama",
       [](auto& c) {
         c["rope_parameters"] = {{"rope_type", "linear"}, {"factor", 0}};
       },
       "'factor' is 0; expected is a number above 0"},
      {"llama_tied_llama3", [](auto& c) { c["rope_parameters"]["high_freq_factor"] = 1.0; },
       "'high_freq_factor' is 1.0"},
      {"llama", [](auto& c) { c["partial_rotary_factor"] = 0.5; }, "'partial_rotary_factor' is 0.5"},
      {"llama", [](auto& c) { c["hidden_act"] = "tanh"; }, "'hidden_act' is 'tanh', but only silu"},
      {"llama",
       [](auto& c) {
         c["quantization_config"] = {{"bits", 4}};
       },
       "a quantised checkpoint is not supported"},
      {"gemma", [](auto& c) { c["use_bidirectional_attention"] = true; }, "attention to later tokens is not supported"},
      {"gemma2", [](auto& c) { c["layer_types"][0] = "chunked_attention"; }, "'layer_types' is"},
      {"gemma2", [](auto& c) { c["layer_types"].push_back("full_attention"); }, "num_hidden_layers = 2"},
      {"gemma2", [](auto& c) { c["sliding_window"] = nullptr; }, "no 'sliding_attention' without a 'sliding_window'"},
      {"llama", [](auto& c) { c["num_key_value_heads"] = 3; }, "a divisor of num_attention_heads 4"},
      {"llama", [](auto& c) { c["head_dim"] = 5; }, "the head size is 5"},
      {"llama", [](auto& c) { c.erase("hidden_size"); }, "but config.json asks for [48, 4096]"},
      {"llama", [](auto& c) { c["hidden_size"] = nullptr; }, "lacks the number 'hidden_size'"},
      {"llama", [](auto& c) { c["vocab_size"] = "48"; }, "'vocab_size' is \"48\"; expected is a whole number"},
      {"llama", [](auto& c) { c["num_hidden_layers"] = 0; }, "'num_hidden_layers' is 0"},
      {"llama", [](auto& c) { c["attention_dropout"] = 1; }, "'attention_dropout' is 1"},
      {"llama", [](auto& c) { c["attention_bias"] = 1; }, "'attention_bias' is 1; expected is true or false"},
      {"t5", [](auto& c) { c["feed_forward_proj"] = "gated-tanh", c.erase("dense_act_fn"); },
       "'feed_forward_proj' is 'tanh'"},
      {"t5", [](auto& c) { c["dense_act_fn"] = "tanh"; }, "'dense_act_fn' is 'tanh'"},
      {"t5", [](auto& c) { c["relative_attention_num_buckets"] = 2; }, "'relative_attention_num_buckets' is 2"},
      {"t5", [](auto& c) { c["relative_attention_max_distance"] = 4; }, "'relative_attention_max_distance' is 4"},
      {"t5", [](auto& c) { c.erase("decoder_start_token_id"), c["pad_token_id"] = nullptr; }, "needs a first token"},
  };
  for (const auto& [golden, change, part] : cases) {
    expect_part(error_after(golden, [&change = change](Checkpoint& spoilt) { change(spoilt.config); }), part);
  }
}

TEST(LoadModel, AWrongTensorIsNamed) {
  const std::string name = "model.layers.1.self_attn.k_proj.weight";
  std::string message = error_after("llama", [&](Checkpoint& spoilt) { spoilt.tensors.erase(name); });
  expect_part(message, "lack the tensor '" + name + "' of shape [8, 16] (and 0 more)");
  message = error_after("llama", [&](Checkpoint& spoilt) { spoilt.tensors[name] = torch::zeros({8, 15}); });
  expect_part(message, "tensor '" + name + "' has shape [8, 15], but config.json asks for [8, 16]");
  message = error_after("llama", [&](Checkpoint& spoilt) {
    spoilt.tensors[name] = torch::zeros({8, 16}, torch::kInt);
  });
  expect_part(message, "tensor '" + name + "' has dtype Int; expected are floating-point weights");
  message = error_after("llama", [&](Checkpoint& spoilt) { spoilt.tensors.erase("lm_head.weight"); });
  expect_part(message, "lack the tensor 'lm_head.weight' of shape [48, 16], and config.json does not tie it");
  message = error_after("llama", [&](Checkpoint& spoilt) {
    spoilt.tensors["lm_head.weight"] = torch::zeros({47, 16});
  });
  expect_part(message, "tensor 'lm_head.weight' has shape [47, 16]");
  // A bias that config.json does not ask for would silently be left out.
  message = error_after("llama", [&](Checkpoint& spoilt) {
    spoilt.tensors["model.layers.0.self_attn.q_proj.bias"] = torch::zeros({16});
  });
  expect_part(message, "holds the tensor 'model.layers.0.self_attn.q_proj.bias' of shape [16], which the model");
}

TEST(RelativePositionBuckets, AreExactNearAndWidenFarAway) {
  // 8 buckets: bidirectional 4 a side, of which 2 for one distance each, then up to 12 and beyond.
  const torch::Tensor both = relative_position_buckets(5, 6, 20, true, 8, 12, torch::kCPU).flatten();
  const std::vector<int64_t> expected = {3, 2, 2, 2, 1, 0, 5, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7};
  for (int64_t key = 0; key < 20; ++key) {
    // The border between 2 and 3 lies at 2 · √6 = 4.9.
    EXPECT_EQ(both[key].item<int64_t>(), expected[key]) << key;
  }
  const torch::Tensor causal = relative_position_buckets(0, 20, 20, false, 8, 12, torch::kCPU);
  EXPECT_EQ(causal.triu(1).abs().max().item<int64_t>(), 0) << "later keys are masked anyway";
  for (int64_t distance = 0; distance < 4; ++distance) EXPECT_EQ(causal[10][10 - distance].item<int64_t>(), distance);
  EXPECT_EQ(causal[19][0].item<int64_t>(), 7);
  EXPECT_TRUE(causal.slice(0, 7, 8).equal(relative_position_buckets(7, 8, 20, false, 8, 12, torch::kCPU)));
}

}  // namespace
}  // namespace finetune
