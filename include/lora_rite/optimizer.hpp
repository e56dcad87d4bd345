#pragma once

#include <torch/nn/module.h>
#include <torch/optim/adamw.h>
#include <torch/optim/optimizer.h>
#include <torch/serialize/archive.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/basis.hpp"
#include "lora_rite/choose.hpp"
#include "lora_rite/diagnostics.hpp"
#include "lora_rite/engine/adamw.hpp"
#include "lora_rite/engine/batches.hpp"
#include "lora_rite/factor_pair.hpp"
#include "lora_rite/options.hpp"

namespace lora_rite {

/// What `LoraRite::load_matching` takes from an archive.
struct LoadOptions {
  /// The name here of a pair of the archive, given its name there; empty to leave it out. By default the same.
  std::function<std::string(const std::string&)> rename;
  /// Also what is remembered of the parameters that AdamW steps: the groups of them in their order.
  bool other_parameters = true;
};

/// What `LoraRite::load_matching` did, by the names of pairs; groups of other parameters are called "group 1" and so
/// on.
struct LoadReport {
  std::vector<std::string> loaded;  ///< of this optimizer, from the archive
  std::vector<std::string> kept;    ///< of this optimizer, not in the archive: as they were
  std::vector<std::string> unused;  ///< of the archive, not in this optimizer
};

/// LoRA-RITE (Yen et al., "LoRA Done RITE: Robust Invariant Transformation Equilibration for LoRA Optimization",
/// ICLR 2025) as a torch::optim::Optimizer. Its step moves ΔW = BA in the same way for every factorisation
/// (TA, BT⁻¹) of it; see docs/algorithm.md.
///
/// Param groups hold LoRA factors, a₀, b₀, a₁, b₁, … with `LoraRiteOptions`, or other parameters with
/// `torch::optim::AdamWOptions`. LibTorch's schedulers and ours drive all of them. Pairs that are views of two leaves
/// (`expert_pairs`) stand there as these, once, in the first group that has a part of them.
///
/// - A step with a gradient or factor that is NaN or infinite changes nothing, and is counted: `skipped_steps()`.
/// - A factor without a gradient stays as it is; its partner still moves.
/// - A factor that someone else changed since the last step (a merge, a loaded checkpoint, averaged weights) is noticed
///   by sums over its columns. The second moment in its old basis keeps its place in the new one, and the momenta stay
///   as they are, as Adam's would. (`Engine::Host` forms the sums where the pointer, the version counter or the bits of
///   64 elements changed, and so misses what a raw pointer wrote past all of these.)
/// - An exception of `step` leaves factors and state as they were, whether a check of the input threw it, the closure,
///   or an allocation of a tensor.
///
/// `Basis` (PolarBasis or QrBasis) is the root of the Gram matrix; both give the same trajectory up to round-off.
template <class Basis = PolarBasis>
class LoraRite : public torch::optim::Optimizer {
 public:
  /// One group of these pairs. Throws c10::Error naming the pair or option if the list is empty, a pair does not fit
  /// together, a tensor appears twice, or an option is out of its range.
  explicit LoraRite(std::vector<FactorPair> pairs, LoraRiteOptions options = {}) : LoraRite(options) {
    add_pairs(std::move(pairs), options);
  }

  /// All factor pairs of a module (`find_factor_pairs`) in one group, and all its other trainable parameters, if any,
  /// in a second one by AdamW with `others`. What the module holds under several names is stepped once. With
  /// `options.maximize()` both groups ascend.
  explicit LoraRite(const torch::nn::Module& module, LoraRiteOptions options, torch::optim::AdamWOptions others)
      : LoraRite(options) {
    std::vector<FactorPair> pairs = find_factor_pairs(module);
    TORCH_CHECK(!pairs.empty(), "LoraRite: the module has no parameters named like LoRA factors (",
                detail::known_factor_names(), "), expected at least one pair");
    add_pairs(std::move(pairs), options);
    std::vector<torch::Tensor> rest;
    std::set<const void*> seen;
    for (const auto& parameter : module.parameters()) {
      if (!parameter.requires_grad() || owners_.know(parameter)) continue;
      if (seen.insert(parameter.unsafeGetTensorImpl()).second) rest.push_back(parameter);
    }
    if (!rest.empty()) add_parameters(std::move(rest), others);
  }

  /// The same; AdamW takes lr and weight_decay from `options`.
  explicit LoraRite(const torch::nn::Module& module, LoraRiteOptions options = {})
      : LoraRite(module, options, torch::optim::AdamWOptions(options.lr()).weight_decay(options.weight_decay())) {}

