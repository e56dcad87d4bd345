#include "commands/merge.hpp"

#include <algorithm>
#include <cmath>
#include <lora_rite/io/peft.hpp>
#include <lora_rite/io/safetensors.hpp>
#include <nlohmann/json.hpp>
#include <sstream>

#include "common/files.hpp"
#include "models/bert.hpp"
#include "support.hpp"

namespace finetune {
namespace {

namespace fs = std::filesystem;
using lora_rite::test::write_bytes;

// Unit round-off of float and bfloat16.
constexpr double kFloat = 0x1p-24, kBFloat16 = 0x1p-8;

MergeOptions merge_options(const fs::path& model, const fs::path& adapter, const fs::path& out) {
  MergeOptions options;
  options.model = model;
  options.adapters = {{adapter, 1}};
  options.out = out;
  return options;
}

void merge(const MergeOptions& options) {
  std::ostringstream ignored;
  merge_adapters(options, ignored);
}

std::string refusal_of(const MergeOptions& options) {
  return message_of([&] { merge(options); });
}

// W + weight · scale · B A in double, for each factor pair of an adapter that PEFT wrote for linear layers.
Tensors exact_weights(const Tensors& base, const fs::path& adapter, double weight) {
  const lora_rite::Adapter file = lora_rite::load_adapter(adapter);
  const double scale = file.config.lora_alpha / static_cast<double>(file.config.r);
  Tensors weights;
  for (const auto& [name, a] : file.tensors) {
    const size_t at = name.find(".lora_A.weight");
    if (at == std::string::npos) continue;
    const std::string module = name.substr(0, at);
    const torch::Tensor b = file.tensors.at(module + ".lora_B.weight").to(torch::kDouble);
    weights[module + ".weight"] =
        base.at(module + ".weight").to(torch::kDouble) + weight * scale * torch::matmul(b, a.to(torch::kDouble));
  }
  return weights;
}

TEST(Merge, EveryWeightIsTheExactSumRoundedOnce) {
  for (const std::string dtype : {"", "float32", "bfloat16", "float16"}) {
    const TemporaryFolder folder;
    const fs::path adapter = save_golden_adapter("llama", folder / "adapter");
    MergeOptions options = merge_options(model_golden("llama"), adapter, folder / "merged");
    options.dtype = dtype;
    merge(options);
    const Tensors base = lora_rite::load_sharded(model_golden("llama")).tensors;
    const Tensors merged = lora_rite::load_sharded(folder / "merged").tensors;
    const Tensors exact = exact_weights(base, adapter, 1);
    ASSERT_EQ(merged.size(), base.size());
    ASSERT_GE(exact.size(), 4U);
    const auto expected_dtype = dtype.empty() || dtype == "float32" ? torch::kFloat
                                : dtype == "bfloat16"               ? torch::kBFloat16
                                                                    : torch::kHalf;
    const double unit = expected_dtype == torch::kFloat ? kFloat : expected_dtype == torch::kHalf ? 0x1p-11 : kBFloat16;
    for (const auto& [name, tensor] : merged) {
      ASSERT_EQ(tensor.scalar_type(), expected_dtype) << name;
      const auto changed = exact.find(name);
      if (changed == exact.end()) {
        EXPECT_TRUE(tensor.equal(base.at(name).to(expected_dtype))) << name;
        continue;
      }
      EXPECT_GT(distance(changed->second, base.at(name)), 1e-2) << name << ": the adapter has an effect";
      // One rounding of the sum, beside at most r + 2 ≤ 8 roundings of float in a ΔW of entries below 8.
      const torch::Tensor bound = unit * changed->second.abs() + 8 * 8 * kFloat;
      EXPECT_TRUE(((tensor.to(torch::kDouble) - changed->second).abs() <= bound).all().item<bool>()) << name;
    }
    const nlohmann::json config = read_json(folder / "merged" / "config.json");
    EXPECT_EQ(config["dtype"], dtype.empty() ? "float32" : dtype);
    EXPECT_EQ(config["model_type"], "llama");
  }
}

TEST(Merge, LogitsAreThoseOfBaseAndAdapterForEveryKindOfModel) {
  for (const std::string& name : model_names()) {
    const TemporaryFolder folder;
    merge(merge_options(model_golden(name), save_golden_adapter(name, folder / "adapter"), folder / "merged"));
    const Tensors expected = expected_of(name);
    const LanguageInput input = input_of(expected);
    const torch::NoGradGuard no_grad;
    const torch::Tensor adapted = adapted_golden(name)->forward(input);
    const torch::Tensor merged = load_model(folder / "merged")->forward(input);
    const torch::Tensor base = load_model(model_golden(name))->forward(input);
    EXPECT_GT(relative_distance(base, adapted), 1e-2) << name << ": the adapter has an effect";
    // Some 32 products of up to 48 terms one behind the other, each rounded in another order.
    EXPECT_LT(relative_distance(merged, adapted), 32 * 48 * kFloat) << name;
  }
}

TEST(Merge, LogitsInBFloat16AreThoseUpToTheRoundingOfTheWeights) {
  // Computed in float: only the weights are rounded, by a unit each, in so many matrix products one behind the other
  // (a layer has 7, a decoder's of T5 11, and there is the output). Their errors add up at worst.
  const std::map<std::string, int> products = {{"llama", 15}, {"llama_tied_llama3", 15}, {"t5_gated", 37}};
  for (const auto& [name, count] : products) {
    const TemporaryFolder folder;
    MergeOptions options =
        merge_options(model_golden(name), save_golden_adapter(name, folder / "adapter"), folder / "merged");
    options.dtype = "bfloat16";
    merge(options);
    const LanguageInput input = input_of(expected_of(name));
    const torch::NoGradGuard no_grad;
    const torch::Tensor adapted = adapted_golden(name)->forward(input);
    const double bound = count * kBFloat16;
    EXPECT_GT(relative_distance(load_model(model_golden(name))->forward(input), adapted), 2 * bound) << name;
    EXPECT_LT(relative_distance(load_model(folder / "merged")->forward(input), adapted), bound) << name;
  }
}

TEST(Merge, AnAdapterOfPeftInBertGivesWhatPeftComputes) {
  const TemporaryFolder folder;
  merge(merge_options(golden("tiny"), golden("tiny_adapter"), folder / "merged"));
  const Safetensors expected = load_safetensors(golden("tiny_adapter/expected.safetensors"));
  const auto model = load_bert(folder / "merged");
  const torch::NoGradGuard no_grad;
  const torch::Tensor hidden = model->forward(expected.tensors.at("tokens"), expected.tensors.at("mask"));
  EXPECT_LT(distance(mean_pool(hidden, expected.tensors.at("mask")), expected.tensors.at("pooled")), 1e-5);
  EXPECT_TRUE(load_safetensors(folder / "merged/model.safetensors").tensors.count("pooler.dense.weight") > 0);
}

TEST(Merge, PrefixesOfModelsWithAHeadAreFound) {
  const TemporaryFolder folder;
  fs::create_directories(folder / "headed");
  fs::copy_file(golden("tiny/config.json"), folder / "headed/config.json");
  Tensors tensors;
  for (const auto& [name, tensor] : load_safetensors(golden("tiny/model.safetensors")).tensors) {
    tensors["bert." + name] = tensor;
  }
  save_safetensors(folder / "headed/model.safetensors", tensors);
  merge(merge_options(folder / "headed", golden("tiny_adapter"), folder / "merged"));
  merge(merge_options(golden("tiny"), golden("tiny_adapter"), folder / "plain"));
  const Tensors plain = load_safetensors(folder / "plain/model.safetensors").tensors;
  const Tensors merged = load_safetensors(folder / "merged/model.safetensors").tensors;
  ASSERT_EQ(merged.size(), plain.size());
  for (const auto& [name, tensor] : plain) EXPECT_TRUE(merged.at("bert." + name).equal(tensor)) << name;
}

TEST(Merge, TiedWeightsStayTied) {
  const TemporaryFolder folder;
  const fs::path adapter = save_golden_adapter("llama_tied_llama3", folder / "adapter");
  merge(merge_options(model_golden("llama_tied_llama3"), adapter, folder / "merged"));
  EXPECT_EQ(load_safetensors(folder / "merged/model.safetensors").tensors.count("lm_head.weight"), 0U);
  EXPECT_EQ(read_json(folder / "merged/config.json")["tie_word_embeddings"], true);
}

TEST(Merge, ShardsAreThoseOfTheBase) {
  const TemporaryFolder folder;
  const fs::path adapter = save_golden_adapter("llama", folder / "adapter");
  MergeOptions options = merge_options(model_golden("llama_sharded"), adapter, folder / "sharded");
  options.shard_size = 4000 / 1e9;  // of an unsharded base alone
  merge(options);
  merge(merge_options(model_golden("llama"), adapter, folder / "whole"));
  const Tensors whole = lora_rite::load_sharded(folder / "whole").tensors;
  const Tensors sharded = lora_rite::load_sharded(folder / "sharded").tensors;
  ASSERT_EQ(sharded.size(), whole.size());
  for (const auto& [name, tensor] : whole) EXPECT_TRUE(sharded.at(name).equal(tensor)) << name;
  const auto index = [](const fs::path& path) { return read_json(path / "model.safetensors.index.json"); };
  EXPECT_EQ(index(folder / "sharded")["weight_map"], index(model_golden("llama_sharded"))["weight_map"]);
  EXPECT_FALSE(fs::exists(folder / "sharded" / "model.safetensors"));
  EXPECT_FALSE(fs::exists(folder / "whole" / "model.safetensors.index.json"));
}

TEST(Merge, LargeWeightsGoIntoSeveralFiles) {
  const TemporaryFolder folder;
  const fs::path adapter = save_golden_adapter("llama", folder / "adapter");
  MergeOptions options = merge_options(model_golden("llama"), adapter, folder / "cut");
  options.shard_size = 8000 / 1e9;
  merge(options);
  merge(merge_options(model_golden("llama"), adapter, folder / "whole"));
  const nlohmann::json index = read_json(folder / "cut" / "model.safetensors.index.json");
  std::map<std::string, int64_t> sizes;
  int64_t total = 0;
  const Tensors whole = lora_rite::load_sharded(folder / "whole").tensors;
  const Tensors cut = lora_rite::load_sharded(folder / "cut").tensors;
  ASSERT_EQ(cut.size(), whole.size());
  for (const auto& [name, tensor] : whole) {
    EXPECT_TRUE(cut.at(name).equal(tensor)) << name;
    sizes[index["weight_map"][name]] += static_cast<int64_t>(tensor.nbytes());
    total += static_cast<int64_t>(tensor.nbytes());
  }
  EXPECT_EQ(index["metadata"]["total_size"], total);
  EXPECT_GE(sizes.size(), 3U);
  for (const auto& [file, size] : sizes) EXPECT_LE(size, 8000) << file;
}

TEST(Merge, SeveralAdaptersAreAddedByTheirWeights) {
  const TemporaryFolder folder;
  const fs::path first = save_golden_adapter("llama", folder / "first");
  lora_rite::Adapter adapter = lora_rite::load_adapter(first);
  for (auto& [name, tensor] : adapter.tensors) tensor = (2 * tensor).flip(0).contiguous();
  // The rank's dimension of A is flipped, so B's must be as well, else of another product: any will do here.
  lora_rite::save_adapter(folder / "second", adapter);
  MergeOptions options = merge_options(model_golden("llama"), first, folder / "merged");
  options.adapters = {{first, 0.75}, {folder / "second", -0.5}};
  merge(options);
  const Tensors base = lora_rite::load_sharded(model_golden("llama")).tensors;
  const Tensors merged = lora_rite::load_sharded(folder / "merged").tensors;
  const Tensors with_second = exact_weights(base, folder / "second", -0.5);
  for (const auto& [name, weight] : exact_weights(base, first, 0.75)) {
    const torch::Tensor exact = weight + with_second.at(name) - base.at(name);
    EXPECT_GT(distance(exact, weight), 1e-2) << name;
    EXPECT_LT(distance(merged.at(name), exact), 64 * 16 * kFloat) << name;  // ΔWs below 64, 16 roundings
  }
}

TEST(Merge, RanksAndAlphasByPatternAndRsloraCount) {
  const TemporaryFolder folder;
  const auto model = load_model(model_golden("llama"));
  lora_rite::nn::LoraConfig config;
  config.rank = 2;
  config.alpha = 3;
  config.use_rslora = true;
  config.init = lora_rite::nn::LoraInit::Random;
  config.target_modules = std::vector<std::string>{"q_proj", "down_proj"};
  config.rank_pattern = {{"layers.1.self_attn.q_proj", 5}};
  config.alpha_pattern = {{"down_proj", 7}};
  torch::manual_seed(4);
  lora_rite::nn::inject_lora(*model, config);
  lora_rite::save_adapter(folder / "adapter", lora_rite::nn::peft_adapter(*model));
  merge(merge_options(model_golden("llama"), folder / "adapter", folder / "merged"));
  lora_rite::nn::merge_and_unload(*model);
  const Tensors merged = lora_rite::load_sharded(folder / "merged").tensors;
  for (const auto& [name, weight] : lora_rite::nn::base_state(*model)) {
    if (merged.count(name) == 0) continue;  // tied
    EXPECT_LT(distance(merged.at(name), weight), 16 * kFloat) << name;
  }
}

TEST(Merge, TrainedBiasesReplaceTheBases) {
  const TemporaryFolder folder;
  const auto model = load_model(model_golden("llama_linear_biases"));
  lora_rite::nn::LoraConfig config;
  config.init = lora_rite::nn::LoraInit::Random;
  config.bias = lora_rite::nn::LoraBias::LoraOnly;
  config.target_modules = std::vector<std::string>{"q_proj"};
  lora_rite::nn::inject_lora(*model, config);
  for (const auto& parameter : model->named_parameters()) {
    const torch::NoGradGuard no_grad;
    if (parameter.value().requires_grad() && parameter.key().find(".bias") != std::string::npos) {
      parameter.value().add_(1);
    }
  }
  lora_rite::save_adapter(folder / "adapter", lora_rite::nn::peft_adapter(*model));
  MergeOptions options = merge_options(model_golden("llama_linear_biases"), folder / "adapter", folder / "merged");
  merge(options);
  const Tensors base = lora_rite::load_sharded(model_golden("llama_linear_biases")).tensors;
  const Tensors merged = lora_rite::load_sharded(folder / "merged").tensors;
  const std::string bias = "model.layers.0.self_attn.q_proj.bias";
  EXPECT_TRUE(merged.at(bias).equal(base.at(bias) + 1));
  EXPECT_TRUE(merged.at("model.layers.0.self_attn.k_proj.bias").equal(base.at("model.layers.0.self_attn.k_proj.bias")));

  options.out = folder / "half";
  options.adapters[0].weight = 0.5;
  EXPECT_NE(refusal_of(options).find("trained biases"), std::string::npos);
  EXPECT_FALSE(fs::exists(options.out));
}

TEST(Merge, WhatIsMergedAlreadyIsRefused) {
  const TemporaryFolder folder;
  const fs::path adapter = save_golden_adapter("llama", folder / "adapter");
  fs::copy(adapter, folder / "copy");
  merge(merge_options(model_golden("llama"), adapter, folder / "once"));
  const std::string message = refusal_of(merge_options(folder / "once", folder / "copy", folder / "twice"));
  EXPECT_NE(message.find("was merged into"), std::string::npos) << message;
  EXPECT_NE(message.find("Use the base it was trained on"), std::string::npos) << message;
  EXPECT_FALSE(fs::exists(folder / "twice"));

  MergeOptions options = merge_options(model_golden("llama"), adapter, folder / "twice");
  options.adapters.push_back({folder / "copy", 1});
  EXPECT_NE(refusal_of(options).find("stands there twice"), std::string::npos);

  // Another one is added to it, and both are remembered, in shards as well.
  lora_rite::Adapter other = lora_rite::load_adapter(adapter);
  other.config.lora_alpha *= 2;
  lora_rite::save_adapter(folder / "other", other);
  MergeOptions more = merge_options(folder / "once", folder / "other", folder / "both");
  more.shard_size = 8000 / 1e9;
  merge(more);
  EXPECT_NE(refusal_of(merge_options(folder / "both", adapter, folder / "twice")), "");
  EXPECT_NE(refusal_of(merge_options(folder / "both", folder / "other", folder / "twice")), "");
  EXPECT_FALSE(fs::exists(folder / "twice"));
}

TEST(Merge, AnAdapterOfAnotherBaseIsRefused) {
  const TemporaryFolder folder;
  const fs::path llama = save_golden_adapter("llama", folder / "llama");
  const fs::path out = folder / "merged";
  std::string message = refusal_of(merge_options(model_golden("t5"), llama, out));
  EXPECT_NE(message.find("has no tensor 'model.layers.0."), std::string::npos) << message;
  EXPECT_NE(message.find("was trained on another base model"), std::string::npos) << message;
  message = refusal_of(merge_options(golden("tiny"), llama, out));
  EXPECT_NE(message.find("has no tensor"), std::string::npos) << message;

  lora_rite::Adapter wide = lora_rite::load_adapter(llama);
  for (auto& [name, tensor] : wide.tensors) {
    if (name.find("lora_A") != std::string::npos) tensor = torch::cat({tensor, tensor}, 1);
  }
  lora_rite::save_adapter(folder / "wide", wide);
  message = refusal_of(merge_options(model_golden("llama"), folder / "wide", out));
  EXPECT_NE(message.find("has shape [24, 16], but the adapter's factors of"), std::string::npos) << message;
  EXPECT_FALSE(fs::exists(out));
  EXPECT_FALSE(fs::exists(out.string() + ".tmp"));
}

TEST(Merge, NonsenseIsRefusedAndNothingWritten) {
  const TemporaryFolder folder;
  const fs::path adapter = save_golden_adapter("llama", folder / "adapter");
  const fs::path out = folder / "merged";
  const MergeOptions good = merge_options(model_golden("llama"), adapter, out);
  const auto refusal = [&](const std::function<void(MergeOptions&)>& change) {
    MergeOptions options = good;
    change(options);
    const std::string message = refusal_of(options);
    EXPECT_FALSE(fs::exists(out)) << message;
    EXPECT_FALSE(fs::exists(out.string() + ".tmp")) << message;
    return message;
  };
  EXPECT_NE(refusal([](auto& options) { options.adapters.clear(); }).find("no --adapter"), std::string::npos);
  EXPECT_NE(refusal([](auto& options) { options.dtype = "int8"; }).find("float32, bfloat16, float16"),
            std::string::npos);
  EXPECT_NE(refusal([](auto& options) { options.shard_size = 0; }).find("--shard-size 0"), std::string::npos);
  EXPECT_NE(refusal([](auto& options) { options.model = "/nowhere"; }).find("/nowhere/config.json"), std::string::npos);
  EXPECT_NE(
      refusal([](auto& options) { options.adapters[0].folder = "/nowhere"; }).find("/nowhere/adapter_config.json"),
      std::string::npos);

  lora_rite::Adapter dora = lora_rite::load_adapter(adapter);
  dora.config.other["use_dora"] = true;
  lora_rite::save_adapter(folder / "dora", dora);
  EXPECT_NE(refusal([&](auto& options) { options.adapters[0].folder = folder / "dora"; }).find("use_dora"),
            std::string::npos);
  lora_rite::Adapter pissa = lora_rite::load_adapter(adapter);
  pissa.config.init_lora_weights = std::string("pissa");
  lora_rite::save_adapter(folder / "pissa", pissa);
  EXPECT_NE(refusal([&](auto& options) { options.adapters[0].folder = folder / "pissa"; }).find("init_lora_weights"),
            std::string::npos);
  lora_rite::Adapter infinite = lora_rite::load_adapter(adapter);
  infinite.config.lora_alpha = 1e38;
  lora_rite::save_adapter(folder / "infinite", infinite);
  EXPECT_NE(refusal([&](auto& options) {
              options.adapters[0].folder = folder / "infinite";
              options.dtype = "float16";
            }).find("not finite"),
            std::string::npos);
  lora_rite::Adapter more = lora_rite::load_adapter(adapter);
  more.tensors["lm_head.weight"] = torch::zeros({3});
  lora_rite::save_adapter(folder / "more", more);
  EXPECT_NE(refusal([&](auto& options) {
              options.adapters[0].folder = folder / "more";
            }).find("'lm_head.weight' is neither a factor, a bias nor"),
            std::string::npos);

  fs::create_directories(out);
  write_bytes(out / "precious", "1");
  EXPECT_NE(refusal_of(good).find("is there already"), std::string::npos);
  EXPECT_EQ(content_of(out), (std::map<std::string, std::string>{{"precious", "1"}}));
  fs::remove(out / "precious");
  EXPECT_EQ(refusal_of(good), "");  // an empty folder will do
  EXPECT_TRUE(fs::exists(out / "model.safetensors"));
}

// The names of the files below a folder. Those of `folder` that hold no name of their own are the model's.
std::vector<std::string> names_in(const fs::path& folder) {
  std::vector<std::string> names;
  for (const auto& item : content_of(folder)) names.push_back(item.first);
  return names;
}

TEST(Merge, WhatIsNoWeightFileComesAlong) {
  const TemporaryFolder folder;
  fs::create_directories(folder / "base");
  for (const char* own : {"config.json", "model.safetensors"}) {
    fs::copy_file(model_golden("llama") / own, folder / "base" / own);
  }
  const fs::path adapter = save_golden_adapter("llama", folder / "adapter");
  const std::vector<std::string> copied = {"LICENSE",
                                           "README.md",
                                           "chat_template.jinja",
                                           "merges.txt",
                                           "modeling_own.py",
                                           "qwen.tiktoken",
                                           "spiece.model",
                                           "tokenizer.json",
                                           "additional_chat_templates/tool.jinja",
                                           "onnx/config.json",
                                           "1_Pooling/config.json",
                                           "2_Dense/config.json",
                                           "2_Dense/model.safetensors",
                                           "2_Dense/pytorch_model.bin"};
  const std::vector<std::string> left = {".cache/lock",
                                         "adapter_config.json",
                                         "old.safetensors",
                                         "onnx/model.onnx",
                                         "original/consolidated.00.pth",
                                         "pytorch_model.bin",
                                         "pytorch_model.bin.index.json",
                                         "runs/arc/adapter_config.json",
                                         "runs/arc/adapter_model.safetensors"};
  for (const auto& names : {copied, left}) {
    for (const std::string& name : names) {
      fs::create_directories((folder / "base" / name).parent_path());
      write_bytes(folder / "base" / name, name);
    }
  }
  write_json(folder / "base/modules.json",
             {{{"idx", 0}, {"path", ""}}, {{"idx", 1}, {"path", "1_Pooling"}}, {{"idx", 2}, {"path", "2_Dense"}}});
  write_bytes(folder / "adapter/head.safetensors", "head");
  fs::create_symlink(".", folder / "base/loop");
  fs::create_symlink("nowhere", folder / "base/broken");
  std::ostringstream log;
  merge_adapters(merge_options(folder / "base", adapter, folder / "base/merged/"), log);  // within it: not in itself

  std::vector<std::string> expected = copied;
  for (const char* name : {"config.json", "head.safetensors", "model.safetensors", "modules.json"}) {
    expected.push_back(name);
  }
  std::sort(expected.begin(), expected.end());
  EXPECT_EQ(names_in(folder / "base/merged"), expected);
  const auto content = content_of(folder / "base/merged");
  for (const std::string& name : copied) EXPECT_EQ(content.at(name), name);
  EXPECT_EQ(content.at("head.safetensors"), "head");
  EXPECT_NE(log.str().find("left out what is none of the merged model's: .cache, adapter_config.json, broken, loop, "
                           "old.safetensors, onnx/model.onnx, original/consolidated.00.pth, pytorch_model.bin, "
                           "pytorch_model.bin.index.json, runs/arc\n"),
            std::string::npos)
      << log.str();
}

TEST(Merge, AMergedClassifierKeepsItsHead) {
  const TemporaryFolder folder;
  fs::create_directories(folder / "base");
  for (const char* own : {"config.json", "model.safetensors"}) {
    fs::copy_file(golden("tiny") / own, folder / "base" / own);
  }
  write_bytes(folder / "base/head.safetensors", "the base's");
  merge(merge_options(folder / "base", golden("tiny_adapter"), folder / "merged"));
  EXPECT_EQ(content_of(folder / "merged").at("head.safetensors"), "the base's");
}

TEST(Merge, WeightsStandBehindTheFolder) {
  const TemporaryFolder folder;
  EXPECT_EQ(parse_weighted_adapter("runs/a").folder, "runs/a");
  EXPECT_EQ(parse_weighted_adapter("runs/a").weight, 1);
  EXPECT_EQ(parse_weighted_adapter("runs/a=-0.5").folder, "runs/a");
  EXPECT_EQ(parse_weighted_adapter("runs/a=-0.5").weight, -0.5);
  fs::create_directories(folder / "lr=1");
  EXPECT_EQ(parse_weighted_adapter(folder.string() + "/lr=1").folder, folder / "lr=1");
  EXPECT_EQ(parse_weighted_adapter(folder.string() + "/lr=1=2").folder, folder / "lr=1");
  for (const char* text : {"a=", "a=x", "a=1x", "a=nan", "a=inf"}) {
    EXPECT_NE(message_of([&] { parse_weighted_adapter(text); }).find("DIR=WEIGHT"), std::string::npos) << text;
  }
}

TEST(Merge, TheCommandLineReachesIt) {
  const TemporaryFolder folder;
  const fs::path adapter = save_golden_adapter("llama", folder / "adapter");
  ::testing::internal::CaptureStdout();
  EXPECT_EQ(run_command(&add_merge_command,
                        {"merge", "--model", model_golden("llama").string(), "--adapter", adapter.string() + "=0.5",
                         "--out", (folder / "merged").string(), "--dtype", "bfloat16", "--shard-size", "1"}),
            0);
  EXPECT_NE(::testing::internal::GetCapturedStdout().find("the model is in"), std::string::npos);
  MergeOptions options = merge_options(model_golden("llama"), adapter, folder / "direct");
  options.adapters[0].weight = 0.5;
  options.dtype = "bfloat16";
  merge(options);
  EXPECT_TRUE(content_of(folder / "merged") == content_of(folder / "direct"));
}

}  // namespace
}  // namespace finetune
