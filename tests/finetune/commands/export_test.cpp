#include "commands/export.hpp"

#include <csignal>
#include <lora_rite/io/safetensors.hpp>
#include <nlohmann/json.hpp>
#include <sstream>

#include "commands/evaluate.hpp"
#include "common/files.hpp"
#include "support.hpp"
#include "task_files.hpp"

namespace finetune {
namespace {

namespace fs = std::filesystem;
using lora_rite::test::read_bytes;
using lora_rite::test::write_bytes;

// A run of a tiny model as `finetune train` leaves it: with run.json, which knows the file that names the classes.
RunOptions tiny_run(const TemporaryFolder& folder, const fs::path& model) {
  RunOptions options = tiny_options((folder / "run").string(), "rite");
  options.model = model.string();
  options.steps = 6;
  options.train = (folder / "train.tsv").string();
  fs::create_directories(options.out);
  write_bytes(options.train, "yes\ta\nno\tb\n");
  return options;
}

void write_run(const RunOptions& options) { write_bytes(options.out + "/run.json", nlohmann::json(options).dump()); }

TinyRun interrupt_after(int64_t step, const RunOptions& options) {
  write_run(options);
  return run_tiny(options, /*resume=*/false, [step](const StepRecord& record) {
    if (record.step == step) std::raise(SIGINT);
  });
}

ExportOptions export_options(const TemporaryFolder& folder) {
  ExportOptions options;
  options.run = folder / "run";
  options.out = folder / "exported";
  return options;
}

std::string exported(const ExportOptions& options) {
  std::ostringstream log;
  export_adapter(options, log);
  return log.str();
}

const std::vector<fs::path>& tiny_models() {
  static const std::vector<fs::path> models = {golden("tiny"), model_golden("llama"), model_golden("t5")};
  return models;
}

TEST(Export, OfAFinishedRunIsWhatTheRunSaved) {
  for (const fs::path& model : tiny_models()) {
    for (const std::string init : {"kaiming", "pissa"}) {
      const TemporaryFolder folder;
      RunOptions options = tiny_run(folder, model);
      options.init = init;
      options.dropout = 0.1;
      write_run(options);
      ASSERT_EQ(run_tiny(options).outcome, Outcome::Finished);
      EXPECT_NE(exported(export_options(folder)).find("step 6"), std::string::npos);
      const auto files = content_of(folder / "exported");
      ASSERT_EQ(files.size(), model == golden("tiny") ? 3U : 2U) << model;
      for (const auto& [name, bytes] : files) EXPECT_TRUE(bytes == read_bytes(folder / "run" / name)) << model << name;
    }
  }
}

TEST(Export, OfAnInterruptedRunHoldsTheFactorsOfItsLastStep) {
  for (const fs::path& model : tiny_models()) {
    const TemporaryFolder folder;
    const TinyRun run = interrupt_after(4, tiny_run(folder, model));
    ASSERT_EQ(run.outcome, Outcome::Interrupted);
    ASSERT_FALSE(fs::exists(folder / "run/adapter_model.safetensors"));
    EXPECT_NE(exported(export_options(folder)).find("step 4"), std::string::npos);
    Tensors expected;
    double largest_b = 0;
    for (const auto& [name, tensor] : run.trained) {
      std::string file_name = name;
      if (file_name.rfind("head.", 0) == 0) continue;
      if (file_name.rfind("bert.", 0) == 0) file_name.erase(0, 5);
      file_name.erase(file_name.find(".default"), 8);
      expected[file_name] = tensor;
      if (name.find("lora_B") != std::string::npos) largest_b = std::max(largest_b, tensor.abs().max().item<double>());
    }
    EXPECT_GT(largest_b, 0) << "it has learned something";
    const lora_rite::Adapter adapter = lora_rite::load_adapter(folder / "exported");
    ASSERT_EQ(adapter.tensors.size(), expected.size());
    for (const auto& [name, tensor] : expected) EXPECT_TRUE(adapter.tensors.at(name).equal(tensor)) << name;
    EXPECT_EQ(adapter.config.base_model_name_or_path, model.string());
    if (model != golden("tiny")) continue;
    const Safetensors head = load_safetensors(folder / "exported/head.safetensors");
    EXPECT_TRUE(head.tensors.at("weight").equal(run.trained.at("head.weight")));
    EXPECT_EQ(head.metadata.at("labels"), R"(["no","yes"])");
  }
}

TEST(Export, FactorsAreRoundedToTheDtypeThatIsAskedFor) {
  const TemporaryFolder folder;
  interrupt_after(3, tiny_run(folder, model_golden("llama")));
  ExportOptions options = export_options(folder);
  exported(options);
  const Tensors exact = lora_rite::load_adapter(folder / "exported").tensors;
  options.out = folder / "half";
  options.dtype = "bfloat16";
  exported(options);
  const Tensors rounded = lora_rite::load_adapter(folder / "half").tensors;
  ASSERT_EQ(rounded.size(), exact.size());
  for (const auto& [name, tensor] : exact) EXPECT_TRUE(rounded.at(name).equal(tensor.to(torch::kBFloat16))) << name;
}

TEST(Export, InBFloat16ItIsMeasuredAsItsRoundedFactors) {
  const TemporaryFolder folder;
  RunOptions run = tiny_run(folder, model_golden("llama"));
  run.lr = 0.1;  // far enough for the rounding to show
  interrupt_after(3, run);
  ExportOptions options = export_options(folder);
  exported(options);
  lora_rite::Adapter rounded = lora_rite::load_adapter(options.out);
  for (auto& item : rounded.tensors) item.second = item.second.to(torch::kBFloat16).to(torch::kFloat);
  lora_rite::save_adapter(folder / "rounded", rounded);
  options.out = folder / "half";
  options.dtype = "bfloat16";
  exported(options);
  const fs::path texts = write_texts(folder / "texts.jsonl", tiny_texts(10, 4));
  const auto loss_of = [&](const char* adapter, const char* dtype) {
    EvaluateOptions measured;
    measured.model = run.model;
    measured.adapter = folder / adapter;
    measured.data = {texts};
    measured.dtype = dtype;
    std::ostringstream ignored;
    return evaluate_model(measured, ignored)["results"][0]["loss"].get<double>();
  };
  for (const char* dtype : {"float32", "bfloat16"}) {  // of the base
    EXPECT_EQ(loss_of("half", dtype), loss_of("rounded", dtype)) << dtype;
    EXPECT_NE(loss_of("half", dtype), loss_of("exported", dtype)) << dtype;
  }
}

TEST(Export, TheBestIsThatOfTheBestMeasurement) {
  for (const fs::path& model : {golden("tiny"), model_golden("llama")}) {
    const TemporaryFolder folder;
    RunOptions options = tiny_run(folder, model);
    options.validation = "given";  // tiny_workload has data for it
    options.evaluate_every = 2;
    write_run(options);
    run_tiny(options);
    ExportOptions best = export_options(folder);
    best.from = "best";
    exported(best);
    EXPECT_TRUE(content_of(folder / "exported") == content_of(folder / "run/best")) << model;
    EXPECT_GE(content_of(folder / "exported").size(), 2U);
  }
}

TEST(Export, ABaseThatMovedIsNamed) {
  const TemporaryFolder folder;
  fs::copy(model_golden("llama"), folder / "base");
  interrupt_after(2, tiny_run(folder, folder / "base"));
  fs::rename(folder / "base", folder / "moved");
  ExportOptions options = export_options(folder);
  EXPECT_NE(message_of([&] { exported(options); }).find((folder / "base/config.json").string()), std::string::npos);
  EXPECT_FALSE(fs::exists(options.out));
  options.model = folder / "moved";
  exported(options);
  EXPECT_TRUE(fs::exists(options.out / "adapter_config.json"));
}

TEST(Export, OtherWeightsOrClassNamesThanTheRunsAreRefused) {
  const TemporaryFolder folder;
  fs::copy(golden("tiny"), folder / "other");
  Safetensors other = load_safetensors(folder / "other/model.safetensors");
  torch::Tensor& weight = other.tensors.at("encoder.layer.0.attention.self.query.weight");
  weight = weight.clone().neg_();
  save_safetensors(folder / "other/model.safetensors", other.tensors, other.metadata);
  const RunOptions run = tiny_run(folder, golden("tiny"));
  interrupt_after(2, run);
  ExportOptions options = export_options(folder);
  options.model = folder / "other";
  const std::string message = message_of([&] { exported(options); });
  EXPECT_EQ(
      message.find((folder / "run/checkpoint.pt: the run was begun with something else (base weights: ").string()), 0U)
      << message;
  options.model.clear();
  write_bytes(run.train, "good\ta\nbad\tb\n");
  EXPECT_NE(message_of([&] { exported(options); }).find("(class names: 2 of fingerprint "), std::string::npos);
  EXPECT_FALSE(fs::exists(options.out));
  write_bytes(run.train, "no\tx\nyes\ty\n");  // other examples: only their classes matter
  exported(options);
}

TEST(Export, NonsenseIsRefusedAndNothingWritten) {
  const TemporaryFolder folder;
  const RunOptions run = tiny_run(folder, model_golden("llama"));
  const ExportOptions good = export_options(folder);
  const auto refusal = [&](const std::function<void(ExportOptions&)>& change) {
    ExportOptions options = good;
    change(options);
    const std::string message = message_of([&] { exported(options); });
    EXPECT_FALSE(fs::exists(options.out)) << message;
    EXPECT_FALSE(fs::exists(options.out.string() + ".tmp")) << message;
    return message;
  };
  const auto nothing = [](ExportOptions&) {};
  EXPECT_NE(refusal(nothing).find("run.json: does not exist"), std::string::npos);
  write_bytes(folder / "run/run.json", "{}");
  EXPECT_NE(refusal(nothing).find("is not the record of a run"), std::string::npos);
  write_run(run);
  EXPECT_NE(refusal(nothing).find("checkpoint.pt: does not exist"), std::string::npos);
  interrupt_after(2, run);
  EXPECT_NE(refusal([](auto& options) { options.from = "first"; }).find("expected last or best"), std::string::npos);
  EXPECT_NE(refusal([](auto& options) { options.from = "best"; }).find("holds no adapter"), std::string::npos);
  EXPECT_NE(refusal([](auto& options) { options.dtype = "int8"; }).find("--dtype int8"), std::string::npos);
  EXPECT_NE(refusal([](auto& options) { options.model = model_golden("t5"); }).find("checkpoint.pt"),
            std::string::npos);
  std::string bytes = read_bytes(folder / "run/checkpoint.pt");
  write_bytes(folder / "run/checkpoint.pt", bytes.substr(0, bytes.size() / 2));
  EXPECT_NE(refusal(nothing).find("truncated"), std::string::npos);
  write_bytes(folder / "run/checkpoint.pt", bytes);

  fs::create_directories(good.out);
  write_bytes(good.out / "precious", "1");
  EXPECT_NE(message_of([&] { exported(good); }).find("is there already"), std::string::npos);
  EXPECT_EQ(content_of(good.out), (std::map<std::string, std::string>{{"precious", "1"}}));
}

TEST(Export, TheCommandLineReachesIt) {
  const TemporaryFolder folder;
  interrupt_after(2, tiny_run(folder, model_golden("llama")));
  ::testing::internal::CaptureStdout();
  run_command(&add_export_command, {"export", "--run", (folder / "run").string(), "--out", (folder / "a").string(),
                                    "--dtype", "float16", "--from", "last"});
  EXPECT_NE(::testing::internal::GetCapturedStdout().find("The adapter of step 2 is in"), std::string::npos);
  EXPECT_EQ(lora_rite::load_adapter(folder / "a").tensors.begin()->second.scalar_type(), torch::kHalf);
}

}  // namespace
}  // namespace finetune
