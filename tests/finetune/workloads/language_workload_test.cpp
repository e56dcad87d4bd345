#include "workloads/language_workload.hpp"

#include <fstream>
#include <lora_rite/io/peft.hpp>
#include <lora_rite/nn/adapters.hpp>
#include <nlohmann/json.hpp>
#include <set>

#include "common/files.hpp"
#include "finetune/models/support.hpp"

namespace finetune {
namespace {

RunOptions llama_options() {
  RunOptions options;
  options.model = model_golden("llama").string();
  options.batch = 8;
  options.rank = 4;
  options.alpha = 4;
  return options;
}

// In place of Python and its tokenizer: every text is "Yes."
std::string write_yes_sayer(const std::filesystem::path& path) {
  std::ofstream(path) << "#!/bin/sh\nwhile read -r line; do echo '\"Yes.\"'; done <\"$5\" >\"$7\"\n";
  std::filesystem::permissions(path, std::filesystem::perms::owner_all);
  return path.string();
}

// The module names that have an adapter, in the order of the model.
std::vector<std::string> adapted(Workload& workload) {
  std::vector<std::string> names;
  for (const auto& [name, layer] : lora_rite::nn::lora_layers(workload.model())) {
    if (!layer->adapter_names().empty()) names.push_back(name);
  }
  return names;
}

// A file as prepare_tasks.py writes it.
std::string write_texts(const std::filesystem::path& path, const std::vector<TextRecord>& records) {
  std::ofstream file(path);
  file << R"({"format":"finetune-tasks 1","task":"gsm8k","kind":"text","encoder_decoder":false})" << '\n';
  for (const TextRecord& record : records) {
    file << nlohmann::json{{"prompt", record.prompt}, {"completion", record.completion}, {"references", {"yes"}}}
         << '\n';
  }
  return path.string();
}

std::string write_choices(const std::filesystem::path& path) {
  std::ofstream(path) << R"({"format":"finetune-tasks 1","task":"arc","kind":"choices","encoder_decoder":false})"
                      << '\n'
                      << R"({"prompts":[[5,6]],"choices":[[7],[8,9]],"characters":[1,2],"bytes":[1,2],"answer":1})"
                      << '\n';
  return path.string();
}

TEST(LanguageWorkload, ItsLossIsThatOfTheCompletionsWhateverTheParts) {
  LanguageWorkload workload(llama_options(), load_model(model_golden("llama")), tiny_language_data());
  const std::vector<TextRecord> records = tiny_texts(45, 1);
  const std::vector<int64_t> examples = {3, 1, 4};
  int64_t completion = 0, all = 0;
  for (const int64_t index : examples) {
    completion += static_cast<int64_t>(records[index].completion.size());
    all += static_cast<int64_t>(records[index].prompt.size() + records[index].completion.size());
  }
  EXPECT_EQ(workload.weight(examples), completion);
  EXPECT_EQ(workload.tokens(examples), all);
  double parts = 0;
  for (const int64_t index : examples) parts += workload.loss_sum({index}).item<double>();
  EXPECT_NEAR(workload.loss_sum(examples).item<double>(), parts, 1e-6 * parts);
}

TEST(LanguageWorkload, AnEpochTakesEveryExampleOnce) {
  LanguageWorkload workload(llama_options(), load_model(model_golden("llama")), tiny_language_data());
  std::multiset<int64_t> taken;
  for (int64_t step = 0; step < 6; ++step) {
    for (const int64_t index : workload.examples_of(step)) taken.insert(index);
  }
  EXPECT_EQ(taken.size(), 45U);
  EXPECT_EQ(std::set<int64_t>(taken.begin(), taken.end()).size(), 45U);
}

TEST(LanguageWorkload, AdaptersGoWhereTheOptionsSay) {
  const auto targets = [](const std::string& target, const std::string& exclude = "") {
    RunOptions options = llama_options();
    options.target_modules = target;
    options.exclude_modules = exclude;
    LanguageWorkload workload(options, load_model(model_golden("llama")), tiny_language_data());
    return adapted(workload);
  };
  const auto every = targets("");
  EXPECT_EQ(every.size(), 14U) << "seven in each of two layers, and not the output head";
  EXPECT_EQ(targets("all-linear"), every);
  EXPECT_EQ(targets("q_proj,o_proj", "re:.*layers\\.0\\..*"),
            (std::vector<std::string>{"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.o_proj"}));
  EXPECT_EQ(targets("re:.*1\\.mlp\\.(up|down)_proj"),
            (std::vector<std::string>{"model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"}));
  EXPECT_NE(error_of([&] { targets("q_proj,,v_proj"); }).find("has an empty name"), std::string::npos);
  EXPECT_NE(error_of([&] { targets("", "all-linear"); }).find("would leave no layer"), std::string::npos);
  EXPECT_THROW(targets("dense"), c10::Error);
}

TEST(LanguageWorkload, EveryStartLeavesTheModelAsItWas) {
  const auto loss = [](const std::string& init, bool rslora) {
    RunOptions options = llama_options();
    options.init = init;
    options.rslora = rslora;
    LanguageWorkload workload(options, load_model(model_golden("llama")), tiny_language_data());
    const auto layers = lora_rite::nn::lora_layers(workload.model());
    const auto* layer = layers[1].layer;  // the first one is the embedding
    EXPECT_EQ(layer->adapter("default").config.scale(), rslora ? 2 : 1);
    const bool draws_both = init == "orthogonal" || init == "pissa";
    EXPECT_EQ(layer->adapter("default").b.count_nonzero().item<int64_t>() > 0, draws_both) << init;
    return workload.loss_sum({0, 1, 2}).item<double>();
  };
  const double usual = loss("kaiming", false);
  for (const std::string& init : init_names()) {
    // A weight of about 0.1 loses a product and gets it back: two round-offs of 6e-8 each, over two layers.
    EXPECT_NEAR(loss(init, false), usual, 1e-5 * usual) << init;
  }
  EXPECT_NEAR(loss("gaussian", true), usual, 1e-6 * usual);
}

TEST(LanguageWorkload, OptionsOfClassifiersAreRefused) {
  const auto message = [](const std::function<void(RunOptions&)>& change) {
    RunOptions options = llama_options();
    change(options);
    return error_of(
        [&] { LanguageWorkload workload(options, load_model(model_golden("llama")), tiny_language_data()); });
  };
  EXPECT_EQ(message([](RunOptions& options) { options.head_lr = 1; }).find("--head-lr: a language model has no"), 0U);
  EXPECT_EQ(message([](RunOptions& options) { options.max_length = 5; }).find("--max-length: a language model"), 0U);
}

TEST(LanguageWorkload, IsMadeOfTheRunsFilesAndMeasuredByWhatTheyHold) {
  const TemporaryFolder folder;
  RunOptions options = llama_options();
  options.out = folder.string();
  options.train = write_texts(folder / "train.jsonl", tiny_texts(10, 1));
  options.validation = write_choices(folder / "validation.jsonl");
  const auto workload = make_workload(options, {});
  EXPECT_EQ(workload->title(), "10 examples of gsm8k");
  EXPECT_TRUE(workload->has(Split::Validation));
  EXPECT_FALSE(workload->has(Split::Test));
  EXPECT_EQ(workload->headline().score, "acc");
  EXPECT_TRUE(workload->headline().higher_is_better);
  const Scores choices = workload->evaluate(Split::Validation, {});
  EXPECT_EQ(choices.front().first, "acc");
  EXPECT_TRUE(choices.front().second == 0 || choices.front().second == 1);

  options.validation = write_texts(folder / "validation.jsonl", tiny_texts(5, 2));
  const auto other = make_workload(options, {});
  EXPECT_EQ(other->headline().score, "loss");
  EXPECT_FALSE(other->headline().higher_is_better);
  const Scores texts = other->evaluate(Split::Validation, {});
  EXPECT_NEAR(score_of(texts, "perplexity"), std::exp(score_of(texts, "loss")), 1e-9);

  options.memory_limit = 1e-5;
  EXPECT_NE(error_of([&] { make_workload(options, {}); }).find("the run needs about"), std::string::npos);
  options.memory_limit = 0;
  options.test = options.validation;
  options.generate = 3;
  options.out = folder.string();
  options.python = write_yes_sayer(folder / "python3");
  EXPECT_NO_THROW(make_workload(options, {}));
  options.python = "/nowhere/python3";
  EXPECT_NE(error_of([&] { make_workload(options, {}); }).find("decoding failed"), std::string::npos)
      << "found out before the training";
  options.test = write_choices(folder / "test.jsonl");
  EXPECT_NE(error_of([&] { make_workload(options, {}); }).find("has choices, after which there is nothing to write"),
            std::string::npos);
  std::filesystem::create_directory(folder / "gpt");
  std::ofstream(folder / "gpt" / "config.json") << R"({"model_type":"gpt2"})";
  options.model = (folder / "gpt").string();
  EXPECT_NE(error_of([&] { make_workload(options, {}); }).find("'model_type' is 'gpt2', but only bert and llama"),
            std::string::npos);
}

TEST(LanguageWorkload, WhatItWritesIsScoredToo) {
  const TemporaryFolder folder;
  RunOptions options = llama_options();
  options.out = folder.string();
  options.python = write_yes_sayer(folder / "python3");
  options.generate = 3;
  LanguageWorkload workload(options, load_model(model_golden("llama")), tiny_language_data());
  const Scores scores = workload.evaluate(Split::Test, {});
  EXPECT_EQ(score_of(scores, "exact_match"), 1) << "but for case and punctuation it is the reference";
  EXPECT_EQ(score_of(scores, "rouge_l"), 1);
  EXPECT_EQ(score_of(scores, "strict_number"), 0);
  EXPECT_GT(score_of(scores, "loss"), 0);
}

TEST(LanguageWorkload, TheAdapterIsWrittenAsPeftDoes) {
  for (const auto& [name, task] : {std::pair("llama", "CAUSAL_LM"), std::pair("t5", "SEQ_2_SEQ_LM")}) {
    const TemporaryFolder folder;
    RunOptions options = llama_options();
    options.model = model_golden(name).string();
    LanguageWorkload workload(options, load_model(options.model), tiny_language_data());
    workload.save(folder.string());
    const lora_rite::Adapter adapter = lora_rite::load_adapter(folder.string());
    EXPECT_EQ(adapter.config.task_type, task);
    EXPECT_EQ(adapter.config.base_model_name_or_path, options.model);
    EXPECT_EQ(adapter.config.r, 4);
    EXPECT_EQ(adapter.tensors.size(), 2 * adapted(workload).size());
  }
}

}  // namespace
}  // namespace finetune
