#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <lora_rite/product_spectrum.hpp>
#include <nlohmann/json_fwd.hpp>
#include <ostream>
#include <string>
#include <vector>

#include "adapters/adapter_files.hpp"

namespace CLI {
class App;
}

namespace finetune {

class BaseCheckpoint;

/// What one layer of an adapter holds.
struct LayerReport {
  std::string module;
  int64_t rank = 0;
  double scale = 1;
  lora_rite::ProductSpectrum spectrum;  ///< of ΔW
  double base_norm = 0;                 ///< ‖W‖_F; 0 where the base is not known
  double relative_change = 0;  ///< ‖ΔW‖_F / ‖W‖_F; 0 where the base is not known, infinite where W is 0
};

/// Every layer in the adapter's order; `base` may be null. Throws Error or c10::Error naming the layer if a factor is
/// not finite or the adapter does not fit the base.
std::vector<LayerReport> inspect_adapter(const AdapterFile& adapter, const BaseCheckpoint* base);

/// The names that --sort takes: "name", "norm", "change", "condition", "rank", "balance".
std::vector<std::string> sort_names();

/// Largest first, except for names, which keep the adapter's order, and ranks, where the lowest effective one comes
/// first; "balance": the most unequal factors first. Throws Error for another name, and for "change" without a base.
void sort_reports(std::vector<LayerReport>& reports, const std::string& by, bool has_base);

/// All figures for programs; an infinite one is null.
nlohmann::json to_json(const AdapterFile& adapter, const std::vector<LayerReport>& reports, bool has_base);

/// What `finetune inspect` is asked for.
struct InspectOptions {
  std::filesystem::path adapter;
  std::filesystem::path model;  ///< empty = the base is not looked at
  std::string sort = "name";
  int64_t top = 0;  ///< lines of the table; 0 = all
  std::filesystem::path json;
  std::filesystem::path picture;
  std::string python;  ///< interpreter with matplotlib
};

/// Prints the table to `out` and writes what else is asked for. Errors as inspect_adapter's; nothing is written then.
void inspect(const InspectOptions& options, std::ostream& out);

/// Registers `finetune inspect`; once it is parsed, `action` does it.
void add_inspect_command(CLI::App& app, std::function<int()>& action);

}  // namespace finetune
