// Time of one optimizer step: LoRA-RITE beside torch::optim's Adam and AdamW, on the same tensors.
//
// All run in one process in interleaved rounds, so that a slow minute of the machine meets each of them; the medians
// and their ratios are printed last. Every flag of Google Benchmark works, and comes after the defaults set here.

#include <benchmark/benchmark.h>
#include <torch/torch.h>
#include <lora_rite/lora_rite.hpp>

#include <cstdio>
#include <map>
#include <string>
#include <vector>

namespace {

// The factors of a small language model: r = 16 on the attention and feed-forward matrices of 6 layers with d = 384.
std::vector<lora_rite::FactorPair> make_pairs() {
  torch::manual_seed(0);
  std::vector<lora_rite::FactorPair> pairs;
  const auto factor = [](int64_t rows, int64_t columns) {
    torch::Tensor x = torch::randn({rows, columns}).mul_(0.02).requires_grad_();
    x.mutable_grad() = torch::randn({rows, columns}).mul_(1e-3);
    return x;
  };
  const auto add = [&](const std::string& name, int64_t in, int64_t out) {
    pairs.push_back({name, factor(16, in), factor(out, 16)});
  };
  for (int layer = 0; layer < 6; ++layer) {
    const std::string prefix = "layer" + std::to_string(layer) + ".";
    for (const char* name : {"query", "key", "value", "output"}) add(prefix + name, 384, 384);
    add(prefix + "up", 384, 1536);
    add(prefix + "down", 1536, 384);
  }
  return pairs;
}

std::vector<torch::Tensor> tensors(const std::vector<lora_rite::FactorPair>& pairs) {
  std::vector<torch::Tensor> all;
  for (const auto& pair : pairs) all.insert(all.end(), {pair.a, pair.b});
  return all;
}

void run(benchmark::State& state, torch::optim::Optimizer& optimizer) {
  optimizer.step();  // allocates the state
  for (auto _ : state) optimizer.step();
}

void rite(benchmark::State& state) {
  lora_rite::LoraRite<> optimizer(make_pairs(), lora_rite::LoraRiteOptions(1e-4));
  run(state, optimizer);
}
void adam(benchmark::State& state) {
  torch::optim::Adam optimizer(tensors(make_pairs()), torch::optim::AdamOptions(1e-4));
  run(state, optimizer);
}
void adamw(benchmark::State& state) {
  torch::optim::AdamW optimizer(tensors(make_pairs()), torch::optim::AdamWOptions(1e-4));
  run(state, optimizer);
}

const auto real_time = [](benchmark::internal::Benchmark* b) { b->UseRealTime()->Unit(benchmark::kMicrosecond); };
BENCHMARK(rite)->Apply(real_time);
BENCHMARK(adam)->Apply(real_time);
BENCHMARK(adamw)->Apply(real_time);

// The usual table, and the medians kept for the ratio.
struct Reporter : benchmark::ConsoleReporter {
  std::map<std::string, double> medians;
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
  if (benchmark::ReportUnrecognizedArguments(count, pointers.data())) return 1;

  Reporter reporter;
  benchmark::RunSpecifiedBenchmarks(&reporter);
  const auto& median = reporter.medians;
  if (median.size() < 3) return 0;  // a filter left some out
  std::printf("median step, 36 pairs of rank 16, %d threads: LoRA-RITE %.0f us, Adam %.0f us, AdamW %.0f us\n",
              torch::get_num_threads(), median.at("rite"), median.at("adam"), median.at("adamw"));
  std::printf("LoRA-RITE / Adam = %.2f, LoRA-RITE / AdamW = %.2f\n", median.at("rite") / median.at("adam"),
              median.at("rite") / median.at("adamw"));
  return 0;
}
