// What docs/merge.md and the --help text promise of inspect, and no other test holds.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <lora_rite/io/peft.hpp>
#include <map>

#include "commands/inspect.hpp"
#include "finetune/python.hpp"
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

// The place of a column in a table.
size_t column(const std::vector<std::vector<std::string>>& table, const std::string& name) {
  return std::find(table[0].begin(), table[0].end(), name) - table[0].begin();
}

// Layers of the ranks 1 to r, by rows of A that are multiples of the first; r stays r.
TEST(InspectPromises, RanksAreThoseOfTheFullProducts) {
  const TemporaryFolder folder;
  const int64_t r = 4;
  lora_rite::Adapter adapter;
  adapter.config.r = r;
  std::map<std::string, int64_t> ranks;
  std::map<std::string, double> effective;
  torch::manual_seed(21);
  for (int64_t rank = 1; rank <= r; ++rank) {
    const std::string module = "layers." + std::to_string(rank) + ".proj";
    torch::Tensor a = torch::randn({r, 9});
    for (int64_t row = rank; row < r; ++row) a[row].copy_(2 * a[0]);
    const torch::Tensor b = torch::randn({7, r});
    adapter.tensors[module + ".lora_A.weight"] = a;
    adapter.tensors[module + ".lora_B.weight"] = b;
    const torch::Tensor values = torch::linalg_svdvals(torch::matmul(b.to(torch::kDouble), a.to(torch::kDouble)));
    const torch::Tensor large = values.masked_select(values > 1e-10 * values[0]);  // the others are round-off
    ASSERT_EQ(large.numel(), rank);
    const torch::Tensor shares = large / large.sum();
    ranks[module] = rank;
    effective[module] = torch::exp(-(shares * shares.log()).sum()).item<double>();
    EXPECT_TRUE(rank == 1 || number(effective[module]) != std::to_string(rank)) << "the columns differ";
  }
  lora_rite::save_adapter(folder / "adapter", adapter);
  InspectOptions options;
  options.adapter = folder / "adapter";
  options.json = folder / "figures.json";
  const auto table = table_in(inspected(options));
  for (size_t i = 1; i <= ranks.size(); ++i) {
    const std::vector<std::string>& row = table.at(i);
    EXPECT_EQ(row[column(table, "r")], std::to_string(r)) << row[0];
    EXPECT_EQ(row[column(table, "rank")], std::to_string(ranks.at(row[0]))) << row[0];
    EXPECT_EQ(row[column(table, "eff. rank")], number(effective.at(row[0]))) << row[0];
  }
  const nlohmann::json layers = read_json(options.json)["layers"];
  ASSERT_EQ(layers.size(), ranks.size());
  for (const nlohmann::json& layer : layers) {
    EXPECT_EQ(layer["r"], r);
    EXPECT_EQ(layer["numerical_rank"], ranks.at(layer["layer"])) << layer["layer"];
    EXPECT_NEAR(layer["effective_rank"].get<double>(), effective.at(layer["layer"]), 1e-9) << layer["layer"];
  }
}

// ΔW of the layer would take 640 GB in float.
TEST(InspectPromises, TheProductIsNeverFormed) {
  const TemporaryFolder folder;
  const int64_t size = 400000;
  lora_rite::Adapter adapter;
  adapter.config.r = 2;
  adapter.config.lora_alpha = 1;
  adapter.tensors["layers.0.proj.lora_A.weight"] = torch::ones({2, size}).mul_(torch::tensor({{1.0F}, {0.0F}}));
  adapter.tensors["layers.0.proj.lora_B.weight"] = torch::ones({size, 2});
  lora_rite::save_adapter(folder / "adapter", adapter);
  const std::vector<LayerReport> reports = inspect_adapter(read_adapter(folder / "adapter"), nullptr);
  ASSERT_EQ(reports.size(), 1U);
  EXPECT_NEAR(reports[0].spectrum.spectral_norm, 200000, 200000 * 1e-12);  // ½ ‖1‖ ‖1‖, of so many products in double
  EXPECT_EQ(reports[0].spectrum.numerical_rank, 1);
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

TEST(InspectPromises, ThePictureIsDrawnByMatplotlib) {
  if (!python_has("matplotlib")) GTEST_SKIP() << "Python has no package 'matplotlib'; run scripts/setup --tests";
  const TemporaryFolder folder;
  InspectOptions options;
  options.adapter = save_adapter_with_a_zero(folder / "adapter");  // infinite figures among the others
  for (const bool has_base : {false, true}) {
    if (has_base) options.model = model_golden("llama");
    options.picture = folder / ("map" + std::to_string(has_base) + ".png");
    inspected(options);
    const std::string bytes = lora_rite::test::read_bytes(options.picture);
    EXPECT_EQ(bytes.substr(0, 8), "\x89PNG\r\n\x1a\n");
    // Read again: so many colours as a heat map has, and a page that is not one grey.
    const std::string check =
        "import sys, matplotlib.image\n"
        "image = matplotlib.image.imread(sys.argv[1])\n"
        "colours = {tuple(pixel) for pixel in image.reshape(-1, image.shape[2])}\n"
        "sys.exit(image.shape[0] < 200 or image.shape[1] < 200 or len(colours) < 100)\n";
    EXPECT_EQ(run_program({find_python(""), "-c", check, options.picture.string()}), 0);
  }
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
