#include "commands/inspect.hpp"

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>

#include "common/files.hpp"
#include "models/base_checkpoint.hpp"
#include "reports/table.hpp"
#include "support.hpp"

namespace finetune {
namespace {

namespace fs = std::filesystem;
using lora_rite::test::write_bytes;

constexpr double kEpsilon = std::numeric_limits<double>::epsilon();

std::string inspected(const InspectOptions& options) {
  std::ostringstream out;
  inspect(options, out);
  return out.str();
}

// The lines of the table: their first words.
std::vector<std::string> layers_in(const std::string& output) {
  std::vector<std::string> names;
  std::istringstream lines(output);
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind("model.", 0) == 0) names.push_back(line.substr(0, line.find(' ')));
  }
  return names;
}

TEST(Inspect, SingularValuesAreThoseOfTheFullProduct) {
  for (const std::string name : {"llama", "t5", "gemma2"}) {
    const TemporaryFolder folder;
    const AdapterFile adapter = read_adapter(save_golden_adapter(name, folder / "adapter"));
    const BaseCheckpoint base(model_golden(name));
    const auto model = adapted_golden(name);
    const std::vector<LayerReport> reports = inspect_adapter(adapter, &base);
    size_t count = 0;
    for (const auto& [layer_name, layer] : lora_rite::nn::lora_layers(*model)) {
      if (!layer->has_adapter("default")) continue;
      ++count;
      const auto report = std::find_if(reports.begin(), reports.end(),
                                       [name = layer_name](const auto& candidate) { return candidate.module == name; });
      ASSERT_NE(report, reports.end()) << layer_name;
      const auto& own = layer->adapter("default");
      const torch::Tensor delta =
          own.config.scale() * torch::matmul(own.b.detach().to(torch::kDouble), own.a.detach().to(torch::kDouble));
      const torch::Tensor values = torch::linalg_svdvals(delta);
      const double bound = static_cast<double>(delta.size(0) + delta.size(1)) * kEpsilon * own.config.scale() *
                           own.a.norm().item<double>() * own.b.norm().item<double>();
      for (int64_t i = 0; i < values.numel(); ++i) {
        const auto at = static_cast<size_t>(i);
        const double found = at < report->spectrum.singular_values.size() ? report->spectrum.singular_values[at] : 0;
        EXPECT_NEAR(found, values[i].item<double>(), bound) << layer_name << " " << i;
      }
      EXPECT_EQ(report->rank, own.config.rank);
      const double weight =
          lora_rite::nn::base_state(*model).at(layer_name + ".weight").to(torch::kDouble).norm().item<double>();
      EXPECT_NEAR(report->base_norm, weight, 1e-12 * weight);
      EXPECT_NEAR(report->relative_change, delta.norm().item<double>() / weight, 1e-12);
    }
    EXPECT_EQ(reports.size(), count);
  }
}

TEST(Inspect, LayersStandInTheOrderOfTheirNumbers) {
  const TemporaryFolder folder;
  lora_rite::Adapter adapter;
  adapter.config.r = 2;
  for (const std::string name : {"model.layers.10.q", "model.layers.2.q", "model.layers.2.k", "model.layers.01.q"}) {
    adapter.tensors[name + ".lora_A.weight"] = torch::randn({2, 3});
    adapter.tensors[name + ".lora_B.weight"] = torch::randn({4, 2});
  }
  lora_rite::save_adapter(folder / "adapter", adapter);
  InspectOptions options;
  options.adapter = folder / "adapter";
  EXPECT_EQ(layers_in(inspected(options)), (std::vector<std::string>{"model.layers.01.q", "model.layers.2.k",
                                                                     "model.layers.2.q", "model.layers.10.q"}));
}

TEST(Inspect, AFreshAdapterShowsNoChangeAndNoNaN) {
  const TemporaryFolder folder;
  const auto model = load_model(model_golden("llama"));
  lora_rite::nn::LoraConfig config;
  config.target_modules = std::string("all-linear");
  lora_rite::nn::inject_lora(*model, config);
  lora_rite::save_adapter(folder / "adapter", lora_rite::nn::peft_adapter(*model));
  InspectOptions options;
  options.adapter = folder / "adapter";
  options.model = model_golden("llama");
  options.json = folder / "figures.json";
  for (const std::string& sort : sort_names()) {
    options.sort = sort;
    const std::string output = inspected(options);
    EXPECT_EQ(output.find("nan"), std::string::npos) << output;
    EXPECT_NE(output.find("14 layers, all of ΔW: 0, 0 of their weights; 14 of them with ΔW = 0"), std::string::npos)
        << output;
  }
  const nlohmann::json layer = read_json(folder / "figures.json")["layers"][0];
  EXPECT_EQ(layer["frobenius_norm"], 0);
  EXPECT_EQ(layer["relative_change"], 0);
  EXPECT_EQ(layer["numerical_rank"], 0);
  EXPECT_TRUE(layer["condition_number"].is_null()) << "infinite";
  EXPECT_EQ(layer["singular_values"], std::vector<double>(8, 0.0));
}

