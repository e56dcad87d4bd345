#pragma once

#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "lora_rite/baselines/baseline.hpp"

namespace lora_rite::baselines {

/// Options of a param group of Soap, whose formulas explain the symbols.
struct SoapOptions : public BaselineOptions<SoapOptions> {
  using betas_t = std::tuple<double, double>;          ///< (β₁, β₂)
  explicit SoapOptions(double lr = 3e-3) : lr_(lr) {}  ///< all else by default

  TORCH_ARG(double, lr) = 3e-3;  ///< ≥ 0
  /// Decay rates (β₁, β₂) of the two moments, each in [0, 1).
  TORCH_ARG(betas_t, betas) = std::make_tuple(0.95, 0.95);
  TORCH_ARG(double, shampoo_beta) = 0.95;             ///< of the statistics, in [0, 1)
  TORCH_ARG(double, eps) = 1e-8;                      ///< ≥ 0
  TORCH_ARG(double, weight_decay) = 0.0;              ///< ≥ 0, decoupled; the authors' default is 0.01
  TORCH_ARG(int64_t, max_preconditioner_dim) = 1024;  ///< a longer side is not rotated; 10000 in the authors' code
  TORCH_ARG(int64_t, interval) = 10;                  ///< steps between two corrections of the bases, ≥ 1

 public:
  /// Throws c10::Error that names an option out of its range, what it is and what was expected.
  void check() const {
    check_at_least_zero("lr", lr());
    check_decay_rate("betas[0]", std::get<0>(betas()));
    check_decay_rate("betas[1]", std::get<1>(betas()));
    check_decay_rate("shampoo_beta", shampoo_beta());
    check_at_least_zero("eps", eps());
    check_at_least_zero("weight_decay", weight_decay());
    TORCH_CHECK(max_preconditioner_dim() >= 1, "max_preconditioner_dim is ", max_preconditioner_dim(),
                ", expected at least 1");
    TORCH_CHECK(interval() >= 1, "interval is ", interval(), ", expected at least 1");
  }
  /// Calls function(name, value) for every option that a checkpoint keeps.
  template <class Options, class Function>
  static void for_each_saved(Options& options, const Function& function) {
    function("lr", options.lr());
    function("betas", options.betas());
    function("shampoo_beta", options.shampoo_beta());
    function("eps", options.eps());
    function("weight_decay", options.weight_decay());
    function("max_preconditioner_dim", options.max_preconditioner_dim());
    function("interval", options.interval());
  }
};

/// SOAP (Vyas et al., ICLR 2025): Adam in the eigenbases Q_L, Q_R of Shampoo's statistics GGᵀ and GᵀG,
///
///   x ← x − η Q_L (M' / √V') Q_Rᵀ,  M' = Q_Lᵀ M Q_R,  V' ← β₂ V' + (1−β₂) (Q_Lᵀ G Q_R)²,
///
/// the bases corrected every `interval` steps by one power iteration and QR. As in the authors' code the first gradient
/// only starts the statistics, the moments count from the second one on, and weights decay after the step.
class Soap : public Baseline<SoapOptions> {
 public:
  /// Groups without options of their own have `defaults`. Throws c10::Error if an option is out of its range.
  explicit Soap(const std::vector<torch::optim::OptimizerParamGroup>& groups, SoapOptions defaults = SoapOptions())
      : Baseline(groups, defaults) {}
  /// The same for one group of these parameters.
  explicit Soap(std::vector<torch::Tensor> parameters, SoapOptions defaults = SoapOptions())
      : Soap({torch::optim::OptimizerParamGroup(std::move(parameters))}, defaults) {}

 protected:
  void update(const SoapOptions& options, Batch& batch) override {
    const auto [beta1, beta2] = options.betas();
    const at::Tensor g = matrices(batch.gradient);
    const bool left = g.size(1) <= options.max_preconditioner_dim(),
               right = g.size(2) <= options.max_preconditioner_dim();
    at::Tensor mean = batch.state("exp_avg", g.sizes().slice(1)),
               square = batch.state("exp_avg_sq", g.sizes().slice(1));
    const std::vector<int64_t> left_sizes = {g.size(1), g.size(1)}, right_sizes = {g.size(2), g.size(2)};
    at::Tensor q_left, q_right;
    if (left) q_left = batch.state("left_basis", left_sizes);
    if (right) q_right = batch.state("right_basis", right_sizes);

    const int64_t adam_steps = batch.step - 1;
    if (adam_steps > 0) {
      const auto rotated = [&](at::Tensor x) {
        if (left) x = at::matmul(q_left.mT(), x);
        return right ? at::matmul(x, q_right) : x;
      };
      mean.lerp_(g, 1 - beta1);
      square.lerp_(rotated(g).square(), 1 - beta2);
      at::Tensor direction = rotated(mean) / (square.sqrt() + options.eps());
      if (left) direction = at::matmul(q_left, direction);
      if (right) direction = at::matmul(direction, q_right.mT());
      const double t = static_cast<double>(adam_steps);
      const double correction = std::sqrt(1 - std::pow(beta2, t)) / (1 - std::pow(beta1, t));
      batch.move(1, options.lr() * correction * direction.reshape(batch.gradient.sizes()));
      if (options.weight_decay() > 0) at::_foreach_mul_(batch.parameters, 1 - options.lr() * options.weight_decay());
    }

    const bool correct = adam_steps > 0 && adam_steps % options.interval() == 0;
    if (left)
      follow(options, batch.state("left", left_sizes), at::matmul(g, g.mT()), q_left, batch.step == 1, correct, square,
             1);
    if (right)
      follow(options, batch.state("right", right_sizes), at::matmul(g.mT(), g), q_right, batch.step == 1, correct,
             square, 2);
  }

 private:
  /// Takes a gradient's outer product into the statistics and keeps the basis near their eigenvectors, sorted by
  /// falling eigenvalues; the columns of `square` go along. Decompositions of half types, which LibTorch has not, are
  /// those of float.
  static void follow(const SoapOptions& options, at::Tensor statistics, const at::Tensor& fresh, at::Tensor basis,
                     bool first, bool correct, at::Tensor square, int64_t dimension) {
    statistics.lerp_(fresh, 1 - options.shampoo_beta());
    if (!first && !correct) return;
    const auto dtype = basis.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const at::Tensor wide = statistics.to(dtype), old = basis.to(dtype);
    if (first) {
      basis.copy_(std::get<1>(at::linalg_eigh(wide)).flip({-1}));
    } else {
      const at::Tensor power = at::matmul(wide, old);
      const at::Tensor order = (old * power).sum(-2).argsort(-1, /*descending=*/true);  // [k, d]
      const at::Tensor columns = order.unsqueeze(1).expand_as(power);
      basis.copy_(std::get<0>(at::linalg_qr(power.gather(2, columns))));
      const at::Tensor along = dimension == 1 ? order.unsqueeze(2) : order.unsqueeze(1);
      square.copy_(square.gather(dimension, along.expand_as(square)));
    }
  }
};

}  // namespace lora_rite::baselines
