#pragma once

#include <ATen/ATen.h>
#include <torch/optim/optimizer.h>
#include <torch/serialize/archive.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/engine/device_numbers.hpp"

namespace lora_rite {

/// Dynamic loss scaling for training in half precision, which LibTorch lacks: torch.amp.GradScaler for any
/// torch::optim::Optimizer. The loss is multiplied by a scale so that small gradients survive the backward pass, the
/// gradients are divided by it before the step. A step whose gradients hold an infinity or NaN is left out and the
/// scale backs off; after `growth_interval` steps in a row without one the scale grows.
///
///   scaler.scale(loss).backward();
///   scaler.unscale_(optimizer);  // only if something reads or clips the gradients before the step
///   scaler.step(optimizer);
///   scaler.update();
///
/// Differences from PyTorch's: half gradients are unscaled to float ones instead of being refused, and every number of
/// the constructor, of `update` and of `load` is checked.
///
/// A step that is left out never reaches the optimizer, so `LoraRite::skipped_steps()` does not count it.
class GradScaler {
 public:
  /// init_scale > 0, growth_factor > 1, 0 < backoff_factor < 1, all finite (init_scale as a float, too), and
  /// growth_interval ≥ 1; else c10::Error. With `enabled` false `scale` returns what it is given, `step` is the
  /// optimizer's own, and all else does nothing.
  explicit GradScaler(double init_scale = 65536, double growth_factor = 2, double backoff_factor = 0.5,
                      int64_t growth_interval = 2000, bool enabled = true)
      : settings_{init_scale, growth_factor, backoff_factor, growth_interval, 0}, enabled_(enabled) {
    check(settings_, "GradScaler");
  }

  GradScaler(const GradScaler&) = delete;
  GradScaler& operator=(const GradScaler&) = delete;

  /// As the constructor was told.
  bool is_enabled() const { return enabled_; }

  /// `output` times the scale. The first call puts the scale on the device of `output`.
  at::Tensor scale(const at::Tensor& output) {
    if (!enabled_) return output;
    if (!scale_.defined()) {
      const auto options = at::TensorOptions().device(output.device());
      scale_ = at::full({}, settings_.scale, options.dtype(at::kFloat));
      growth_tracker_ = at::full({}, settings_.growth_tracker, options.dtype(at::kInt));
    }
    return output * engine::on_device(scale_, output.device());
  }

  /// Each of `outputs` times the scale.
  std::vector<at::Tensor> scale(const std::vector<at::Tensor>& outputs) {
    std::vector<at::Tensor> result;
    for (const auto& output : outputs) result.push_back(scale(output));
    return result;
  }

  /// Divides the gradients of the optimizer's parameters by the scale and looks for infinities and NaN among them,
  /// without a host read. In place, but for half gradients, which are replaced by float ones: divided in half, they
  /// would underflow again. `step` does it by itself where it was not called. Throws c10::Error if it was called for
  /// this optimizer since the last `update`, after its `step`, or before `scale`.
  void unscale_(torch::optim::Optimizer& optimizer) {
    if (!enabled_) return;
    check_has_scale("unscale_");
    Progress& progress = progress_[&optimizer];
    TORCH_CHECK(
        progress.stage != Stage::Unscaled,
        "GradScaler: unscale_ was called for this optimizer already, expected once between two calls of update");
    TORCH_CHECK(progress.stage != Stage::Stepped, "GradScaler: unscale_ was called after step, expected before");
    at::NoGradGuard no_grad;
    std::map<std::pair<std::string, at::ScalarType>, std::vector<at::Tensor>> gradients;  // by device and dtype
    for (auto& group : optimizer.param_groups()) {
      for (auto& parameter : group.params()) {
        if (!parameter.grad().defined()) continue;
        at::Tensor& gradient = parameter.mutable_grad();
        if (gradient.scalar_type() == at::kHalf) gradient = gradient.to(at::kFloat);
        const at::Tensor values = gradient.is_sparse() ? gradient._values() : gradient;
        gradients[{values.device().str(), values.scalar_type()}].push_back(values);
      }
    }
    // In double, as PyTorch does: some compilers divide floats inexactly.
    const at::Tensor inverse_scale = scale_.to(at::kDouble).reciprocal().to(at::kFloat);
    std::vector<at::Tensor> found_infinite;
    for (const auto& [device_and_dtype, tensors] : gradients) {
      const at::Device device = tensors[0].device();
      found_infinite.push_back(at::zeros({}, at::TensorOptions().dtype(at::kFloat).device(device)));
      at::_amp_foreach_non_finite_check_and_unscale_(tensors, found_infinite.back(),
                                                     engine::on_device(inverse_scale, device));
    }
    progress = {Stage::Unscaled, std::move(found_infinite)};
  }

