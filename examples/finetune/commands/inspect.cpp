#include "commands/inspect.hpp"

#include <torch/types.h>
#include <torch/utils.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <iostream>
#include <lora_rite/nn/peft.hpp>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <system_error>

#include "adapters/merge_plan.hpp"
#include "cli/options.hpp"
#include "common/error.hpp"
#include "common/files.hpp"
#include "common/subprocess.hpp"
#include "models/base_checkpoint.hpp"
#include "reports/table.hpp"

namespace finetune {
namespace {

namespace fs = std::filesystem;

std::string table_of(const std::vector<LayerReport>& reports, size_t count, bool has_base) {
  std::vector<std::string> header = {"layer", "r", "‖A‖", "‖B‖", "‖B‖/‖A‖", "κ(A)", "κ(B)", "‖ΔW‖"};
  if (has_base) header.insert(header.end(), {"‖W‖", "‖ΔW‖/‖W‖"});
  header.insert(header.end(), {"σ₁", "σᵣ", "κ(ΔW)", "rank", "eff. rank"});
  Table table(header);
  for (size_t index = 0; index < count; ++index) {
    const LayerReport& report = reports[index];
    const lora_rite::ProductSpectrum& found = report.spectrum;
    std::vector<std::string> row = {report.module, std::to_string(report.rank)};
    for (const double value : {found.norm_a, found.norm_b, found.balance, found.condition_number_a,
                               found.condition_number_b, found.frobenius_norm}) {
      row.push_back(short_number(value));
    }
    if (has_base) row.insert(row.end(), {short_number(report.base_norm), short_number(report.relative_change)});
    row.insert(row.end(), {short_number(found.spectral_norm), short_number(found.singular_values.back()),
                           short_number(found.condition_number), std::to_string(found.numerical_rank),
                           short_number(found.effective_rank)});
    table.add(std::move(row));
  }
  return table.text();
}

// All layers taken together: ΔW and W as one long vector each.
std::string summary_of(const std::vector<LayerReport>& reports, bool has_base) {
  double changes = 0, weights = 0;
  int64_t unchanged = 0;
  for (const LayerReport& report : reports) {
    changes += std::pow(report.spectrum.frobenius_norm, 2);
    weights += std::pow(report.base_norm, 2);
    unchanged += report.spectrum.numerical_rank == 0;
  }
  std::string text = concat(reports.size(), " layers, all of ΔW: ", short_number(std::sqrt(changes)));
  if (has_base) text += concat(", ", short_number(std::sqrt(changes / weights)), " of their weights");
  if (unchanged > 0) text += concat("; ", unchanged, " of them with ΔW = 0");
  return text + "\n";
}

// What the adapter holds and does beside its factors, and what of the description has no effect.
std::string rest_of(const AdapterFile& adapter) {
  std::string text;
  const lora_rite::AdapterConfig& config = adapter.adapter.config;
  for (const auto& [field, why] : lora_rite::nn::detail::unsupported_fields(config)) {
    text += concat(field, " is ", config.other.at(field).dump(),
                   ": the table shows the factors alone, and nothing else of what this does\n");
  }
  if (!adapter.biases.empty()) text += concat("trained biases: ", adapter.biases.size(), "\n");
  for (const auto& [name, tensor] : adapter.whole) text += concat("trained whole: ", name, " ", tensor.sizes(), "\n");
  for (const AdapterLayer& layer : adapter.layers) {
    if (layer.base_weight.defined()) text += concat("a copy of the base's weight: ", layer.module, "\n");
  }
  for (const std::string& name : adapter.others) text += concat("neither factor nor bias: ", name, "\n");
  for (const std::string& note : adapter.notes) text += note + "\n";
  return text;
}

// Runs inspect_plot.py on the figures, which are in a file for as long as that takes.
void draw(const nlohmann::json& figures, const InspectOptions& options) {
  fs::path input = options.picture;
  input += ".json.tmp";
  write_json(input, figures);
  const std::string python = find_python(options.python);
  const int code =
      run_program({python, script_path("inspect_plot.py").string(), input.string(), options.picture.string()});
  std::error_code ignored;
  fs::remove(input, ignored);
  if (code != 0) {
    fail("--picture ", options.picture.string(), ": was not drawn (inspect_plot.py ended with code ", code,
         "); it needs Python 3 with matplotlib (install it with '", python,
         " -m pip install matplotlib', or name another interpreter with --python or FINETUNE_PYTHON)");
  }
}

}  // namespace

std::vector<LayerReport> inspect_adapter(const AdapterFile& adapter, const BaseCheckpoint* base) {
  const torch::NoGradGuard no_grad;
  std::vector<LayerReport> reports;
  for (const AdapterLayer& layer : adapter.layers) {
    LayerReport report;
    report.module = layer.module;
    report.rank = layer.pair.a.size(0);
    report.scale = layer.scale;
    report.spectrum = lora_rite::product_spectrum(layer.pair, layer.scale);
    if (base != nullptr) {
      const std::string name = stored_weight(*base, layer.module, adapter);
      const torch::Tensor& weight = base->tensors().at(name);
      std::vector<int64_t> shape = weight.sizes().vec();
      // Said of all layers, true of those only that are transformers' Conv1D.
      const std::vector<int64_t> own = {layer.pair.b.size(0), layer.pair.a.size(1)};
      if (adapter.adapter.config.fan_in_fan_out && !layer.embedding && shape != own) {
        std::reverse(shape.begin(), shape.end());
      }
      check_shape(layer, shape, concat(base->folder().string(), ": tensor '", name, "'"));
      report.base_norm = weight.to(torch::kDouble).norm().item<double>();
      report.relative_change =
          report.spectrum.frobenius_norm > 0 ? report.spectrum.frobenius_norm / report.base_norm : 0;
    }
    reports.push_back(std::move(report));
  }
  return reports;
}

std::vector<std::string> sort_names() { return {"name", "norm", "change", "condition", "rank", "balance"}; }

void sort_reports(std::vector<LayerReport>& reports, const std::string& by, bool has_base) {
  const std::vector<std::string> names = sort_names();
  if (std::find(names.begin(), names.end(), by) == names.end()) fail("--sort ", by, ": expected one of ", join(names));
  if (by == "name") return;
  if (by == "change" && !has_base) fail("--sort change: needs the base's weights; name its folder with --model");
  const auto key = [&](const LayerReport& report) {
    if (by == "norm") return report.spectrum.frobenius_norm;
    if (by == "change") return report.relative_change;
    if (by == "condition") return report.spectrum.condition_number;
    if (by == "rank") return -report.spectrum.effective_rank;
    return std::abs(std::log(report.spectrum.balance));  // whichever factor is the larger
  };
  std::stable_sort(reports.begin(), reports.end(),
                   [&](const LayerReport& left, const LayerReport& right) { return key(left) > key(right); });
}

nlohmann::json to_json(const AdapterFile& adapter, const std::vector<LayerReport>& reports, bool has_base) {
  nlohmann::json layers = nlohmann::json::array();
  for (const LayerReport& report : reports) {
    const lora_rite::ProductSpectrum& found = report.spectrum;
    nlohmann::json layer = {{"layer", report.module},
                            {"r", report.rank},
                            {"scale", report.scale},
                            {"norm_a", found.norm_a},
                            {"norm_b", found.norm_b},
                            {"balance", found.balance},
                            {"condition_number_a", found.condition_number_a},
                            {"condition_number_b", found.condition_number_b},
                            {"frobenius_norm", found.frobenius_norm},
                            {"spectral_norm", found.spectral_norm},
                            {"singular_values", found.singular_values},
                            {"condition_number", found.condition_number},
                            {"numerical_rank", found.numerical_rank},
                            {"effective_rank", found.effective_rank}};
    if (has_base) {
      layer["base_norm"] = report.base_norm;
      layer["relative_change"] = report.relative_change;
    }
    layers.push_back(std::move(layer));
  }
  return {{"adapter", adapter.folder.string()}, {"layers", std::move(layers)}};
}

void inspect(const InspectOptions& options, std::ostream& out) {
  if (options.top < 0) fail("--top ", options.top, ": expected at least 0");
  check_place("--json", options.json);
  check_place("--picture", options.picture);
  const AdapterFile adapter = read_adapter(options.adapter);
  const bool has_base = !options.model.empty();
  std::optional<BaseCheckpoint> base;
  if (has_base && lora_rite::detail::has_target_parameters(adapter.adapter.config)) {
    fail("--model ", options.model.string(), ": the adapter has factors of parameters that hold many experts ",
         "(target_parameters), whose weights are not looked up; leave it out");
  }
  if (has_base) base.emplace(options.model);
  std::vector<LayerReport> reports = inspect_adapter(adapter, has_base ? &*base : nullptr);
  const nlohmann::json figures = to_json(adapter, reports, has_base);
  sort_reports(reports, options.sort, has_base);
  if (!options.json.empty()) write_json(options.json, figures);
  if (!options.picture.empty()) draw(figures, options);

  const size_t count = options.top == 0 ? reports.size() : std::min(reports.size(), static_cast<size_t>(options.top));
  out << table_of(reports, count, has_base);
  if (count < reports.size()) out << concat("… and ", reports.size() - count, " more (--top 0 shows all)\n");
  out << summary_of(reports, has_base);
  if (const lora_rite::AdapterConfig& config = adapter.adapter.config; lora_rite::nn::changes_base(config)) {
    out << concat("init_lora_weights is '", std::get<std::string>(config.init_lora_weights),
                  "': the base has lost what the factors started with, so ΔW is not the way from it\n");
  }
  out << rest_of(adapter);
}

void add_inspect_command(CLI::App& app, std::function<int()>& action) {
  CLI::App* command =
      app.add_subcommand("inspect", "Show what an adapter holds, layer by layer: as a table, as JSON, as a heat map");
  const auto options = std::make_shared<InspectOptions>();
  command->add_option("adapter", options->adapter, "Folder with adapter_config.json and adapter_model.safetensors")
      ->required()
      ->type_name("ADAPTER");
  command->add_option("--model", options->model, "Folder of the base model, for ‖W‖")->type_name("DIR");
  command->add_option("--sort", options->sort, "Which layers come first: " + join(sort_names()))->capture_default_str();
  command->add_option("--top", options->top, "Lines of the table, 0 = all")->capture_default_str();
  command->add_option("--json", options->json, "Write all figures, every singular value among them")->type_name("FILE");
  command->add_option("--picture", options->picture, "Draw a heat map, layers by kinds of modules")
      ->type_name("FILE.png");
  command->add_option("--python", options->python, "Interpreter with matplotlib")
      ->default_str("$FINETUNE_PYTHON, else python3");
  command->footer(
      "\n"
      "  ‖A‖, ‖B‖, ‖B‖/‖A‖, κ(A), κ(B)   how ΔW is split: norms, their ratio, condition numbers\n"
      "  ‖ΔW‖, σ₁, σᵣ, κ(ΔW)             ΔW = scale * B A: norm, largest and smallest of its min(r, in, out) singular\n"
      "                                  values, their ratio\n"
      "  rank, eff. rank                 singular values above round-off; exp of their entropy, between 1 and r (0 "
      "where\n"
      "                                  ΔW is 0)\n"
      "  ‖ΔW‖/‖W‖                        how far the layer went from its base weight (with --model)\n"
      "\n"
      "Norms are Frobenius norms. The product is never formed. Of an adapter that does more than add ΔW (DoRA, ...)\n"
      "the table shows the factors alone; a line below it names the field of adapter_config.json.\n"
      "\n"
      "Example:\n"
      "  finetune inspect runs/arc --model .deps/smollm2 --sort change --top 10 --picture arc.png\n");
  command->callback([options, &action] {
    action = [options] {
      inspect(*options, std::cout);
      return 0;
    };
  });
}

}  // namespace finetune
