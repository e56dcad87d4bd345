#pragma once

#include <torch/arg.h>
#include <torch/optim/optimizer.h>
#include <torch/optim/serialize.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>

#include "lora_rite/optimizer_support.hpp"
#include "lora_rite/rule/hyperparameters.hpp"

namespace lora_rite {

/// Who moves the tall data (factors, gradients, momenta). The rule itself is the same for all.
enum class Engine : int64_t {
  Automatic,  ///< Host for the pairs that it takes, Device for all others
  Device,     ///< ATen operators, same-shape pairs batched: any device and dtype, no host read
  Host,       ///< loops of our own for contiguous float factors on a CPU, on LibTorch's threads
  Cuda,       ///< kernels of our own on a GPU, which `lora_rite::cuda` has; Device for the pairs that they do not take
};

/// Options of one param group of `LoraRite`. Every one is honoured per group.
///
/// Symbols follow the paper (Yen et al., "LoRA Done RITE", ICLR 2025): a factor X (n×r) with gradient G has the
/// partner Y; R is a root of YᵀY and Ḡ = G R⁺ is the unmagnified gradient.
struct LoraRiteOptions : public torch::optim::OptimizerCloneableOptions<LoraRiteOptions> {
  using betas_t = std::tuple<double, double>;  ///< (β₁, β₂)

  LoraRiteOptions() = default;
  /// Implicit, as those of torch::optim are: `LoraRite<>(pairs, 1e-3)`.
  LoraRiteOptions(double lr) : lr_(lr) {}  // NOLINT(google-explicit-constructor)

  /// The arithmetic of the published code, as in pytorch_optimizer 4.1.0: no escaped mass, clip at 1, ε = 1e-6 outside
  /// and ε² under the root.
  static LoraRiteOptions reference(double lr) {
    return LoraRiteOptions(lr).escape(false).clip_unmagnified_norm(1.0).eps(1e-6).eps_root(1e-12);
  }

  /// Learning rate η ≥ 0. RITE's good rates lie below Adam's: start at a third of Adam's.
  TORCH_ARG(double, lr) = 1e-3;
  /// Decay rates (β₁, β₂) of the first and second moment, each in [0, 1).
  TORCH_ARG(betas_t, betas) = std::make_tuple(0.9, 0.999);
  /// ε ≥ 0 in ((V + ρI)^{1/2} + εI)^{-1}.
  TORCH_ARG(double, eps) = 1e-8;
  /// Added under the root, to the eigenvalues of V + ρI, ≥ 0. 0 in the paper, ε² in pytorch_optimizer.
  TORCH_ARG(double, eps_root) = 0.0;
  /// Exponent p in [0, 1/2] of the adaptive matrix step: 1/2 divides every direction by the root of its second moment,
  /// as in the paper; 0 divides all alike, by the mean over directions; between them p does so in part, and the mean,
  /// to the power 1/2 − p, keeps a step's length (Padam, Chen et al. 2018, for Adam). See docs/algorithm.md.
  TORCH_ARG(double, preconditioner_exponent) = 0.5;
  /// Decoupled weight decay λ ≥ 0: each factor shrinks by 1 − ηλ a step; ηλ < 1 for both factors. It is equivariant
  /// too.
  TORCH_ARG(double, weight_decay) = 0.0;
  /// When the partner's column space turns, V loses the part that lies outside of the new one. Keep how large that part
  /// is as ρ, and add it in all directions alike (the paper's Algorithm 1).
  TORCH_ARG(bool, escape) = true;
  /// Bound ≥ 0 on the Frobenius norm of the Ḡ of *all* pairs of the optimizer together; 0 switches the clip off.
  TORCH_ARG(double, clip_unmagnified_norm) = 1.0;
  /// Bound ≥ 0 on the RMS of the momentum M in the partner's orthonormal basis: a larger one is scaled down; 0 = off.
  TORCH_ARG(double, max_update_rms) = 0.0;
  /// Bound τ ≥ 0 on how much each gradient makes a step change a factor relative to itself, in every direction, and
  /// with it on the cross term dB·dA; 0 = off, 0.3 is a good value. Without momentum ‖dX X⁺‖ ≤ τ. See
  /// docs/algorithm.md.
  TORCH_ARG(double, max_relative_change) = 0.0;
  /// Adapt from row to row as well: a second moment for each row of a factor beside V. See docs/algorithm.md.
  TORCH_ARG(bool, row_equilibration) = false;
  /// Rate of B divided by the rate of A (LoRA+, Hayou et al. 2024); > 0.
  TORCH_ARG(double, lr_ratio_b) = 1.0;
  /// After each step scale A and B such that their norms agree, BA unchanged. Only pairs whose factors both moved.
  TORCH_ARG(bool, balance) = false;
  /// Ascend instead of descend. Groups by AdamW, whose options lack this, do as the optimizer's constructor was told;
  /// see `LoraRite::add_parameters`.
  TORCH_ARG(bool, maximize) = false;
  /// Keep a float copy of bfloat16 and half factors, so that steps below their resolution add up (4 bytes an element).
  TORCH_ARG(bool, master_weights) = false;
  /// Engine for this group's tall data, chosen in the first step. Not part of a saved optimizer: it belongs to the
  /// machine. Engine::Host is refused together with `capturable`.
  TORCH_ARG(Engine, engine) = Engine::Automatic;
  /// A step that a CUDA graph can record (at::cuda::CUDAGraph): Engine::Cuda as it is, or Engine::Device, with Cholesky
  /// factors and Newton–Schulz products in place of eigenvalues, which also batch at every rank. The escaped mass is
  /// then bounded by a trace, which makes steps a little shorter where several directions escape at once;
  /// `preconditioner_exponent` is 1/2 or 1/4. See docs/algorithm.md. Record after a few ordinary steps; before a replay
  /// `LoraRite::upload_rates()` hands over what a scheduler set. Chosen in the first step, not part of a saved
  /// optimizer.
  TORCH_ARG(bool, capturable) = false;