TEST(Inspect, ABaseWeightOfZerosGivesNoNaN) {
  const TemporaryFolder folder;
  Tensors tensors = lora_rite::load_sharded(model_golden("llama")).tensors;
  for (auto& [name, tensor] : tensors) tensor = torch::zeros_like(tensor);
  fs::create_directories(folder / "base");
  fs::copy_file(model_golden("llama") / "config.json", folder / "base/config.json");
  save_safetensors(folder / "base/model.safetensors", tensors);
  lora_rite::Adapter adapter = lora_rite::load_adapter(save_golden_adapter("llama", folder / "adapter"));
  for (auto& [name, tensor] : adapter.tensors) {
    if (name == "model.layers.0.self_attn.q_proj.lora_B.weight") tensor = torch::zeros_like(tensor);
  }
  lora_rite::save_adapter(folder / "adapter", adapter);
  const BaseCheckpoint base(folder / "base");
  int unchanged = 0;
  for (const LayerReport& report : inspect_adapter(read_adapter(folder / "adapter"), &base)) {
    const bool is_unchanged = report.module == "model.layers.0.self_attn.q_proj";
    unchanged += is_unchanged;
    EXPECT_EQ(report.relative_change, is_unchanged ? 0 : std::numeric_limits<double>::infinity()) << report.module;
  }
  EXPECT_EQ(unchanged, 1);
}

TEST(Inspect, SortsAndCutsTheTable) {
  const TemporaryFolder folder;
  InspectOptions options;
  options.adapter = save_golden_adapter("llama", folder / "adapter");
  options.model = model_golden("llama");
  const BaseCheckpoint base(options.model);
  const std::vector<LayerReport> all = inspect_adapter(read_adapter(options.adapter), &base);
  const std::map<std::string, std::function<double(const LayerReport&)>> keys = {
      {"norm", [](const LayerReport& report) { return report.spectrum.frobenius_norm; }},
      {"change", [](const LayerReport& report) { return report.spectrum.frobenius_norm / report.base_norm; }},
      {"condition", [](const LayerReport& report) { return report.spectrum.condition_number; }},
      {"rank", [](const LayerReport& report) { return -report.spectrum.effective_rank; }},
      {"balance", [](const LayerReport& report) { return std::abs(std::log(report.spectrum.balance)); }}};
  for (const auto& [sort, key] : keys) {
    std::vector<LayerReport> expected = all;
    std::sort(expected.begin(), expected.end(),
              [&, key = key](const auto& a, const auto& b) { return key(a) > key(b); });
    options.sort = sort;
    options.top = 2;
    EXPECT_EQ(layers_in(inspected(options)), (std::vector<std::string>{expected[0].module, expected[1].module}))
        << sort;
    options.top = 0;
    EXPECT_EQ(layers_in(inspected(options)).size(), all.size());
  }
}

TEST(Inspect, JsonHasWhatTheTableHas) {
  const TemporaryFolder folder;
  InspectOptions options;
  options.adapter = save_golden_adapter("t5", folder / "adapter");
  options.json = folder / "figures.json";
  options.top = 1;
  inspected(options);
  const nlohmann::json figures = read_json(folder / "figures.json");
  const std::vector<LayerReport> reports = inspect_adapter(read_adapter(options.adapter), nullptr);
  ASSERT_EQ(figures["layers"].size(), reports.size()) << "all layers, whatever the table shows";
  for (size_t i = 0; i < reports.size(); ++i) {
    const nlohmann::json& layer = figures["layers"][i];
    const lora_rite::ProductSpectrum& found = reports[i].spectrum;
    EXPECT_EQ(layer["layer"], reports[i].module);
    EXPECT_EQ(layer["r"], reports[i].rank);
    EXPECT_EQ(layer["scale"], 1.5);
    EXPECT_EQ(layer["norm_a"], found.norm_a);
    EXPECT_EQ(layer["norm_b"], found.norm_b);
    EXPECT_EQ(layer["balance"], found.balance);
    EXPECT_EQ(layer["condition_number_a"], found.condition_number_a);
    EXPECT_EQ(layer["condition_number_b"], found.condition_number_b);
    EXPECT_EQ(layer["condition_number"], found.condition_number);
    EXPECT_EQ(layer["frobenius_norm"], found.frobenius_norm);
    EXPECT_EQ(layer["spectral_norm"], found.spectral_norm);
    EXPECT_EQ(layer["effective_rank"], found.effective_rank);
    EXPECT_EQ(layer["numerical_rank"], found.numerical_rank);
    EXPECT_EQ(layer["singular_values"], found.singular_values);
    EXPECT_FALSE(layer.contains("relative_change")) << "without a base";
  }
}

