#pragma once

// What the tests of several processes share: some pairs, and what is expected of all processes.

#include "distributed/processes.hpp"
#include "support/pairs.hpp"

namespace lora_rite::test {

/// Three shapes, one of them four times: more pairs than processes, of unequal cost.
inline std::vector<FactorPair> some_pairs(torch::Dtype dtype) {
  torch::manual_seed(5);
  std::vector<FactorPair> pairs;
  for (int i = 0; i < 4; ++i) pairs.push_back(random_pair("q" + std::to_string(i), 4, 24, 16, dtype));
  pairs.push_back(random_pair("wide", 4, 70, 31, dtype));
  pairs.push_back(random_pair("small", 2, 12, 8, dtype));
  return pairs;
}

inline LoraRiteOptions some_options() { return LoraRiteOptions(1e-2).weight_decay(0.01); }

inline void expect_same_everywhere(const Process& process, const std::vector<FactorPair>& pairs) {
  for (const auto& pair : pairs) {
    for (const auto& factor : {pair.a, pair.b}) {
      at::Tensor first = factor.detach().clone();
      detail::Collectives(process.group).broadcast(first, 0, "a test");
      EXPECT_TRUE(at::equal(first, factor)) << pair.name;
    }
  }
}

/// The gradients of step i; each process sees some of the data, and their mean is what matters.
inline void set_local_gradients(const Process& process, const std::vector<FactorPair>& pairs, int64_t i) {
  set_gradients(pairs, static_cast<uint64_t>(1000 + 17 * i + process.rank));
}

inline void expect_error(const std::string& expected, const std::function<void()>& body) {
  EXPECT_TRUE(mentions(error_of(body), expected));
}

}  // namespace lora_rite::test
