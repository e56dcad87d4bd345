#pragma once

#include <torch/nn/module.h>
#include <torch/optim/adamw.h>
#include <torch/optim/optimizer.h>

#include <utility>
#include <vector>

#include "lora_rite/engine/basis_functions.hpp"
#include "lora_rite/factor_pair.hpp"
#include "lora_rite/optimizer_base.hpp"
#include "lora_rite/options.hpp"
#include "lora_rite/rule/basis.hpp"

namespace lora_rite {

/// The optimizer: how it is constructed. `LoraRiteBase` (optimizer_base.hpp) has all that it does. `Basis` (PolarBasis
/// or QrBasis) is the root of the Gram matrix; both give the same trajectory up to round-off.
template <class Basis = PolarBasis>
class LoraRite : public LoraRiteBase {
 public:
  /// One group of these pairs. Errors as of `add_pairs`.
  explicit LoraRite(std::vector<FactorPair> pairs, LoraRiteOptions options = {}) : LoraRite(options) {
    add_pairs(std::move(pairs), options);
  }

  /// All factor pairs of a module (`find_factor_pairs`) in one group, and all its other trainable parameters, if any,
  /// in a second one with AdamW and the options `others`. What the module holds under several names is stepped once.
  /// With `options.maximize()` both groups ascend. Throws c10::Error if the module has no factors, or one that has no
  /// partner or is of a method that is refused.
  explicit LoraRite(const torch::nn::Module& module, LoraRiteOptions options, torch::optim::AdamWOptions others)
      : LoraRite(options) {
    add_module(module, options, others);
  }

  /// The same; AdamW takes lr and weight_decay from `options`.
  explicit LoraRite(const torch::nn::Module& module, LoraRiteOptions options = {})
      : LoraRite(module, options, torch::optim::AdamWOptions(options.lr()).weight_decay(options.weight_decay())) {}

  /// a₀, b₀, a₁, b₁, …, as the authors' code takes them. Throws c10::Error for an odd number of tensors.
  explicit LoraRite(std::vector<torch::Tensor> alternating, LoraRiteOptions options = {}) : LoraRite(options) {
    add_alternating(alternating, options);
  }

  /// LibTorch's param groups, each added by `add_param_group`: those without options have `defaults`, the options of
  /// the others are taken whole. Throws c10::Error if there are none.
  explicit LoraRite(const std::vector<torch::optim::OptimizerParamGroup>& groups, LoraRiteOptions defaults = {})
      : LoraRite(defaults) {
    add_groups(groups);
  }

 protected:
  /// As LoraRiteBase's.
  explicit LoraRite(const LoraRiteOptions& defaults, bool parts = false)
      : LoraRiteBase(engine::BasisFunctions::of<Basis>(), defaults, parts) {}
};

}  // namespace lora_rite

// The bodies, unless the library lora_rite::compiled holds them. (It has our two bases; for one of your own include
// engine/make_batches.hpp as well.)
#ifndef LORA_RITE_COMPILED
#include "lora_rite/engine/make_batches.hpp"
#include "lora_rite/step/archive.inc"
#include "lora_rite/step/groups.inc"
#include "lora_rite/step/load_matching.inc"
#include "lora_rite/step/state.inc"
#include "lora_rite/step/step.inc"
#endif
