#pragma once

#include <torch/nn/module.h>
#include <torch/optim/adamw.h>
#include <torch/optim/optimizer.h>
#include <torch/serialize/archive.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/bodies.hpp"
#include "lora_rite/diagnostics.hpp"
#include "lora_rite/engine/basis_functions.hpp"
#include "lora_rite/factor_pair.hpp"
#include "lora_rite/options.hpp"
#include "lora_rite/state.hpp"

namespace lora_rite {

struct PairState;
namespace detail {
class Owners;
}
namespace engine {
struct RowShards;
class BatchGroup;
}  // namespace engine

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
/// (TA, BT⁻¹) of it; see docs/algorithm.md. `LoraRite<Basis>` constructs it; the basis makes no other difference here.
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
///   or an allocation. (What AdamW's kernel or an accelerator refuses in the last act is the exception;
///   docs/algorithm.md.)
class LoraRiteBase : public torch::optim::Optimizer {
 public:
  LORA_RITE_BODY ~LoraRiteBase() override;

  /// Another group with options of its own. Throws c10::Error naming the pair or option if the list is empty, a pair
  /// does not fit together, a tensor appears twice, or an option is out of its range; nothing is added then.
  void add_pairs(std::vector<FactorPair> pairs, LoraRiteOptions options);

  /// Another group of parameters that are no LoRA factors, stepped with AdamW. It ascends with `maximize`, which
  /// LibTorch's AdamWOptions lack; by default it does what the optimizer was built with (`maximize` of the
  /// constructor's options).
  void add_parameters(std::vector<torch::Tensor> parameters, torch::optim::AdamWOptions options,
                      std::optional<bool> maximize = std::nullopt);

  /// LibTorch's way to add a group: alternating factors with LoraRiteOptions (or none: the defaults), or other
  /// parameters with AdamWOptions.
  void add_param_group(const torch::optim::OptimizerParamGroup& group);

  /// One step with the gradients at hand; a closure, if given, is called before, with gradients enabled, and its loss
  /// is returned. Reads nothing back from the device. Throws c10::Error naming the pair or option if an option left its
  /// range, a factor changed shape, dtype or device, or a gradient is sparse or of another shape; nothing is changed
  /// then.
  LORA_RITE_BODY torch::Tensor step(LossClosure closure = nullptr) override;

  /// Hands the learning rates to the device. Only a replay of a recorded step (`LoraRiteOptions::capturable`) needs it,
  /// after a scheduler or a user changed them: `step` itself does it.
  void upload_rates();

  /// Steps that were skipped because a gradient or a factor was not finite. Reads from the device.
  int64_t skipped_steps() const;

  /// How every pair stands, in the order of the groups. Reads from the device; changes nothing.
  std::vector<PairDiagnostics> diagnostics() const;

  /// What is remembered of a pair, as copies: the answer to `state()` of LibTorch's optimizers. Nothing before the
  /// first step with a gradient of one of its factors. Reads from the device. Throws c10::Error if there is no such
  /// pair, or several of that name.
  std::optional<StateOfPair> state_of(const std::string& name) const;
  /// The same by the pair's place in its group.
  std::optional<StateOfPair> state_of(size_t group, size_t pair) const;

  /// Forgets what is remembered of a pair (momenta, second moments, escaped mass, numbers of steps), as one does after
  /// factors were merged and drawn anew (ReLoRA) or a task begins: its next step is the first one of a new optimizer.
  /// Where all pairs begin anew, `reset_state()` is cheaper. A recorded step must be recorded again. Throws c10::Error
  /// if there is no such pair, or several of that name.
  void reset_state(const std::string& name);
  /// The same by the pair's place in its group.
  void reset_state(size_t group, size_t pair);
  /// Forgets all that is remembered, also of parameters that AdamW steps, and the number of skipped steps: the next
  /// step is the first one of a new optimizer.
  void reset_state();

