#pragma once

#include <torch/nn/module.h>
#include <torch/optim/adamw.h>
#include <torch/optim/optimizer.h>
#include <torch/serialize/archive.h>

#include <map>
#include <memory>
#include <optional>
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
/// `torch::optim::AdamWOptions`. LibTorch's schedulers and ours drive all of them.
///
/// - A step with a gradient or factor that is NaN or infinite changes nothing, and is counted: `skipped_steps()`.
/// - A factor without a gradient stays as it is; its partner still moves.
/// - A factor that someone else changed since the last step (a merge, a loaded checkpoint, averaged weights) is noticed
///   by sums over its columns. Its statistics are always fresh; the second moment in its old basis keeps its place in
///   the new one, and the momenta stay as they are, as Adam's would.
/// - An exception leaves factors and state as they were, as far as it comes from a check of the input.
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
  /// in a second one by AdamW with `others`.
  explicit LoraRite(const torch::nn::Module& module, LoraRiteOptions options, torch::optim::AdamWOptions others)
      : LoraRite(options) {
    std::vector<FactorPair> pairs = find_factor_pairs(module);
    TORCH_CHECK(!pairs.empty(), "LoraRite: the module has no parameters named like LoRA factors (lora_A/lora_B, ",
                "lora_embedding_A/_B, lora_down/lora_up, lora.down/lora.up), expected at least one pair");
    add_pairs(std::move(pairs), options);
    std::vector<torch::Tensor> rest;
    for (const auto& parameter : module.parameters()) {
      if (parameter.requires_grad() && !is_known(parameter)) rest.push_back(parameter);
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
    std::map<const void*, std::string> owners = owners_;
    std::vector<torch::Tensor> factors;
    for (size_t i = 0; i < pairs.size(); ++i) {
      const std::string label = detail::pair_label(pairs[i], index, i);
      detail::check_factor_pair(pairs[i], label);
      for (const auto& factor : {pairs[i].a, pairs[i].b}) {
        claim(owners, factor, label);
        factors.push_back(factor);
      }
    }
    add_group(std::move(factors), std::make_unique<LoraRiteOptions>(options));
    owners_ = std::move(owners);
    groups_.push_back({std::move(pairs), {}, std::nullopt});
  }

  /// Another group of parameters that are no LoRA factors, stepped by AdamW.
  void add_parameters(std::vector<torch::Tensor> parameters, torch::optim::AdamWOptions options) {
    const size_t index = param_groups_.size();
    TORCH_CHECK(!parameters.empty(), "LoraRite, group ", index, ": the list of parameters is empty");
    std::map<const void*, std::string> owners = owners_;
    for (size_t i = 0; i < parameters.size(); ++i) {
      const std::string label = "parameter " + std::to_string(i) + " of group " + std::to_string(index);
      TORCH_CHECK(parameters[i].defined(), label, " is undefined, expected a tensor");
      TORCH_CHECK(at::isFloatingType(parameters[i].scalar_type()), label, " has dtype ", parameters[i].scalar_type(),
                  ", expected a floating one");
      claim(owners, parameters[i], label);
    }
    add_group(parameters, std::make_unique<torch::optim::AdamWOptions>(options));
    owners_ = std::move(owners);
    groups_.push_back({{}, {}, engine::AdamWParameters(std::move(parameters))});
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
  /// range, a factor changed shape, dtype or device, or a gradient is sparse; nothing is changed then.
  torch::Tensor step(LossClosure closure = nullptr) override {
    torch::Tensor loss;
    if (closure) {
      at::AutoGradMode enable_grad(true);
      loss = closure();
    }
    at::NoGradGuard no_grad;
    build_batches();
    check_inputs();

    // Act 1, observe: tall data become r×r statistics.
    struct Work {
      const LoraRiteOptions* options;
      engine::Batch* batch;
    };
    std::vector<Work> work;
    std::vector<at::Tensor> finite;
    for (size_t i = 0; i < groups_.size(); ++i) {
      if (groups_[i].others) {
        for (auto& flag : groups_[i].others->finite()) finite.push_back(flag);
        continue;
      }
      for (const auto& batch : groups_[i].batches.all) {
        if (!batch->observe(rite_options(i))) continue;
        work.push_back({&rite_options(i), batch.get()});
        finite.push_back(batch->finite());
      }
    }
    if (finite.empty()) return loss;
    const at::Device home = finite[0].device();
    const at::Tensor proceed = at::stack(to_device(finite, home)).all();

    // Act 2, decide: the partner's bases, the norm of all unmagnified gradients, the maps for the rows.
    std::vector<at::Tensor> norms_squared;
    for (const auto& [options, batch] : work) {
      norms_squared.push_back(batch->unmagnify(proceed.to(batch->device(), /*non_blocking=*/true)));
    }
    if (!work.empty()) {
      const at::Tensor norm = at::stack(to_device(norms_squared, home)).sum().sqrt();
      for (const auto& [options, batch] : work) {
        const double bound = options->clip_unmagnified_norm();
        const at::Tensor clip_factor = bound > 0 ? (bound / norm).clamp_max(1.0) : at::ones_like(norm);
        // Act 3, apply: the rows move.
        batch->apply(*options, clip_factor.to(batch->device(), /*non_blocking=*/true),
                     proceed.to(batch->device(), /*non_blocking=*/true));
      }
    }
    for (size_t i = 0; i < groups_.size(); ++i) {
      if (groups_[i].others) groups_[i].others->step(adamw_options(i), proceed);
    }
    const at::Tensor skipped = negated(proceed).to(at::kLong);
    if (skipped_.defined() && skipped_.device() == home) {
      skipped_.add_(skipped);  // in place: a recorded step counts, too
    } else {
      skipped_ = skipped_.defined() ? skipped_.to(home) + skipped : skipped;
    }
    return loss;
  }

  /// Hands the learning rates to the device. Only a replay of a recorded step (`LoraRiteOptions::capturable`) needs it,
  /// after a scheduler or a user changed them: `step` itself does it.
  void upload_rates() {
    at::NoGradGuard no_grad;
    for (size_t i = 0; i < groups_.size(); ++i) {
      if (groups_[i].others) groups_[i].others->upload_rate(adamw_options(i));
      for (const auto& batch : groups_[i].batches.all) batch->upload_rates(rite_options(i));
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
        if (group.batches.places.empty()) {  // before the first step
          entry =
              engine::make_batches<Basis>({group.pairs[i]}, {group.pairs[i].name}, Engine::Device).all[0]->diagnose(0);
        } else {
          entry = group.batches.all[group.batches.places[i].batch]->diagnose(group.batches.places[i].index);
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
        entry.write("stepped", c10::IValue(!group.batches.places.empty()));
        if (!group.batches.places.empty())
          group.batches.all[group.batches.places[p].batch]->pick(group.batches.places[p].index).save(entry);
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
        other_states[i] = group.others->read(group_archive, label);
        continue;
      }
      detail::check_options(static_cast<const LoraRiteOptions&>(*options.back()), "load: " + label);
      for (size_t p = 0; p < group.pairs.size(); ++p) {
        pair_states[i].push_back(read_pair(group_archive, group, i, p));
      }
    }

    for (size_t i = 0; i < groups_.size(); ++i) {
      param_groups_[i].set_options(std::move(options[i]));
      Group& group = groups_[i];
      if (group.others) group.others->restore(std::move(other_states[i]));
      for (size_t b = 0; b < group.batches.all.size(); ++b) {
        std::vector<PairState> states(group.batches.all[b]->count());
        for (size_t p = 0; p < group.pairs.size(); ++p) {
          if (group.batches.places[p].batch == b) states[group.batches.places[p].index] = std::move(pair_states[i][p]);
        }
        group.batches.all[b]->restore(states);
      }
    }
    skipped_ = at::tensor(skipped, at::kLong);
  }

 private:
  static constexpr const char* kFormat = "lora_rite.LoraRite 1";

  /// Beside the param group of the same index: factor pairs, or (`others`) the parameters that AdamW steps.
  struct Group {
    std::vector<FactorPair> pairs;
    engine::Batches batches;
    std::optional<engine::AdamWParameters> others;
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

  /// Enters a tensor as owned by `label`; throws if it has an owner already.
  static void claim(std::map<const void*, std::string>& owners, const torch::Tensor& tensor, const std::string& label) {
    const auto [owner, is_new] = owners.emplace(tensor.unsafeGetTensorImpl(), label);
    TORCH_CHECK(is_new, label, ": a tensor of shape ", tensor.sizes(), " is used twice, the other time in ",
                owner->second, "; expected every tensor once");
  }

  bool is_known(const torch::Tensor& tensor) const { return owners_.count(tensor.unsafeGetTensorImpl()) > 0; }

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
    for (size_t g = 0; g < groups_.size(); ++g) {
      Group& group = groups_[g];
      if (group.others || !group.batches.places.empty()) continue;
      std::vector<std::string> labels;
      for (size_t i = 0; i < group.pairs.size(); ++i) {
        labels.push_back(detail::pair_label(group.pairs[i], g, i));
        detail::check_factor_pair(group.pairs[i], labels.back());
      }
      const LoraRiteOptions& options = rite_options(g);
      const bool needs_device = options.capturable() || options.row_equilibration();
      group.batches =
          engine::make_batches<Basis>(group.pairs, labels, needs_device ? Engine::Device : options.engine());
    }
  }

  /// Groups, options and gradients, before anything is changed.
  void check_inputs() const {
    for (size_t i = 0; i < groups_.size(); ++i) {
      const Group& group = groups_[i];
      const std::string label = "LoraRite, group " + std::to_string(i);
      const size_t expected = group.others ? group.others->size() : 2 * group.pairs.size();
      TORCH_CHECK(param_groups_[i].params().size() == expected, label, ": the list of parameters has ",
                  param_groups_[i].params().size(), " tensors, expected ", expected,
                  " as when the group was added; use add_pairs or add_parameters for more");
      const auto& options = param_groups_[i].options();
      const bool right_options = group.others ? dynamic_cast<const torch::optim::AdamWOptions*>(&options) != nullptr
                                              : dynamic_cast<const LoraRiteOptions*>(&options) != nullptr;
      TORCH_CHECK(right_options, label, " was given options of another optimizer, expected ",
                  group.others ? "torch::optim::AdamWOptions" : "LoraRiteOptions");
      if (group.others) {
        group.others->check_inputs(label);
        continue;
      }
      detail::check_options(rite_options(i), label);
      for (const auto& batch : group.batches.all) batch->check_inputs();
    }
  }

  static std::vector<at::Tensor> to_device(const std::vector<at::Tensor>& tensors, at::Device device) {
    std::vector<at::Tensor> result;
    for (const auto& tensor : tensors) result.push_back(tensor.to(device, /*non_blocking=*/true));
    return result;
  }

  static int64_t read_int(torch::serialize::InputArchive& archive, const std::string& key) {
    c10::IValue value;
    TORCH_CHECK(archive.try_read(key, value) && value.isInt(), "load: the archive has no number '", key, "'");
    return value.toInt();
  }

  PairState read_pair(torch::serialize::InputArchive& group_archive, const Group& group, size_t g, size_t p) const {
    const engine::Batch& batch = *group.batches.all[group.batches.places[p].batch];
    const std::string label = detail::pair_label(group.pairs[p], g, p);
    torch::serialize::InputArchive entry;
    c10::IValue name, stepped;
    TORCH_CHECK(group_archive.try_read(std::to_string(p), entry), "load: ", label, " is missing in the archive");
    TORCH_CHECK(
        entry.try_read("name", name) && name.isString() && entry.try_read("stepped", stepped) && stepped.isBool(),
        "load: ", label, " has no entries 'name' and 'stepped'");
    TORCH_CHECK(name.toStringRef() == group.pairs[p].name, "load: ", label, " is '", name.toStringRef(),
                "' in the archive, expected '", group.pairs[p].name, "'");
    return batch.read(stepped.toBool() ? &entry : nullptr, group.batches.places[p].index);
  }

  std::vector<Group> groups_;
  std::map<const void*, std::string> owners_;  ///< every tensor of every group, and whose it is
  at::Tensor skipped_;                         ///< scalar on the device, so that counting needs no host read
};

}  // namespace lora_rite
