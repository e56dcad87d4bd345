// Time of one optimizer step, LoRA-RITE beside torch::optim's Adam and AdamW and ATen's fused AdamW, on tensors of the
// same shapes.
//
// The contenders of a case run in one process in interleaved rounds, so that a slow minute of the machine meets each of
// them; what counts is the ratio of their medians. All flags of Google Benchmark work, and some of our own: --help.

#include <benchmark/benchmark.h>
#include <torch/torch.h>
#include <lora_rite/lora_rite.hpp>

#include <ATen/record_function.h>

#include <CLI/CLI.hpp>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "contenders.hpp"

namespace {

using namespace bench;

/// Contenders that run interleaved on the same shapes.
struct Case {
  std::string name;
  std::vector<Shape> shapes;
  std::vector<std::pair<std::string, Make>> contenders;
  int threads = 2;
  torch::ScalarType dtype = torch::kFloat;
};

std::vector<std::pair<std::string, Make>> usual(torch::Device device) {
  std::vector<std::pair<std::string, Make>> contenders = {
      {"rite", rite()}, {"adam", named("adam")}, {"adamw", named("adamw")}, {"fused_adamw", fused_adamw}};
#ifdef LORA_RITE_HAS_BEFORE
  contenders.emplace_back("rite, before", rite_before);
#endif
  if (!device.is_cuda()) return contenders;
  contenders.emplace_back("rite, capturable", rite(LoraRiteOptions(1e-4).capturable(true)));
#ifdef LORA_RITE_CUDA
  contenders.emplace_back("rite, Engine::Cuda", rite(LoraRiteOptions(1e-4).engine(lora_rite::Engine::Cuda)));
#endif
#ifdef LORA_RITE_HAS_CUDA_GRAPHS
  contenders.emplace_back("rite, graph", rite_graph(lora_rite::Engine::Automatic));
#ifdef LORA_RITE_CUDA
  contenders.emplace_back("rite, Engine::Cuda in a graph", rite_graph(lora_rite::Engine::Cuda));
#endif
#endif
  return contenders;
}

/// The factors of a small language model: r = 16 on the matrices of 6 layers with d = 384.
std::vector<Shape> minilm() { return {{24, 384, 384, 16}, {6, 384, 1536, 16}, {6, 1536, 384, 16}}; }

/// r = 16 on all linear layers of a whole model.
std::vector<Shape> gemma_2b() {
  return {{36, 2048, 2048, 16}, {36, 2048, 256, 16}, {36, 2048, 16384, 16}, {18, 16384, 2048, 16}};
}
std::vector<Shape> llama_7b() { return {{128, 4096, 4096, 16}, {64, 4096, 11008, 16}, {32, 11008, 4096, 16}}; }

std::vector<Case> suite(const std::string& name, torch::Device device) {
  std::vector<Case> cases;
  const auto add = [&](const Shape& shape, int threads = 2) {
    cases.push_back({shape.name(), {shape}, usual(device), threads});
  };
  if (name == "short") {
    cases.push_back({"minilm", minilm(), usual(device)});
    add({24, 1024, 1024, 16, 0.7});
  } else if (name == "targets" || name == "one-thread") {
    const int threads = name == "targets" ? 2 : 1;
    for (const Shape& shape : std::vector<Shape>{{126, 512, 512, 8, 0.25},
                                                 {32, 2048, 2048, 8, 0.4},
                                                 {24, 1024, 1024, 16, 0.7},
                                                 {126, 2048, 2048, 16, 0.8},
                                                 {16, 4096, 4096, 16, 1.0},
                                                 {18, 2048, 16384, 16, 1.0},
                                                 {32, 2048, 2048, 32, 1.5},
                                                 {32, 2048, 2048, 64, 4.0}})
      add(shape, threads);
  } else if (name == "models") {
    cases.push_back({"minilm", minilm(), usual(device)});
    cases.push_back({"gemma-2b", gemma_2b(), usual(device)});
    cases.push_back({"llama-7b", llama_7b(), usual(device)});
  } else if (name == "ranks") {
    for (const int64_t rank : {1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 100, 128}) add({32, 1024, 1024, rank});
  } else if (name == "pairs") {
    for (const int64_t pairs : {1, 10, 100, 1000, 10000}) add({pairs, 256, 256, 8});
  } else if (name == "width") {
    for (const int64_t d : {128, 512, 2048, 8192, 32768, 65536}) add({8, d, d, 16});
  } else if (name == "optimizers") {
    Case all = {"optimizers", {{24, 1024, 1024, 16}}, {}};
    for (const std::string& optimizer : lora_rite::optimizer_names())
      all.contenders.push_back({optimizer, named(optimizer)});
    cases.push_back(std::move(all));
  } else if (name == "variants") {
    const Shape shape = {24, 1024, 1024, 16};
    const LoraRiteOptions options(1e-4);
    cases.push_back({"variants",
                     {shape},
                     {{"rite", rite()},
                      {"rite, QrBasis", rite<lora_rite::QrBasis>()},
                      {"rite, no escape", rite(LoraRiteOptions(options).escape(false))},
                      {"rite, no clipping", rite(LoraRiteOptions(options).clip_unmagnified_norm(0))},
                      {"rite, balance", rite(LoraRiteOptions(options).balance(true))},
                      {"rite, preconditioner_exponent", rite(LoraRiteOptions(options).preconditioner_exponent(0.25))},
                      {"rite, row_equilibration", rite(LoraRiteOptions(options).row_equilibration(true))},
                      {"rite, max_update_rms", rite(LoraRiteOptions(options).max_update_rms(1))},
                      {"rite, Engine::Device", rite(LoraRiteOptions(options).engine(lora_rite::Engine::Device))},
                      {"adamw", named("adamw")}}});
    for (const auto dtype : {torch::kDouble, torch::kBFloat16})
      cases.push_back({std::string("dtype ") + torch::toString(dtype),
                       {shape},
                       {{"rite", rite()}, {"adam", named("adam")}, {"adamw", named("adamw")}},
                       2,
                       dtype});
  } else {
    throw std::invalid_argument("unknown suite " + name);
  }
  return cases;
}

int64_t calls = 0;

/// ATen operator calls of one step, nested ones included.
int64_t operator_calls(const Step& step) {
  calls = 0;
  const auto handle = at::addGlobalCallback(
      at::RecordFunctionCallback([](const at::RecordFunction&) -> std::unique_ptr<at::ObserverContext> {
        ++calls;
        return nullptr;
      }).scopes({at::RecordScope::FUNCTION}));
  step();
  at::removeCallback(handle);
  return calls;
}

/// The usual table, and the medians kept.
struct Reporter : benchmark::ConsoleReporter {
  std::map<std::string, double> medians;  ///< microseconds
  void ReportRuns(const std::vector<Run>& runs) override {
    for (const Run& run : runs)
      if (run.aggregate_name == "median") medians[run.run_name.function_name] = run.GetAdjustedRealTime();
    ConsoleReporter::ReportRuns(runs);
  }
};

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> flags = {argv[0], "--benchmark_repetitions=9", "--benchmark_min_time=0.05",
                                    "--benchmark_enable_random_interleaving=true",
                                    "--benchmark_report_aggregates_only=true"};
  flags.insert(flags.end(), argv + 1, argv + argc);
  std::vector<char*> pointers;
  for (std::string& flag : flags) pointers.push_back(flag.data());
  int count = static_cast<int>(pointers.size());
  benchmark::Initialize(&count, pointers.data());

