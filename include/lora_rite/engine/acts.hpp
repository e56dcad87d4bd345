#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <exception>
#include <memory>
#include <vector>

#include "lora_rite/options.hpp"

/// The three acts of a step, as every engine does them:
///
///     observe() → Observation → unmagnify() → plan() → Plan → commit()
///
/// act 1 reads tall data, act 2 decides on r×r matrices, act 3 moves the rows. Nothing is changed before `commit`, and
/// everything that can fail lies before it. Batches that do act 2 together are a `BatchGroup`.
namespace lora_rite::engine {

/// All that `commit` writes, and all memory that it needs. Dropped, nothing has happened.
class Plan {
 public:
  virtual ~Plan() = default;

  /// Moves factors and momenta, and remembers. Asks for no memory on a CPU: of several groups none must fail when
  /// others have moved.
  virtual void commit() noexcept = 0;

  /// What an accelerator answered to `commit`, if it failed to take the commands.
  const std::exception_ptr& error() const { return error_; }

 protected:
  std::exception_ptr error_;
};

/// What act 1 found in one step. Dropped, nothing has happened.
class Observation {
 public:
  virtual ~Observation() = default;

  /// Are all gradients and factors finite? A scalar on the group's device.
  virtual at::Tensor finite() const = 0;

  /// Act 2, first half: the partner's bases. Returns ‖Ḡ‖² of both factors of every pair, batch by batch, on the group's
  /// device. Where the step will be skipped (`step_allowed` false) nothing that is not finite comes near an
  /// eigensolver.
  virtual at::Tensor unmagnify(const at::Tensor& step_allowed) = 0;

  /// Act 2, second half, with the clip factor c (a scalar), and all of act 3 that can fail. Takes the observation's
  /// memory: it is of no more use.
  virtual std::unique_ptr<Plan> plan(const LoraRiteOptions& options, const at::Tensor& clip_factor,
                                     const at::Tensor& step_allowed) = 0;

  /// The batches of the group that take part, by their places among the param group's, in the order of `unmagnify`.
  virtual const std::vector<size_t>& batches() const = 0;
};

/// Batches of one param group that go through the acts together.
class BatchGroup {
 public:
  virtual ~BatchGroup() = default;

  virtual at::Device device() const = 0;

  /// Throws c10::Error if these batches cannot be stepped with `options`. Changes nothing.
  virtual void check_options(const LoraRiteOptions& /*options*/) const {}

  /// Act 1. Null if no pair has a gradient: then there is nothing to do.
  virtual std::unique_ptr<Observation> observe(const LoraRiteOptions& options) = 0;

  /// All of a step, where nobody else has a say in whether it is taken and how it is clipped: no other group, and no
  /// other process. `skipped` counts the steps that are not taken, on the device; undefined means 0. Returns false if
  /// this group cannot; then nothing has happened.
  virtual bool step_alone(const LoraRiteOptions& /*options*/, at::Tensor& /*skipped*/) { return false; }

  /// Hands the rates of `options` to the device, for a recorded step; an ordinary one does it itself.
  virtual void upload_rates(const LoraRiteOptions& /*options*/) {}
};

}  // namespace lora_rite::engine
