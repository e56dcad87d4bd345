#pragma once

#include <torch/nn/module.h>
#include <torch/optim/adamw.h>
#include <torch/optim/optimizer.h>
#include <torch/serialize/archive.h>

#include <algorithm>
#include <array>
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

/// LoRA-RITE (Yen et al., "LoRA Done RITE: Robust Invariant Transformation Equilibration for LoRA Optimization",
/// ICLR 2025) as a torch::optim::Optimizer. Its step moves ΔW = BA in the same way for every factorisation
/// (TA, BT⁻¹) of it; see docs/algorithm.md.
///
/// Param groups hold LoRA factors, a₀, b₀, a₁, b₁, … with `LoraRiteOptions`, or other parameters with
/// `torch::optim::AdamWOptions`. LibTorch's schedulers and ours drive all of them. Pairs that are views of two leaves
/// (`expert_pairs`) stand there as these, once.
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
  /// in a second one by AdamW with `others`. What the module holds under several names is stepped once.
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
    add_pairs(pair_up(alternating), options);
  }

  /// Another group with options of its own. Same errors as the constructor; nothing is added then.
  void add_pairs(std::vector<FactorPair> pairs, LoraRiteOptions options) {
    const size_t index = param_groups_.size();
    detail::check_options(options, "LoraRite, group " + std::to_string(index));
    TORCH_CHECK(!pairs.empty(), "LoraRite, group ", index, ": the list of pairs is empty, expected at least one pair");
    detail::Owners owners = owners_;
    for (size_t i = 0; i < pairs.size(); ++i) {
      const std::string label = detail::pair_label(pairs[i], index, i);
      detail::check_factor_pair(pairs[i], label);
      for (const auto& factor : {pairs[i].a, pairs[i].b}) owners.claim(factor, label);
    }
    owners.settle();
    add_group(detail::leaves_of(pairs), std::make_unique<LoraRiteOptions>(options));
    owners_ = std::move(owners);
    groups_.push_back({std::move(pairs), {}, {}, {}, std::nullopt});
  }

  /// Another group of parameters that are no LoRA factors, stepped by AdamW.
  void add_parameters(std::vector<torch::Tensor> parameters, torch::optim::AdamWOptions options) {
    const size_t index = param_groups_.size();
    detail::check_options_of_adam(options, "LoraRite, group " + std::to_string(index));
    TORCH_CHECK(!parameters.empty(), "LoraRite, group ", index, ": the list of parameters is empty");
    detail::Owners owners = owners_;
    for (size_t i = 0; i < parameters.size(); ++i) {
      const std::string label = "parameter " + std::to_string(i) + " of group " + std::to_string(index);
      TORCH_CHECK(parameters[i].defined(), label, " is undefined, expected a tensor");
      TORCH_CHECK(at::isFloatingType(parameters[i].scalar_type()), label, " has dtype ", parameters[i].scalar_type(),
                  ", expected a floating one");
      owners.claim(parameters[i], label);
    }
    add_group(parameters, std::make_unique<torch::optim::AdamWOptions>(options));
    owners_ = std::move(owners);
    groups_.push_back({{}, {}, {}, {}, engine::AdamWParameters(std::move(parameters))});
  }

  /// LibTorch's way to add a group: alternating factors with LoraRiteOptions (or none: the defaults), or other
  /// parameters with AdamWOptions.
  void add_param_group(const torch::optim::OptimizerParamGroup& group) {
    if (!group.has_options()) {
      add_pairs(pair_up(group.params()), static_cast<const LoraRiteOptions&>(defaults()));
    } else if (const auto* rite = dynamic_cast<const LoraRiteOptions*>(&group.options())) {
      add_pairs(pair_up(group.params()), *rite);
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
    std::vector<bool> had_batches;
    for (const Group& group : groups_) had_batches.push_back(!group.places.empty());
    try {
      build_batches();
      check_inputs();
      move_factors();
    } catch (...) {
      // A first step that failed did not take place: the module may still be moved or converted.
      for (size_t i = 0; i < groups_.size(); ++i)
        if (!had_batches[i]) groups_[i].forget_batches();
      throw;
    }
    return loss;
  }

  /// Hands the learning rates to the device. Only a replay of a recorded step (`LoraRiteOptions::capturable`) needs it,
  /// after a scheduler or a user changed them: `step` itself does it.
  void upload_rates() {
    at::NoGradGuard no_grad;
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

  /// Writes options and state of all groups, by group and place and never by address: a freshly built optimizer over
  /// the same pairs resumes bit for bit. The factors themselves are the module's to save.
  void save(torch::serialize::OutputArchive& archive) const override {
    check_groups();
    archive.write("format", c10::IValue(std::string(kFormat)));
    archive.write("basis", c10::IValue(std::string(Basis::name())));
    archive.write("skipped_steps", c10::IValue(skipped_steps()));
    archive.write("group_count", c10::IValue(static_cast<int64_t>(groups_.size())));
    for (size_t i = 0; i < groups_.size(); ++i) {
      const Group& group = groups_[i];
      torch::serialize::OutputArchive group_archive(archive.compilation_unit());
      torch::serialize::OutputArchive options(archive.compilation_unit());
      param_groups_[i].options().serialize(options);
      group_archive.write("options", options);
      group_archive.write("kind", c10::IValue(std::string(kind(group))));
      group_archive.write("size", c10::IValue(static_cast<int64_t>(param_groups_[i].params().size())));
      if (group.others) group.others->save(group_archive);
      for (size_t p = 0; p < group.pairs.size(); ++p) {
        torch::serialize::OutputArchive entry(archive.compilation_unit());
        entry.write("name", c10::IValue(group.pairs[p].name));
        entry.write("stepped", c10::IValue(!group.places.empty()));
        if (!group.places.empty()) save_state(entry, i, p);
        group_archive.write(std::to_string(p), entry);
      }
      archive.write(std::to_string(i), group_archive);
    }
  }

  /// Takes over what `save` wrote. Throws c10::Error that names the first thing that does not fit (basis, number or
  /// kind of groups, a pair's name, an entry's shape or dtype, an option out of range); nothing is changed then.
  void load(torch::serialize::InputArchive& archive) override {
    at::NoGradGuard no_grad;
    build_batches();
    const auto text = [](const c10::IValue& value) { return value.isString() ? value.toStringRef() : ""; };
    c10::IValue value;
    TORCH_CHECK(archive.try_read("format", value) && text(value) == kFormat,
                "load: the archive holds no LoraRite optimizer (entry 'format' is '", text(value), "', expected '",
                kFormat, "')");
    archive.try_read("basis", value);
    TORCH_CHECK(text(value) == Basis::name(), "load: the archive's basis is '", text(value), "', expected '",
                Basis::name(), "'");
    const int64_t skipped = read_int(archive, "skipped_steps");
    const int64_t count = read_int(archive, "group_count");
    TORCH_CHECK(count == static_cast<int64_t>(groups_.size()), "load: the archive has ", count,
                " param groups, expected ", groups_.size());

    // Everything is read and checked before anything is changed.
    std::vector<std::unique_ptr<torch::optim::OptimizerOptions>> options;
    std::vector<std::vector<PairState>> pair_states(groups_.size());
    std::vector<std::vector<engine::AdamWParameters::State>> other_states(groups_.size());
    for (size_t i = 0; i < groups_.size(); ++i) {
      const Group& group = groups_[i];
      const std::string label = "group " + std::to_string(i);
      torch::serialize::InputArchive group_archive, options_archive;
      TORCH_CHECK(archive.try_read(std::to_string(i), group_archive), "load: ", label, " is missing in the archive");
      group_archive.try_read("kind", value);
      TORCH_CHECK(text(value) == kind(group), "load: ", label, " holds '", text(value), "', expected '", kind(group),
                  "'");
      const int64_t size = read_int(group_archive, "size");
      TORCH_CHECK(size == static_cast<int64_t>(param_groups_[i].params().size()), "load: ", label, " has ", size,
                  " parameters in the archive, expected ", param_groups_[i].params().size());
      TORCH_CHECK(group_archive.try_read("options", options_archive), "load: ", label, " has no options");
      options.push_back(param_groups_[i].options().clone());
      options.back()->serialize(options_archive);
      if (group.others) {
        detail::check_options_of_adam(static_cast<const torch::optim::AdamWOptions&>(*options.back()),
                                      "load: " + label);
        other_states[i] = group.others->read(group_archive, label);
        continue;
      }
      detail::check_options(static_cast<const LoraRiteOptions&>(*options.back()), "load: " + label);
      for (size_t p = 0; p < group.pairs.size(); ++p) {
        pair_states[i].push_back(group.places[p] ? read_pair(group_archive, group, i, p) : PairState());
      }
    }

    for (size_t i = 0; i < groups_.size(); ++i) {
      param_groups_[i].set_options(std::move(options[i]));
      Group& group = groups_[i];
      if (group.others) group.others->restore(std::move(other_states[i]));
      for (size_t b = 0; b < group.batches.size(); ++b) {
        std::vector<PairState> states(group.batches[b]->count());
        for (size_t p = 0; p < group.pairs.size(); ++p) {
          const auto& place = group.places[p];
          if (place && place->batch == b) states[place->index] = std::move(pair_states[i][p]);
        }
        group.batches[b]->restore(states);
      }
    }
    skipped_ = at::tensor(skipped, at::kLong);
  }

 protected:
  // What one of several processes does otherwise than one alone: `ShardedLoraRite` overrides it.

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

  size_t group_count() const { return groups_.size(); }
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
    std::vector<std::vector<int64_t>> numbers;                  ///< of a batch's pairs among those of all groups
    std::vector<std::optional<engine::Batches::Place>> places;  ///< of the pairs; empty before the first step
    std::optional<engine::AdamWParameters> others;

    std::optional<engine::Batches::Place> place_of(size_t pair) const {
      return places.empty() ? std::nullopt : places[pair];
    }
    void forget_batches() {
      batches.clear();
      numbers.clear();
      places.clear();
    }
  };

  explicit LoraRite(const LoraRiteOptions& defaults)
      : Optimizer(std::vector<torch::optim::OptimizerParamGroup>{}, std::make_unique<LoraRiteOptions>(defaults)) {}

  static const char* kind(const Group& group) { return group.others ? "other parameters" : "factor pairs"; }

  static std::vector<FactorPair> pair_up(const std::vector<torch::Tensor>& alternating) {
    TORCH_CHECK(alternating.size() % 2 == 0, "LoraRite: the list of alternating factors a0, b0, a1, b1, … has ",
                alternating.size(), " tensors, expected an even number");
    std::vector<FactorPair> pairs;
    for (size_t i = 0; i < alternating.size(); i += 2) pairs.push_back({"", alternating[i], alternating[i + 1]});
    return pairs;
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

  /// Batches are built with the first step, not before: until then a module may still be moved or converted.
  void build_batches() {
    check_groups();
    int64_t first_pair = 0;
    for (size_t g = 0; g < groups_.size(); first_pair += static_cast<int64_t>(groups_[g].pairs.size()), ++g) {
      Group& group = groups_[g];
      if (group.others || !group.places.empty()) continue;
      // Pairs whose factors are shards share a batch only where all processes can: by the shapes of the whole.
      std::map<std::array<int64_t, 4>, std::vector<size_t>> members;
      for (size_t i = 0; i < group.pairs.size(); ++i) {
        detail::check_factor_pair(group.pairs[i], label_of(g, i));
        const auto shards = row_shards(g, i);
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
          labels.push_back(label_of(g, i));
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
          numbers[batch].push_back(first_pair + static_cast<int64_t>(indices[k]));
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
  }

  /// Are the groups what they were when they were added, their options of this optimizer's class?
  void check_groups() const {
    TORCH_CHECK(param_groups_.size() == groups_.size(), "LoraRite has ", param_groups_.size(),
                " param groups, expected ", groups_.size(),
                ": one was added through torch::optim::Optimizer, whose add_param_group is not virtual; ",
                "call that of LoraRite, add_pairs or add_parameters");
    for (size_t i = 0; i < groups_.size(); ++i) {
      const Group& group = groups_[i];
      const std::string label = "LoraRite, group " + std::to_string(i);
      const size_t expected = group.others ? group.others->size() : detail::leaves_of(group.pairs).size();
      TORCH_CHECK(param_groups_[i].params().size() == expected, label, ": the list of parameters has ",
                  param_groups_[i].params().size(), " tensors, expected ", expected,
                  " as when the group was added; use add_pairs or add_parameters for more");
      const auto& options = param_groups_[i].options();
      const bool right_options = group.others ? dynamic_cast<const torch::optim::AdamWOptions*>(&options) != nullptr
                                              : dynamic_cast<const LoraRiteOptions*>(&options) != nullptr;
      TORCH_CHECK(right_options, label, " was given options of another optimizer, expected ",
                  group.others ? "torch::optim::AdamWOptions" : "LoraRiteOptions");
    }
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
    };
    std::vector<Work> work;
    std::vector<at::Tensor> finite;
    for (size_t i = 0; i < groups_.size(); ++i) {
      if (groups_[i].others) {
        for (auto& flag : groups_[i].others->finite()) finite.push_back(flag);
        continue;
      }
      for (size_t b = 0; b < groups_[i].batches.size(); ++b) {
        const auto& batch = groups_[i].batches[b];
        if (!batch->observe(rite_options(i))) continue;
        work.push_back({&rite_options(i), batch.get(), &groups_[i].numbers[b]});
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
    for (const auto& [options, batch, numbers] : work) {
      norms_squared.push_back(batch->unmagnify(engine::on_device(proceed, batch->device())));
      order.insert(order.end(), numbers->begin(), numbers->end());
    }
    const at::Tensor norm = total(in_order(norms_squared, order, home)).sum().sqrt();
    for (const auto& [options, batch, numbers] : work) {
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

  static int64_t read_int(torch::serialize::InputArchive& archive, const std::string& key) {
    c10::IValue value;
    TORCH_CHECK(archive.try_read(key, value) && value.isInt(), "load: the archive has no number '", key, "'");
    return value.toInt();
  }

  PairState read_pair(torch::serialize::InputArchive& group_archive, const Group& group, size_t g, size_t p) const {
    const std::string label = label_of(g, p);
    torch::serialize::InputArchive entry;
    c10::IValue name, stepped;
    TORCH_CHECK(group_archive.try_read(std::to_string(p), entry), "load: ", label, " is missing in the archive");
    TORCH_CHECK(
        entry.try_read("name", name) && name.isString() && entry.try_read("stepped", stepped) && stepped.isBool(),
        "load: ", label, " has no entries 'name' and 'stepped'");
    TORCH_CHECK(name.toStringRef() == group.pairs[p].name, "load: ", label, " is '", name.toStringRef(),
                "' in the archive, expected '", group.pairs[p].name, "'");
    return read_state(stepped.toBool() ? &entry : nullptr, g, p);
  }

  std::vector<Group> groups_;
  detail::Owners owners_;  ///< every tensor of every group, and whose it is
  std::vector<int64_t> known_order_;
  at::Tensor order_;    ///< the same, on the device
  at::Tensor skipped_;  ///< scalar on the device, so that counting needs no host read
};

}  // namespace lora_rite
