#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/bodies.hpp"
#include "lora_rite/leaf.hpp"
#include "lora_rite/optimizer_base.hpp"
#include "lora_rite/optimizer_support.hpp"
#include "lora_rite/step/group.hpp"

/// Bodies of LoraRiteBase: its param groups, how they come and are checked, and how pairs are found.
namespace lora_rite {

LORA_RITE_BODY LoraRiteBase::LoraRiteBase(const engine::BasisFunctions& basis, const LoraRiteOptions& defaults,
                                          bool parts)
    : Optimizer(std::vector<torch::optim::OptimizerParamGroup>{}, std::make_unique<LoraRiteOptions>(defaults)),
      own_(std::make_unique<Groups>()) {
  own_->basis = basis;
  own_->parts = parts;
}
LORA_RITE_BODY LoraRiteBase::~LoraRiteBase() = default;
LORA_RITE_BODY LoraRiteBase::LoraRiteBase(LoraRiteBase&&) noexcept = default;
LORA_RITE_BODY LoraRiteBase& LoraRiteBase::operator=(LoraRiteBase&&) noexcept = default;

// --- Adding --------------------------------------------------------------------------------------------------------

/// Adds a group that was checked. What can fail comes before the first change.
LORA_RITE_BODY void LoraRiteBase::append(Group&& group, std::vector<torch::Tensor> tensors,
                                         std::unique_ptr<torch::optim::OptimizerOptions> options,
                                         detail::Owners owners) {
  own_->all.reserve(own_->all.size() + 1);
  detail::add_group(*this, std::move(tensors), std::move(options));
  own_->owners = std::move(owners);
  own_->all.push_back(std::move(group));
}

LORA_RITE_BODY void LoraRiteBase::add_pairs(std::vector<FactorPair> pairs, LoraRiteOptions options) {
  const size_t index = param_groups_.size();
  detail::check_options(options, "LoraRite, group " + std::to_string(index));
  TORCH_CHECK(!pairs.empty(), "LoraRite, group ", index, ": the list of pairs is empty, expected at least one pair");
  detail::Owners owners = own_->owners;
  for (size_t i = 0; i < pairs.size(); ++i) {
    const std::string label = detail::pair_label(pairs[i], index, i);
    detail::check_trained_pair(pairs[i], label);
    if (!own_->parts) detail::check_rank(pairs[i], detail::rows_of(pairs[i]), label);
    for (const Side side : kSides) owners.claim(pairs[i].factor(side), label);
  }
  owners.settle();
  // A leaf of which an earlier group has parts stands there. Twice, a GradScaler would unscale it twice.
  std::vector<torch::Tensor> leaves = detail::leaves_of(pairs);
  leaves.erase(
      std::remove_if(leaves.begin(), leaves.end(), [&](const torch::Tensor& leaf) { return own_->owners.know(leaf); }),
      leaves.end());
  Group group{Group::Pairs{std::move(pairs), leaves, std::nullopt}};
  append(std::move(group), std::move(leaves), std::make_unique<LoraRiteOptions>(options), std::move(owners));
}

LORA_RITE_BODY void LoraRiteBase::add_parameters(std::vector<torch::Tensor> parameters,
                                                 torch::optim::AdamWOptions options, std::optional<bool> maximize) {
  const size_t index = param_groups_.size();
  detail::check_options_of_adam(options, "LoraRite, group " + std::to_string(index));
  TORCH_CHECK(!parameters.empty(), "LoraRite, group ", index, ": the list of parameters is empty");
  detail::Owners owners = own_->owners;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const std::string label = Group::parameter_label(index, i);
    TORCH_CHECK(parameters[i].defined(), label, " is undefined, expected a tensor");
    TORCH_CHECK(at::isFloatingType(parameters[i].scalar_type()), label, " has dtype ", parameters[i].scalar_type(),
                ", expected a floating one");
    owners.claim(parameters[i], label);
  }
  const bool ascends = maximize.value_or(static_cast<const LoraRiteOptions&>(defaults()).maximize());
  Group group{engine::AdamWParameters(parameters, ascends)};
  append(std::move(group), std::move(parameters), std::make_unique<torch::optim::AdamWOptions>(options),
         std::move(owners));
}