  /// a₀, b₀, a₁, b₁, …, as the authors' code takes them.
  explicit LoraRite(std::vector<torch::Tensor> alternating, LoraRiteOptions options = {}) : LoraRite(options) {
    add_alternating(alternating, options);
  }

  /// LibTorch's param groups, each added by `add_param_group`: those without options have `defaults`, the options of
  /// the others are taken whole. Throws c10::Error if there are none.
  explicit LoraRite(const std::vector<torch::optim::OptimizerParamGroup>& groups, LoraRiteOptions defaults = {})
      : LoraRite(defaults) {
    TORCH_CHECK(!groups.empty(), "LoraRite: the list of param groups is empty, expected at least one group");
    for (const auto& group : groups) add_param_group(group);
  }

  /// Another group with options of its own. Same errors as the constructor; nothing is added then.
  void add_pairs(std::vector<FactorPair> pairs, LoraRiteOptions options) {
    const size_t index = param_groups_.size();
    detail::check_options(options, "LoraRite, group " + std::to_string(index));
    TORCH_CHECK(!pairs.empty(), "LoraRite, group ", index, ": the list of pairs is empty, expected at least one pair");
    detail::Owners owners = owners_;
    for (size_t i = 0; i < pairs.size(); ++i) {
      const std::string label = detail::pair_label(pairs[i], index, i);
      detail::check_trained_pair(pairs[i], label);
      if (!parts_) detail::check_rank(pairs[i], detail::rows_of(pairs[i]), label);
      for (const auto& factor : {pairs[i].a, pairs[i].b}) owners.claim(factor, label);
    }
    owners.settle();
    std::vector<torch::Tensor> leaves = detail::leaves_of(pairs);
    // One of which an earlier group has parts stands there: twice, a GradScaler would unscale it twice.
    leaves.erase(
        std::remove_if(leaves.begin(), leaves.end(), [&](const torch::Tensor& leaf) { return owners_.know(leaf); }),
        leaves.end());
    add_group(leaves, std::make_unique<LoraRiteOptions>(options));
    owners_ = std::move(owners);
    groups_.push_back({std::move(pairs), {}, {}, {}, std::nullopt, std::move(leaves)});
  }

  /// Another group of parameters that are no LoRA factors, stepped by AdamW. It ascends with `maximize`, which
  /// LibTorch's AdamWOptions lack; by default it does what the optimizer was built with (`maximize` of the
  /// constructor's options).
  void add_parameters(std::vector<torch::Tensor> parameters, torch::optim::AdamWOptions options,
                      std::optional<bool> maximize = std::nullopt) {
    const size_t index = param_groups_.size();
    detail::check_options_of_adam(options, "LoraRite, group " + std::to_string(index));
    TORCH_CHECK(!parameters.empty(), "LoraRite, group ", index, ": the list of parameters is empty");
    detail::Owners owners = owners_;
    for (size_t i = 0; i < parameters.size(); ++i) {
      const std::string label = other_label(index, i);
      TORCH_CHECK(parameters[i].defined(), label, " is undefined, expected a tensor");
      TORCH_CHECK(at::isFloatingType(parameters[i].scalar_type()), label, " has dtype ", parameters[i].scalar_type(),
                  ", expected a floating one");
      owners.claim(parameters[i], label);
    }
    const bool ascends = maximize.value_or(static_cast<const LoraRiteOptions&>(defaults()).maximize());
    add_group(parameters, std::make_unique<torch::optim::AdamWOptions>(options));
    owners_ = std::move(owners);
    groups_.push_back({{}, {}, {}, {}, engine::AdamWParameters(std::move(parameters), ascends), {}});
  }

