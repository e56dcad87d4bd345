#pragma once

#include <torch/optim/adam.h>

#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "lora_rite/factor_pair.hpp"

namespace lora_rite::baselines {

/// LoRA+ (Hayou, Ghosh & Yu, ICML 2024): Adam with a larger rate for B. Group 0 holds the factors A with rate lr, group
/// 1 the factors B with rate lr · ratio.
class LoraPlus : public torch::optim::Adam {
 public:
  /// `ratio` > 0; 16 is the authors' choice. Throws c10::Error if it is not.
  explicit LoraPlus(const std::vector<FactorPair>& pairs, torch::optim::AdamOptions options = {}, double ratio = 16)
      : Adam(groups(pairs, options, ratio), options) {
    // LibTorch takes a group's rate that is the default of AdamOptions for one that was not set (from 2.10 on).
    param_groups_[1].options().set_lr(options.lr() * ratio);
  }

 private:
  static std::vector<torch::optim::OptimizerParamGroup> groups(const std::vector<FactorPair>& pairs,
                                                               const torch::optim::AdamOptions& options, double ratio) {
    TORCH_CHECK(ratio > 0 && std::isfinite(ratio), "ratio is ", ratio, ", expected a finite number > 0");
    std::vector<torch::Tensor> a, b;
    const std::vector<torch::Tensor> factors = detail::alternating_factors(pairs);
    for (size_t i = 0; i < factors.size(); ++i) (i % 2 == 0 ? a : b).push_back(factors[i]);
    auto of_a = std::make_unique<torch::optim::AdamOptions>(options);
    auto of_b = std::make_unique<torch::optim::AdamOptions>(options);
    of_b->lr(options.lr() * ratio);
    std::vector<torch::optim::OptimizerParamGroup> result;
    result.emplace_back(std::move(a), std::move(of_a));
    result.emplace_back(std::move(b), std::move(of_b));
    return result;
  }
};

}  // namespace lora_rite::baselines