LORA_RITE_BODY void LoraRiteBase::add_param_group(const torch::optim::OptimizerParamGroup& group) {
  if (!group.has_options()) {
    add_alternating(group.params(), static_cast<const LoraRiteOptions&>(defaults()));
  } else if (const auto* rite = dynamic_cast<const LoraRiteOptions*>(&group.options())) {
    add_alternating(group.params(), *rite);
  } else if (const auto* adamw = dynamic_cast<const torch::optim::AdamWOptions*>(&group.options())) {
    add_parameters(group.params(), *adamw);
  } else {
    TORCH_CHECK(false, "LoraRite: a param group has options of another optimizer, expected LoraRiteOptions or ",
                "torch::optim::AdamWOptions");
  }
}

LORA_RITE_BODY void LoraRiteBase::add_module(const torch::nn::Module& module, const LoraRiteOptions& options,
                                             const torch::optim::AdamWOptions& others) {
  std::vector<FactorPair> pairs = find_factor_pairs(module);
  TORCH_CHECK(!pairs.empty(), "LoraRite: the module has no parameters named like LoRA factors (",
              detail::known_factor_names(), "), expected at least one pair");
  add_pairs(std::move(pairs), options);
  std::vector<torch::Tensor> rest;
  std::set<const void*> seen;
  for (const auto& parameter : module.parameters()) {
    if (!parameter.requires_grad() || own_->owners.know(parameter)) continue;
    if (seen.insert(parameter.unsafeGetTensorImpl()).second) rest.push_back(parameter);
  }
  if (!rest.empty()) add_parameters(std::move(rest), others);
}

LORA_RITE_BODY void LoraRiteBase::add_alternating(const std::vector<torch::Tensor>& factors,
                                                  const LoraRiteOptions& options) {
  constexpr const char* kHint =
      "; a list of tensors is read as a0, b0, a1, b1, …: for all parameters of a model give the model itself, for "
      "other parameters torch::optim::AdamWOptions";
  TORCH_CHECK(factors.size() % 2 == 0, "LoraRite: the list of alternating factors a0, b0, a1, b1, … has ",
              factors.size(), " tensors, expected an even number", kHint);
  std::vector<FactorPair> pairs;
  for (size_t i = 0; i < factors.size(); i += 2) pairs.push_back({"", factors[i], factors[i + 1]});
  try {
    add_pairs(std::move(pairs), options);
  } catch (const c10::Error& error) {
    TORCH_CHECK(false, error.what_without_backtrace(), kHint);
  }
}

LORA_RITE_BODY void LoraRiteBase::add_groups(const std::vector<torch::optim::OptimizerParamGroup>& groups) {
  TORCH_CHECK(!groups.empty(), "LoraRite: the list of param groups is empty, expected at least one group");
  for (const auto& group : groups) add_param_group(group);
}

// --- Asking --------------------------------------------------------------------------------------------------------

LORA_RITE_BODY size_t LoraRiteBase::group_count() const { return own_->all.size(); }

LORA_RITE_BODY bool LoraRiteBase::ascends(size_t group) const { return own_->all[group].adamw()->maximize(); }

LORA_RITE_BODY const std::vector<FactorPair>& LoraRiteBase::pairs_of(size_t group) const {
  static const std::vector<FactorPair> none;
  const auto* pairs = own_->all[group].pairs();
  return pairs ? pairs->all : none;
}

LORA_RITE_BODY std::string LoraRiteBase::label_of(size_t group, size_t pair) const {
  return detail::pair_label(pairs_of(group)[pair], group, pair);
}

/// A pair's name, or its place if it has none.
LORA_RITE_BODY std::string LoraRiteBase::name_of(size_t group, size_t pair) const {
  const std::string& name = pairs_of(group)[pair].name;
  return name.empty() ? label_of(group, pair) : name;
}

LORA_RITE_BODY const LoraRiteOptions& LoraRiteBase::rite_options(size_t group) const {
  return static_cast<const LoraRiteOptions&>(param_groups_[group].options());
}

LORA_RITE_BODY const torch::optim::AdamWOptions& LoraRiteBase::adamw_options(size_t group) const {
  return static_cast<const torch::optim::AdamWOptions&>(param_groups_[group].options());
}

