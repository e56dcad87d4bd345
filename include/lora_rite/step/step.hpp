#pragma once

#include <ATen/ATen.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "lora_rite/bodies.hpp"
#include "lora_rite/engine/acts.hpp"
#include "lora_rite/engine/choose.hpp"
#include "lora_rite/engine/device_numbers.hpp"
#include "lora_rite/optimizer_base.hpp"
#include "lora_rite/optimizer_support.hpp"
#include "lora_rite/step/group.hpp"

/// Bodies of LoraRiteBase: the step.
namespace lora_rite {

namespace detail {

inline std::vector<at::Tensor> to_device(const std::vector<at::Tensor>& tensors, at::Device device) {
  std::vector<at::Tensor> result;
  for (const auto& tensor : tensors) result.push_back(engine::on_device(tensor, device));
  return result;
}

}  // namespace detail

/// What act 1 found, of all param groups.
struct LoraRiteBase::Act1 {
  struct ObservedGroup {
    const LoraRiteOptions* options;
    engine::BatchGroup* group;
    std::unique_ptr<engine::Observation> observation;
  };
  std::vector<ObservedGroup> groups;
  std::vector<int64_t> order;            ///< of the observed pairs among the pairs of all groups
  std::optional<at::Tensor> all_finite;  ///< absent where no parameter has a gradient
};

LORA_RITE_BODY torch::Tensor LoraRiteBase::step(LossClosure closure) {
  torch::Tensor loss = detail::loss_of(closure);
  at::NoGradGuard no_grad;
  with_batches([&] {
    check_inputs();
    agree_before_change({});
    take_step();
  });
  return loss;
}

LORA_RITE_BODY void LoraRiteBase::upload_rates() {
  at::NoGradGuard no_grad;
  check_groups();
  for (size_t i = 0; i < group_count(); ++i) {
    Group& group = own_->all[i];
    if (group.adamw()) {
      group.adamw()->upload_rate(adamw_options(i));
    } else if (group.pairs()->batches) {
      for (const auto& batches : group.pairs()->batches->groups) batches->upload_rates(rite_options(i));
    }
  }
}

/// Options, factors and gradients, before anything is changed.
LORA_RITE_BODY void LoraRiteBase::check_inputs() const {
  for (size_t i = 0; i < group_count(); ++i) {
    const std::string label = "LoraRite, group " + std::to_string(i);
    const Group& group = own_->all[i];
    if (group.adamw()) {
      group.adamw()->check_inputs(adamw_options(i), label);
      continue;
    }
    detail::check_options(rite_options(i), label);
    for (const auto& placed : group.pairs()->batches->all) placed.batch->check_inputs();
  }
}

/// Act 1: GᵀG, and (YC)ᵀYC, (YC)ᵀY_old of the partners. Tall data become r×r statistics.
LORA_RITE_BODY LoraRiteBase::Act1 LoraRiteBase::observe() {
  Act1 found;
  std::vector<at::Tensor> finite;
  int64_t first_pair = 0;  // of the param group
  for (size_t i = 0; i < group_count(); ++i) {
    Group& group = own_->all[i];
    if (group.adamw()) {
      for (at::Tensor& flag : group.adamw()->finite()) finite.push_back(std::move(flag));
      continue;
    }
    const engine::Batches& batches = *group.pairs()->batches;
    for (const auto& together : batches.groups) {
      auto observation = together->observe(rite_options(i));
      if (!observation) continue;
      finite.push_back(observation->finite());
      for (const size_t batch : observation->batches())
        for (const int64_t pair : batches.all[batch].pair_indices) found.order.push_back(first_pair + pair);
      found.groups.push_back({&rite_options(i), together.get(), std::move(observation)});
    }
    first_pair += static_cast<int64_t>(group.pair_count());
  }
  if (!finite.empty()) found.all_finite = at::stack(detail::to_device(finite, finite[0].device())).all();
  return found;
}

/// The step, with inputs that were checked and batches that were built.
LORA_RITE_BODY void LoraRiteBase::take_step() {
  Act1 found = observe();
  const std::optional<at::Tensor> agreed = agree_on_step(found.all_finite);
  if (!agreed) return;
  const at::Tensor& step_allowed = *agreed;
  const at::Device device = step_allowed.device();

  // Act 2: R⁺ of the partners and ‖Ḡ‖² = tr R⁺ᵀ GᵀG R⁺; c = min(1, bound / ‖Ḡ‖) over all pairs; then V, H and the maps
  // M = N·momentum_map + G·gradient_map for the rows.
  std::vector<at::Tensor> squared_norms;
  for (const auto& [options, group, observation] : found.groups)
    squared_norms.push_back(observation->unmagnify(engine::on_device(step_allowed, group->device())));
  const at::Tensor norm = sum_over_processes(in_pair_order(squared_norms, found.order, device)).sum().sqrt();
  std::vector<std::unique_ptr<engine::Plan>> plans;
  for (auto& [options, group, observation] : found.groups) {
    const double bound = options->clip_unmagnified_norm();
    const at::Tensor clip_factor = bound > 0 ? (bound / norm).clamp_max(1.0) : at::ones_like(norm);
    plans.push_back(observation->plan(*options, engine::on_device(clip_factor, group->device()),
                                      engine::on_device(step_allowed, group->device())));
    observation.reset();
  }
  for (size_t i = 0; i < group_count(); ++i)
    if (own_->all[i].adamw()) plans.push_back(own_->all[i].adamw()->plan(adamw_options(i), step_allowed));
  at::Tensor skipped = negated(step_allowed).to(at::kLong);
  at::Tensor& count = own_->skipped;
  if (count.defined() && count.device() != device) count = count.to(device);

  // Act 3: X ← (1−ηλ) X − ηN. Nothing from here on asks for memory, but for AdamW's kernel and accelerators.
  for (const auto& plan : plans) plan->commit();
  if (count.defined()) {
    count.add_(skipped);  // in place: a recorded step counts, too
  } else {
    count = std::move(skipped);
  }
  for (const auto& plan : plans)
    if (plan->error()) std::rethrow_exception(plan->error());
}

/// What batches tell of their pairs, in the order of the pairs of all groups, 0 for the others: a sum over it does not
/// depend on how pairs are batched or divided over processes.
LORA_RITE_BODY at::Tensor LoraRiteBase::in_pair_order(const std::vector<at::Tensor>& of_batches,
                                                      const std::vector<int64_t>& order, at::Device device) {
  int64_t count = 0;
  for (const Group& group : own_->all) count += static_cast<int64_t>(group.pair_count());
  at::Tensor result = at::zeros({count}, at::TensorOptions().dtype(at::kDouble).device(device));
  if (of_batches.empty()) return result;
  at::Tensor& indices = own_->order_on_device;
  if (!indices.defined() || indices.device() != device || order != own_->order) {
    indices = at::tensor(order, at::kLong).to(device);
    own_->order = order;
  }
  return result.index_copy(0, indices, at::cat(detail::to_device(of_batches, device)));
}

}  // namespace lora_rite
