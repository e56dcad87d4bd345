#pragma once

#include <torch/optim/adagrad.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/rmsprop.h>
#include <torch/optim/sgd.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/baselines/alt_lora.hpp"
#include "lora_rite/baselines/lamb.hpp"
#include "lora_rite/baselines/lora_muon.hpp"
#include "lora_rite/baselines/lora_plus.hpp"
#include "lora_rite/baselines/lora_tsd.hpp"
#include "lora_rite/baselines/muon.hpp"
#include "lora_rite/baselines/polora.hpp"
#include "lora_rite/baselines/scaled_adam.hpp"
#include "lora_rite/baselines/shampoo.hpp"
#include "lora_rite/baselines/soap.hpp"
#include "lora_rite/optimizer.hpp"

namespace lora_rite {
namespace detail {

using MakeOptimizer = std::function<std::unique_ptr<torch::optim::Optimizer>(std::vector<FactorPair>, double)>;

/// An optimizer that takes all factors alike, with its own defaults but the rate.
template <class Optimizer, class Options>
MakeOptimizer over_factors() {
  return [](const std::vector<FactorPair>& pairs, double lr) {
    return std::make_unique<Optimizer>(alternating_factors(pairs), Options(lr));
  };
}

/// One that takes pairs, likewise.
template <class Optimizer, class Options>
MakeOptimizer over_pairs() {
  return
      [](const std::vector<FactorPair>& pairs, double lr) { return std::make_unique<Optimizer>(pairs, Options(lr)); };
}

/// A new optimizer is one line here.
inline const std::vector<std::pair<std::string, MakeOptimizer>>& optimizer_registry() {
  namespace optim = torch::optim;
  using Pairs = std::vector<FactorPair>;
  static const std::vector<std::pair<std::string, MakeOptimizer>> registry = {
      {"rite",
       [](Pairs pairs, double lr) { return std::make_unique<LoraRite<>>(std::move(pairs), LoraRiteOptions(lr)); }},
      {"rite-qr", [](Pairs pairs,
                     double lr) { return std::make_unique<LoraRite<QrBasis>>(std::move(pairs), LoraRiteOptions(lr)); }},
      {"adam", over_factors<optim::Adam, optim::AdamOptions>()},
      {"adamw", over_factors<optim::AdamW, optim::AdamWOptions>()},
      {"adagrad", over_factors<optim::Adagrad, optim::AdagradOptions>()},
      {"rmsprop", over_factors<optim::RMSprop, optim::RMSpropOptions>()},
      {"sgd", over_factors<optim::SGD, optim::SGDOptions>()},
      {"shampoo", over_factors<baselines::Shampoo, baselines::ShampooOptions>()},
      {"lamb", over_factors<baselines::Lamb, baselines::LambOptions>()},
      {"lora+", [](const Pairs& pairs,
                   double lr) { return std::make_unique<baselines::LoraPlus>(pairs, torch::optim::AdamOptions(lr)); }},
      {"scaled-adam", over_pairs<baselines::ScaledAdam, baselines::ScaledAdamOptions>()},
      {"muon", over_factors<baselines::Muon, baselines::MuonOptions>()},
      {"soap", over_factors<baselines::Soap, baselines::SoapOptions>()},
      {"polora", over_pairs<baselines::PoLora, baselines::PoLoraOptions>()},
      {"lora-muon", over_pairs<baselines::LoraMuon, baselines::LoraMuonOptions>()},
      {"lora-tsd", over_pairs<baselines::LoraTsd, baselines::LoraTsdOptions>()},
      {"altlora", over_pairs<baselines::AltLora, baselines::AltLoraOptions>()},
  };
  return registry;
}

}  // namespace detail

/// The names that `make_optimizer` knows.
inline std::vector<std::string> optimizer_names() {
  std::vector<std::string> names;
  for (const auto& [name, make] : detail::optimizer_registry()) names.push_back(name);
  return names;
}

/// An optimizer over LoRA pairs by its name, with its own defaults but the learning rate. Throws c10::Error listing the
/// names if there is no such one, and what the optimizer itself throws.
inline std::unique_ptr<torch::optim::Optimizer> make_optimizer(const std::string& name, std::vector<FactorPair> pairs,
                                                               double lr) {
  for (const auto& [known, make] : detail::optimizer_registry())
    if (known == name) return make(std::move(pairs), lr);
  std::string names;
  for (const std::string& known : optimizer_names()) names += (names.empty() ? "" : ", ") + known;
  TORCH_CHECK(false, "make_optimizer: no optimizer is named '", name, "', expected one of ", names);
}

}  // namespace lora_rite