 public:
  /// `lr`, for LibTorch's schedulers.
  double get_lr() const override { return lr(); }
  /// Sets `lr`.
  void set_lr(const double value) override { lr(value); }

  /// Writes every option that a checkpoint keeps under its name.
  void serialize(torch::serialize::OutputArchive& archive) const override {
    for_each_saved(*this, [&](const char* name, const auto& value) { archive.write(name, c10::IValue(value)); });
  }

  /// Takes over what `serialize` wrote. An option that the archive lacks stays as it is: it is newer than the
  /// archive. Throws c10::Error naming an option of another type; ranges are not checked here.
  void serialize(torch::serialize::InputArchive& archive) override {
    for_each_saved(*this, [&](const char* name, auto& value) {
      using Value = std::decay_t<decltype(value)>;
      c10::IValue found;
      if (!archive.try_read(name, found)) return;  // an option that is newer than the archive
      try {
        value = found.to<Value>();
      } catch (const c10::Error&) {
        TORCH_CHECK(false, "the saved option ", name, " is ", found, ", expected ",
                    std::is_same_v<Value, bool> ? "true or false"
                                                : (std::is_same_v<Value, double> ? "a double" : "two doubles"));
      }
    });
  }

  /// Calls function(name, value) for every option that a checkpoint keeps.
  template <class Options, class Function>
  static void for_each_saved(Options& options, const Function& function) {
    function("lr", options.lr());
    function("betas", options.betas());
    function("eps", options.eps());
    function("eps_root", options.eps_root());
    function("preconditioner_exponent", options.preconditioner_exponent());
    function("weight_decay", options.weight_decay());
    function("escape", options.escape());
    function("clip_unmagnified_norm", options.clip_unmagnified_norm());
    function("max_update_rms", options.max_update_rms());
    function("max_relative_change", options.max_relative_change());
    function("row_equilibration", options.row_equilibration());
    function("lr_ratio_b", options.lr_ratio_b());
    function("balance", options.balance());
    function("maximize", options.maximize());
    function("master_weights", options.master_weights());
  }
};

/// What one step reads of them.
inline rule::Hyperparameters hyperparameters(const LoraRiteOptions& options) {
  rule::Hyperparameters numbers;
  numbers.lr = options.lr();
  std::tie(numbers.beta1, numbers.beta2) = options.betas();
  numbers.eps = options.eps();
  numbers.eps_root = options.eps_root();
  numbers.preconditioner_exponent = options.preconditioner_exponent();
  numbers.weight_decay = options.weight_decay();
  numbers.escape = options.escape();
  numbers.clip_unmagnified_norm = options.clip_unmagnified_norm();
  numbers.max_update_rms = options.max_update_rms();
  numbers.max_relative_change = options.max_relative_change();
  numbers.row_equilibration = options.row_equilibration();
  numbers.lr_ratio_b = options.lr_ratio_b();
  numbers.balance = options.balance();
  numbers.maximize = options.maximize();
  return numbers;
}

namespace detail {

/// lr, betas, eps and weight_decay, which all Adams have. Throws c10::Error that names the first one out of its range,
/// the value found and the range; `where` says whose options they are.
template <class Options>
void check_options_of_adam(const Options& options, const std::string& where) {
  check_at_least_zero("lr", options.lr(), where);
  check_decay_rate("betas[0]", std::get<0>(options.betas()), where);
  check_decay_rate("betas[1]", std::get<1>(options.betas()), where);
  check_at_least_zero("eps", options.eps(), where);
  check_at_least_zero("weight_decay", options.weight_decay(), where);
}

/// The same for all options of LoRA-RITE.
inline void check_options(const LoraRiteOptions& options, const std::string& where) {
  const auto at_least_zero = [&](const char* name, double value) { check_at_least_zero(name, value, where); };
  check_options_of_adam(options, where);
  at_least_zero("eps_root", options.eps_root());
  const double exponent = options.preconditioner_exponent();
  TORCH_CHECK(exponent >= 0 && exponent <= 0.5, where, ": preconditioner_exponent is ", exponent,
              ", expected a number in [0, 1/2]");
  TORCH_CHECK(!options.capturable() || exponent == 0.5 || exponent == 0.25, where, ": preconditioner_exponent is ",
              exponent, ", expected 1/2 or 1/4 for a capturable step");
  at_least_zero("clip_unmagnified_norm", options.clip_unmagnified_norm());
  at_least_zero("max_update_rms", options.max_update_rms());
  at_least_zero("max_relative_change", options.max_relative_change());
  at_least_zero("lr_ratio_b", options.lr_ratio_b());
  TORCH_CHECK(options.lr_ratio_b() > 0, where, ": lr_ratio_b is 0, expected a finite number > 0");
  const double largest_rate = options.lr() * std::max(1.0, options.lr_ratio_b());
  TORCH_CHECK(largest_rate * options.weight_decay() < 1, where, ": lr · weight_decay is ",
              largest_rate * options.weight_decay(), ", expected < 1 (a step would turn the factors around)");
  TORCH_CHECK(options.engine() >= Engine::Automatic && options.engine() <= Engine::Cuda, where, ": engine is ",
              static_cast<int64_t>(options.engine()),
              ", expected Engine::Automatic, Engine::Device, Engine::Host or Engine::Cuda");
  TORCH_CHECK(
      options.engine() != Engine::Host || !options.capturable(), where,
      ": engine is Engine::Host, expected Engine::Device, Engine::Cuda or Engine::Automatic for a capturable step");
}

}  // namespace detail
}  // namespace lora_rite