  /// Takes a pair out of its group and its param group; all others go on as if it had no gradients. A group whose last
  /// pair went stays, empty, so that groups keep their numbers, and schedulers and rates their places. Pairs behind it
  /// move up by one place. A recorded step must be recorded again. Throws c10::Error if there is no such pair, or
  /// several of that name, or several processes share the work; nothing is changed then.
  void remove_pair(const std::string& name);
  /// The same by the pair's place in its group.
  void remove_pair(size_t group, size_t pair);

  /// Writes options and state of all groups, by group and place and never by address: a freshly built optimizer over
  /// the same pairs resumes bit for bit. The factors themselves are the module's to save.
  LORA_RITE_BODY void save(torch::serialize::OutputArchive& archive) const override;

  /// Takes over what `save` wrote. Options are assigned in place: references to them stay good. Throws c10::Error that
  /// names the first thing that does not fit (basis, number or kind of groups, a pair's name, an entry's shape or
  /// dtype, an option out of range); nothing is changed then, and a `load` before the first step fixes neither engine
  /// nor dtypes.
  LORA_RITE_BODY void load(torch::serialize::InputArchive& archive) override;

  /// Takes over what `save` wrote of the pairs that this optimizer has as well, by name, in whatever group they are
  /// there: for other prefixes, a part of the pairs, or factors of another dtype. A pair without a name is called
  /// "pair 2 of group 0", there and here. Momenta are converted; factors that were rounded since count as edited.
  /// Everything else stays as it is: options (rates among them), skipped steps, pairs and groups that the archive
  /// lacks. Throws c10::Error that names what does not fit (basis, a shape, two pairs renamed alike), or both sides'
  /// names if no pair is in both; nothing is changed then.
  LORA_RITE_BODY virtual LoadReport load_matching(torch::serialize::InputArchive& archive,
                                                  const LoadOptions& options = {});

 protected:
  /// Without groups yet. With `parts` the factors are what one of several processes holds of them: how many rows there
  /// are in all, and so whether the rank fits, is known in the first step only.
  LoraRiteBase(const engine::BasisFunctions& basis, const LoraRiteOptions& defaults, bool parts);
  /// What is left of the other one can be destroyed or assigned to, nothing else.
  LoraRiteBase(LoraRiteBase&&) noexcept;
  /// Likewise.
  LoraRiteBase& operator=(LoraRiteBase&&) noexcept;

  /// All factor pairs of a module in one group, and its other trainable parameters, if any, in a second one.
  void add_module(const torch::nn::Module& module, const LoraRiteOptions& options,
                  const torch::optim::AdamWOptions& others);
  /// `add_pairs` with a₀, b₀, a₁, b₁, …; errors say that the list is read so, for it may be a list of something else.
  void add_alternating(const std::vector<torch::Tensor>& factors, const LoraRiteOptions& options);
  /// Each by `add_param_group`. Throws c10::Error if there are none.
  void add_groups(const std::vector<torch::optim::OptimizerParamGroup>& groups);

  // --- Hooks: what one of several processes does otherwise than one alone (`ShardedLoraRite`, `RowShardedLoraRite`).

