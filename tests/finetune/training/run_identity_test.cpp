// What a run is, and that it goes on with nothing else.

#include "training/run_identity.hpp"

#include <ATen/Parallel.h>

#include <csignal>
#include <lora_rite/checkpoint.hpp>
#include <set>
#include <sstream>

#include "common/files.hpp"
#include "finetune/commands/support.hpp"
#include "training/optimizers.hpp"

namespace finetune {
namespace {

namespace fs = std::filesystem;

TEST(Fingerprint, NoticesEveryBitAndEveryByteMore) {
  std::string bytes(27, 'x');
  const auto value = [&] {
    Fingerprint fingerprint;
    fingerprint.add(bytes);
    return fingerprint.value();
  };
  std::set<uint64_t> seen = {value()};
  for (char& byte : bytes) {
    for (int bit = 0; bit < 8; ++bit) {
      byte = static_cast<char>(byte ^ (1 << bit));
      EXPECT_TRUE(seen.insert(value()).second);
      byte = static_cast<char>(byte ^ (1 << bit));
    }
  }
  bytes.push_back('\0');
  EXPECT_TRUE(seen.insert(value()).second);
}

TEST(Fingerprint, NoticesNumbersWithTheSignChanged) {
  const auto value = [](std::vector<float> numbers) {
    Fingerprint fingerprint;
    fingerprint.add_bytes(numbers.data(), numbers.size() * sizeof(float));
    return fingerprint.value();
  };
  EXPECT_NE(value({1, 2, 3, 4}), value({1, -2, 3, -4})) << "the highest bits of two words";
  EXPECT_NE(value({1, 2, 3, 4}), value({3, 4, 1, 2}));
}

// The content of one part.
std::string content_of_part(const RunIdentity& identity, const std::string& name) {
  for (const RunPart& part : identity) {
    if (part.name == name) return part.content;
  }
  ADD_FAILURE() << "no part " << name;
  return {};
}

TEST(RunIdentity, OfWeightsIsTheSameForAnyNumberOfThreadsAndOtherForOtherPieces) {
  const TemporaryFolder folder;
  lora_rite::test::write_bytes(folder / "config.json", "{}");
  torch::nn::Linear large(1024, 1024);  // of four pieces
  const auto weights = [&] { return content_of_part(base_identity(*large, folder.string()), "base weights"); };
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const std::string alone = weights();
  at::set_num_threads(3);
  EXPECT_EQ(weights(), alone);
  at::set_num_threads(threads);
  const torch::NoGradGuard no_grad;
  const torch::Tensor first = large->weight.slice(0, 0, 256).clone();
  large->weight.slice(0, 0, 256).copy_(large->weight.slice(0, 256, 512));
  large->weight.slice(0, 256, 512).copy_(first);
  EXPECT_NE(weights(), alone);
}

TEST(RunIdentity, OfABaseDependsOnNeitherItsPlaceNorItsFiles) {
  const TemporaryFolder folder;
  fs::copy(model_golden("llama"), folder / "moved");
  const auto identity = [](const fs::path& path) { return lines_of(base_identity(*load_model(path), path)); };
  const std::string expected = identity(model_golden("llama"));
  EXPECT_EQ(identity(folder / "moved"), expected);

  // The same tensors in two files, the same config with other spaces and another note of who wrote it.
  const Tensors tensors = load_safetensors(folder / "moved/model.safetensors").tensors;
  Tensors parts[2];
  nlohmann::json map;
  for (const auto& [name, tensor] : tensors) {
    const size_t part = parts[0].size() > parts[1].size();
    parts[part].emplace(name, tensor);
    map[name] = concat("part", part, ".safetensors");
  }
  for (const int part : {0, 1}) save_safetensors(folder / concat("moved/part", part, ".safetensors"), parts[part]);
  fs::remove(folder / "moved/model.safetensors");
  write_json(folder / "moved/model.safetensors.index.json", {{"weight_map", map}});
  nlohmann::json config = read_json(folder / "moved/config.json");
  config["transformers_version"] = "99.0.0";
  lora_rite::test::write_bytes(folder / "moved/config.json", config.dump(7));
  EXPECT_EQ(identity(folder / "moved"), expected);
}

// A run of a tiny model, with all that it is begun with at hand to be changed.
struct Begun {
  RunOptions options;
  LanguageData texts = tiny_language_data(/*with_validation=*/true);
  TaskData sentences = tiny_task(/*with_validation=*/true);
  std::function<void(torch::nn::Module&)> edit_base = [](torch::nn::Module&) {};

  bool is_classifier() const { return read_json(fs::path(options.model) / "config.json")["model_type"] == "bert"; }

