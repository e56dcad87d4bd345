// Two experiments on what a factorisation ΔW = BA does to an optimizer. `invariance` trains one network from the
// factors (A, B) and from (TA, BT⁻¹) and compares the two ΔW. `feature_learning` measures how much of a layer's change
// comes from either factor as the layer grows wider.
#pragma once

#include <torch/torch.h>
#include <lora_rite/baselines/registry.hpp>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "without_decay.hpp"

namespace lora_rite::laboratory {

constexpr int64_t kRank = 4;

using Pairs = std::vector<FactorPair>;

/// One optimizer step by the gradients that the factors hold.
using Step = std::function<void()>;

/// Scaled gradient descent (Tong, Ma & Chi, "Accelerating Ill-Conditioned Low-Rank Matrix Estimation via Scaled
/// Gradient Descent", JMLR 2021): X ← X − η G (YᵀY)⁻¹, Y being X's partner before the step. With Y = QR the inverse is
/// R⁻¹R⁻ᵀ; YᵀY itself would square Y's condition number.
inline void scaled_gradient_step(const Pairs& pairs, double rate) {
  torch::NoGradGuard no_grad;
  const auto scaled = [](const torch::Tensor& gradient, const torch::Tensor& partner) {  // [n, r], [m, r]
    const auto root = std::get<1>(torch::linalg_qr(partner.to(torch::kDouble)));
    const auto unmagnified = torch::linalg_solve_triangular(root, gradient.to(torch::kDouble), true, /*left=*/false);
    return torch::linalg_solve_triangular(root.t(), unmagnified, /*upper=*/false, /*left=*/false);
  };
  for (const auto& [name, a, b] : pairs) {
    const auto of_a = scaled(a.grad().t(), b).t(), of_b = scaled(b.grad(), a.t());
    torch::Tensor(a).sub_(of_a.to(a.scalar_type()), rate);
    torch::Tensor(b).sub_(of_b.to(b.scalar_type()), rate);
  }
}

/// Every name of the registry, and "scaled-gd".
inline std::vector<std::string> contenders() {
  auto names = optimizer_names();
  names.emplace_back("scaled-gd");
  return names;
}

inline Step make_step(const std::string& name, const Pairs& pairs, double rate) {
  if (name == "scaled-gd") return [pairs, rate] { scaled_gradient_step(pairs, rate); };
  const std::shared_ptr<torch::optim::Optimizer> optimizer = make_optimizer(name, pairs, rate);
  bench::without_decay(*optimizer);
  return [optimizer] { optimizer->step(); };
}

/// Fresh gradients of `loss` in the factors.
inline void differentiate(const Pairs& pairs, const torch::Tensor& loss) {
  for (const auto& factor : detail::alternating_factors(pairs)) factor.mutable_grad().reset();
  loss.backward();
}

// --- Invariance -----------------------------------------------------------------------------------------------------

/// A family of r×r matrices T.
enum class Kind {
  Scaling,   ///< the identity times a number
  Diagonal,  ///< entries spread evenly on a logarithmic scale
  Rotation,  ///< orthogonal
  General,   ///< a rotation, a diagonal one, a rotation
};

/// T [r, r] in double, from the current random numbers. `magnitude` is κ(T); of a scaling, whose κ is 1, the number.
inline torch::Tensor transformation(Kind kind, double magnitude) {
  if (kind == Kind::Scaling) return magnitude * torch::eye(kRank, torch::kDouble);
  const auto rotation = [] { return std::get<0>(torch::linalg_qr(torch::randn({kRank, kRank}, torch::kDouble))); };
  if (kind == Kind::Rotation) return rotation();
  const double half = std::log10(magnitude) / 2;
  const auto diagonal = torch::logspace(-half, half, kRank, 10.0, torch::kDouble).diag();
  return kind == Kind::Diagonal ? diagonal : rotation().matmul(diagonal).matmul(rotation());
}

/// Least squares on (W₂ + B₂A₂) tanh((W₁ + B₁A₁) x), 30 → 40 → 30, no factor zero.
class Network {
 public:
  explicit Network(torch::ScalarType dtype) {
    torch::manual_seed(2);
    constexpr int64_t kSamples = 96, kNarrow = 30, kWide = 40;
    const auto normal = [dtype](int64_t rows, int64_t columns, double deviation) {
      return (torch::randn({rows, columns}, torch::kDouble) * deviation).to(dtype);
    };
    x_ = normal(kSamples, kNarrow, 1);
    targets_ = normal(kSamples, kNarrow, 1);
    for (const auto& [in, out] : {std::pair(kNarrow, kWide), std::pair(kWide, kNarrow)}) {
      const double deviation = 1 / std::sqrt(static_cast<double>(in));
      frozen_.push_back(normal(out, in, deviation));
      pairs.push_back({"", normal(kRank, in, deviation).requires_grad_(), normal(out, kRank, 0.3).requires_grad_()});
    }
  }

