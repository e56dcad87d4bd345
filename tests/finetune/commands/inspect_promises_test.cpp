// What docs/finetune.md and the --help text promise of inspect, and no other test holds.

#include <cmath>
#include <cstdio>
#include <limits>
#include <lora_rite/io/peft.hpp>

#include "commands/inspect.hpp"
#include "models/base_checkpoint.hpp"
#include "support.hpp"

namespace finetune {
namespace {

namespace fs = std::filesystem;

std::string inspected(const InspectOptions& options) {
  std::ostringstream out;
  inspect(options, out);
  return out.str();
}

// The adapter of the golden Llama, of which one layer has lost its B.
fs::path save_adapter_with_a_zero(const fs::path& folder) {
  lora_rite::Adapter adapter = lora_rite::load_adapter(save_golden_adapter("llama", folder));
  torch::Tensor& b = adapter.tensors.at("model.layers.0.self_attn.q_proj.lora_B.weight");
  b = torch::zeros_like(b);
  lora_rite::save_adapter(folder, adapter);
  return folder;
}

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3g", value);
  return text;
}

TEST(InspectPromises, EveryCellIsTheFigureThatItsColumnNames) {
  const TemporaryFolder folder;
  InspectOptions options;
  options.adapter = save_adapter_with_a_zero(folder / "adapter");
  for (const bool has_base : {false, true}) {
    if (has_base) options.model = model_golden("llama");
    const BaseCheckpoint base(model_golden("llama"));
    std::vector<std::vector<std::string>> expected = {{"layer", "r", "‖A‖", "‖B‖", "‖B‖/‖A‖", "κ(A)", "κ(B)", "‖ΔW‖",
                                                       "‖W‖", "‖ΔW‖/‖W‖", "σ₁", "σᵣ", "κ(ΔW)", "rank", "eff. rank"}};
    size_t infinite = 0;
    for (const LayerReport& report : inspect_adapter(read_adapter(options.adapter), has_base ? &base : nullptr)) {
      const lora_rite::ProductSpectrum& found = report.spectrum;
      expected.push_back({report.module, std::to_string(report.rank), number(found.norm_a), number(found.norm_b),
                          number(found.norm_b / found.norm_a), number(found.condition_number_a),
                          number(found.condition_number_b), number(found.frobenius_norm), number(report.base_norm),
                          number(report.relative_change), number(found.singular_values.front()),
                          number(found.singular_values.back()), number(found.condition_number),
                          std::to_string(found.numerical_rank), number(found.effective_rank)});
      if (report.module != "model.layers.0.self_attn.q_proj") continue;
      ++infinite;
      EXPECT_EQ(expected.back()[6], "inf") << "κ(B) of B = 0";
      EXPECT_EQ(expected.back()[12], "inf");
      EXPECT_EQ(expected.back()[14], "0") << "the effective rank of ΔW = 0";
    }
    EXPECT_EQ(infinite, 1U);
    if (!has_base) {
      for (auto& row : expected) row.erase(row.begin() + 8, row.begin() + 10);
    }
    std::vector<std::vector<std::string>> table = table_in(inspected(options));
    ASSERT_GE(table.size(), expected.size());
    table.resize(expected.size());
    EXPECT_EQ(table, expected) << inspected(options);
  }
}

TEST(InspectPromises, JsonHasTheBasesFiguresAndNullForWhatIsInfinite) {
  const TemporaryFolder folder;
  InspectOptions options;
  options.adapter = save_adapter_with_a_zero(folder / "adapter");
  options.model = model_golden("llama");
  options.json = folder / "figures.json";
  inspected(options);
  const nlohmann::json figures = read_json(options.json);
  EXPECT_EQ(figures["adapter"], options.adapter.string());
  const BaseCheckpoint base(options.model);
  const std::vector<LayerReport> reports = inspect_adapter(read_adapter(options.adapter), &base);
  ASSERT_EQ(figures["layers"].size(), reports.size());
  for (size_t i = 0; i < reports.size(); ++i) {
    const nlohmann::json& layer = figures["layers"][i];
    EXPECT_GT(reports[i].base_norm, 0);
    EXPECT_EQ(layer["base_norm"], reports[i].base_norm);
    EXPECT_EQ(layer["relative_change"], reports[i].relative_change);
    const bool is_zero = reports[i].module == "model.layers.0.self_attn.q_proj";
    EXPECT_EQ(layer["condition_number_b"].is_null(), is_zero) << reports[i].module;
    EXPECT_EQ(layer["condition_number"].is_null(), is_zero) << reports[i].module;
    EXPECT_EQ(layer["relative_change"] == 0, is_zero) << reports[i].module;
  }
}

TEST(InspectPromises, EveryOptionReachesItFromTheCommandLine) {
  const TemporaryFolder folder;
  InspectOptions options;
  options.adapter = save_golden_adapter("llama", folder / "adapter");
  options.model = model_golden("llama");
  options.sort = "change";
  options.top = 2;
  const std::string expected = inspected(options);
  InspectOptions plain;
  plain.adapter = options.adapter;
  ASSERT_NE(expected, inspected(plain));
  ::testing::internal::CaptureStdout();
  EXPECT_EQ(run_command(&add_inspect_command,
                        {"inspect", options.adapter.string(), "--model", options.model.string(), "--sort", "change",
                         "--top", "2", "--json", (folder / "figures.json").string()}),
            0);
  EXPECT_EQ(::testing::internal::GetCapturedStdout(), expected);
  EXPECT_TRUE(fs::exists(folder / "figures.json"));
  ::testing::internal::CaptureStdout();
  EXPECT_EQ(run_command(&add_inspect_command, {"inspect", options.adapter.string()}), 0);
  EXPECT_EQ(::testing::internal::GetCapturedStdout(), inspected(plain)) << "the defaults";
}

TEST(InspectPromises, FactorsOfExpertsAreShownWithoutABaseAlone) {
  const TemporaryFolder folder;
  lora_rite::Adapter adapter = lora_rite::load_adapter(save_golden_adapter("llama", folder / "adapter"));
  adapter.config.other["target_parameters"] = {"experts.up"};
  lora_rite::save_adapter(folder / "adapter", adapter);
  InspectOptions options;
  options.adapter = folder / "adapter";
  EXPECT_NE(inspected(options).find(" layers, all of ΔW: "), std::string::npos);
  options.model = model_golden("llama");
  const std::string message = message_of([&] { inspected(options); });
  EXPECT_NE(message.find("the adapter has factors of parameters that hold many experts"), std::string::npos) << message;
  EXPECT_NE(message.find("whose weights are not looked up; leave it out"), std::string::npos) << message;
}

TEST(InspectPromises, FoldersOfResultsAreLookedForAtTheStart) {
  const TemporaryFolder folder;
  InspectOptions options;
  options.adapter = "/nowhere";
  options.json = folder / "none/figures.json";
  EXPECT_NE(message_of([&] { inspected(options); }).find("--json"), std::string::npos);
  options.json.clear();
  options.picture = folder / "none/map.png";
  EXPECT_NE(message_of([&] { inspected(options); }).find("--picture"), std::string::npos);
}

}  // namespace
}  // namespace finetune