  std::unique_ptr<Workload> workload() const {
    const torch::NoGradGuard no_grad;
    if (is_classifier()) {
      const auto base = load_bert(options.model);
      edit_base(*base);
      return std::make_unique<SentenceWorkload>(options, base, sentences);
    }
    const auto base = load_model(options.model);
    edit_base(*base);
    return std::make_unique<LanguageWorkload>(options, base, texts);
  }

  // Trains until `last`; returns what was shown, or the message.
  std::string run(Start start, int64_t last) const {
    std::ostringstream out;
    const auto stop = [&](const StepRecord& record) {
      if (record.step == last) std::raise(SIGINT);
    };
    const auto built = workload();
    const std::string message = message_of([&] { run_training(options, *built, start, {out, false, stop}); });
    return message.empty() ? out.str() : message;
  }
};

const std::vector<std::string> kParts = {
    "base weights: ", "config.json: ",   "generation_config.json: ", "tokenizer: ",
    "class names: ",  "training data: ", "validation data: ",        "test data: "};

class OtherRun : public testing::Test {
 protected:
  Begun begin(const fs::path& model) {
    fs::remove_all(folder / "base");
    fs::remove_all(folder / "run");
    fs::copy(model, folder / "base");
    fs::create_directories(folder / "run");
    lora_rite::test::write_bytes(folder / "base/tokenizer.json", R"({"version":"1.0"})");
    Begun begun;
    begun.options = tiny_options((folder / "run").string(), "rite");
    begun.options.model = (folder / "base").string();
    begun.options.train = "/data/train";
    begun.options.validation = "/data/validation";
    begun.options.test = "/data/test";
    begun.options.steps = 6;
    EXPECT_EQ(begun.run(Start::Anew, 2).find("error"), std::string::npos);
    return begun;
  }

  // That a run with this change is told this of this part alone, and that nothing in its folder is changed.
  void expect_refused(const Begun& begun, const std::function<void(Begun&)>& change, const std::string& expected) {
    SCOPED_TRACE(expected);
    Begun other = begun;
    change(other);
    const auto before = content_of(folder / "run");
    const std::string message = other.run(Start::Resume, 4);
    EXPECT_EQ(message.find(folder.string() + "/run/checkpoint.pt: the run was begun with something else (" + expected),
              0U)
        << message;
    EXPECT_NE(message.find("by --resume-anyway"), std::string::npos) << message;
    size_t named = 0;
    for (const std::string& part : kParts) {
      named += message.find("(" + part) != std::string::npos || message.find("; " + part) != std::string::npos;
    }
    EXPECT_EQ(named, 1U) << message;
    EXPECT_TRUE(content_of(folder / "run") == before);
  }

  // A file of the base for as long as a test needs another one.
  void expect_file_refused(const Begun& begun, const char* name, const std::string& bytes, const char* expected) {
    const std::string good = read_file(folder / "base" / name);
    lora_rite::test::write_bytes(folder / "base" / name, bytes);
    expect_refused(
        begun, [](Begun&) {}, expected);
    lora_rite::test::write_bytes(folder / "base" / name, good);
  }

