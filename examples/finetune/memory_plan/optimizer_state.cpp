#include "memory_plan/optimizer_state.hpp"

#include <lora_rite/nn/inject.hpp>
#include <map>
#include <string>
#include <utility>

#include "common/error.hpp"

namespace finetune {
namespace {

// A side of Shampoo's or SOAP's two matrices: the statistics and the root or basis. Long sides go without.
double preconditioner(const std::vector<int64_t>& shape) {
  constexpr int64_t kMaxPreconditioner = 1024;
  const int64_t columns = shape.size() > 1 ? static_cast<int64_t>(count(shape)) / shape.front() : 1;
  double size = 0;
  for (const int64_t side : {shape.front(), columns}) {
    if (side <= kMaxPreconditioner) size += 2 * static_cast<double>(side * side);
  }
  return size;
}

}  // namespace

std::vector<FactorShapes> plan_factors(torch::nn::Module& model, const lora_rite::nn::LoraConfig& config) {
  std::vector<FactorShapes> factors;
  for (const auto& step : lora_rite::nn::detail::plan_injection("inject_lora", model, config, "default").steps) {
    auto [a, b] = step.layer->factor_shapes(step.config.rank);
    factors.push_back({std::move(a), std::move(b)});
  }
  return factors;
}

double state_bytes(const MemoryQuestion& question, const FactorShapes& pair) {
  const std::string& name = question.optimizer;
  if (name == "rite" || name == "rite-qr") {
    // One momentum; V and R⁺ of both sides, the column sums of factors and momentum, four scalars a side.
    const double r = pair.rank();
    double bytes = kFloatBytes * pair.size() + kDoubleBytes * (4 * r * r + 4 * r + 8);
    if (question.row_equilibration) bytes += kFloatBytes * pair.size() / r;
    return bytes;
  }
  static const std::map<std::string, double> moments = {
      {"sgd", 0},     {"adagrad", 1}, {"rmsprop", 1},   {"muon", 1},        {"adam", 2},
      {"adamw", 2},   {"lamb", 2},    {"lora+", 2},     {"scaled-adam", 2}, {"soap", 2},
      {"shampoo", 3}, {"polora", 1},  {"lora-muon", 1}, {"lora-tsd", 1},    {"altlora", 1}};
  const auto found = moments.find(name);
  if (found == moments.end()) fail("--optimizer ", name, ": its memory is not known");
  double size = found->second * pair.size();
  if (name == "soap" || name == "shampoo") size += preconditioner(pair.a) + preconditioner(pair.b);
  if (name == "polora") size += pair.size() / pair.rank() + 4 * pair.rank();  // energies, and four vectors of norms
  if (name == "altlora") size += 2 * pair.rank() * pair.rank();               // overlaps
  return kFloatBytes * size;
}

}  // namespace finetune
