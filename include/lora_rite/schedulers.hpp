#pragma once

#include <torch/optim/schedulers/lr_scheduler.h>
#include <torch/serialize/archive.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace lora_rite {

/// Common ground of the schedules with a warm-up, which LibTorch lacks. The rate of every param group is its base rate
/// (the one it has when the scheduler is built) times a factor f(k) of the number k of finished steps:
/// k < warmup_steps: (k + 1) / warmup_steps; after that `decay(p)` of the progress p = (k − warm-up) / (total −
/// warm-up), from 1 at p = 0 to `min_ratio` at p = 1 and beyond. The constructor sets f(0); call `step()` after each
/// optimizer step. A group that is added to the optimizer later has as base rate the one that it has when
/// `include_new_groups()` or the next `step()` finds it.
class WarmupScheduler : public torch::optim::LRScheduler {
 public:
  /// 0 ≤ warmup_steps ≤ total_steps, total_steps ≥ 1, min_ratio in [0, 1]; else c10::Error. The optimizer must outlive
  /// the scheduler.
  WarmupScheduler(torch::optim::Optimizer& optimizer, int64_t warmup_steps, int64_t total_steps, double min_ratio)
      : LRScheduler(optimizer),
        optimizer_(optimizer),
        warmup_steps_(warmup_steps),
        total_steps_(total_steps),
        min_ratio_(min_ratio),
        base_lrs_(get_current_lrs()) {
    TORCH_CHECK(total_steps >= 1, "scheduler: total_steps is ", total_steps, ", expected ≥ 1");
    TORCH_CHECK(warmup_steps >= 0 && warmup_steps <= total_steps, "scheduler: warmup_steps is ", warmup_steps,
                ", expected 0 to total_steps (", total_steps, ")");
    TORCH_CHECK(min_ratio >= 0 && min_ratio <= 1, "scheduler: min_ratio is ", min_ratio, ", expected 0 to 1");
  }

  /// To be called after groups were added to the optimizer, so that they are scaled from now on and not from the next
  /// `step()`: takes their rates as base rates and sets those of now. Throws c10::Error if the optimizer has fewer
  /// groups than before.
  void include_new_groups() {
    const size_t known = base_lrs_.size();
    find_new_groups();
    const auto wanted = rates(finished_steps());
    for (size_t i = known; i < wanted.size(); ++i) optimizer_.param_groups()[i].options().set_lr(wanted[i]);
  }

  /// Number of finished steps k.
  int64_t finished_steps() const { return static_cast<int64_t>(step_count_); }

  /// Writes the number of finished steps and the base rates.
  void save(torch::serialize::OutputArchive& archive) const {
    archive.write("finished_steps", c10::IValue(finished_steps()));
    archive.write("base_lrs", c10::IValue(c10::List<double>(c10::ArrayRef<double>(base_lrs_))));
  }

  /// Restores the position and the base rates, and sets the groups' rates accordingly. Throws c10::Error if the archive
  /// is no scheduler's or has another number of groups; nothing is changed then.
  void load(torch::serialize::InputArchive& archive) {
    c10::IValue steps, lrs;
    TORCH_CHECK(archive.try_read("finished_steps", steps) && steps.isInt() && archive.try_read("base_lrs", lrs) &&
                    lrs.isDoubleList(),
                "scheduler: the archive holds no scheduler (entries 'finished_steps' and 'base_lrs')");
    const size_t groups = optimizer_.param_groups().size();
    TORCH_CHECK(lrs.toDoubleVector().size() == groups, "scheduler: the archive has ", lrs.toDoubleVector().size(),
                " param groups, expected ", groups, " as the optimizer has");
    base_lrs_ = lrs.toDoubleVector();
    step_count_ = static_cast<unsigned>(steps.toInt());
    set_rates(finished_steps());
  }

 protected:
  /// The factor after the warm-up, progress p in [0, 1]: from 1 to min_ratio.
  virtual double decay(double progress) const = 0;

  /// As the constructor was told.
  double min_ratio() const { return min_ratio_; }

  /// To be called at the end of a derived constructor (a base one cannot call `decay`).
  void set_initial_rates() { set_rates(0); }

 private:
  // LibTorch counts after it has asked: while the k-th step is being finished, step_count_ is still k − 1.
  std::vector<double> get_lrs() override {
    find_new_groups();
    return rates(finished_steps() + 1);
  }

  std::vector<double> rates(int64_t finished) const {
    double factor = 0;
    if (finished < warmup_steps_) {
      factor = static_cast<double>(finished + 1) / static_cast<double>(warmup_steps_);
    } else if (finished >= total_steps_) {
      factor = min_ratio_;
    } else {
      factor = decay(static_cast<double>(finished - warmup_steps_) / static_cast<double>(total_steps_ - warmup_steps_));
    }
    std::vector<double> result = base_lrs_;
    for (double& rate : result) rate *= factor;
    return result;
  }

  void find_new_groups() {
    const std::vector<double> now = get_current_lrs();
    TORCH_CHECK(now.size() >= base_lrs_.size(), "scheduler: the optimizer has ", now.size(), " param groups, expected ",
                base_lrs_.size(), " or more; build a new scheduler when groups were taken out");
    base_lrs_.insert(base_lrs_.end(), now.begin() + static_cast<std::ptrdiff_t>(base_lrs_.size()), now.end());
  }

  void set_rates(int64_t finished) {
    const auto wanted = rates(finished);
    for (size_t i = 0; i < wanted.size(); ++i) optimizer_.param_groups()[i].options().set_lr(wanted[i]);
  }

  torch::optim::Optimizer& optimizer_;
  int64_t warmup_steps_;
  int64_t total_steps_;
  double min_ratio_;
  std::vector<double> base_lrs_;
};

/// Warm-up, then a straight line down to min_ratio (default 0) at total_steps.
class WarmupLinear : public WarmupScheduler {
 public:
  /// As WarmupScheduler's. Sets the rates of step 0.
  WarmupLinear(torch::optim::Optimizer& optimizer, int64_t warmup_steps, int64_t total_steps, double min_ratio = 0)
      : WarmupScheduler(optimizer, warmup_steps, total_steps, min_ratio) {
    set_initial_rates();
  }

 private:
  double decay(double progress) const override { return 1 - (1 - min_ratio()) * progress; }
};

/// Warm-up, then half a cosine down to min_ratio (default 0) at total_steps (Loshchilov & Hutter 2017).
class WarmupCosine : public WarmupScheduler {
 public:
  /// As WarmupScheduler's. Sets the rates of step 0.
  WarmupCosine(torch::optim::Optimizer& optimizer, int64_t warmup_steps, int64_t total_steps, double min_ratio = 0)
      : WarmupScheduler(optimizer, warmup_steps, total_steps, min_ratio) {
    set_initial_rates();
  }

 private:
  double decay(double progress) const override {
    constexpr double kPi = 3.14159265358979323846;
    return min_ratio() + (1 - min_ratio()) * 0.5 * (1 + std::cos(kPi * progress));
  }
};

}  // namespace lora_rite