  /// Before anything else is asked of groups that are new.
  virtual void agree_on_groups() {}
  /// Is the division of the work such that a pair can go?
  virtual bool can_remove_pairs() const { return true; }
  /// Called by `step`, `load` and `load_matching` when every refusal is behind them and nothing was changed: where
  /// processes agree. `lines` say what else must be the same everywhere.
  virtual void agree_before_change(const std::string& /*lines*/) {}
  /// The same for a call that only changes what is remembered: `what` checks its argument, and says it.
  virtual void agree_on_call(const char* /*call*/, const std::function<std::string()>& what) { what(); }
  /// Does this process keep the state of pair `pair` and move its factors?
  virtual bool keeps(size_t /*group*/, size_t /*pair*/) const { return true; }
  /// The other rows of a pair, where this process holds only some.
  LORA_RITE_BODY virtual std::optional<engine::RowShards> row_shards(size_t group, size_t pair) const;
  /// Does nobody else have a say in the two that follow?
  virtual bool decides_alone() const { return true; }
  /// Shall the step be taken? `all_finite` is absent where no parameter of this process has a gradient; so is the
  /// result if there is nothing to do.
  virtual std::optional<at::Tensor> agree_on_step(const std::optional<at::Tensor>& all_finite) { return all_finite; }
  /// ‖Ḡ‖² of every pair, 0 where this process does not keep it → the same of all processes.
  virtual at::Tensor sum_over_processes(const at::Tensor& squared_norms) { return squared_norms; }
  /// Writes the state of a pair.
  LORA_RITE_BODY virtual void save_state(torch::serialize::OutputArchive& archive, size_t group, size_t pair) const;
  /// Reads what `save_state` wrote; without an archive: nothing remembered.
  LORA_RITE_BODY virtual PairState read_state(torch::serialize::InputArchive* archive, size_t group, size_t pair) const;

  // --- For those who override the hooks.

  /// Are the groups what they were when they were added, their options of this optimizer's class?
  void check_groups() const;
  /// Those of other parameters among them.
  size_t group_count() const;
  /// Of a group of other parameters.
  bool ascends(size_t group) const;
  /// Empty for a group of other parameters.
  const std::vector<FactorPair>& pairs_of(size_t group) const;
  /// What messages call a pair: by its name, or by its place if it has none.
  std::string label_of(size_t group, size_t pair) const;
  /// The state of a pair that this process keeps.
  PairState pick(size_t group, size_t pair) const;

 private:
  // step/group.hpp
  struct Groups;
  struct Group;

  // step/groups.inc
  void append(Group&& group, std::vector<torch::Tensor> tensors,
              std::unique_ptr<torch::optim::OptimizerOptions> options, detail::Owners owners);
  const LoraRiteOptions& rite_options(size_t group) const;
  const torch::optim::AdamWOptions& adamw_options(size_t group) const;
  [[noreturn]] void refuse_tensor(size_t group, size_t place) const;
  [[noreturn]] void refuse_new_leaf(size_t group, size_t pair, Side side) const;
  std::pair<size_t, size_t> find_pair(const std::string& name) const;
  void check_pair(size_t group, size_t pair) const;
  std::string name_of(size_t group, size_t pair) const;

  // step/state.inc
  void with_batches(const std::function<void()>& function);
  void build_batches(size_t index, Group& group);
  void forget(size_t group, size_t pair);

  // step/step.inc
  struct Act1;
  Act1 observe();
  void check_inputs() const;
  void take_step();
  engine::BatchGroup* only_group() const;
  at::Tensor in_pair_order(const std::vector<at::Tensor>& of_batches, const std::vector<int64_t>& order,
                           at::Device device);

  // step/archive.inc
  using WritePair = std::function<void(torch::serialize::OutputArchive& entry, size_t group, size_t pair)>;
  using WriteAdamW = std::function<void(torch::serialize::OutputArchive& group_archive, size_t group)>;
  void write(torch::serialize::OutputArchive& archive, const WritePair& write_pair,
             const WriteAdamW& write_adamw) const;
  void write_own_pair(torch::serialize::OutputArchive& entry, size_t group, size_t pair) const;
  int64_t read_header(torch::serialize::InputArchive& archive) const;
  PairState read_pair(torch::serialize::InputArchive& group_archive, size_t group, size_t pair) const;
  struct SavedGroup;
  SavedGroup read_group(torch::serialize::InputArchive& archive, size_t index) const;

  // step/load_matching.inc
  struct Matching;
  Matching find_in(torch::serialize::InputArchive& archive, const LoadOptions& options) const;
  void read_matching(Matching& matching, const LoadOptions& options) const;
  PairState read_converted(torch::serialize::InputArchive& entry, size_t group, size_t pair) const;

  std::unique_ptr<Groups> own_;
};

}  // namespace lora_rite
