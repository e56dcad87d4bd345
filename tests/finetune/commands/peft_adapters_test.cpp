// Adapters as PEFT writes them (make_adapter_goldens.py) in eval, merge and inspect: what PEFT computes with them is
// what is computed here, beside the base and in its weights.

#include <lora_rite/io/peft.hpp>
#include <lora_rite/io/safetensors.hpp>
#include <nlohmann/json.hpp>
#include <sstream>

#include "adapters/adapted_model.hpp"
#include "commands/inspect.hpp"
#include "commands/merge.hpp"
#include "common/files.hpp"
#include "support.hpp"

namespace finetune {
namespace {

namespace fs = std::filesystem;

// Sums of some tens of products in float, one layer behind the other, in another order.
constexpr double kSameSums = 1e-5;

struct Case {
  std::string name;
  fs::path adapter = golden("peft") / name;
  std::string base = read_json(adapter / "case.json")["base"];
  torch::Tensor logits = load_safetensors(adapter / "expected.safetensors").tensors.at("logits");

  torch::Tensor run(LanguageModel& model) const {
    const torch::NoGradGuard no_grad;
    return model.forward(input_of(expected_of(base)));
  }
};

using finetune::merge_message;
std::string merge_message(const Case& data, const fs::path& out) {
  return merge_message(model_golden(data.base), {{data.adapter, 1}}, out);
}

std::string inspect_text(const fs::path& adapter, const fs::path& model = {}) {
  InspectOptions options;
  options.adapter = adapter;
  options.model = model;
  std::ostringstream out;
  inspect(options, out);
  return out.str();
}

const std::vector<std::string> kMergeable = {
    "llama_both",      "llama_other_base", "llama_saved",     "llama_saved_below", "llama_velora",
    "tied_embedding",  "tied_output",      "tied_both",       "tied_saved",        "tied_other_base",
    "gemma_embedding", "gemma2_both",      "t5_untied_output"};

TEST(PeftAdapters, BesideTheBaseGivePeftsLogits) {
  std::vector<std::string> names = kMergeable;
  names.insert(names.end(), {"t5_embeddings", "t5_output"});
  for (const std::string& name : names) {
    const Case data{name};
    const auto model = load_adapted_language_model(model_golden(data.base), data.adapter, torch::kFloat, torch::kCPU);
    EXPECT_LT(relative_distance(data.run(*model), data.logits), kSameSums) << name;
    const auto base = load_model(model_golden(data.base));
    EXPECT_GT(relative_distance(data.run(*base), data.logits), 1e-2) << name << ": the adapter has an effect";
  }
}

TEST(PeftAdapters, MergedGivePeftsLogits) {
  for (const std::string& name : kMergeable) {
    const TemporaryFolder folder;
    const Case data{name};
    EXPECT_EQ(merge_message(data, folder / "merged"), "");
    const auto model = load_model(folder / "merged");
    EXPECT_LT(relative_distance(data.run(*model), data.logits), 10 * kSameSums) << name;
  }
}

TEST(PeftAdapters, OfATiedDecoderMakeTwoMatricesOfOneOnlyWhereTheyChangeOne) {
  for (const std::string name : {"tied_embedding", "tied_output", "tied_saved", "gemma_embedding", "llama_both"}) {
    const TemporaryFolder folder;
    const Case data{name};
    merge_message(data, folder / "merged");
    const Tensors merged = load_safetensors(folder / "merged/model.safetensors").tensors;
    const Tensors base = load_safetensors(model_golden(data.base) / "model.safetensors").tensors;
    EXPECT_EQ(read_json(folder / "merged/config.json")["tie_word_embeddings"], false) << name;
    ASSERT_EQ(merged.count("lm_head.weight") + merged.count("model.embed_tokens.weight"), 2U) << name;
    if (name == "llama_both") continue;
    const std::string other = name == "tied_output" ? "model.embed_tokens.weight" : "lm_head.weight";
    EXPECT_TRUE(merged.at(other).equal(base.at("model.embed_tokens.weight"))) << name << ": the other use is as it was";
  }
  // In shards the second one stands beside the first.
  const TemporaryFolder folder;
  MergeOptions options;
  options.model = model_golden("llama_tied_llama3");
  options.shard_size = 4000 / 1e9;
  options.adapters = {{save_golden_adapter("llama_tied_llama3", folder / "other"), 1}};
  options.out = folder / "shards";
  std::ostringstream ignored;
  merge_adapters(options, ignored);
  EXPECT_EQ(read_json(folder / "shards/config.json")["tie_word_embeddings"], true) << "nothing of it is changed";
  const Case data{"tied_embedding"};
  merge_message(folder / "shards", {{data.adapter, 1}}, folder / "both");
  const nlohmann::json map = read_json(folder / "both/model.safetensors.index.json")["weight_map"];
  EXPECT_EQ(map["lm_head.weight"], map["model.embed_tokens.weight"]);
  EXPECT_EQ(lora_rite::load_sharded(folder / "both").tensors.count("lm_head.weight"), 1U);
  EXPECT_NO_THROW(load_model(folder / "both"));
}

TEST(PeftAdapters, OfAT5sSharedMatrixAreRefusedWithTheReason) {
  const TemporaryFolder folder;
  for (const std::string name : {"t5_embeddings", "t5_output", "t5_shared"}) {
    const std::string message = merge_message(Case{name}, folder / name);
    EXPECT_NE(message.find("uses one matrix for the embeddings of encoder and decoder"), std::string::npos) << message;
  }
  // PEFT's logits are those without these factors.
  const Case data{"t5_shared"};
  const std::string message = message_of(
      [&] { load_adapted_language_model(model_golden(data.base), data.adapter, torch::kFloat, torch::kCPU); });
  EXPECT_NE(message.find("factors of 'shared', which a T5 of transformers never calls"), std::string::npos) << message;
}

TEST(PeftAdapters, WhatReplacesTheBasesIsMergedAlone) {
  const TemporaryFolder folder;
  const std::map<std::string, std::string> reasons = {
      {"llama_other_base", "another weight than the base's beneath the factors ('lm_head.weight')"},
      {"llama_saved", "modules that were trained whole"}};
  for (const auto& [name, reason] : reasons) {
    const Case data{name};
    const std::string message = merge_message(model_golden(data.base), {{data.adapter, 0.5}}, folder / name);
    EXPECT_NE(message.find(reason), std::string::npos) << message;
    EXPECT_NE(message.find("merge it alone and without a weight"), std::string::npos) << message;
  }
  // Nor beside others, whichever stands first.
  const fs::path other = save_golden_adapter("llama", folder / "other");
  for (const auto& [name, reason] : reasons) {
    const Case data{name};
    ASSERT_EQ(data.base, "llama");
    const std::vector<WeightedAdapter> orders[] = {{{data.adapter, 1}, {other, 1}}, {{other, 1}, {data.adapter, 1}}};
    for (const auto& adapters : orders) {
      const std::string message = merge_message(model_golden(data.base), adapters, folder / name);
      EXPECT_NE(message.find(reason), std::string::npos) << message;
    }
  }
  // The base's own bytes beside the factors are none of that.
  const Case data{"llama_both"};
  EXPECT_EQ(merge_message(model_golden(data.base), {{data.adapter, 0.5}}, folder / "half"), "");
  EXPECT_EQ(merge_message(model_golden(data.base), {{data.adapter, 1}, {other, 1}}, folder / "both"), "");
}

TEST(PeftAdapters, CopiesOfTheBaseInAnotherDtypeReplaceNothing) {
  const TemporaryFolder folder;
  const Case data{"llama_both"};
  lora_rite::Adapter adapter = lora_rite::load_adapter(data.adapter);
  for (auto& [name, tensor] : adapter.tensors) {
    if (name.find("base_layer") != std::string::npos) tensor = tensor.to(torch::kBFloat16);
  }
  lora_rite::save_adapter(folder / "adapter", adapter);
  EXPECT_EQ(merge_message(model_golden(data.base), {{folder / "adapter", 1}}, folder / "rounded"), "");
  EXPECT_EQ(merge_message(data, folder / "plain"), "");
  const Tensors rounded = load_safetensors(folder / "rounded/model.safetensors").tensors;
  for (const auto& [name, tensor] : load_safetensors(folder / "plain/model.safetensors").tensors) {
    EXPECT_TRUE(rounded.at(name).equal(tensor)) << name;
  }
}

TEST(PeftAdapters, WithNamesOfAModelInMemoryAreTheSame) {
  const TemporaryFolder folder;
  const Case data{"llama_both"};
  Tensors tensors;
  for (const auto& [name, tensor] : load_safetensors(data.adapter / "adapter_model.safetensors").tensors) {
    std::string other = "base_model.model._orig_mod." + name.substr(std::string("base_model.model.").size());
    if (const size_t at = other.find(".weight"); at != std::string::npos && other.find("lora_") < at) {
      other.insert(at, ".default");
    } else if (other.find("lora_embedding") != std::string::npos) {
      other += ".default";
    }
    tensors[other] = tensor;
  }
  fs::create_directories(folder / "adapter");
  fs::copy_file(data.adapter / "adapter_config.json", folder / "adapter/adapter_config.json");
  save_safetensors(folder / "adapter/adapter_model.safetensors", tensors);
  const auto model =
      load_adapted_language_model(model_golden(data.base), folder / "adapter", torch::kFloat, torch::kCPU);
  EXPECT_LT(relative_distance(data.run(*model), data.logits), kSameSums);
  EXPECT_EQ(merge_message(model_golden(data.base), {{folder / "adapter", 1}}, folder / "merged"), "");
  EXPECT_EQ(inspect_text(folder / "adapter"), inspect_text(data.adapter));
}

TEST(PeftAdapters, AreShownWhateverTheyHoldBesideFactors) {
  const TemporaryFolder folder;
  for (const auto& entry : fs::directory_iterator(golden("peft"))) {
    const Case data{entry.path().filename().string()};
    const std::string text = inspect_text(data.adapter, model_golden(data.base));
    EXPECT_NE(text.find(" of their weights"), std::string::npos) << data.name;
    EXPECT_EQ(text.find("nan"), std::string::npos) << text;
    EXPECT_EQ(text.find("trained whole: lm_head.weight [48, 16]") != std::string::npos, data.name == "llama_saved")
        << text;
    const bool has_copy = text.find("a copy of the base's weight: lm_head") != std::string::npos;
    EXPECT_EQ(has_copy, load_safetensors(data.adapter / "adapter_model.safetensors")
                                .tensors.count("base_model.model.lm_head.base_layer.weight") > 0)
        << data.name;
  }
  const auto changed = [&](const std::function<void(lora_rite::Adapter&)>& change) {
    lora_rite::Adapter adapter = lora_rite::load_adapter(golden("peft") / "llama_velora");
    change(adapter);
    lora_rite::save_adapter(folder / "changed", adapter);
    const std::string text = inspect_text(folder / "changed");
    EXPECT_NE(text.find("2 layers, all of ΔW: "), std::string::npos) << text;
    return text;
  };
  EXPECT_NE(changed([](auto& adapter) {
              adapter.config.other["use_dora"] = true;
              adapter.tensors["model.layers.0.self_attn.q_proj.lora_magnitude_vector"] = torch::ones({16});
            }).find("use_dora is true: the table shows the factors alone"),
            std::string::npos);
  EXPECT_NE(changed([](auto& adapter) {
              adapter.config.alpha_pattern = {{"layers.7.*", 3}};
            }).find("alpha_pattern['layers.7.*'] means none of the layers"),
            std::string::npos);
  changed([](auto& adapter) { adapter.config.fan_in_fan_out = true; });

  // PEFT sets it for a GPT-2, of which some layers are Conv1D and the head is none.
  lora_rite::Adapter adapter = lora_rite::load_adapter(save_golden_adapter("llama", folder / "mixed"));
  adapter.config.fan_in_fan_out = true;
  lora_rite::save_adapter(folder / "mixed", adapter);
  fs::copy(model_golden("llama"), folder / "turned");
  Tensors tensors = load_safetensors(folder / "turned/model.safetensors").tensors;
  const std::string module = "model.layers.0.self_attn.v_proj";
  ASSERT_TRUE(adapter.tensors.count(module + ".lora_A.weight") > 0);
  torch::Tensor& weight = tensors.at(module + ".weight");
  ASSERT_NE(weight.size(0), weight.size(1));
  weight = weight.t().contiguous();
  lora_rite::save_safetensors(folder / "turned/model.safetensors", tensors);
  const std::string mixed = inspect_text(folder / "mixed", folder / "turned");
  EXPECT_NE(mixed.find(" layers, all of ΔW: "), std::string::npos) << mixed;
  EXPECT_EQ(mixed, inspect_text(folder / "mixed", model_golden("llama")));
  changed([](auto& adapter) {
    adapter.config.other["target_parameters"] = {"experts.up"};
    adapter.config.target_modules = std::vector<std::string>{"q_proj"};
  });
}

/// PEFT 0.21.2 writes an empty list for adapters of modules alone.
TEST(PeftAdapters, WithAnEmptyListOfParametersHaveTheRanksOfTheirDescription) {
  const TemporaryFolder folder;
  lora_rite::Adapter adapter = lora_rite::load_adapter(golden("peft") / "llama_velora");
  adapter.config.other["target_parameters"] = nlohmann::json::array();
  lora_rite::save_adapter(folder / "adapter", adapter);
  EXPECT_EQ(merge_message(model_golden("llama"), {{folder / "adapter", 1}}, folder / "merged"), "");
  nlohmann::json description = read_json(folder / "adapter/adapter_config.json");
  description["r"] = 1;  // the factors' is 3
  write_json(folder / "adapter/adapter_config.json", description);
  const std::string message = merge_message(model_golden("llama"), {{folder / "adapter", 1}}, folder / "other");
  EXPECT_NE(message.find("has rank 3, expected r = 1"), std::string::npos) << message;
}

TEST(PeftAdapters, OfAnotherKindAreRefusedByWhatTheyHold) {
  const TemporaryFolder folder;
  const auto refusal = [&](const std::function<void(lora_rite::Adapter&)>& change) {
    lora_rite::Adapter adapter = lora_rite::load_adapter(golden("peft") / "llama_velora");
    change(adapter);
    lora_rite::save_adapter(folder / "adapter", adapter);
    const std::string merging = merge_message(model_golden("llama"), {{folder / "adapter", 1}}, folder / "merged");
    const std::string loading = message_of(
        [&] { load_adapted_language_model(model_golden("llama"), folder / "adapter", torch::kFloat, torch::kCPU); });
    EXPECT_EQ(merging, loading) << "one reader";
    return merging;
  };
  EXPECT_NE(refusal([](auto& adapter) { adapter.config.fan_in_fan_out = true; }).find("fan_in_fan_out"),
            std::string::npos);
  const std::map<std::string, nlohmann::json> fields = {{"use_dora", true},
                                                        {"lora_bias", true},
                                                        {"use_qalora", true},
                                                        {"use_bdlora", true},
                                                        {"arrow_config", {{"top_k", 3}}},
                                                        {"megatron_config", {{"size", 2}}},
                                                        {"ensure_weight_tying", true},
                                                        {"alora_invocation_tokens", {1, 2}},
                                                        {"layer_replication", {{0, 2}, {1, 2}}},
                                                        {"target_parameters", {"experts.up"}},
                                                        {"trainable_token_indices", {1, 2}},
                                                        {"kasa_config", {{"beta", 1}}},
                                                        {"monteclora_config", {{"samples", 4}}}};
  for (const auto& [field, value] : fields) {
    const std::string message = refusal([&](auto& adapter) { adapter.config.other[field] = value; });
    EXPECT_NE(message.find(field + " is '" + value.dump()), std::string::npos) << field << ": " << message;
    const std::string text = inspect_text(folder / "adapter");
    EXPECT_NE(text.find("2 layers, all of ΔW"), std::string::npos) << field << ": " << text;
    const size_t line = text.find("\n" + field + " is " + value.dump() + ": the table shows the factors alone");
    EXPECT_NE(line, std::string::npos) << field << ": " << text;
    EXPECT_EQ(text.find("the factors alone"), text.rfind("the factors alone")) << "that field and no other: " << text;
  }
  EXPECT_EQ(inspect_text(golden("peft") / "llama_velora").find("the factors alone"), std::string::npos);
  EXPECT_NE(refusal([](auto& adapter) { adapter.config.init_lora_weights = "pissa"; }).find("init_lora_weights"),
            std::string::npos);
  EXPECT_NE(refusal([](auto& adapter) {
              adapter.tensors["model.norm.weight"] = torch::ones({16});
            }).find("'model.norm.weight' is neither a factor, a bias nor a part of a module of modules_to_save"),
            std::string::npos);
}

}  // namespace
}  // namespace finetune