TEST(Inspect, FactorsOfPissaAreSaidToBeNoChange) {
  const TemporaryFolder folder;
  lora_rite::Adapter adapter = lora_rite::load_adapter(save_golden_adapter("llama", folder / "adapter"));
  InspectOptions options;
  options.adapter = folder / "pissa";
  for (const std::string init : {"gaussian", "pissa"}) {
    adapter.config.init_lora_weights = init;
    lora_rite::save_adapter(folder / "pissa", adapter);
    EXPECT_EQ(inspected(options).find("the base has lost") != std::string::npos, init == "pissa");
  }
}

TEST(Inspect, NonsenseIsRefusedAndNothingWritten) {
  const TemporaryFolder folder;
  InspectOptions good;
  good.adapter = save_golden_adapter("llama", folder / "adapter");
  good.json = folder / "figures.json";
  const auto refusal = [&](const std::function<void(InspectOptions&)>& change) {
    InspectOptions options = good;
    change(options);
    const std::string message = message_of([&] { inspected(options); });
    EXPECT_FALSE(fs::exists(folder / "figures.json")) << message;
    return message;
  };
  EXPECT_NE(refusal([](auto& options) { options.sort = "size"; }).find("name, norm, change"), std::string::npos);
  EXPECT_NE(refusal([](auto& options) { options.sort = "change"; }).find("with --model"), std::string::npos);
  EXPECT_NE(refusal([](auto& options) { options.top = -1; }).find("--top -1"), std::string::npos);
  EXPECT_NE(refusal([](auto& options) { options.model = model_golden("t5"); }).find("trained on another base model"),
            std::string::npos);
  EXPECT_NE(refusal([](auto& options) { options.adapter = "/nowhere"; }).find("/nowhere/adapter_config.json"),
            std::string::npos);
  lora_rite::Adapter adapter = lora_rite::load_adapter(good.adapter);
  torch::Tensor& factor = adapter.tensors.begin()->second;
  factor = factor.clone();
  factor.view(-1)[0] = std::nan("");
  lora_rite::save_adapter(folder / "nan", adapter);
  EXPECT_NE(refusal([&](auto& options) { options.adapter = folder / "nan"; }).find("not finite"), std::string::npos);
  adapter.tensors.clear();
  lora_rite::save_adapter(folder / "empty", adapter);
  EXPECT_NE(refusal([&](auto& options) { options.adapter = folder / "empty"; }).find("holds no factors"),
            std::string::npos);
}

// A stand-in for the interpreter, which keeps what the script would have been given.
TEST(Inspect, ThePictureIsDrawnOfTheFigures) {
  const TemporaryFolder folder;
  const fs::path interpreter = folder / "python3";
  write_bytes(interpreter, "#!/bin/sh\ncp \"$2\" '" + (folder / "given").string() + "'\necho \"$1\" > \"$3\"\n");
  fs::permissions(interpreter, fs::perms::owner_all);
  const fs::path adapter = save_golden_adapter("llama", folder / "adapter");
  ::testing::internal::CaptureStdout();
  run_command(&add_inspect_command, {"inspect", adapter.string(), "--python", interpreter.string(), "--picture",
                                     (folder / "map.png").string(), "--json", (folder / "figures.json").string()});
  EXPECT_NE(::testing::internal::GetCapturedStdout().find("‖ΔW‖"), std::string::npos);
  EXPECT_EQ(read_json(folder / "given"), read_json(folder / "figures.json"));
  EXPECT_NE(lora_rite::test::read_bytes(folder / "map.png").find("inspect_plot.py"), std::string::npos);
  EXPECT_FALSE(fs::exists(folder / "map.png.json.tmp"));

  write_bytes(interpreter, "#!/bin/sh\nexit 1\n");
  InspectOptions options;
  options.adapter = adapter;
  options.picture = folder / "other.png";
  options.python = interpreter.string();
  EXPECT_NE(message_of([&] { inspected(options); }).find("needs Python 3 with matplotlib"), std::string::npos);
  EXPECT_FALSE(fs::exists(folder / "other.png.json.tmp"));
}

TEST(Table, AlignsByCharactersNotBytes) {
  Table table({"layer", "‖ΔW‖"});
  table.add({"q", "1"});
  table.add({"longer", "0.0123"});
  EXPECT_EQ(table.text(), "layer     ‖ΔW‖\nq            1\nlonger  0.0123\n");
  EXPECT_EQ(short_number(1.0 / 81), "0.0123");
  EXPECT_EQ(short_number(std::numeric_limits<double>::infinity()), "inf");
}

}  // namespace
}  // namespace finetune
