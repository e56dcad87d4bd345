#include "models/base_checkpoint.hpp"

#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "adapters/adapted_model.hpp"
#include "commands/inspect.hpp"
#include "commands/merge.hpp"
#include "common/files.hpp"
#include "finetune/commands/support.hpp"
#include "memory_plan/plan.hpp"
#include "models/bert.hpp"

namespace finetune {
namespace {

namespace fs = std::filesystem;
using lora_rite::test::write_bytes;

nlohmann::json config_of(const std::string& golden) { return read_json(model_golden(golden) / "config.json"); }

Tensors tensors_of(const fs::path& folder) { return lora_rite::load_sharded(folder).tensors; }

void merge(const fs::path& model, const fs::path& adapter, const fs::path& out) {
  MergeOptions options;
  options.model = model;
  options.adapters = {{adapter, 1}};
  options.out = out;
  std::ostringstream ignored;
  merge_adapters(options, ignored);
}

// Every command that reads a base, and what each says of one it cannot use.
std::vector<std::string> refusals(const fs::path& model, const fs::path& adapter, bool is_bert) {
  const TemporaryFolder folder;
  MemoryQuestion question;
  question.model = model;
  question.length = question.completion = question.classes = 2;
  std::ostringstream ignored;
  InspectOptions inspection;
  inspection.adapter = adapter;
  inspection.model = model;
  return {message_of([&] {
            if (is_bert) {
              load_bert(model);
            } else {
              load_model(model);
            }
          }),
          message_of([&] { plan_memory(question); }), message_of([&] { merge(model, adapter, folder / "merged"); }),
          message_of([&] { inspect(inspection, ignored); })};
}

TEST(BaseCheckpoint, AQuantisedOneIsRefusedByEveryCommandInTheSameWords) {
  const TemporaryFolder folder;
  const fs::path adapter = save_golden_adapter("llama", folder / "adapter");
  const std::string words = "a quantised checkpoint is not supported";
  const std::string weight = "model.layers.0.self_attn.q_proj.weight";
  nlohmann::json config = config_of("llama");
  config["quantization_config"] = {{"quant_method", "fp8"}};
  write_model(folder / "said", config, tensors_of(model_golden("llama")));

  Tensors codes = tensors_of(model_golden("llama"));
  codes[weight] = codes.at(weight).to(torch::kFloat8_e4m3fn);
  write_model(folder / "codes", config_of("llama"), codes);

  Tensors scaled = tensors_of(model_golden("llama"));
  scaled[weight + "_scale_inv"] = torch::ones({1, 1});
  write_model(folder / "scaled", config_of("llama"), scaled);

  Tensors packed = tensors_of(model_golden("llama"));
  packed.erase(weight);
  packed["model.layers.0.self_attn.q_proj.qweight"] = torch::ones({2, 16}, torch::kInt);
  write_model(folder / "packed", config_of("llama"), packed);
  for (const char* name : {"said", "codes", "scaled", "packed"}) {
    std::set<std::string> different;
    for (const std::string& message : refusals(folder / name, adapter, false)) {
      EXPECT_NE(message.find(words), std::string::npos) << name << ": " << message;
      different.insert(message);
    }
    EXPECT_EQ(different.size(), 1U) << name;
  }

  config = read_json(golden("tiny/config.json"));
  config["quantization_config"] = {{"load_in_8bit", true}};
  write_model(folder / "bert", config, tensors_of(golden("tiny")));
  for (const std::string& message : refusals(folder / "bert", golden("tiny_adapter"), true)) {
    EXPECT_NE(message.find(words), std::string::npos) << message;
  }
}

TEST(BaseCheckpoint, EveryCommandTakesTheSameFiles) {
  // As transformers: the whole file, whatever an index beside it says.
  const TemporaryFolder folder;
  const fs::path model = folder / "model";
  fs::copy(model_golden("llama_sharded"), model);
  fs::copy_file(model_golden("llama") / "model.safetensors", model / "model.safetensors");
  for (const char* shard : {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}) {
    Tensors other = lora_rite::load_safetensors(model / shard).tensors;
    for (auto& [name, tensor] : other) tensor = tensor + 1;
    lora_rite::save_safetensors(model / shard, other);
  }
  const std::string name = "model.layers.0.self_attn.q_proj.weight";
  const torch::Tensor weight = tensors_of(model_golden("llama")).at(name);
  EXPECT_TRUE(load_model(model)->named_parameters()[name].equal(weight));
  const fs::path adapter = save_golden_adapter("llama", folder / "adapter");
  merge(model, adapter, folder / "merged");
  merge(model_golden("llama"), adapter, folder / "expected");
  EXPECT_TRUE(tensors_of(folder / "merged").at(name).equal(tensors_of(folder / "expected").at(name)));
  EXPECT_FALSE(fs::exists(folder / "merged/model.safetensors.index.json"));
  EXPECT_FALSE(fs::exists(folder / "merged/model-00001-of-00002.safetensors"));
}

TEST(BaseCheckpoint, ShardsOfEveryKindOfModelAreRead) {
  const TemporaryFolder folder;
  MergeOptions options;
  options.model = golden("tiny");
  options.adapters = {{golden("tiny_adapter"), 1}};
  options.out = folder / "sharded";
  options.shard_size = 6000 / 1e9;
  std::ostringstream ignored;
  merge_adapters(options, ignored);
  merge(golden("tiny"), golden("tiny_adapter"), folder / "whole");
  ASSERT_TRUE(fs::exists(folder / "sharded/model.safetensors.index.json"));
  const auto whole = load_bert(folder / "whole")->named_parameters();
  for (const auto& item : load_bert(folder / "sharded")->named_parameters()) {
    EXPECT_TRUE(item.value().equal(whole[item.key()])) << item.key();
  }
}

TEST(BaseCheckpoint, ABinFileIsNamed) {
  const TemporaryFolder folder;
  const fs::path adapter = save_golden_adapter("llama", folder / "adapter");
  fs::create_directories(folder / "model");
  write_json(folder / "model/config.json", config_of("llama"));
  write_bytes(folder / "model/pytorch_model.bin", "");
  for (const std::string& message : refusals(folder / "model", adapter, false)) {
    EXPECT_NE(message.find("there is 'pytorch_model.bin'. A .bin file is Python's pickle"), std::string::npos)
        << message;
  }
}

TEST(BaseCheckpoint, WhatTorchCompileNamedIsRefusedOfABaseAndReadOfAnAdapter) {
  const TemporaryFolder folder;
  const fs::path adapter = save_golden_adapter("llama", folder / "adapter");
  Tensors tensors;
  for (const auto& [name, tensor] : tensors_of(model_golden("llama"))) tensors["_orig_mod." + name] = tensor;
  write_model(folder / "model", config_of("llama"), tensors);
  for (const std::string& message : refusals(folder / "model", adapter, false)) {
    EXPECT_NE(message.find("what torch.compile made was saved ('_orig_mod.' in the names)"), std::string::npos)
        << message;
  }
  lora_rite::Adapter file = lora_rite::load_adapter(adapter), compiled = file;
  compiled.tensors.clear();
  for (const auto& [name, tensor] : file.tensors) compiled.tensors["_orig_mod." + name] = tensor;
  lora_rite::save_adapter(folder / "compiled", compiled);
  merge(model_golden("llama"), folder / "compiled", folder / "merged");
  merge(model_golden("llama"), adapter, folder / "plain");
  const Tensors expected = tensors_of(folder / "plain");
  for (const auto& [name, tensor] : tensors_of(folder / "merged")) EXPECT_TRUE(tensor.equal(expected.at(name))) << name;
}

TEST(BaseCheckpoint, NamesInMemoryAndInFilesAreOneByPlainName) {
  const nlohmann::json models = read_json(model_golden("tensor_names.json"));  // what transformers has and writes
  ASSERT_GE(models.size(), 20U);
  for (const auto& model : models) {
    const std::string type = model["model_type"];
    std::set<std::string> plain;
    ASSERT_GE(model["names"].size(), 10U) << type;
    for (const auto& pair : model["names"]) {
      const std::string memory = pair[0], file = pair[1];
      EXPECT_EQ(plain_name(type, memory), plain_name(type, file)) << type << ": " << memory << ", " << file;
      EXPECT_TRUE(plain.insert(plain_name(type, memory)).second) << type << ": " << memory << " is like another";
    }
  }
}

TEST(BaseCheckpoint, PrefixesOfModelsThatCannotBeTrainedHereAreKnown) {
  EXPECT_EQ(plain_name("gpt2", "transformer.h.0.attn.c_attn.weight"), plain_name("gpt2", "h.0.attn.c_attn.weight"));
  EXPECT_EQ(plain_name("colpali", "model.vlm.model.language_model.layers.0.mlp.up_proj.weight"),
            plain_name("colpali", "vlm.language_model.model.layers.0.mlp.up_proj.weight"));
  EXPECT_EQ(plain_name("clip", "vision.transformer.layers.0.weight"), "vision.transformer.layers.0.weight");
}

// A golden's tensors under other names.
Tensors renamed(const Tensors& tensors, const std::function<std::string(const std::string&)>& rename) {
  Tensors result;
  for (const auto& [name, tensor] : tensors) result[rename(name)] = tensor;
  return result;
}

TEST(BaseCheckpoint, AnAdapterNamesModulesAsTheyAreInMemoryOrInTheFiles) {
  const TemporaryFolder folder;
  const fs::path adapter = save_golden_adapter("llama", folder / "plain");
  merge(model_golden("llama"), adapter, folder / "expected");
  const Tensors expected = tensors_of(folder / "expected");
  const lora_rite::Adapter file = lora_rite::load_adapter(adapter);
  const auto within = [](const std::string& prefix) {
    return [prefix](const std::string& name) {
      return name.rfind("model.", 0) == 0 ? prefix + name.substr(std::string("model.").size()) : name;
    };
  };
  const std::map<std::string, std::string> files = {{"gemma3", "language_model.model."},
                                                    {"llava", "language_model.model."},
                                                    {"qwen2_vl", "model."},
                                                    {"qwen2_5_vl", "model.language_model."}};
  for (const auto& [type, in_files] : files) {
    nlohmann::json config = config_of("llama");
    config["model_type"] = type;
    write_model(folder / type, config, renamed(tensors_of(model_golden("llama")), within(in_files)));
    for (const std::string in_memory : {"model.language_model.", "language_model.model."}) {
      lora_rite::Adapter other = file;
      other.tensors = renamed(file.tensors, within(in_memory));
      const fs::path name = folder / (type + "." + in_memory + "adapter");
      lora_rite::save_adapter(name, other);
      merge(folder / type, name, folder / (type + "." + in_memory + "merged"));
      const Tensors merged = tensors_of(folder / (type + "." + in_memory + "merged"));
      ASSERT_EQ(merged.size(), expected.size());
      for (const auto& [own, tensor] : expected) EXPECT_TRUE(merged.at(within(in_files)(own)).equal(tensor)) << own;
    }
  }
}

// A tied matrix of 12 × 8 under some name, and an adapter of an embedding of `rows` × 8.
struct TiedCase {
  const char* model_type;
  const char* stored;  // the module in the files
  const char* module;  // as the adapter names it
  int64_t rows;
  const char* words;  // of the refusal; none: both matrices are written, or the one is no matrix of the vocabulary
};

TEST(BaseCheckpoint, ATiedMatrixNeverChangesInSilence) {
  const char* unknown = "is not known here";
  for (const auto& [type, stored, module, rows, words] :
       {TiedCase{"qwen2_vl", "model.embed_tokens", "model.language_model.embed_tokens", 12, unknown},
        TiedCase{"gemma3", "language_model.model.embed_tokens", "model.language_model.embed_tokens", 12, unknown},
        TiedCase{"mamba", "backbone.embeddings", "backbone.embeddings", 12, unknown},
        TiedCase{"bart", "model.shared", "model.shared", 12, unknown},
        TiedCase{"whisper", "model.decoder.embed_tokens", "model.decoder.embed_tokens", 12, unknown},
        TiedCase{"gpt2", "transformer.wte", "transformer.wte", 12, unknown},
        TiedCase{"gpt2", "transformer.wpe", "transformer.wpe", 6, nullptr},
        TiedCase{"qwen3", "model.embed_tokens", "model.embed_tokens", 12, nullptr},
        TiedCase{"gemma3_text", "model.embed_tokens", "model.language_model.embed_tokens", 12, nullptr}}) {
    SCOPED_TRACE(std::string(type) + " " + module);
    const TemporaryFolder folder;
    const torch::Tensor weight = torch::randn({rows, 8});
    write_model(folder / "base", {{"model_type", type}, {"tie_word_embeddings", true}, {"vocab_size", 12}},
                {{stored + std::string(".weight"), weight}});
    lora_rite::Adapter adapter;
    adapter.config.r = 2;
    adapter.config.lora_alpha = 2;
    adapter.tensors[module + std::string(".lora_embedding_A")] = torch::randn({2, rows});
    adapter.tensors[module + std::string(".lora_embedding_B")] = torch::randn({8, 2});
    lora_rite::save_adapter(folder / "adapter", adapter);
    const std::string message = message_of([&] { merge(folder / "base", folder / "adapter", folder / "merged"); });
    if (words != nullptr) {
      EXPECT_NE(message.find(words), std::string::npos) << message;
      EXPECT_FALSE(fs::exists(folder / "merged"));
      continue;
    }
    ASSERT_EQ(message, "");
    const Tensors merged = tensors_of(folder / "merged");
    EXPECT_FALSE(merged.at(stored + std::string(".weight")).equal(weight));
    EXPECT_EQ(merged.count("lm_head.weight"), rows == 12 ? 1U : 0U);
    if (rows == 12) {
      EXPECT_TRUE(merged.at("lm_head.weight").equal(weight));
    }
  }
}

// The message of merging factors of one module, of an embedding or of a linear layer, into a model of these tensors.
std::string tied_message(const nlohmann::json& config, const Tensors& tensors, const std::string& module,
                         bool is_embedding, int64_t rows) {
  const TemporaryFolder folder;
  write_model(folder / "base", config, tensors);
  lora_rite::Adapter adapter;
  adapter.config.r = 2;
  adapter.config.lora_alpha = 2;
  if (is_embedding) {
    adapter.tensors[module + ".lora_embedding_A"] = torch::randn({2, rows});
    adapter.tensors[module + ".lora_embedding_B"] = torch::randn({8, 2});
  } else {
    adapter.tensors[module + ".lora_A.weight"] = torch::randn({2, 8});
    adapter.tensors[module + ".lora_B.weight"] = torch::randn({rows, 2});
  }
  lora_rite::save_adapter(folder / "adapter", adapter);
  return message_of([&] { merge(folder / "base", folder / "adapter", folder / "merged"); });
}

TEST(BaseCheckpoint, ATieIsSaidWhicheverUseIsChangedAndWhateverTheSizes) {
  const std::string words = "uses one matrix as embedding and as output";
  const auto rows = [](int64_t count) { return torch::randn({count, 8}); };
  // The output, which the files have not, of a kind of which two matrices are not known.
  EXPECT_NE(tied_message({{"model_type", "qwen2_vl"}, {"tie_word_embeddings", true}, {"vocab_size", 12}},
                         {{"model.embed_tokens.weight", rows(12)}}, "lm_head", false, 12)
                .find(words),
            std::string::npos);
  // An embedding that was resized, which only the text_config says.
  const nlohmann::json resized = {{"model_type", "paligemma"},
                                  {"tie_word_embeddings", true},
                                  {"vocab_size", 40},
                                  {"text_config", {{"vocab_size", 12}}}};
  EXPECT_NE(tied_message(resized, {{"language_model.model.embed_tokens.weight", rows(12)}},
                         "model.language_model.embed_tokens", true, 12)
                .find(words),
            std::string::npos);
  // BERT with its output for masked words; without it nothing is tied.
  const nlohmann::json bert = {{"model_type", "bert"}, {"vocab_size", 12}};
  Tensors tensors = {{"bert.embeddings.word_embeddings.weight", rows(12)},
                     {"cls.predictions.bias", torch::zeros({12})}};
  const std::string module = "bert.embeddings.word_embeddings";
  EXPECT_NE(tied_message(bert, tensors, module, true, 12).find(words), std::string::npos);
  tensors.erase("cls.predictions.bias");
  EXPECT_EQ(tied_message(bert, tensors, module, true, 12), "");
  // A table of positions as long as the vocabulary is none of it.
  EXPECT_EQ(tied_message({{"model_type", "gpt2"}, {"vocab_size", 12}},
                         {{"wte.weight", rows(12)}, {"wpe.weight", rows(16)}}, "transformer.wpe", true, 16),
            "");
}

TEST(BaseCheckpoint, EmbeddingsThatPeftWroteBesideTheFactorsAreDroppedIfTheyAreTheBases) {
  const TemporaryFolder folder;
  lora_rite::Adapter adapter = lora_rite::load_adapter(save_golden_adapter("llama", folder / "plain"));
  const Tensors base = tensors_of(model_golden("llama"));
  for (const char* name : {"model.embed_tokens.weight", "lm_head.weight"}) adapter.tensors[name] = base.at(name);
  lora_rite::save_adapter(folder / "with", adapter);
  merge(model_golden("llama"), folder / "plain", folder / "expected");
  merge(model_golden("llama"), folder / "with", folder / "merged");
  const Tensors expected = tensors_of(folder / "expected");
  for (const auto& [name, tensor] : tensors_of(folder / "merged")) EXPECT_TRUE(tensor.equal(expected.at(name))) << name;
  EXPECT_NO_THROW(load_adapted_language_model(model_golden("llama"), folder / "with", torch::kFloat, torch::kCPU));
  adapter.tensors["lm_head.weight"] = base.at("lm_head.weight") + 1;
  lora_rite::save_adapter(folder / "other", adapter);
  EXPECT_NE(message_of([&] { merge(model_golden("llama"), folder / "other", folder / "no"); }).find("lm_head.weight"),
            std::string::npos);
}

TEST(BaseCheckpoint, OldestNamesOfBertMergeWithBiases) {
  const TemporaryFolder folder;
  const auto model = load_bert(golden("tiny"));
  lora_rite::nn::LoraConfig config;
  config.init = lora_rite::nn::LoraInit::Random;
  config.bias = lora_rite::nn::LoraBias::All;
  config.target_modules = std::vector<std::string>{"query"};
  lora_rite::nn::inject_lora(*model, config);
  for (const auto& parameter : model->named_parameters()) {
    const torch::NoGradGuard no_grad;
    if (parameter.value().requires_grad()) parameter.value().add_(0.5);
  }
  lora_rite::save_adapter(folder / "adapter", lora_rite::nn::peft_adapter(*model));
  const auto older = [](std::string name) {
    name = "bert." + name;
    for (const auto& [now, before] :
         {std::pair{"LayerNorm.weight", "LayerNorm.gamma"}, std::pair{"LayerNorm.bias", "LayerNorm.beta"}}) {
      if (const size_t at = name.find(now); at != std::string::npos) name.replace(at, std::string::npos, before);
    }
    return name;
  };
  write_model(folder / "older", read_json(golden("tiny/config.json")), renamed(tensors_of(golden("tiny")), older));
  merge(folder / "older", folder / "adapter", folder / "merged");
  merge(golden("tiny"), folder / "adapter", folder / "expected");
  const Tensors merged = tensors_of(folder / "merged"), expected = tensors_of(folder / "expected");
  ASSERT_EQ(merged.size(), expected.size());
  for (const auto& [name, tensor] : expected) EXPECT_TRUE(merged.at(older(name)).equal(tensor)) << name;
  const std::string beta = "bert.encoder.layer.0.output.LayerNorm.beta";
  EXPECT_NEAR(distance(merged.at(beta), tensors_of(folder / "older").at(beta)), 0.5, 1e-6);
}

TEST(BaseCheckpoint, TwoTensorsOfOneNameAreNotGuessed) {
  const TemporaryFolder folder;
  Tensors tensors = tensors_of(model_golden("llama"));
  tensors["language_model.norm.weight"] = tensors.at("model.norm.weight");
  write_model(folder / "model", config_of("llama"), tensors);
  const BaseCheckpoint base(folder / "model");
  EXPECT_EQ(base.find("model.norm.weight"), "model.norm.weight");
  EXPECT_EQ(base.find("model.layers.9.weight"), "");
  EXPECT_EQ(error_of([&] { base.find("norm.weight"); }),
            (folder / "model").string() +
                ": 'norm.weight' may be 'language_model.norm.weight' or 'model.norm.weight'; expected is one tensor of "
                "such a name");
  EXPECT_NE(error_of([&] {
              load_model(folder / "model");
            }).find("'model.norm.weight' of shape [16], which was there already as 'language_model.norm.weight'"),
            std::string::npos);
}

TEST(BaseCheckpoint, ATieIsToldByConfigAndWeights) {
  const TemporaryFolder folder;
  const Tensors tied = tensors_of(model_golden("llama_tied_llama3"));
  const torch::Tensor embedding = tied.at("model.embed_tokens.weight");
  const auto is_tied = [&](const std::string& golden, const std::function<void(nlohmann::json&, Tensors&)>& change) {
    nlohmann::json config = config_of(golden);
    Tensors tensors = tensors_of(model_golden(golden));
    change(config, tensors);
    write_model(folder / "model", config, tensors);
    const BaseCheckpoint base(folder / "model");
    // As loading does it.
    const auto parameters = load_model(folder / "model")->named_parameters();
    const torch::Tensor own =
        parameters[golden.find("t5") == std::string::npos ? "model.embed_tokens.weight" : "shared.weight"];
    EXPECT_EQ(parameters["lm_head.weight"].is_same(own), base.is_tied()) << golden;
    return base.is_tied();
  };
  EXPECT_TRUE(is_tied("llama_tied_llama3", [](auto&, auto&) {}));
  EXPECT_TRUE(is_tied("llama_tied_llama3", [&](auto&, auto& t) { t["lm_head.weight"] = embedding.clone(); }));
  EXPECT_FALSE(is_tied("llama_tied_llama3", [&](auto&, auto& t) { t["lm_head.weight"] = embedding + 1; }));
  EXPECT_FALSE(is_tied("llama", [](auto&, auto&) {}));
  EXPECT_TRUE(is_tied("t5", [](auto& c, auto&) { c["tie_word_embeddings"] = false; }));  // as transformers 5 has it
  for (const bool said : {true, false}) {  // T5 1.1 and mT5 as published, and as transformers 5 saves them again
    EXPECT_FALSE(is_tied("t5_gated", [&](auto& c, auto&) { c["tie_word_embeddings"] = said; }));
    EXPECT_FALSE(is_tied("mt5", [&](auto& c, auto&) { c["tie_word_embeddings"] = said; }));
  }
}

TEST(BaseCheckpoint, AnOutputThatTheWeightsUntieCanBeMergedInto) {
  const TemporaryFolder folder;
  nlohmann::json config = config_of("mt5");
  config["tie_word_embeddings"] = true;
  write_model(folder / "model", config, tensors_of(model_golden("mt5")));
  const auto model = load_model(folder / "model");
  lora_rite::nn::LoraConfig lora;
  lora.target_modules = std::vector<std::string>{"lm_head"};
  lora.init = lora_rite::nn::LoraInit::Random;
  lora_rite::nn::inject_lora(*model, lora);
  lora_rite::save_adapter(folder / "adapter", lora_rite::nn::peft_adapter(*model));
  merge(folder / "model", folder / "adapter", folder / "merged");
  const LanguageInput input = input_of(expected_of("mt5"));
  const torch::NoGradGuard no_grad;
  EXPECT_LT(relative_distance(load_model(folder / "merged")->forward(input), model->forward(input)), 1e-5);
}

TEST(BaseCheckpoint, CopiesOfT5sEmbeddingMustBeCopies) {
  const TemporaryFolder folder;
  Tensors tensors = tensors_of(model_golden("t5"));
  tensors["encoder.embed_tokens.weight"] = tensors.at("shared.weight") + 1;
  write_model(folder / "model", config_of("t5"), tensors);
  EXPECT_NE(error_of([&] { load_model(folder / "model"); })
                .find("'shared.weight' of shape [48, 16], which was there already as 'encoder.embed_tokens.weight' "
                      "with other values"),
            std::string::npos);
}

}  // namespace
}  // namespace finetune