LORA_RITE_BODY std::optional<engine::RowShards> LoraRiteBase::row_shards(size_t, size_t) const { return std::nullopt; }

LORA_RITE_BODY PairState LoraRiteBase::pick(size_t group, size_t pair) const {
  const Group::Pairs& pairs = *own_->all[group].pairs();
  const auto slot = *pairs.slot_of(pair);
  return pairs.batch(slot.batch).pick(slot.index);
}

/// The group and place of a pair by its name.
LORA_RITE_BODY std::pair<size_t, size_t> LoraRiteBase::find_pair(const std::string& name) const {
  std::vector<std::pair<size_t, size_t>> found;
  std::vector<std::string> names;
  for (size_t g = 0; g < group_count(); ++g) {
    for (size_t p = 0; p < pairs_of(g).size(); ++p) {
      names.push_back(name_of(g, p));
      if (names.back() == name) found.emplace_back(g, p);
    }
  }
  TORCH_CHECK(!found.empty(), "LoraRite has no pair '", name, "', expected one of ", detail::listed(names));
  TORCH_CHECK(found.size() == 1, "LoraRite has ", found.size(), " pairs '", name,
              "', expected one; give the group and the place in it");
  return found[0];
}

LORA_RITE_BODY void LoraRiteBase::check_pair(size_t group, size_t pair) const {
  TORCH_CHECK(group < group_count(), "LoraRite has no group ", group, ", expected a number below ", group_count());
  TORCH_CHECK(pair < pairs_of(group).size(), "LoraRite, group ", group, " has no pair ", pair,
              ", expected a number below ", pairs_of(group).size());
}

LORA_RITE_BODY void LoraRiteBase::check_groups() const {
  TORCH_CHECK(param_groups_.size() == group_count(), "LoraRite has ", param_groups_.size(), " param groups, expected ",
              group_count(), ": one was added through torch::optim::Optimizer, whose add_param_group is not virtual; ",
              "call that of LoraRite, add_pairs or add_parameters");
  for (size_t i = 0; i < group_count(); ++i) {
    const Group& group = own_->all[i];
    const std::string label = "LoraRite, group " + std::to_string(i);
    const size_t expected = group.tensors().size();
    TORCH_CHECK(param_groups_[i].params().size() == expected, label, ": the list of parameters has ",
                param_groups_[i].params().size(), " tensors, expected ", expected,
                " as when the group was added; use add_pairs or add_parameters for more, remove_pair for less");
    for (size_t place = 0; place < expected; ++place)
      if (!param_groups_[i].params()[place].is_same(group.tensors()[place])) refuse_tensor(i, place);
    const auto& options = param_groups_[i].options();
    const bool right_options = group.adamw() ? dynamic_cast<const torch::optim::AdamWOptions*>(&options) != nullptr
                                             : dynamic_cast<const LoraRiteOptions*>(&options) != nullptr;
    TORCH_CHECK(right_options, label, " was given options of another optimizer, expected ",
                group.adamw() ? "torch::optim::AdamWOptions" : "LoraRiteOptions");
  }
}

/// Throws: a tensor of a param group is not the one that was added.
LORA_RITE_BODY void LoraRiteBase::refuse_tensor(size_t g, size_t place) const {
  const at::Tensor& found = param_groups_[g].params()[place];
  const Group& group = own_->all[g];
  const auto owner = own_->owners.owner_of(found);
  std::string wanted = "parameter " + std::to_string(place);
  if (group.pairs() && group.tensors().size() == 2 * group.pair_count())
    wanted = label_of(g, place / 2) + (place % 2 == 0 ? ", factor a" : ", factor b");
  else if (group.pairs())
    wanted = "of " + *own_->owners.owner_of(group.tensors()[place]) + " and others";
  C10_THROW_ERROR(Error, c10::str("LoraRite, group ", g, ": tensor ", place, " of its list (", wanted, ") is now ",
                                  owner ? "a tensor of " + *owner : "a tensor that was never added",
                                  ", expected the one that was added; give it new values by copy_ or set_data, change "
                                  "options instead of groups, or build the optimizer anew"));
}

}  // namespace lora_rite