  CLI::App app("Times one optimizer step; flags of Google Benchmark (--benchmark_...) are taken too.");
  std::vector<std::string> suites = {"short"};
  std::string json_path;
  std::string device_name = "cpu";
  double fail_above = 0;
  bool list = false;
  app.add_option("--suite", suites, "short, targets, one-thread, models, ranks, pairs, width, variants, optimizers")
      ->delimiter(',');
  app.add_option("--json", json_path, "writes the medians and what belongs to them to this file");
  app.add_option("--fail-above", fail_above, "exit status 1 if LoRA-RITE's time to AdamW's exceeds this × its target");
  app.add_option("--device", device_name, "cpu, or cuda: a step's time ends when the GPU has done it")
      ->check(CLI::IsMember({"cpu", "cuda"}));
  app.add_flag("--list", list, "prints the names of the cases and measures nothing");
  CLI11_PARSE(app, count, pointers.data());

  const torch::Device device(device_name);
  if (device.is_cuda() && !torch::cuda::is_available()) {
    std::cerr << "step_time: --device cuda: LibTorch finds no GPU here\n";
    return 1;
  }
  nlohmann::json results = nlohmann::json::array();
  bool failed = false;
  for (const std::string& suite_name : suites) {
    for (const Case& c : suite(suite_name, device)) {
      if (list) {
        std::cout << c.name << '\n';
        continue;
      }
      torch::set_num_threads(c.threads);
      benchmark::ClearRegisteredBenchmarks();
      std::map<std::string, int64_t> operators;
      std::vector<Step> steps;
      for (const auto& [contender, make] : c.contenders) {
        steps.push_back(make(make_pairs(c.shapes, c.dtype, device)));
        steps.back()();  // allocates the state
        operators[contender] = operator_calls(steps.back());
      }
      for (size_t i = 0; i < steps.size(); ++i) {
        benchmark::RegisterBenchmark((c.name + "/" + c.contenders[i].first).c_str(),
                                     [step = &steps[i], waits = device.is_cuda()](benchmark::State& state) {
                                       for (auto _ : state) {
                                         (*step)();
                                         if (waits) torch::cuda::synchronize();
                                       }
                                     })
            ->UseRealTime()
            ->Unit(benchmark::kMicrosecond);
      }
      Reporter reporter;
      benchmark::RunSpecifiedBenchmarks(&reporter);
      int64_t parameters = 0;
      for (const Shape& shape : c.shapes) parameters += shape.parameters();
      const auto median = [&](const std::string& contender) {
        const auto found = reporter.medians.find(c.name + "/" + contender);
        return found == reporter.medians.end() ? 0.0 : found->second;
      };
      for (const auto& [contender, make] : c.contenders) {
        if (median(contender) == 0) continue;  // a filter left it out
        results.push_back({{"suite", suite_name},
                           {"case", c.name},
                           {"contender", contender},
                           {"threads", c.threads},
                           {"device", device_name},
                           {"dtype", torch::toString(c.dtype)},
                           {"parameters", parameters},
                           {"target", c.shapes[0].target},
                           {"median_us", median(contender)},
                           {"operator_calls", operators[contender]}});
      }
      if (median("rite") > 0 && median("rite, before") > 0) {
        std::cout << c.name << ", " << c.threads
                  << " threads: LoRA-RITE / before = " << median("rite") / median("rite, before") << std::endl;
      }
      if (median("rite") == 0 || median("adamw") == 0) continue;
      const double ratio = median("rite") / median("adamw"), target = c.shapes[0].target;
      std::cout << c.name << ", " << c.threads << " threads: LoRA-RITE / AdamW = " << ratio;
      if (median("adam") > 0) std::cout << ", / Adam = " << median("rite") / median("adam");
      if (target > 0) std::cout << " (target " << target << ")";
      std::cout << std::endl;
      if (fail_above > 0 && target > 0 && ratio > fail_above * target) failed = true;
    }
  }
  if (!json_path.empty()) std::ofstream(json_path) << results.dump(1) << '\n';
  if (failed) std::cerr << "step_time: a ratio exceeds " << fail_above << " times its target\n";
  return failed ? 1 : 0;
}
