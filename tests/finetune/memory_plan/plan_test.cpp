#include "memory_plan/plan.hpp"

#include <torch/nn/functional/loss.h>

#include <fstream>
#include <lora_rite/baselines/registry.hpp>
#include <lora_rite/nn/nn.hpp>
#include <nlohmann/json.hpp>
#include <numeric>
#include <set>
#include <sstream>
#include <utility>

#include "data/batches.hpp"
#include "finetune/models/support.hpp"
#include "memory_plan/machine.hpp"
#include "models/classifier.hpp"
#include "support/counting_allocator.hpp"

namespace finetune {
namespace {

double bytes_of(const MemoryPlan& plan, const std::string& beginning) {
  double bytes = 0;
  for (const auto& [name, part] : plan.parts) {
    if (name.rfind(beginning, 0) == 0) bytes += part;
  }
  return bytes;
}

// What tensors hold; one that stands there twice counts once.
double bytes_of(const std::vector<torch::Tensor>& tensors) {
  double bytes = 0;
  std::set<const void*> seen;
  for (const torch::Tensor& tensor : tensors) {
    if (seen.insert(tensor.data_ptr()).second) bytes += static_cast<double>(tensor.nbytes());
  }
  return bytes;
}

std::vector<torch::Tensor> trained_or_not(const torch::nn::Module& module, bool trained) {
  std::vector<torch::Tensor> found;
  for (const torch::Tensor& parameter : module.parameters()) {
    if (parameter.requires_grad() == trained) found.push_back(parameter);
  }
  return found;
}

MemoryQuestion question_of(const std::filesystem::path& folder, int64_t rank = 4) {
  MemoryQuestion question;
  question.model = folder;
  question.lora.target_modules = "all-linear";
  question.lora.rank = rank;
  question.rows = 4;
  question.length = 48;
  question.completion = 12;
  return question;
}

TEST(Memory, WeightsFactorsAndGradientsAreCountedExactly) {
  std::vector<std::string> names = model_names();
  names.push_back("llama_sharded");
  for (const auto dtype : {torch::kFloat, torch::kBFloat16}) {
    for (const std::string& name : names) {
      MemoryQuestion question = question_of(model_golden(name));
      question.dtype = dtype;
      if (name == "gemma2") question.lora.target_modules = std::vector<std::string>{"q_proj", "down_proj"};
      const MemoryPlan plan = plan_memory(question);

      const auto model = load_model(question.model, dtype);
      EXPECT_EQ(bytes_of(plan, "base weights"), bytes_of(model->parameters())) << name << '\n' << plan.text();
      lora_rite::nn::inject_lora(*model, question.lora);
      const auto factors = trained_or_not(*model, true);
      EXPECT_EQ(bytes_of(plan, "factors"), bytes_of(factors)) << name << '\n' << plan.text();
      std::vector<torch::Tensor> gradients;
      for (const torch::Tensor& factor : factors) gradients.push_back(torch::zeros_like(factor));
      EXPECT_EQ(bytes_of(plan, "their gradients"), bytes_of(gradients)) << name;
      EXPECT_EQ(plan.total(), bytes_of(plan, "")) << name;
    }
  }
}

TEST(Memory, AClassifierIsInFloatAndHasAHead) {
  MemoryQuestion question = question_of(golden("tiny"));
  question.dtype = torch::kBFloat16;
  question.classes = 3;
  const MemoryPlan plan = plan_memory(question);
  SentenceClassifier model(load_bert(golden("tiny")), 3);
  const double head = bytes_of(model.head().parameters());
  EXPECT_EQ(bytes_of(plan, "base weights"), bytes_of(model.bert().parameters()));
  EXPECT_EQ(bytes_of(plan, "head"), 4 * head);  // with its gradient and Adam's two moments
  lora_rite::nn::inject_lora(model.bert(), question.lora);
  EXPECT_EQ(bytes_of(plan, "factors"), bytes_of(trained_or_not(model.bert(), true)));
}

// What is remembered; LibTorch also writes the number of groups and parameters as tensors.
double saved_bytes(torch::serialize::InputArchive& archive) {
  double bytes = 0;
  for (const std::string& key : archive.keys()) {
    if (key == "param_groups") continue;
    torch::Tensor tensor;
    torch::serialize::InputArchive nested;
    if (archive.try_read(key, tensor) || archive.try_read(key, tensor, /*is_buffer=*/true)) {
      bytes += static_cast<double>(tensor.nbytes());
    } else if (archive.try_read(key, nested)) {
      bytes += saved_bytes(nested);
    }
  }
  return bytes;
}

double saved_bytes(const torch::optim::Optimizer& optimizer) {
  torch::serialize::OutputArchive saved;
  optimizer.save(saved);
  std::stringstream stream;
  saved.save_to(stream);
  torch::serialize::InputArchive archive;
  archive.load_from(stream);
  return saved_bytes(archive);
}

TEST(Memory, TheStateOfEveryOptimizerIsCountedExactly) {
  // A feed-forward layer wider than 1024, beyond which Shampoo and SOAP go without a preconditioner.
  TemporaryFolder folder;
  nlohmann::json config;
  std::ifstream(model_golden("llama") / "config.json") >> config;
  config["intermediate_size"] = 1100;
  std::ofstream(folder / "config.json") << config;
  const auto model = build_model(folder.string());
  Tensors tensors;
  for (const auto& item : model->named_parameters()) tensors[item.key()] = torch::zeros(item.value().sizes());
  save_safetensors(folder / "model.safetensors", tensors);

  MemoryQuestion question = question_of(folder.string());
  lora_rite::nn::inject_lora(*model, question.lora);
  const auto pairs = lora_rite::nn::factor_pairs(*model);
  torch::manual_seed(1);
  for (const auto& pair : pairs) {
    for (torch::Tensor factor : {pair.a, pair.b}) factor.mutable_grad() = torch::randn_like(factor);
  }
  for (const std::string& name : lora_rite::optimizer_names()) {
    question.optimizer = name;
    const auto optimizer = lora_rite::make_optimizer(name, pairs, /*lr=*/1e-3);
    optimizer->step();
    EXPECT_EQ(bytes_of(plan_memory(question), "state"), saved_bytes(*optimizer)) << name;
  }

  question.optimizer = "rite";
  question.row_equilibration = true;
  lora_rite::LoraRite<> optimizer(pairs, lora_rite::LoraRiteOptions(1e-3).row_equilibration(true));
  optimizer.step();
  EXPECT_EQ(bytes_of(plan_memory(question), "state"), saved_bytes(optimizer));

  question.optimizer = "none";
  EXPECT_EQ(error_of([&] { plan_memory(question); }), "--optimizer none: its memory is not known");
}

// A folder with a model of a golden's kind but other sizes, and random weights.
void make_model(const std::filesystem::path& folder, const std::string& golden, const nlohmann::json& changes) {
  nlohmann::json config;
  std::ifstream(model_golden(golden) / "config.json") >> config;
  config.update(changes);
  config.erase("layer_types");
  std::ofstream(folder / "config.json") << config;
  Tensors tensors;
  const auto model = build_model(folder);
  for (const auto& item : model->named_parameters()) tensors[item.key()] = torch::randn(item.value().sizes()) / 10;
  for (const char* stack : {"encoder", "decoder"})  // T5's have the shared matrix under names of their own
    tensors.erase(std::string(stack) + ".embed_tokens.weight");
  if (config.value("tie_word_embeddings", true) == false) {
    const bool is_t5 = tensors.count("shared.weight") > 0;
    const torch::Tensor& embedding = tensors.at(is_t5 ? "shared.weight" : "model.embed_tokens.weight");
    tensors["lm_head.weight"] = torch::randn(embedding.sizes());
  }
  save_safetensors(folder / "model.safetensors", tensors);
}

// Planned and held at most by forward and backward, once the gradients are there.
std::pair<double, double> planned_and_held(const MemoryQuestion& question) {
  const MemoryPlan plan = plan_memory(question);
  const auto model = load_model(question.model, question.dtype);
  lora_rite::nn::inject_lora(*model, question.lora);
  model->set_gradient_checkpointing(question.gradient_checkpointing);
  model->train();
  const int64_t prompt = model->is_encoder_decoder() ? question.length : question.length - question.completion;
  const TextRecord record{std::vector<int64_t>(prompt, 7), std::vector<int64_t>(question.completion, 9), {}};
  const std::vector<TextRecord> records(question.rows, record);
  std::vector<int64_t> all(question.rows);
  std::iota(all.begin(), all.end(), 0);
  const auto batch = make_language_batch(records, all, model->is_encoder_decoder(), model->special_tokens());
  const auto run = [&] { completion_loss(*model, batch).backward(); };
  run();
  return {bytes_of(plan, "activations") + bytes_of(plan, "logits"),
          lora_rite::test::CountingAllocator::instance().peak_of(run)};
}

// An estimate is allowed to be wrong by a third: it counts what the layers are known to keep. Forgetting one of the
// wide tensors of a layer would make it wrong by about as much.
void expect_near(const std::pair<double, double>& planned_and_held, const std::string& what) {
  const double ratio = planned_and_held.first / planned_and_held.second;
  EXPECT_GT(ratio, 0.85) << what;
  EXPECT_LT(ratio, 1.3) << what;
}

TEST(Memory, ActivationsAreNearWhatForwardAndBackwardHold) {
  const nlohmann::json decoder = {{"hidden_size", 64}, {"intermediate_size", 160}, {"num_hidden_layers", 4},
                                  {"vocab_size", 500}, {"num_attention_heads", 4}, {"num_key_value_heads", 2},
                                  {"head_dim", 16},    {"sliding_window", 16}};
  const nlohmann::json t5 = {{"d_model", 64},     {"d_ff", 160},    {"num_layers", 4}, {"num_decoder_layers", 3},
                             {"vocab_size", 500}, {"num_heads", 4}, {"d_kv", 16}};
  for (const std::string name : {"llama", "gemma2", "t5", "mt5"}) {
    for (const double dropout : {0.0, 0.1}) {
      TemporaryFolder folder;
      const bool is_t5 = name == "t5" || name == "mt5";
      nlohmann::json changes = is_t5 ? t5 : decoder;
      changes["dropout_rate"] = dropout;
      if (name == "llama") changes["attention_dropout"] = dropout;
      make_model(folder.string(), name, changes);
      for (const auto dtype : {torch::kFloat, torch::kBFloat16}) {
        for (const bool checkpointing : {false, true}) {
          MemoryQuestion question = question_of(folder.string());
          question.dtype = dtype;
          question.lora.dropout = dropout;
          question.gradient_checkpointing = checkpointing;
          expect_near(planned_and_held(question),
                      concat(name, ' ', dtype, " dropout ", dropout, checkpointing ? " with checkpointing" : ""));
        }
      }
    }
  }
}

TEST(Memory, AClassifiersActivationsAreNear) {
  TemporaryFolder folder;
  nlohmann::json config;
  std::ifstream(golden("tiny") / "config.json") >> config;
  config.update(
      {{"hidden_size", 64}, {"intermediate_size", 160}, {"num_hidden_layers", 4}, {"max_position_embeddings", 64}});
  std::ofstream(folder / "config.json") << config;
  Tensors tensors;
  for (const auto& item : BertModel(BertConfig::from_file(folder / "config.json")).named_parameters()) {
    tensors[item.key()] = torch::randn(item.value().sizes()) / 10;
  }
  save_safetensors(folder / "model.safetensors", tensors);

  MemoryQuestion question = question_of(folder.string());
  for (const auto& [length, dropout] :
       {std::pair{int64_t{16}, 0.0}, std::pair{int64_t{64}, 0.0}, std::pair{int64_t{16}, 0.1}}) {
    question.length = length;
    question.lora.dropout = dropout;
    const MemoryPlan plan = plan_memory(question);
    SentenceClassifier model(load_bert(folder.string()), 2);
    lora_rite::nn::inject_lora(model.bert(), question.lora);
    model.train();
    const torch::Tensor tokens = torch::full({question.rows, question.length}, 9, torch::kLong);
    const torch::Tensor mask = torch::ones({question.rows, question.length}, torch::kBool);
    const torch::Tensor labels = torch::zeros({question.rows}, torch::kLong);
    const auto run = [&] { torch::nn::functional::cross_entropy(model.forward(tokens, mask), labels).backward(); };
    run();
    expect_near({bytes_of(plan, "activations"), lora_rite::test::CountingAllocator::instance().peak_of(run)},
                concat("BERT, ", length, " tokens, dropout ", dropout));
  }
}

TEST(Memory, WhatDoesNotFitIsRefusedBeforeItIsRead) {
  // A file that claims 40 GB of weights, all of it a hole: whoever read it would hold them.
  TemporaryFolder folder;
  nlohmann::json config;
  std::ifstream(model_golden("llama") / "config.json") >> config;
  config["vocab_size"] = 100'000'000;
  config["hidden_size"] = 100;
  config["num_attention_heads"] = config["num_key_value_heads"] = 10;
  config["tie_word_embeddings"] = true;
  config.erase("head_dim");
  std::ofstream(folder / "config.json") << config;
  nlohmann::json header;
  uint64_t end = 0;
  for (const auto& item : build_model(folder.string())->named_parameters()) {
    const uint64_t begin = std::exchange(end, end + 4 * static_cast<uint64_t>(item.value().numel()));
    header[item.key()] = {{"dtype", "F32"}, {"shape", item.value().sizes().vec()}, {"data_offsets", {begin, end}}};
  }
  const std::string text = header.dump();
  const uint64_t size = text.size();
  std::ofstream(folder / "model.safetensors", std::ios::binary)
      << std::string(reinterpret_cast<const char*>(&size), sizeof size) << text;
  std::filesystem::resize_file(folder / "model.safetensors", sizeof size + size + end);

  MemoryQuestion question = question_of(folder.string());
  question.completion = 1;
  const double before = peak_memory();
  const MemoryPlan plan = plan_memory(question);
  const std::string message = error_of([&] { check_memory(plan, 16e9); });
  EXPECT_LT(peak_memory() - before, 100e6);
  EXPECT_NE(message.find("but may take 16.00 GB: 40.00 (base weights: 10.00 G"), std::string::npos) << message;
  EXPECT_NE(message.find("--gradient-checkpointing"), std::string::npos) << message;
  check_memory(plan, plan.total());
  EXPECT_NE(error_of([&] { check_memory(plan, plan.total() * 0.999); }), "");
}

TEST(Memory, TheRefusalIsASum) {
  const MemoryPlan plan{{{"base weights: 2.0 M in float32", 8e6}, {"state of rite", 1.5e6}}};
  EXPECT_EQ(error_of([&] { check_memory(plan, 9e6); }),
            "the run needs about 9.50 MB, but may take 9.00 MB: 8.00 (base weights: 2.0 M in float32) + 1.50 (state of "
            "rite) = 9.50 MB; take --dtype bfloat16, a smaller --micro-batch, --gradient-checkpointing or a lower "
            "--rank, or allow more by --memory-limit");
  EXPECT_EQ(plan.text(),
            "      8.00 MB  base weights: 2.0 M in float32\n"
            "      1.50 MB  state of rite\n"
            "      9.50 MB  together\n");
}

TEST(Memory, TheLargestTensorOfAnotherDtypeIsHeldTwiceWhileLoading) {
  const MemoryPlan cast = [&] {
    MemoryQuestion question = question_of(model_golden("llama"));
    question.dtype = torch::kBFloat16;
    return plan_memory(question);
  }();
  double largest = 0;
  for (const auto& [name, tensor] : load_safetensors(model_golden("llama") / "model.safetensors").tensors) {
    largest = std::max(largest, static_cast<double>(tensor.nbytes()));
  }
  EXPECT_EQ(bytes_of(cast, "while loading: the largest tensor in float32"), largest);
  EXPECT_EQ(bytes_of(plan_memory(question_of(model_golden("llama"))), "while loading"), 0);
}

TEST(Memory, LayersThatAreNotThereAreRefused) {
  MemoryQuestion question = question_of(model_golden("llama"));
  question.lora.target_modules = std::vector<std::string>{"query"};
  EXPECT_THROW(plan_memory(question), c10::Error);
  question = question_of(model_golden("llama").parent_path());
  EXPECT_NE(error_of([&] { plan_memory(question); }).find("config.json"), std::string::npos);
}

}  // namespace
}  // namespace finetune