  /// LibTorch's way to add a group: alternating factors with LoraRiteOptions (or none: the defaults), or other
  /// parameters with AdamWOptions.
  void add_param_group(const torch::optim::OptimizerParamGroup& group) {
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

  /// One step with the gradients at hand; a closure, if given, is called before, with gradients enabled, and its loss
  /// is returned. Reads nothing back from the device. Throws c10::Error naming the pair or option if an option left its
  /// range, a factor changed shape, dtype or device, or a gradient is sparse or of another shape; nothing is changed
  /// then.
  torch::Tensor step(LossClosure closure = nullptr) override {
    torch::Tensor loss;
    if (closure) {
      at::AutoGradMode enable_grad(true);
      loss = closure();
    }
    at::NoGradGuard no_grad;
    with_batches([&] {
      check_inputs();
      checked({});
      move_factors();
    });
    return loss;
  }

  /// Hands the learning rates to the device. Only a replay of a recorded step (`LoraRiteOptions::capturable`) needs it,
  /// after a scheduler or a user changed them: `step` itself does it.
  void upload_rates() {
    at::NoGradGuard no_grad;
    check_groups();
    for (size_t i = 0; i < groups_.size(); ++i) {
      if (groups_[i].others) groups_[i].others->upload_rate(adamw_options(i));
      for (const auto& batch : groups_[i].batches) batch->upload_rates(rite_options(i));
    }
  }

  /// Steps that were skipped because a gradient or a factor was not finite. Reads from the device.
  int64_t skipped_steps() const { return skipped_.defined() ? skipped_.item<int64_t>() : 0; }

  /// How every pair stands, in the order of the groups. Reads from the device; changes nothing.
  std::vector<PairDiagnostics> diagnostics() const {
    at::NoGradGuard no_grad;
    std::vector<PairDiagnostics> result;
    const int64_t skipped = skipped_steps();
    for (const auto& group : groups_) {
      for (size_t i = 0; i < group.pairs.size(); ++i) {
        PairDiagnostics entry;
        if (const auto place = group.place_of(i)) {
          entry = group.batches[place->batch]->diagnose(place->index);
        } else {  // before the first step
          entry =
              engine::make_batches<Basis>({group.pairs[i]}, {group.pairs[i].name}, Engine::Device).all[0]->diagnose(0);
        }
        entry.skipped_steps = skipped;
        result.push_back(std::move(entry));
      }
    }
    return result;
  }

  /// What is remembered of a pair, as copies: the answer to `state()` of LibTorch's optimizers. Nothing before the
  /// first step with a gradient of one of its factors. Reads from the device. Throws c10::Error if there is no such
  /// pair, or several of that name.
  std::optional<StateOfPair> state_of(const std::string& name) const {
    const auto [group, pair] = find_pair(name);
    return state_of(group, pair);
  }
  /// The same by the pair's place in its group.
  std::optional<StateOfPair> state_of(size_t group, size_t pair) const {
    check_pair(group, pair);
    if (groups_[group].places.empty()) return std::nullopt;
    TORCH_CHECK(groups_[group].places[pair], label_of(group, pair), ": its state is kept by another process");
    return pick(group, pair).told();
  }

  /// Forgets what is remembered of a pair (momenta, second moments, escaped mass, numbers of steps), as one does after
  /// factors were merged and drawn anew (ReLoRA) or a task begins: its next step is the first one of a new optimizer.
  /// Where all pairs begin anew, `reset_state()` is cheaper. A recorded step must be recorded again. Throws c10::Error
  /// if there is no such pair, or several of that name.
  void reset_state(const std::string& name) {
    const auto [group, pair] = find_pair(name);
    reset_state(group, pair);
  }
  /// The same by the pair's place in its group.
  void reset_state(size_t group, size_t pair) {
    at::NoGradGuard no_grad;
    check_pair(group, pair);
    agree_on_call("reset_state", label_of(group, pair));
    const auto place = groups_[group].place_of(pair);
    if (!place) return;  // nothing is remembered, at least not here
    engine::Batch& batch = *groups_[group].batches[place->batch];
    std::vector<PairState> states;
    for (int64_t i = 0; i < batch.count(); ++i)
      states.push_back(i == place->index ? read_state(nullptr, group, pair) : batch.pick(i));
    batch.restore(states);
  }
  /// Forgets all that is remembered, also of parameters that AdamW steps, and the number of skipped steps: the next
  /// step is the first one of a new optimizer.
  void reset_state() {
    agree_on_call("reset_state", "all");
    for (Group& group : groups_) {
      group.forget_batches();
      if (group.others) group.others->forget();
    }
    skipped_ = at::Tensor();
  }

  /// Takes a pair out of its group and its param group; all others go on as if it had no gradients. A group whose last
  /// pair went stays, empty, so that groups keep their numbers, and schedulers and rates their places. Pairs behind it
  /// move up by one place. A recorded step must be recorded again. Throws c10::Error if there is no such pair, or
  /// several of that name, or several processes share the work; nothing is changed then.
  void remove_pair(const std::string& name) {
    const auto [group, pair] = find_pair(name);
    remove_pair(group, pair);
  }
  /// The same by the pair's place in its group.
  void remove_pair(size_t g, size_t pair) {
    at::NoGradGuard no_grad;
    TORCH_CHECK(can_remove_pairs(), "LoraRite: a pair cannot be taken out where several processes share the work, ",
                "expected a new optimizer without it");
    check_groups();
    check_pair(g, pair);
    Group rest;
    std::vector<PairState> states;  // of those that stay
    for (size_t i = 0; i < groups_[g].pairs.size(); ++i) {
      if (i == pair) continue;
      rest.pairs.push_back(groups_[g].pairs[i]);
      if (groups_[g].place_of(i)) states.push_back(pick(g, i));
    }
    // Labels count places, and a tensor whose first part goes stands in a later group.
    detail::Owners owners;
    std::vector<std::vector<torch::Tensor>> leaves(groups_.size()), tensors;
    for (size_t i = 0; i < groups_.size(); ++i) {
      const Group& group = i == g ? rest : groups_[i];
      for (const torch::Tensor& leaf : detail::leaves_of(group.pairs))
        if (!owners.know(leaf)) leaves[i].push_back(leaf);
      claim(owners, group, i);
    }
    tensors = leaves;
    if (!states.empty()) {
      build_batches(g, rest);
      restore(rest, states);
    }
    // What follows cannot fail.
    groups_[g] = std::move(rest);
    for (size_t i = 0; i < groups_.size(); ++i) {
      if (groups_[i].others) continue;
      param_groups_[i].params().swap(tensors[i]);
      groups_[i].leaves.swap(leaves[i]);
    }
    owners_ = std::move(owners);
  }

  /// Writes options and state of all groups, by group and place and never by address: a freshly built optimizer over
  /// the same pairs resumes bit for bit. The factors themselves are the module's to save.
  void save(torch::serialize::OutputArchive& archive) const override;

  /// Takes over what `save` wrote. Options are assigned in place: references to them stay good. Throws c10::Error that
  /// names the first thing that does not fit (basis, number or kind of groups, a pair's name, an entry's shape or
  /// dtype, an option out of range); nothing is changed then, and a `load` before the first step fixes neither engine
  /// nor dtypes.
  void load(torch::serialize::InputArchive& archive) override;

  /// Takes over what `save` wrote of the pairs that this optimizer has as well, by name, in whatever group they are
  /// there: for other prefixes, a part of the pairs, or factors of another dtype. A pair without a name is called
  /// "pair 2 of group 0", there and here. Momenta are converted; factors that were rounded since count as edited.
  /// Everything else stays as it is: options (rates among them), skipped steps, pairs and groups that the archive
  /// lacks. Throws c10::Error that names what does not fit (basis, a shape, two pairs renamed alike), or both sides'
  /// names if no pair is in both; nothing is changed then.
  virtual LoadReport load_matching(torch::serialize::InputArchive& archive, const LoadOptions& options = {});

 protected:
  // What one of several processes does otherwise than one alone: `ShardedLoraRite` overrides it.

  /// Before anything else is asked of groups that are new.
  virtual void agree_on_groups() {}
  /// Is the division of the work such that a pair can go?
  virtual bool can_remove_pairs() const { return true; }
  /// Called by `step`, `load` and `load_matching` when all that they refuse was looked at and nothing was changed:
  /// where processes agree. `lines` say what else must be the same everywhere.
  virtual void checked(const std::string& lines) { (void)lines; }
  /// The same for a call that only changes what is remembered: `what` is its argument.
  virtual void agree_on_call(const char* call, const std::string& what) { (void)call, (void)what; }

  /// Does this process keep the state of pair `pair` and move its factors?
  virtual bool keeps(size_t /*group*/, size_t /*pair*/) const { return true; }
  /// The other rows of a pair, where this process holds only some.
  virtual std::optional<engine::RowShards> row_shards(size_t /*group*/, size_t /*pair*/) const { return std::nullopt; }
  /// Shall the step be taken? `proceed` is undefined where no parameter of this process has a gradient; so is the
  /// result if there is nothing to do.
  virtual at::Tensor agree(const at::Tensor& proceed) { return proceed; }
  /// ‖Ḡ‖² of every pair, 0 where this process does not keep it → the same of all processes.
  virtual at::Tensor total(const at::Tensor& norms_squared) { return norms_squared; }
  /// Writes the state of a pair.
  virtual void save_state(torch::serialize::OutputArchive& archive, size_t group, size_t pair) const {
    pick(group, pair).save(archive);
  }
  /// Reads what `save_state` wrote; without an archive: nothing remembered.
  virtual PairState read_state(torch::serialize::InputArchive* archive, size_t group, size_t pair) const {
    const auto& place = *groups_[group].places[pair];
    return groups_[group].batches[place.batch]->read(archive, place.index);
  }

  /// Without groups yet. With `parts` the factors are what one of several processes holds of them, and their sides are
  /// known in the first step.
  explicit LoraRite(const LoraRiteOptions& defaults, bool parts = false)
      : Optimizer(std::vector<torch::optim::OptimizerParamGroup>{}, std::make_unique<LoraRiteOptions>(defaults)),
        parts_(parts) {}

  /// Are the groups what they were when they were added, their options of this optimizer's class?
  void check_groups() const {
    TORCH_CHECK(param_groups_.size() == groups_.size(), "LoraRite has ", param_groups_.size(),
                " param groups, expected ", groups_.size(),
                ": one was added through torch::optim::Optimizer, whose add_param_group is not virtual; ",
                "call that of LoraRite, add_pairs or add_parameters");
    for (size_t i = 0; i < groups_.size(); ++i) {
      const Group& group = groups_[i];
      const std::string label = "LoraRite, group " + std::to_string(i);
      const size_t expected = tensors_of(group).size();
      TORCH_CHECK(param_groups_[i].params().size() == expected, label, ": the list of parameters has ",
                  param_groups_[i].params().size(), " tensors, expected ", expected,
                  " as when the group was added; use add_pairs or add_parameters for more, remove_pair for less");
      for (size_t place = 0; place < expected; ++place)
        if (!param_groups_[i].params()[place].is_same(tensors_of(group)[place])) refuse_tensor(i, place);
      const auto& options = param_groups_[i].options();
      const bool right_options = group.others ? dynamic_cast<const torch::optim::AdamWOptions*>(&options) != nullptr
                                              : dynamic_cast<const LoraRiteOptions*>(&options) != nullptr;
      TORCH_CHECK(right_options, label, " was given options of another optimizer, expected ",
                  group.others ? "torch::optim::AdamWOptions" : "LoraRiteOptions");
    }
  }

  size_t group_count() const { return groups_.size(); }
  /// Of a group of other parameters.
  bool ascends(size_t group) const { return groups_[group].others->maximize(); }
  const std::vector<FactorPair>& pairs_of(size_t group) const { return groups_[group].pairs; }
  std::string label_of(size_t group, size_t pair) const {
    return detail::pair_label(groups_[group].pairs[pair], group, pair);
  }
  /// The state of a pair that this process keeps.
  PairState pick(size_t group, size_t pair) const {
    const auto& place = *groups_[group].places[pair];
    return groups_[group].batches[place.batch]->pick(place.index);
  }

 private:
  static constexpr const char* kFormat = "lora_rite.LoraRite 1";

  /// Beside the param group of the same index: factor pairs, or (`others`) the parameters that AdamW steps.
  struct Group {
    std::vector<FactorPair> pairs;
    std::vector<std::unique_ptr<engine::Batch>> batches;
    std::vector<std::vector<int64_t>> numbers;                  ///< of a batch's pairs among those of the group
    std::vector<std::optional<engine::Batches::Place>> places;  ///< of the pairs; empty before the first step
    std::optional<engine::AdamWParameters> others;
    std::vector<at::Tensor>
        leaves;  ///< of the pairs, but for those that an earlier group has: the param group's tensors

    std::optional<engine::Batches::Place> place_of(size_t pair) const {
      return places.empty() ? std::nullopt : places[pair];
    }
    void forget_batches() {
      batches.clear();
      numbers.clear();
      places.clear();
    }
  };

  static const char* kind(const Group& group) { return group.others ? "other parameters" : "factor pairs"; }

  /// `add_pairs` with a₀, b₀, a₁, b₁, …; errors say that the list is read so, for it may be a list of something else.
  void add_alternating(const std::vector<torch::Tensor>& factors, const LoraRiteOptions& options) {
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

  /// LibTorch's add_param_group merges the options of its own optimizers only and loses those of others (from 2.10 on),
  /// so they are set again.
  void add_group(std::vector<torch::Tensor> tensors, std::unique_ptr<torch::optim::OptimizerOptions> options) {
    Optimizer::add_param_group(torch::optim::OptimizerParamGroup(std::move(tensors), options->clone()));
    param_groups_.back().set_options(std::move(options));
  }

  const LoraRiteOptions& rite_options(size_t group) const {
    return static_cast<const LoraRiteOptions&>(param_groups_[group].options());
  }
  const torch::optim::AdamWOptions& adamw_options(size_t group) const {
    return static_cast<const torch::optim::AdamWOptions&>(param_groups_[group].options());
  }

  /// Calls the function with batches built. If it throws, those that are new are forgotten: what failed did not take
  /// place, and the module may still be moved or converted.
  template <class Function>
  void with_batches(const Function& function) {
    std::vector<bool> had_batches;
    for (const Group& group : groups_) had_batches.push_back(!group.places.empty());
    try {
      check_groups();
      // Batches are built with the first step, not before: until then a module may still be moved or converted.
      for (size_t g = 0; g < groups_.size(); ++g)
        if (!groups_[g].others && groups_[g].places.empty()) build_batches(g, groups_[g]);
      function();
    } catch (...) {
      for (size_t i = 0; i < groups_.size(); ++i)
        if (!had_batches[i]) groups_[i].forget_batches();
      throw;
    }
  }

  /// Builds the batches of a group that is, or will be, number `g`.
  void build_batches(size_t g, Group& group) {
    const auto label = [&](size_t i) { return detail::pair_label(group.pairs[i], g, i); };
    // Pairs whose factors are shards share a batch only where all processes can: by the shapes of the whole.
    std::map<std::array<int64_t, 4>, std::vector<size_t>> members;
    for (size_t i = 0; i < group.pairs.size(); ++i) {
      detail::check_trained_pair(group.pairs[i], label(i));
      const auto shards = row_shards(g, i);
      detail::check_rank(group.pairs[i], shards ? shards->rows : detail::rows_of(group.pairs[i]), label(i));
      std::array<int64_t, 4> key = {};
      if (shards) key = {shards->rows[0], shards->rows[1], shards->sharded[0], shards->sharded[1]};
      if (keeps(g, i)) members[key].push_back(i);
    }
    const LoraRiteOptions& options = rite_options(g);
    std::vector<std::unique_ptr<engine::Batch>> batches;
    std::vector<std::vector<int64_t>> numbers;
    std::vector<std::optional<engine::Batches::Place>> places(group.pairs.size());
    for (const auto& [key, indices] : members) {
      std::vector<FactorPair> pairs;
      std::vector<std::string> labels;
      for (const size_t i : indices) {
        pairs.push_back(group.pairs[i]);
        labels.push_back(label(i));
      }
      const auto shards = row_shards(g, indices[0]);
      const bool needs_device = options.capturable() || shards;
      engine::Batches made =
          engine::make_batches<Basis>(pairs, labels, needs_device ? Engine::Device : options.engine());
      for (size_t k = 0; k < indices.size(); ++k) {
        const size_t batch = batches.size() + made.places[k].batch;
        places[indices[k]] = {batch, made.places[k].index};
        // Pairs of a batch are in the order in which they were given.
        numbers.resize(std::max(numbers.size(), batch + 1));
        numbers[batch].push_back(static_cast<int64_t>(indices[k]));
      }
      for (auto& batch : made.all) {
        if (shards) batch->set_row_shards(*shards);
        batches.push_back(std::move(batch));
      }
    }
    group.batches = std::move(batches);
    group.numbers = std::move(numbers);
    group.places = std::move(places);
  }

  /// Hands the states of a group's pairs, in their order, to its batches.
  static void restore(Group& group, const std::vector<PairState>& of_pairs) {
    for (size_t b = 0; b < group.batches.size(); ++b) {
      std::vector<PairState> states(static_cast<size_t>(group.batches[b]->count()));
      for (size_t p = 0; p < group.pairs.size(); ++p) {
        const auto& place = group.places[p];
        if (place && place->batch == b) states[static_cast<size_t>(place->index)] = of_pairs[p];
      }
      group.batches[b]->restore(states);
    }
  }

  /// The tensor that was added at this place of a param group.
  static const std::vector<at::Tensor>& tensors_of(const Group& group) {
    return group.others ? group.others->parameters() : group.leaves;
  }
  /// The number of tensors that an archive has state of: factors, or other parameters.
  static size_t state_count(const Group& group) {
    return group.others ? group.others->parameters().size() : 2 * group.pairs.size();
  }

  /// Enters all of a group's tensors.
  static void claim(detail::Owners& owners, const Group& group, size_t index) {
    for (size_t i = 0; i < group.pairs.size(); ++i) {
      const std::string label = detail::pair_label(group.pairs[i], index, i);
      for (const auto& factor : {group.pairs[i].a, group.pairs[i].b}) owners.claim(factor, label);
    }
    for (size_t i = 0; group.others && i < group.others->parameters().size(); ++i)
      owners.claim(group.others->parameters()[i], other_label(index, i));
    owners.settle();
  }
  static std::string other_label(size_t group, size_t parameter) {
    return "parameter " + std::to_string(parameter) + " of group " + std::to_string(group);
  }

  /// Throws: a tensor of a param group is not the one that was added.
  [[noreturn]] void refuse_tensor(size_t g, size_t place) const {
    const at::Tensor& found = param_groups_[g].params()[place];
    const Group& group = groups_[g];
    const auto owner = owners_.owner_of(found);
    std::string wanted = "parameter " + std::to_string(place);
    if (!group.others && group.leaves.size() == 2 * group.pairs.size())
      wanted = label_of(g, place / 2) + (place % 2 == 0 ? ", factor a" : ", factor b");
    else if (!group.others)
      wanted = "of " + *owners_.owner_of(group.leaves[place]) + " and others";
    C10_THROW_ERROR(
        Error, c10::str("LoraRite, group ", g, ": tensor ", place, " of its list (", wanted, ") is now ",
                        owner ? "a tensor of " + *owner : "a tensor that was never added",
                        ", expected the one that was added; give it new values by copy_ or set_data, change options "
                        "instead of groups, or build the optimizer anew"));
  }

  /// The group and place of a pair by its name.
  std::pair<size_t, size_t> find_pair(const std::string& name) const {
    std::vector<std::pair<size_t, size_t>> found;
    std::vector<std::string> names;
    for (size_t g = 0; g < groups_.size(); ++g)
      for (size_t p = 0; p < groups_[g].pairs.size(); ++p) {
        names.push_back(name_of(g, p));
        if (names.back() == name) found.emplace_back(g, p);
      }
    TORCH_CHECK(!found.empty(), "LoraRite has no pair '", name, "', expected one of ", listed(names));
    TORCH_CHECK(found.size() == 1, "LoraRite has ", found.size(), " pairs '", name,
                "', expected one; give the group and the place in it");
    return found[0];
  }

  void check_pair(size_t group, size_t pair) const {
    TORCH_CHECK(group < groups_.size(), "LoraRite has no group ", group, ", expected a number below ", groups_.size());
    TORCH_CHECK(pair < groups_[group].pairs.size(), "LoraRite, group ", group, " has no pair ", pair,
                ", expected a number below ", groups_[group].pairs.size());
  }

  /// A pair's name, or its place if it has none.
  std::string name_of(size_t group, size_t pair) const {
    const std::string& name = groups_[group].pairs[pair].name;
    return name.empty() ? label_of(group, pair) : name;
  }

  /// The first of some names, quoted, for a message.
  static std::string listed(const std::vector<std::string>& names) {
    constexpr size_t kMost = 5;
    std::string result = names.empty() ? "none" : "";
    for (size_t i = 0; i < std::min(names.size(), kMost); ++i) result += (i == 0 ? "'" : ", '") + names[i] + "'";
    return names.size() > kMost ? result + ", … (" + std::to_string(names.size()) + ")" : result;
  }

  /// Options, factors and gradients, before anything is changed.
  void check_inputs() const {
    for (size_t i = 0; i < groups_.size(); ++i) {
      const std::string label = "LoraRite, group " + std::to_string(i);
      if (groups_[i].others)
        groups_[i].others->check_inputs(adamw_options(i), label);
      else
        detail::check_options(rite_options(i), label);
      for (const auto& batch : groups_[i].batches) batch->check_inputs();
    }
  }

  /// The step, with inputs that were checked and batches that were built.
  void move_factors() {
    // Act 1, observe: tall data become r×r statistics.
    struct Work {
      const LoraRiteOptions* options;
      engine::Batch* batch;
      const std::vector<int64_t>* numbers;
      int64_t first_pair;  // of the batch's group among the pairs of all groups
    };
    std::vector<Work> work;
    std::vector<at::Tensor> finite;
    int64_t first_pair = 0;
    for (size_t i = 0; i < groups_.size(); first_pair += static_cast<int64_t>(groups_[i].pairs.size()), ++i) {
      if (groups_[i].others) {
        for (auto& flag : groups_[i].others->finite()) finite.push_back(flag);
        continue;
      }
      for (size_t b = 0; b < groups_[i].batches.size(); ++b) {
        const auto& batch = groups_[i].batches[b];
        if (!batch->observe(rite_options(i))) continue;
        work.push_back({&rite_options(i), batch.get(), &groups_[i].numbers[b], first_pair});
        finite.push_back(batch->finite());
      }
    }
    const at::Tensor proceed =
        agree(finite.empty() ? at::Tensor() : at::stack(to_device(finite, finite[0].device())).all());
    if (!proceed.defined()) return;
    const at::Device home = proceed.device();

    // Act 2, decide: the partner's bases, the norm of all unmagnified gradients, the maps for the rows.
    std::vector<at::Tensor> norms_squared;  // of the pairs of a batch
    std::vector<int64_t> order;             // their places among the pairs of all groups
    for (const Work& w : work) {
      norms_squared.push_back(w.batch->unmagnify(engine::on_device(proceed, w.batch->device())));
      for (const int64_t number : *w.numbers) order.push_back(w.first_pair + number);
    }
    const at::Tensor norm = total(in_order(norms_squared, order, home)).sum().sqrt();
    for (const auto& [options, batch, numbers, first] : work) {
      const double bound = options->clip_unmagnified_norm();
      const at::Tensor clip_factor = bound > 0 ? (bound / norm).clamp_max(1.0) : at::ones_like(norm);
      batch->prepare(*options, engine::on_device(clip_factor, batch->device()),
                     engine::on_device(proceed, batch->device()));
    }
    for (size_t i = 0; i < groups_.size(); ++i) {
      if (groups_[i].others) groups_[i].others->prepare(adamw_options(i), proceed);
    }
    at::Tensor skipped = negated(proceed).to(at::kLong);
    if (skipped_.defined() && skipped_.device() != home) skipped_ = skipped_.to(home);

    // Act 3, apply: the rows move. Nothing from here on asks for memory.
    for (const Work& w : work) w.batch->commit(*w.options);
    for (size_t i = 0; i < groups_.size(); ++i) {
      if (groups_[i].others) groups_[i].others->commit(adamw_options(i));
    }
    if (skipped_.defined()) {
      skipped_.add_(skipped);  // in place: a recorded step counts, too
    } else {
      skipped_ = std::move(skipped);
    }
  }

  static std::vector<at::Tensor> to_device(const std::vector<at::Tensor>& tensors, at::Device device) {
    std::vector<at::Tensor> result;
    for (const auto& tensor : tensors) result.push_back(engine::on_device(tensor, device));
    return result;
  }

  /// What batches tell of their pairs, in the order of the pairs of all groups, 0 for the others: a sum over it does
  /// not depend on how pairs are batched or divided over processes.
  at::Tensor in_order(const std::vector<at::Tensor>& of_batches, const std::vector<int64_t>& order, at::Device home) {
    int64_t count = 0;
    for (const Group& group : groups_) count += static_cast<int64_t>(group.pairs.size());
    at::Tensor result = at::zeros({count}, at::TensorOptions().dtype(at::kDouble).device(home));
    if (of_batches.empty()) return result;
    if (!order_.defined() || order_.device() != home || order != known_order_) {
      order_ = at::tensor(order, at::kLong).to(home);
      known_order_ = order;
    }
    return result.index_copy(0, order_, at::cat(to_device(of_batches, home)));
  }

  // In optimizer_archive.hpp, with `save` and `load`.
  using WritePair = std::function<void(torch::serialize::OutputArchive& entry, size_t group, size_t pair)>;
  using WriteOthers = std::function<void(torch::serialize::OutputArchive& group_archive, size_t group)>;
  void write(torch::serialize::OutputArchive& archive, const WritePair& pair_to, const WriteOthers& others_to) const;
  void write_pair(torch::serialize::OutputArchive& entry, size_t group, size_t pair) const;
  static int64_t read_header(torch::serialize::InputArchive& archive);
  static std::string steps_of_pair(torch::serialize::InputArchive& group_archive, size_t p);
  PairState read_pair(torch::serialize::InputArchive& group_archive, size_t group, size_t pair) const;
  PairState read_converted(torch::serialize::InputArchive& entry, size_t group, size_t pair) const;

  std::vector<Group> groups_;
  bool parts_ = false;     ///< are the factors one process's parts?
  detail::Owners owners_;  ///< every tensor of every group, and whose it is
  std::vector<int64_t> known_order_;
  at::Tensor order_;    ///< the same, on the device
  at::Tensor skipped_;  ///< scalar on the device, so that counting needs no host read
};

}  // namespace lora_rite

#include "lora_rite/optimizer_archive.hpp"
