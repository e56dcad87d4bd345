// The table of docs/merge.md that says what merge refuses, as far as no other test holds it.

#include "commands/merge.hpp"

#include <lora_rite/io/peft.hpp>
#include <lora_rite/io/safetensors.hpp>
#include <sstream>

#include "support.hpp"

namespace finetune {
namespace {

namespace fs = std::filesystem;
using lora_rite::test::write_bytes;

TEST(MergeRefusals, AHeadThatTheBaseHasNot) {
  const TemporaryFolder folder;
  lora_rite::Adapter adapter = lora_rite::load_adapter(save_golden_adapter("llama", folder / "plain"));
  adapter.config.modules_to_save = std::vector<std::string>{"score"};
  adapter.tensors["score.weight"] = torch::ones({2, 16});
  lora_rite::save_adapter(folder / "adapter", adapter);
  expect_words("brings 'score.weight', which",
               merge_message(model_golden("llama"), {{folder / "adapter", 1}}, folder / "merged"));
}

TEST(MergeRefusals, AnOutputOfAnotherVocabulary) {
  const TemporaryFolder folder;
  lora_rite::Adapter adapter = lora_rite::load_adapter(save_golden_adapter("llama", folder / "plain"));
  adapter.config.modules_to_save = std::vector<std::string>{"lm_head"};
  adapter.tensors["lm_head.weight"] = torch::ones({50, 16});  // 48 in the base
  lora_rite::save_adapter(folder / "adapter", adapter);
  const std::string message = merge_message(model_golden("llama"), {{folder / "adapter", 1}}, folder / "merged");
  expect_words("tensor 'lm_head.weight' has shape [48, 16], but the adapter's module that was trained whole [50, 16]",
               message);
  expect_words("or one with another vocabulary", message);
}

TEST(MergeRefusals, ATiedMatrixInACheckpointWithoutAHead) {
  const TemporaryFolder folder;
  Tensors tensors;
  for (const auto& [name, tensor] : lora_rite::load_sharded(model_golden("llama_tied_llama3")).tensors) {
    ASSERT_EQ(name.rfind("model.", 0), 0U) << name;
    tensors[name.substr(std::string("model.").size())] = tensor;
  }
  write_model(folder / "base", read_json(model_golden("llama_tied_llama3") / "config.json"), tensors);
  for (const char* name : {"tied_embedding", "tied_output"}) {
    expect_words("in a checkpoint without a head",
                 merge_message(folder / "base", {{golden("peft") / name, 1}}, folder / "merged"));
  }
  // An adapter of other layers finds them under these names.
  const fs::path other = save_golden_adapter("llama_tied_llama3", folder / "other");
  EXPECT_EQ(merge_message(folder / "base", {{other, 1}}, folder / "merged"), "");
}

TEST(MergeRefusals, EmbeddingsOfAT5WhoseOutputIsItsOwn) {
  for (const char* base : {"t5_gated", "mt5"}) {
    for (const char* module : {"encoder.embed_tokens", "decoder.embed_tokens", "shared"}) {
      const TemporaryFolder folder;
      const auto shape = lora_rite::load_sharded(model_golden(base)).tensors.at("shared.weight").sizes().vec();
      lora_rite::Adapter adapter;
      adapter.config.r = 2;
      adapter.tensors[module + std::string(".lora_embedding_A")] = torch::ones({2, shape[0]});
      adapter.tensors[module + std::string(".lora_embedding_B")] = torch::ones({shape[1], 2});
      lora_rite::save_adapter(folder / "adapter", adapter);
      expect_words("uses one matrix for the embeddings of encoder and decoder, and readers",
                   merge_message(model_golden(base), {{folder / "adapter", 1}}, folder / "merged"));
    }
  }
}

// Copies of the tiny BERT's adapter that differ in their factors, with the heads `first` and `second` (none if empty).
struct Heads {
  Heads(const std::string& own, const std::string& first, const std::string& second) {
    fs::create_directories(folder / "base");
    for (const char* name : {"config.json", "model.safetensors"}) {
      fs::copy_file(golden("tiny") / name, folder / "base" / name);
    }
    lora_rite::Adapter adapter = lora_rite::load_adapter(golden("tiny_adapter"));
    lora_rite::save_adapter(folder / "first", adapter);
    adapter.config.lora_alpha *= 2;
    lora_rite::save_adapter(folder / "second", adapter);
    const std::pair<const char*, std::string> heads[] = {{"base", own}, {"first", first}, {"second", second}};
    for (const auto& [name, head] : heads) {
      if (!head.empty()) write_bytes(folder / name / "head.safetensors", head);
    }
  }

  // Of the two adapters with these weights; 0: without it. The head of the result, or what was refused.
  std::string merge(double first, double second) {
    std::vector<WeightedAdapter> adapters;
    if (first != 0) adapters.push_back({folder / "first", first});
    if (second != 0) adapters.push_back({folder / "second", second});
    const std::string message = merge_message(folder / "base", adapters, folder / "merged");
    return message.empty() ? lora_rite::test::read_bytes(folder / "merged/head.safetensors") : message;
  }

  TemporaryFolder folder;
};

TEST(MergeRefusals, HeadsThatDifferHaveNoSum) {
  expect_words("second/head.safetensors: is another head than", Heads("", "a", "b").merge(1, 1));
  expect_words("heads replace the base's and have no sum", Heads("base", "a", "b").merge(1, 1));
  EXPECT_EQ(Heads("base", "a", "a").merge(1, 1), "a") << "identical ones are one";
  EXPECT_EQ(Heads("base", "a", "").merge(1, 1), "a");
  EXPECT_EQ(Heads("base", "base", "b").merge(1, 1), "b") << "a copy of the base's is dropped";
}

TEST(MergeRefusals, AHeadHasNoShare) {
  expect_words("first/head.safetensors: a head replaces the base's and has no share, but the adapter's weight is 0.5",
               Heads("", "a", "").merge(0.5, 0));
  expect_words("has no share", Heads("base", "a", "").merge(0.5, 1));
  EXPECT_EQ(Heads("base", "a", "").merge(1, 0.5), "a");
  EXPECT_EQ(Heads("base", "base", "").merge(0.5, 0), "base") << "a copy of the base's is dropped";
}

TEST(MergeRefusals, AnAdaptersHeadCountsBeforeTheBases) {
  EXPECT_EQ(Heads("base", "adapter's", "").merge(1, 0), "adapter's");
  EXPECT_EQ(Heads("base", "adapter's", "").merge(0, 1), "base");
}

}  // namespace
}  // namespace finetune