  /// (A, B) → (TA, BT⁻¹), each pair by a T of its own, computed in double and rounded once.
  void transform(Kind kind, double magnitude) {
    torch::NoGradGuard no_grad;
    for (const auto& [name, a, b] : pairs) {
      const auto t = transformation(kind, magnitude);
      a.copy_(t.matmul(a.to(torch::kDouble)));
      b.copy_(b.to(torch::kDouble).matmul(t.inverse()));
    }
  }

  torch::Tensor loss() const {
    const auto weight = [this](size_t i) { return frozen_[i] + pairs[i].b.matmul(pairs[i].a); };
    const auto outputs = torch::tanh(x_.matmul(weight(0).t())).matmul(weight(1).t());
    return (outputs - targets_).square().sum(1).mean() / 2;
  }

  /// ΔW of every pair, in double.
  std::vector<torch::Tensor> products() const {
    std::vector<torch::Tensor> result;
    for (const auto& [name, a, b] : pairs)
      result.push_back(b.detach().to(torch::kDouble).matmul(a.detach().to(torch::kDouble)));
    return result;
  }

  Pairs pairs;

 private:
  torch::Tensor x_, targets_;
  std::vector<torch::Tensor> frozen_;
};

/// With it the loss falls and ΔW moves by a quarter of itself or more in 20 steps: 0.01 for most whose steps do not
/// grow with the gradient, more for those whose rate is the spectral norm of a step of ΔW, and for the three whose
/// steps do.
inline double learning_rate(const std::string& optimizer) {
  static const std::map<std::string, double> others = {{"sgd", 0.05},       {"scaled-gd", 0.05}, {"altlora", 0.2},
                                                       {"lora-muon", 0.05}, {"lora-tsd", 0.05},  {"polora", 0.1}};
  const auto found = others.find(optimizer);
  return found == others.end() ? 0.01 : found->second;
}

constexpr int kSteps = 20;

struct Invariance {
  double after_first_step, after_all_steps;  ///< ‖ΔW − ΔW'‖ / ‖ΔW₂₀ − ΔW₀‖, the larger pair's; infinite for a NaN
  double way;                                ///< ‖ΔW₂₀ − ΔW₀‖ / ‖ΔW₀‖, the smaller pair's
  double loss_ratio;                         ///< loss after the last step ÷ loss at the start
};

/// Trains from (A, B) and from (TA, BT⁻¹).
inline Invariance invariance(const std::string& optimizer, Kind kind, double magnitude, torch::ScalarType dtype) {
  Network original(dtype), transformed(dtype);
  torch::manual_seed(29);
  transformed.transform(kind, magnitude);
  const auto start = original.products();
  const double loss_at_start = original.loss().item<double>();
  const double rate = learning_rate(optimizer);
  const Step step = make_step(optimizer, original.pairs, rate), other = make_step(optimizer, transformed.pairs, rate);

  std::vector<std::vector<torch::Tensor>> products, others;
  for (int i = 0; i < kSteps; ++i) {
    differentiate(original.pairs, original.loss());
    differentiate(transformed.pairs, transformed.loss());
    step();
    other();
    products.push_back(original.products());
    others.push_back(transformed.products());
  }
  Invariance result = {0, 0, INFINITY, original.loss().item<double>() / loss_at_start};
  for (size_t pair = 0; pair < start.size(); ++pair) {
    const double way = (products.back()[pair] - start[pair]).norm().item<double>();
    const auto raise = [&](double& largest, size_t at) {
      const double difference = (products[at][pair] - others[at][pair]).norm().item<double>() / way;
      largest = std::isnan(difference) ? INFINITY : std::max(largest, difference);
    };
    raise(result.after_first_step, 0);
    raise(result.after_all_steps, kSteps - 1);
    result.way = std::min(result.way, way / start[pair].norm().item<double>());
  }
  return result;
}

// --- Feature learning -----------------------------------------------------------------------------------------------

/// Which factor is random at the start; the other is zero. A [r, n] has entries N(0, 1/n), B [n, r] has N(0, 1/r).
enum class Start { RandomA, RandomB };

/// The rate at width n is rate · (64/n)^exponent. LoRA+ has this rate for A, and `rate` at every width for B.
struct Setting {
  std::string optimizer;
  Start start;
  double exponent;
  double rate = 0.02;
};

/// Each exponent keeps the change of y from growing and from vanishing with the width, from one start at least.
inline std::vector<Setting> settings() {
  std::vector<Setting> result;
  for (const Start start : {Start::RandomA, Start::RandomB}) {
    result.push_back({"rite", start, 0.5});
    result.push_back({"adam", start, 0.5});
    result.push_back({"adam", start, 1});
    result.push_back({"lora+", start, 1});
  }
  return result;
}

/// Root mean squares over outputs and inputs, in the last step.
struct Contributions {
  double width, rate;
  double of_a;      ///< B ΔA x
  double of_b;      ///< ΔB A x
  double whole;     ///< the change of BAx
  double features;  ///< A x
};

/// Ten steps on −⟨targets, y⟩, y = BAx, BA [n, n], with 8 inputs and targets of entries N(0, 1). The loss is linear so
/// that its gradient in y is the same at every width and step: least squares would end at the nearest y in B's columns.
inline Contributions contributions(const Setting& setting, int64_t width) {
  constexpr int64_t kInputs = 8;
  constexpr int kTrainingSteps = 10;
  torch::manual_seed(5);
  const double n = static_cast<double>(width);
  const auto normal = [](int64_t rows, int64_t columns) { return torch::randn({rows, columns}, torch::kDouble); };
  const auto x = normal(width, kInputs), targets = normal(width, kInputs);
  auto a = normal(kRank, width).div_(std::sqrt(n)), b = normal(width, kRank).div_(std::sqrt(kRank));
  (setting.start == Start::RandomA ? b : a).zero_();
  const Pairs pairs = {{"", a.requires_grad_(), b.requires_grad_()}};

  const double rate = setting.rate * std::pow(64 / n, setting.exponent);
  Step step;
  if (setting.optimizer == "lora+") {
    const auto options = torch::optim::AdamOptions(rate);
    const auto optimizer = std::make_shared<baselines::LoraPlus>(pairs, options, /*ratio=*/setting.rate / rate);
    step = [optimizer] { optimizer->step(); };
  } else {
    step = make_step(setting.optimizer, pairs, rate);
  }
  torch::Tensor old_a, old_b;
  for (int i = 0; i < kTrainingSteps; ++i) {
    differentiate(pairs, -(b.matmul(a.matmul(x)) * targets).sum(0).mean());
    old_a = a.detach().clone();
    old_b = b.detach().clone();
    step();
  }
  torch::NoGradGuard no_grad;
  const auto rms = [](const torch::Tensor& y) {
    const double value = y.square().mean().sqrt().item<double>();
    return std::isnan(value) ? INFINITY : value;
  };
  return {n,
          rate,
          rms(old_b.matmul((a - old_a).matmul(x))),
          rms((b - old_b).matmul(old_a.matmul(x))),
          rms(b.matmul(a.matmul(x)) - old_b.matmul(old_a.matmul(x))),
          rms(a.matmul(x))};
}

/// The p of y ≈ c·xᵖ: the slope of the least-squares line through (log x, log y).
inline double slope(const std::vector<double>& x, const std::vector<double>& y) {
  const auto centred = [](const std::vector<double>& values) {
    const auto logarithms = torch::tensor(values, torch::kDouble).log();
    return logarithms - logarithms.mean();
  };
  const auto u = centred(x), v = centred(y);
  return (u.dot(v) / u.dot(u)).item<double>();
}

}  // namespace lora_rite::laboratory
