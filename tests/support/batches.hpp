#pragma once

// The batches of a param group by themselves: one step without an optimizer.

#include <gtest/gtest.h>
#include <lora_rite/engine/batches.hpp>
#include <lora_rite/engine/make_batches.hpp>

#include <string>
#include <vector>

namespace lora_rite::test {

/// Pairs of one param group, placed.
template <class Basis = PolarBasis>
engine::Batches place(const std::vector<FactorPair>& pairs, Engine engine) {
  std::vector<engine::PairToPlace> to_place;
  for (size_t i = 0; i < pairs.size(); ++i)
    to_place.push_back({i, pairs[i], "pair " + std::to_string(i), std::nullopt});
  return engine::make_batches<Basis>(to_place, pairs.size(), engine);
}

/// A step of every group, without a clip.
inline void act(engine::Batches& batches, const LoraRiteOptions& options) {
  const torch::NoGradGuard no_grad;
  for (const auto& group : batches.groups) {
    const auto observation = group->observe(options);
    ASSERT_TRUE(observation);
    const torch::Tensor step_allowed = observation->finite();
    observation->unmagnify(step_allowed);
    observation->plan(options, torch::ones({}, torch::kDouble), step_allowed)->commit();
  }
}

}  // namespace lora_rite::test
