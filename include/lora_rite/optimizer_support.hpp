#pragma once

#include <ATen/core/grad_mode.h>
#include <torch/optim/optimizer.h>

#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

/// What every subclass of LibTorch's Optimizer needs here.
namespace lora_rite::detail {

/// The loss that a closure of `step` returns, which it computes with gradients enabled; undefined without a closure.
inline torch::Tensor loss_of(const torch::optim::Optimizer::LossClosure& closure) {
  if (!closure) return {};
  at::AutoGradMode enable_grad(true);
  return closure();
}

/// A param group of these tensors and options. LibTorch's add_param_group merges the options of its own optimizers only
/// and loses those of others (from 2.10 on), so they are set again.
inline void add_group(torch::optim::Optimizer& optimizer, std::vector<torch::Tensor> tensors,
                      std::unique_ptr<torch::optim::OptimizerOptions> options) {
  optimizer.add_param_group(torch::optim::OptimizerParamGroup(std::move(tensors), options->clone()));
  optimizer.param_groups().back().set_options(std::move(options));
}

/// Throws c10::Error naming the option (and whose it is, if `where` says so), what was found and what was expected.
/// Written so that NaN fails every comparison.
inline void check_at_least_zero(const char* name, double value, const std::string& where = {}) {
  TORCH_CHECK(value >= 0 && std::isfinite(value), where, where.empty() ? "" : ": ", name, " is ", value,
              ", expected a finite number ≥ 0");
}
/// The same of a rate by which a mean forgets.
inline void check_decay_rate(const char* name, double value, const std::string& where = {}) {
  TORCH_CHECK(value >= 0 && value < 1, where, where.empty() ? "" : ": ", name, " is ", value,
              ", expected a number in [0, 1)");
}

}  // namespace lora_rite::detail