  TemporaryFolder folder;
};

void negate_one_weight(torch::nn::Module& base) { base.parameters().back().view(-1)[3].neg_(); }

TEST_F(OtherRun, OfALanguageModelIsRefusedByThePartThatDiffers) {
  const Begun begun = begin(model_golden("llama"));
  expect_refused(
      begun, [](Begun& run) { ++run.texts.train[3].completion[0]; }, "training data: 45 examples of fingerprint ");
  expect_refused(
      begun, [](Begun& run) { run.texts.train.pop_back(); }, "training data: 45 examples of fingerprint ");
  expect_refused(
      begun, [](Begun& run) { run.texts.validation = {}; }, "validation data: 20 examples of fingerprint ");
  expect_refused(
      begun, [](Begun& run) { run.texts.test.texts[1].references = {"no"}; }, "test data: 20 examples of fingerprint ");
  expect_refused(
      begun, [](Begun& run) { run.edit_base = negate_one_weight; }, "base weights: ");
  nlohmann::json config = read_json(folder / "base/config.json");
  config["rms_norm_eps"] = 1e-3;
  expect_file_refused(begun, "config.json", config.dump(), "config.json: fields of fingerprint ");
  lora_rite::test::write_bytes(folder / "base/generation_config.json", R"({"eos_token_id":7})");
  expect_refused(
      begun, [](Begun&) {}, "generation_config.json: no file then, fields of fingerprint ");
  fs::remove(folder / "base/generation_config.json");
  expect_file_refused(begun, "tokenizer.json", R"({"version":"1.1"})", "tokenizer: 17 bytes of fingerprint ");
  fs::rename(folder / "base/tokenizer.json", folder / "tokenizer.json");
  expect_refused(
      begun, [](Begun&) {}, "tokenizer: 17 bytes of fingerprint ");
  fs::rename(folder / "tokenizer.json", folder / "base/tokenizer.json");

  Begun moved = begun;
  fs::rename(folder / "base", folder / "moved");
  moved.options.model = (folder / "moved").string();
  moved.options.train = "/elsewhere/train";
  const std::string shown = moved.run(Start::Resume, -1);
  EXPECT_NE(shown.find("6/6"), std::string::npos) << shown;
  EXPECT_EQ(shown.find("begun"), std::string::npos) << shown;
}

TEST_F(OtherRun, OfAClassifierIsRefusedByThePartThatDiffers) {
  const Begun begun = begin(golden("tiny"));
  expect_refused(
      begun, [](Begun& run) { run.sentences.train.labels[3] ^= 1; }, "training data: 50 examples of fingerprint ");
  expect_refused(
      begun, [](Begun& run) { run.sentences.test.tokens[0].push_back(9); }, "test data: 150 examples of fingerprint ");
  expect_refused(
      begun,
      [](Begun& run) {
        run.sentences.classes = {"neg", "pos"};
      },
      "class names: 2 of fingerprint ");
  expect_refused(
      begun, [](Begun& run) { run.edit_base = negate_one_weight; }, "base weights: ");
  expect_file_refused(begun, "tokenizer.json", "{}", "tokenizer: 17 bytes of fingerprint ");
  EXPECT_NE(begun.run(Start::Resume, -1).find("6/6"), std::string::npos);
}

TEST_F(OtherRun, OfAPissaStartIsToldByTheBaseAsItIsInItsFiles) {
  Begun begun = begin(model_golden("llama"));
  begun.options.init = "pissa";
  begun.run(Start::Anew, 2);
  expect_refused(
      begun, [](Begun& run) { run.edit_base = negate_one_weight; }, "base weights: ");
  EXPECT_NE(begun.run(Start::Resume, -1).find("6/6"), std::string::npos);
}

TEST_F(OtherRun, GoesOnAnywayIfAskedSaysWhatDiffersAndRemembersIt) {
  const Begun begun = begin(model_golden("llama"));
  Begun other = begun;
  other.texts.train.pop_back();
  const std::string shown = other.run(Start::ResumeAnyway, 3);
  EXPECT_NE(shown.find("checkpoint.pt: goes on with something else than it was begun with: training data: 45 examples"),
            std::string::npos)
      << shown;
  EXPECT_NE(shown.find(" now in /data/train"), std::string::npos) << shown;
  EXPECT_EQ(other.run(Start::Resume, 4).find("begun"), std::string::npos) << "it is that run now";
  EXPECT_NE(begun.run(Start::Resume, 5).find("the run was begun with something else"), std::string::npos);
  EXPECT_EQ(other.run(Start::ResumeAnyway, -1).find("begun"), std::string::npos) << "nothing differs";
}

TEST_F(OtherRun, OfBeforeThatWasRememberedIsTakenAndSaidToBeOne) {
  const Begun begun = begin(model_golden("llama"));
  {  // its checkpoint, without what it was begun with
    const auto workload = begun.workload();
    const TrainingOptimizer training = make_optimizer(begun.options, workload->model());
    const auto scheduler = make_scheduler(begun.options, *training.optimizers[0]);
    lora_rite::TrainingState state;
    state.tensors = lora_rite::trained_tensors(workload->model());
    state.optimizers = {training.optimizers[0].get()};
    state.others = {scheduler.get()};
    lora_rite::load_checkpoint(folder / "run/checkpoint.pt", state);
    EXPECT_FALSE(compare(workload->identity(), state.values).is_unknown);
    const auto first = state.values.lower_bound("begun with: "), last = state.values.lower_bound("begun with; ");
    state.values.erase(first, last);
    EXPECT_TRUE(compare(workload->identity(), state.values).is_unknown);
    lora_rite::save_checkpoint(folder / "run/checkpoint.pt", state);
  }
  const std::string shown = begun.run(Start::Resume, 3);
  EXPECT_NE(shown.find("checkpoint.pt: does not say what the run was begun with"), std::string::npos) << shown;
  EXPECT_EQ(begun.run(Start::Resume, -1).find("does not say"), std::string::npos) << "now it does";
}

}  // namespace
}  // namespace finetune
