#include "workloads/workload.hpp"

#include <ATen/Context.h>
#include <torch/cuda.h>

#include <algorithm>
#include <lora_rite/factor_pair.hpp>
#include <lora_rite/io/peft.hpp>
#include <lora_rite/nn/inject.hpp>
#include <lora_rite/nn/peft.hpp>

#include "common/error.hpp"
#include "memory_plan/machine.hpp"
#include "models/config.hpp"
#include "workloads/language_workload.hpp"
#include "workloads/sentence_workload.hpp"

namespace finetune {
namespace {

using lora_rite::nn::LoraInit;
using lora_rite::nn::ModuleNames;

// What an option says about modules; `otherwise` if it says nothing.
ModuleNames parse_modules(const char* option, const std::string& text, const ModuleNames& otherwise) {
  constexpr std::string_view kRegex = "re:";
  if (text.empty()) return otherwise;
  if (text.compare(0, kRegex.size(), kRegex) == 0) return text.substr(kRegex.size());
  if (text == "all-linear") return text;
  std::vector<std::string> names;
  std::istringstream parts(text + ",");
  for (std::string name; std::getline(parts, name, ',');) {
    if (name.empty()) fail(option, " ", text, ": has an empty name; write it as in q_proj,v_proj");
    names.push_back(name);
  }
  return names;
}

LoraInit init_of(const std::string& name) {
  if (name == "gaussian") return LoraInit::Gaussian;
  if (name == "orthogonal") return LoraInit::Orthogonal;
  if (name == "pissa") return LoraInit::Pissa;
  return LoraInit::Kaiming;
}

}  // namespace

lora_rite::nn::LoraConfig lora_config(const RunOptions& options, const ModuleNames& natural) {
  lora_rite::nn::LoraConfig config;
  config.rank = options.rank;
  config.alpha = options.alpha;
  config.use_rslora = options.rslora;
  config.dropout = options.dropout;
  config.init = init_of(options.init);
  config.target_modules = parse_modules("--target-modules", options.target_modules, natural);
  config.exclude_modules = parse_modules("--exclude-modules", options.exclude_modules, {});
  if (options.exclude_modules == "all-linear") fail("--exclude-modules all-linear: would leave no layer; name some");
  return config;
}

void add_adapters(torch::nn::Module& model, const RunOptions& options, const lora_rite::nn::LoraConfig& config) {
  at::manual_seed(options.seed);
  lora_rite::nn::inject_lora(model, config);
  const at::NoGradGuard no_grad;
  for (const lora_rite::FactorPair& pair : lora_rite::find_factor_pairs(model)) pair.a.mul_(options.init_scale);
}

int64_t rows_at_once(const RunOptions& options, const Processes& processes) {
  const int64_t own = (options.batch + processes.size - 1) / processes.size;
  return options.micro_batch > 0 ? std::min(options.micro_batch, own) : own;
}

void check_device(const std::string& device) {
  if (device == "cuda" && !torch::cuda::is_available()) {
    fail("--device cuda: LibTorch finds no GPU here; choose cpu");
  }
}

void save_adapter_of(const torch::nn::Module& model, const RunOptions& options, const std::string& task_type,
                     const std::filesystem::path& folder) {
  lora_rite::AdapterConfig origin;
  origin.task_type = task_type;
  origin.base_model_name_or_path = options.model;
  lora_rite::save_adapter(folder, lora_rite::nn::peft_adapter(model, "default", origin));
}

void check_it_fits(const RunOptions& options, MemoryQuestion question, const Processes& processes) {
  question.model = options.model;
  question.optimizer = options.optimizer;
  question.row_equilibration = options.row_equilibration;
  question.gradient_checkpointing = options.gradient_checkpointing;
  question.rows = rows_at_once(options, processes);
  // Processes share a machine as a rule.
  const double available = options.device == "cpu" ? available_memory() : available_gpu_memory();
  check_memory(plan_memory(question),
               options.memory_limit > 0 ? 1e9 * options.memory_limit : available / processes.size);
}

std::unique_ptr<Workload> make_workload(const RunOptions& options, const Processes& processes) {
  check_device(options.device);
  const std::filesystem::path config = std::filesystem::path(options.model) / "config.json";
  const std::string type = read_model_type(config);
  if (type == "bert") return load_sentence_workload(options, processes);
  const std::vector<std::string> languages = {"llama", "gemma", "gemma2", "t5", "mt5"};
  if (std::find(languages.begin(), languages.end(), type) == languages.end()) {
    fail(config.string(), ": 'model_type' is '", type, "', but only bert and ", join(languages), " are supported");
  }
  return load_language_workload(options, processes);
}

}  // namespace finetune