  /// `unscale_` unless it was called, and the optimizer's step unless a gradient was infinite or NaN when unscaled; one
  /// host read. Returns whether the optimizer stepped. Throws c10::Error if it was called for this optimizer since the
  /// last `update`, before `scale`, with a closure (it would leave gradients that are scaled), or if no parameter has a
  /// gradient.
  bool step(torch::optim::Optimizer& optimizer, const torch::optim::Optimizer::LossClosure& closure = nullptr) {
    TORCH_CHECK(!closure, "GradScaler: step was given a closure, expected none; call scale(loss).backward() before");
    if (!enabled_) {
      optimizer.step();
      return true;
    }
    check_has_scale("step");
    Progress& progress = progress_[&optimizer];
    TORCH_CHECK(progress.stage != Stage::Stepped,
                "GradScaler: step was called for this optimizer already, expected once between two calls of update");
    if (progress.stage == Stage::Ready) unscale_(optimizer);
    TORCH_CHECK(!progress.found_infinite.empty(),
                "GradScaler: no parameter of the optimizer has a gradient, expected at least one");
    const bool all_finite = sum(progress.found_infinite).item<float>() == 0;
    if (all_finite) optimizer.step();
    progress.stage = Stage::Stepped;
    return all_finite;
  }

  /// At the end of an iteration, after `step` of every optimizer: backs off if one of them found an infinity or NaN,
  /// counts a good iteration and grows after `growth_interval` of them otherwise. No host read. Throws c10::Error if
  /// `unscale_` or `step` was not called since the last `update`, or `scale` never.
  void update() {
    if (!enabled_) return;
    check_has_scale("update");
    std::vector<at::Tensor> found_infinite;
    for (const auto& [optimizer, progress] : progress_)
      found_infinite.insert(found_infinite.end(), progress.found_infinite.begin(), progress.found_infinite.end());
    TORCH_CHECK(!found_infinite.empty(), "GradScaler: update was called without unscale_ or step before it");
    at::_amp_update_scale_(scale_, growth_tracker_, sum(found_infinite), settings_.growth_factor,
                           settings_.backoff_factor, settings_.growth_interval);
    progress_.clear();
  }

  /// At the end of an iteration: sets the scale, which must be > 0 and finite as a float, and leaves the count of good
  /// iterations as it is. Throws c10::Error otherwise, or if `scale` was never called.
  void update(double new_scale) {
    if (!enabled_) return;
    check_has_scale("update");
    check_scale(new_scale, "GradScaler: the new scale");
    scale_.fill_(new_scale);
    progress_.clear();
  }

  /// The scale, 1 for a disabled scaler. Reads from the device.
  double get_scale() const { return enabled_ ? settings().scale : 1.0; }

  /// Iterations without an infinity or NaN since the scale last changed by itself. Reads from the device.
  int64_t growth_tracker() const { return enabled_ ? settings().growth_tracker : 0; }

  /// What the scale is multiplied by when it grows.
  double growth_factor() const { return settings_.growth_factor; }

  /// What the scale is multiplied by when it backs off.
  double backoff_factor() const { return settings_.backoff_factor; }

  /// Iterations without an infinity or NaN until the scale grows.
  int64_t growth_interval() const { return settings_.growth_interval; }

