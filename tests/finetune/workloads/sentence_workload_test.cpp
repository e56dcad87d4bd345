#include "workloads/sentence_workload.hpp"

#include <lora_rite/io/peft.hpp>
#include <lora_rite/nn/nn.hpp>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>

#include "common/files.hpp"
#include "finetune/support.hpp"

namespace finetune {
namespace {

// The tiny model's run with the adapter that PEFT wrote, for whose file rank and alpha are those of
// golden/tiny_adapter.
std::unique_ptr<SentenceWorkload> adapted_workload() {
  RunOptions options;
  options.model = "tiny";
  options.rank = 3;
  options.alpha = 6;
  auto workload = std::make_unique<SentenceWorkload>(options, load_bert(golden("tiny")), tiny_task());
  lora_rite::nn::load_adapter_state(workload->model().bert(), lora_rite::load_adapter(golden("tiny_adapter")).tensors);
  return workload;
}

TEST(SentenceWorkload, AnAdapterOfPeftActsHereAsItDoesThere) {
  const Safetensors expected = load_safetensors(golden("tiny_adapter/expected.safetensors"));
  const Safetensors base = load_safetensors(golden("tiny/expected.safetensors"));
  EXPECT_GT(distance(base.tensors.at("pooled"), expected.tensors.at("pooled")), 0.1) << "the adapter has an effect";
  const torch::Tensor mask = expected.tensors.at("mask");
  const torch::Tensor hidden = adapted_workload()->model().bert().forward(expected.tensors.at("tokens"), mask);
  EXPECT_LT(distance(mean_pool(hidden, mask), expected.tensors.at("pooled")), 1e-5);
}

TEST(SentenceWorkload, TheFileWrittenIsTheOnePeftWrites) {
  const TemporaryFolder folder;
  adapted_workload()->save(folder.string());

  const Safetensors ours = load_safetensors(folder / "adapter_model.safetensors");
  const Safetensors theirs = load_safetensors(golden("tiny_adapter/adapter_model.safetensors"));
  EXPECT_EQ(ours.metadata, theirs.metadata);
  ASSERT_EQ(ours.tensors.size(), theirs.tensors.size());
  for (const auto& [name, tensor] : theirs.tensors) {
    ASSERT_EQ(ours.tensors.count(name), 1U) << name;
    EXPECT_TRUE(ours.tensors.at(name).equal(tensor)) << name;
  }
}

TEST(SentenceWorkload, EveryFieldOfTheDescriptionEqualsPefts) {
  const TemporaryFolder folder;
  adapted_workload()->save(folder.string());
  const nlohmann::json ours = read_json(folder / "adapter_config.json");
  const nlohmann::json theirs = read_json(golden("tiny_adapter/adapter_config.json"));
  for (const auto& [name, value] : ours.items()) {
    ASSERT_TRUE(theirs.contains(name)) << name;
    if (name == "target_modules") {
      EXPECT_EQ(value.get<std::set<std::string>>(), theirs[name].get<std::set<std::string>>());
    } else {
      EXPECT_EQ(value, theirs[name]) << name;
    }
  }
}

TEST(SentenceWorkload, TheHeadCarriesItsClassNames) {
  const TemporaryFolder folder;
  const SentenceClassifier model(load_bert(golden("tiny")), 3);
  auto& head = const_cast<SentenceClassifier&>(model).head();
  save_head(folder / "head.safetensors", head, {"bad", "good", "so\tso"});
  const Safetensors file = load_safetensors(folder / "head.safetensors");
  EXPECT_TRUE(file.tensors.at("weight").equal(head.weight));
  EXPECT_TRUE(file.tensors.at("bias").equal(head.bias));
  EXPECT_EQ(nlohmann::json::parse(file.metadata.at("labels")), (nlohmann::json{"bad", "good", "so\tso"}));
}

TEST(SentenceWorkload, OptionsOfLanguageModelsAreRefused) {
  const auto message = [](const std::function<void(RunOptions&)>& change) {
    RunOptions options;
    change(options);
    return error_of([&] { SentenceWorkload workload(options, load_bert(golden("tiny")), tiny_task()); });
  };
  EXPECT_EQ(message([](RunOptions& options) { options.generate = 5; }).find("--generate: a sentence classifier"), 0U);
  EXPECT_EQ(message([](RunOptions& options) { options.dtype = "bfloat16"; }).find("--dtype: a sentence"), 0U);
  EXPECT_EQ(message([](RunOptions& options) { options.gradient_checkpointing = true; }).find("--gradient-check"), 0U);
}

}  // namespace
}  // namespace finetune
