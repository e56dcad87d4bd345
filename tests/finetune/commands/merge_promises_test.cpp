// What docs/merge.md and the --help text promise of merge, and no other test holds.

#include "commands/merge.hpp"

#include <algorithm>
#include <cmath>
#include <lora_rite/io/peft.hpp>
#include <lora_rite/io/safetensors.hpp>
#include <set>
#include <sstream>

#include "support.hpp"

namespace finetune {
namespace {

namespace fs = std::filesystem;
using lora_rite::test::write_bytes;

// A base of golden/ with other tensors.
fs::path write_base(const fs::path& folder, const std::string& name, const std::function<void(Tensors&)>& change) {
  Tensors tensors = tensors_of(model_golden(name));
  change(tensors);
  write_model(folder, read_json(model_golden(name) / "config.json"), tensors);
  return folder;
}

// In another dtype.
fs::path write_base(const fs::path& folder, const std::string& name, torch::Dtype dtype) {
  return write_base(folder, name, [dtype](Tensors& tensors) {
    for (auto& item : tensors) item.second = item.second.to(dtype);
  });
}

// The same adapter but for its numbers.
fs::path save_scaled(const fs::path& adapter, double factor, const fs::path& folder) {
  lora_rite::Adapter other = lora_rite::load_adapter(adapter);
  for (auto& item : other.tensors) item.second = item.second * factor;
  lora_rite::save_adapter(folder, other);
  return folder;
}

TEST(MergePromises, AHalfBaseKeepsItsDtypeAndEverySumIsRoundedOnce) {
  for (const auto dtype : {torch::kBFloat16, torch::kHalf}) {
    const TemporaryFolder folder;
    MergeOptions options;
    options.model = write_base(folder / "base", "llama", dtype);
    options.adapters = {{save_golden_adapter("llama", folder / "adapter"), 1}};
    options.out = folder / "merged";
    ASSERT_EQ(merge_message(options), "");
    const Tensors base = tensors_of(options.model), deltas = deltas_of(folder / "adapter");
    size_t rounded_twice = 0;
    for (const auto& [name, tensor] : tensors_of(options.out)) {
      ASSERT_EQ(tensor.scalar_type(), dtype) << name;
      if (deltas.count(name) == 0) {
        EXPECT_TRUE(tensor.equal(base.at(name))) << name;
        continue;
      }
      const torch::Tensor& delta = deltas.at(name);
      EXPECT_TRUE(tensor.equal((base.at(name).to(torch::kFloat) + delta).to(dtype))) << name;
      rounded_twice += !tensor.equal(base.at(name) + delta.to(dtype));
    }
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
  ASSERT_EQ(merge_message(options), "");
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
  ASSERT_EQ(merge_message(options), "");
  options.model = model_golden("llama");
  options.out = folder / "known";
  ASSERT_EQ(merge_message(options), "");
  const Tensors known = tensors_of(folder / "known");
  for (const auto& [name, tensor] : tensors_of(folder / "merged")) {
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
  EXPECT_NE(merge_message(options).find("has trained biases"), std::string::npos);
  EXPECT_FALSE(fs::exists(options.out));
}

TEST(MergePromises, EveryFilesMetadataListsWhatWasMerged) {
  const TemporaryFolder folder;
  MergeOptions options;
  options.model = model_golden("llama");
  options.adapters = {{save_golden_adapter("llama", folder / "adapter"), 1}};
  options.out = folder / "merged";
  options.shard_size = 8000 / 1e9;
  ASSERT_EQ(merge_message(options), "");
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

TEST(MergePromises, AFloatSumOfAHalfBaseIsTheSumOfItsFloats) {
  const TemporaryFolder folder;
  const fs::path model = write_base(folder / "base", "llama", torch::kBFloat16);
  const fs::path adapter = save_golden_adapter("llama", folder / "adapter");
  ASSERT_EQ(merge_message(model, {{adapter, 1}}, folder / "merged", "float32"), "");
  const Tensors base = tensors_of(model), deltas = deltas_of(adapter);
  for (const auto& [name, tensor] : tensors_of(folder / "merged")) {
    const torch::Tensor wide = base.at(name).to(torch::kFloat);
    EXPECT_TRUE(tensor.equal(deltas.count(name) == 0 ? wide : wide + deltas.at(name))) << name;
  }
}

TEST(MergePromises, SumsOfAFloat64BaseAreMadeInDouble) {
  const TemporaryFolder folder;
  const fs::path model = write_base(folder / "base", "llama", torch::kDouble);
  const fs::path adapter = save_golden_adapter("llama", folder / "adapter");
  ASSERT_EQ(merge_message(model, {{adapter, 1}}, folder / "merged"), "");
  const Tensors base = tensors_of(model), found = tensors_of(folder / "merged");
  for (const auto& [name, delta] : deltas_of(adapter)) {
    EXPECT_TRUE(found.at(name).equal(base.at(name) + delta.to(torch::kDouble))) << name;
    EXPECT_FALSE(found.at(name).equal((base.at(name).to(torch::kFloat) + delta).to(torch::kDouble))) << name;
  }
}

TEST(MergePromises, SeveralAdaptersAreRoundedOnceAllTogether) {
  const TemporaryFolder folder;
  const fs::path model = write_base(folder / "base", "llama", torch::kBFloat16);
  const fs::path first = save_golden_adapter("llama", folder / "first");
  const fs::path second = save_scaled(first, 0.7, folder / "second");
  ASSERT_EQ(merge_message(model, {{first, 0.5}, {second, -0.25}}, folder / "merged"), "");
  const Tensors base = tensors_of(model), found = tensors_of(folder / "merged");
  const Tensors deltas = deltas_of(first), others = deltas_of(second);
  size_t rounded_twice = 0;
  for (const auto& [name, delta] : deltas) {
    const torch::Tensor sum = base.at(name).to(torch::kFloat) + 0.5 * delta;  // powers of two: no rounding by them
    EXPECT_TRUE(found.at(name).equal((sum - 0.25 * others.at(name)).to(torch::kBFloat16))) << name;
    const torch::Tensor rounded = sum.to(torch::kBFloat16).to(torch::kFloat);
    rounded_twice += !found.at(name).equal((rounded - 0.25 * others.at(name)).to(torch::kBFloat16));
  }
  EXPECT_EQ(rounded_twice, deltas.size()) << "it can be told from rounding after each adapter, as PEFT does";
}

TEST(MergePromises, WhatIsNoFloatKeepsItsDtype) {
  const TemporaryFolder folder;
  const torch::Tensor ids = torch::arange(300), mask = torch::tensor({true, false});
  const fs::path model = write_base(folder / "base", "llama", [&](Tensors& tensors) {
    tensors["model.position_ids"] = ids;
    tensors["model.mask"] = mask;
  });
  const fs::path adapter = save_golden_adapter("llama", folder / "adapter");
  ASSERT_EQ(merge_message(model, {{adapter, 1}}, folder / "merged", "bfloat16"), "");
  const Tensors found = tensors_of(folder / "merged");
  EXPECT_EQ(found.at("model.norm.weight").scalar_type(), torch::kBFloat16);
  EXPECT_EQ(found.at("model.position_ids").scalar_type(), torch::kLong);
  EXPECT_TRUE(found.at("model.position_ids").equal(ids));
  EXPECT_EQ(found.at("model.mask").scalar_type(), torch::kBool);
  EXPECT_TRUE(found.at("model.mask").equal(mask));
}

TEST(MergePromises, AConvolutionComputesWhatBaseAndFactorsCompute) {
  const TemporaryFolder folder;
  torch::manual_seed(8);
  const torch::Tensor weight = torch::randn({6, 3, 2, 3});
  write_model(folder / "base", {{"model_type", "convnext"}}, {{"stem.conv.weight", weight}});
  lora_rite::Adapter adapter;
  adapter.config.r = 2;
  adapter.config.lora_alpha = 3;
  const torch::Tensor a = adapter.tensors["stem.conv.lora_A.weight"] = torch::randn({2, 3, 2, 3});
  const torch::Tensor b = adapter.tensors["stem.conv.lora_B.weight"] = torch::randn({6, 2, 1, 1});
  lora_rite::save_adapter(folder / "adapter", adapter);
  ASSERT_EQ(merge_message(folder / "base", {{folder / "adapter", 1}}, folder / "merged"), "");
  const torch::Tensor input = torch::randn({2, 3, 5, 7});
  const torch::Tensor expected = torch::conv2d(input, weight) + 1.5 * torch::conv2d(torch::conv2d(input, a), b);
  const torch::Tensor found = torch::conv2d(input, tensors_of(folder / "merged").at("stem.conv.weight"));
  EXPECT_LT(relative_distance(found, expected), 1e-5);
  EXPECT_GT(relative_distance(torch::conv2d(input, weight), expected), 0.1) << "the adapter has an effect";
}

TEST(MergePromises, AnotherBaseOfTheSameNamesAndShapesCannotBeTold) {
  const TemporaryFolder folder;
  const fs::path model = write_base(folder / "other", "llama", [](Tensors& tensors) {
    for (auto& item : tensors) item.second = item.second + 1;
  });
  const fs::path adapter = save_golden_adapter("llama", folder / "adapter");
  ASSERT_EQ(merge_message(model, {{adapter, 1}}, folder / "merged"), "");
  const Tensors base = tensors_of(model), found = tensors_of(folder / "merged");
  for (const auto& [name, delta] : deltas_of(adapter)) EXPECT_TRUE(found.at(name).equal(base.at(name) + delta)) << name;
}

// Llama of golden/ with one weight that float16 has not, in a norm that no adapter changes.
TEST(MergePromises, AnUnchangedTensorThatOverflowsInTheDtypeIsRefused) {
  const TemporaryFolder folder;
  const fs::path model = write_base(folder / "base", "llama", [](Tensors& tensors) {
    torch::Tensor& norm = tensors.at("model.norm.weight");
    norm = norm.clone();
    norm[3] = 1e5;
  });
  const fs::path adapter = save_golden_adapter("llama", folder / "adapter");
  const std::string message = merge_message(model, {{adapter, 1}}, folder / "half", "float16");
  expect_words("tensor 'model.norm.weight' would hold values that are not finite in Half; choose another --dtype",
               message);
  EXPECT_EQ(merge_message(model, {{adapter, 1}}, folder / "bfloat16", "bfloat16"), "");
}

TEST(MergePromises, WhatIsNotFiniteInTheBaseStaysAsItIs) {
  const TemporaryFolder folder;
  const std::string changed = "model.layers.0.self_attn.q_proj.weight";
  const fs::path model = write_base(folder / "base", "llama", [&](Tensors& tensors) {
    for (const std::string& name : {std::string("model.norm.weight"), changed}) {
      torch::Tensor& tensor = tensors.at(name);
      tensor = tensor.clone();
      tensor.view(-1)[0] = INFINITY;
      tensor.view(-1)[1] = NAN;
    }
  });
  const fs::path adapter = save_golden_adapter("llama", folder / "adapter");
  ASSERT_EQ(deltas_of(adapter).count(changed), 1U);
  for (const std::string dtype : {"", "bfloat16", "float16"}) {
    const fs::path out = folder / ("merged" + dtype);
    EXPECT_EQ(merge_message(model, {{adapter, 1}}, out, dtype), "") << dtype;
    if (!fs::exists(out)) continue;
    const Tensors found = tensors_of(out);
    for (const std::string& name : {std::string("model.norm.weight"), changed}) {
      const torch::Tensor tensor = found.at(name).to(torch::kFloat).view(-1);
      EXPECT_EQ(tensor[0].item<float>(), INFINITY) << name;
      EXPECT_TRUE(std::isnan(tensor[1].item<float>())) << name;
      EXPECT_TRUE(tensor.slice(0, 2).isfinite().all().item<bool>()) << name;
    }
  }
}

TEST(MergePromises, AnAdapterIsToldByItsFactorsNamesAndScales) {
  const TemporaryFolder folder;
  const auto model = load_model(model_golden("llama_linear_biases"));
  lora_rite::nn::LoraConfig config;
  config.bias = lora_rite::nn::LoraBias::LoraOnly;
  config.init = lora_rite::nn::LoraInit::Random;
  config.target_modules = std::vector<std::string>{"q_proj"};
  lora_rite::nn::inject_lora(*model, config);
  const lora_rite::Adapter adapter = lora_rite::nn::peft_adapter(*model);
  const auto save = [&](const char* name, const std::function<void(lora_rite::Adapter&)>& change) {
    lora_rite::Adapter other = adapter;
    change(other);
    lora_rite::save_adapter(folder / name, other);
    return folder / name;
  };
  const auto shift = [](const char* part) {
    return [part](lora_rite::Adapter& other) {
      for (auto& [name, tensor] : other.tensors) {
        if (name.find(part) != std::string::npos) tensor = tensor + 1;
      }
    };
  };
  const fs::path base = folder / "merged";
  ASSERT_EQ(merge_message(model_golden("llama_linear_biases"), {{save("first", [](auto&) {}), 1}}, base), "");
  // Its factors would be there twice, whatever its biases are.
  const fs::path biases = save("biases", shift(".bias"));
  ASSERT_NE(content_of(biases), content_of(folder / "first"));
  expect_words("was merged into", merge_message(base, {{biases, 1}}, folder / "twice"));
  EXPECT_EQ(merge_message(base, {{save("a", shift("lora_A")), 1}}, folder / "other"), "");
  const fs::path scaled = save("scale", [](auto& other) { other.config.lora_alpha *= 2; });
  EXPECT_EQ(merge_message(base, {{scaled, 1}}, folder / "scaled"), "");
}

TEST(MergePromises, OnlyNamedEndingsAreWeightsAndWhatIsLeftOutIsSaid) {
  const TemporaryFolder folder;
  const fs::path model = write_base(folder / "base", "llama", torch::kFloat);
  const fs::path adapter = save_golden_adapter("llama", folder / "adapter");
  const auto log_of = [&](const char* out) {
    std::ostringstream log;
    merge_adapters(merge_options(model, {{adapter, 1}}, folder / out), log);
    return log.str();
  };
  EXPECT_EQ(log_of("bare").find("left out"), std::string::npos) << "nothing was";
  // In the order of their names; docs/merge.md lists the endings.
  std::string left_out;
  for (const char* name :
       {"a.bin", "a.ckpt", "a.gguf", "a.h5", "a.msgpack", "a.nemo", "a.npz", "a.onnx", "a.onnx_data", "a.ot", "a.pt",
        "a.pth", "a.safetensors", "a.tflite", "adapter_config.json", "run.json", "tf_model.index.json"}) {
    write_bytes(model / name, name);
    left_out += (left_out.empty() ? "" : ", ") + std::string(name);
  }
  const std::vector<std::string> copied = {"a.model", "a.pkl", "a.py", "a.txt", "runs.json"};
  for (const std::string& name : copied) write_bytes(model / name, name);
  const std::string log = log_of("merged");
  expect_words("\nleft out what is none of the merged model's: " + left_out + "\n", log);
  std::vector<std::string> names;
  for (const auto& item : content_of(folder / "merged")) names.push_back(item.first);
  std::vector<std::string> expected = copied;
  expected.insert(expected.end(), {"config.json", "model.safetensors"});
  std::sort(expected.begin(), expected.end());
  EXPECT_EQ(names, expected);
}

}  // namespace
}  // namespace finetune