  /// Writes the scale, the count of good iterations, the factors and the interval, to be called after `update`; nothing
  /// for a disabled scaler. Reads from the device.
  void save(torch::serialize::OutputArchive& archive) const {
    if (!enabled_) return;
    const Settings now = settings();
    archive.write("scale", c10::IValue(now.scale));
    archive.write("growth_factor", c10::IValue(now.growth_factor));
    archive.write("backoff_factor", c10::IValue(now.backoff_factor));
    archive.write("growth_interval", c10::IValue(now.growth_interval));
    archive.write("growth_tracker", c10::IValue(now.growth_tracker));
  }

  /// Takes over what `save` wrote, at the start of an iteration; does nothing for a disabled scaler. Throws c10::Error
  /// if the archive holds no scaler (or a disabled one's nothing) or a number out of its range; nothing is changed
  /// then.
  void load(torch::serialize::InputArchive& archive) {
    if (!enabled_) return;
    const auto read = [&](const char* key) {
      c10::IValue value;
      TORCH_CHECK(archive.try_read(key, value) && value.isScalar(), "load: the archive holds no GradScaler (entry '",
                  key, "')");
      return value.toScalar();
    };
    const Settings loaded = {read("scale").toDouble(), read("growth_factor").toDouble(),
                             read("backoff_factor").toDouble(), read("growth_interval").toLong(),
                             read("growth_tracker").toLong()};
    check(loaded, "load: GradScaler");
    settings_ = loaded;
    progress_.clear();
    if (!scale_.defined()) return;
    scale_.fill_(loaded.scale);
    growth_tracker_.fill_(loaded.growth_tracker);
  }

 private:
  struct Settings {
    double scale, growth_factor, backoff_factor;
    int64_t growth_interval, growth_tracker;
  };

  enum class Stage { Ready, Unscaled, Stepped };

  /// What happened to an optimizer since the last `update`.
  struct Progress {
    Stage stage = Stage::Ready;
    std::vector<at::Tensor> found_infinite;  ///< one scalar a device and dtype, 1 where a gradient was not finite
  };

  // Written so that NaN fails every comparison.
  static void check_scale(double scale, const std::string& what) {
    TORCH_CHECK(static_cast<float>(scale) > 0 && std::isfinite(static_cast<float>(scale)), what, " is ", scale,
                ", expected a finite float > 0");
  }

  static void check(const Settings& settings, const std::string& where) {
    check_scale(settings.scale, where + ": the scale");
    TORCH_CHECK(settings.growth_factor > 1 && std::isfinite(settings.growth_factor), where, ": growth_factor is ",
                settings.growth_factor, ", expected a finite number > 1");
    TORCH_CHECK(settings.backoff_factor > 0 && settings.backoff_factor < 1, where, ": backoff_factor is ",
                settings.backoff_factor, ", expected a number in (0, 1)");
    // It is counted in an int of 32 bits, as in PyTorch.
    constexpr int64_t most = std::numeric_limits<int32_t>::max();
    TORCH_CHECK(settings.growth_interval >= 1 && settings.growth_interval <= most, where, ": growth_interval is ",
                settings.growth_interval, ", expected 1 to ", most);
    TORCH_CHECK(settings.growth_tracker >= 0 && settings.growth_tracker <= most, where, ": growth_tracker is ",
                settings.growth_tracker, ", expected 0 to ", most);
  }

  void check_has_scale(const char* caller) const {
    TORCH_CHECK(scale_.defined(), "GradScaler: ", caller, " was called before scale, expected scale(loss).backward()");
  }

  /// The settings with the scale and the count as they are now.
  Settings settings() const {
    Settings now = settings_;
    if (scale_.defined()) {
      now.scale = scale_.item<double>();
      now.growth_tracker = growth_tracker_.item<int64_t>();
    }
    return now;
  }

  /// On the device of the scale.
  at::Tensor sum(const std::vector<at::Tensor>& scalars) const {
    at::Tensor result = at::zeros_like(scale_);
    for (const auto& scalar : scalars) result += engine::on_device(scalar, result.device());
    return result;
  }

  Settings settings_;  ///< scale and count as they were before the first `scale`
  bool enabled_;
  at::Tensor scale_, growth_tracker_;  ///< scalars on the device of the first loss, float and int
  std::map<const torch::optim::Optimizer*, Progress> progress_;
};

}  // namespace lora_rite
