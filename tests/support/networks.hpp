#pragma once

// Small real losses through autograd, for tests about whole trajectories of ΔW.

#include "support/torch.hpp"
#include "tensors.hpp"

#include <lora_rite/factor_pair.hpp>

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace lora_rite::test {

/// How the two factors of every pair start; ΔW is the same for every transformation of it.
enum class Begin { NonZero, ZeroB };

/// A loss and the factors it depends on.
class Network {
 public:
  virtual ~Network() = default;
  virtual torch::Tensor loss() const = 0;

  std::vector<FactorPair> pairs;

  /// (A, B) → (T A, B T^{-1}) for every pair, computed in double and rounded once.
  void transform(const torch::Tensor& t) {
    for (auto& pair : pairs) {
      const auto a = pair.a.detach().to(torch::kDouble), b = pair.b.detach().to(torch::kDouble);
      const auto new_a = t.matmul(a.flatten(1)).view(a.sizes());
      const auto new_b = b.movedim(1, -1).matmul(t.inverse()).movedim(-1, 1).contiguous();
      torch::NoGradGuard no_grad;
      pair.a.copy_(new_a);
      pair.b.copy_(new_b);
    }
  }

  /// ΔW of every pair, in double.
  std::vector<torch::Tensor> products() const {
    std::vector<torch::Tensor> result;
    for (const auto& pair : pairs) result.push_back(product(pair.a, pair.b));
    return result;
  }

 protected:
  /// A pair of the given shapes with entries of a usual initialisation.
  void add_pair(const std::string& name, std::vector<int64_t> a_shape, std::vector<int64_t> b_shape, Begin begin,
                torch::ScalarType dtype) {
    const auto a = torch::randn(a_shape, torch::kDouble) / std::sqrt(double(a_shape[1]));
    const auto b =
        begin == Begin::ZeroB ? torch::zeros(b_shape, torch::kDouble) : torch::randn(b_shape, torch::kDouble) * 0.3;
    pairs.push_back({name, a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()});
  }
};

/// Two layers with LoRA on both and a logistic loss: cross-entropy of (W₂ + B₂A₂) tanh((W₁ + B₁A₁) x).
class LogisticNetwork : public Network {
 public:
  LogisticNetwork(int64_t rank, Begin begin, torch::ScalarType dtype) {
    torch::manual_seed(2);
    constexpr int64_t kSamples = 96, kIn = 32, kHidden = 28, kClasses = 20;
    x_ = torch::randn({kSamples, kIn}, torch::kDouble).to(dtype);
    labels_ = torch::randint(kClasses, {kSamples});
    w1_ = (torch::randn({kHidden, kIn}, torch::kDouble) / std::sqrt(double(kIn))).to(dtype);
    w2_ = (torch::randn({kClasses, kHidden}, torch::kDouble) / std::sqrt(double(kHidden))).to(dtype);
    add_pair("first", {rank, kIn}, {kHidden, rank}, begin, dtype);
    add_pair("second", {rank, kHidden}, {kClasses, rank}, begin, dtype);
  }

  torch::Tensor loss() const override {
    const auto w1 = w1_ + pairs[0].b.matmul(pairs[0].a);
    const auto w2 = w2_ + pairs[1].b.matmul(pairs[1].a);
    const auto hidden = torch::tanh(x_.matmul(w1.t()));
    return torch::cross_entropy_loss(hidden.matmul(w2.t()), labels_);
  }

 private:
  torch::Tensor x_, labels_, w1_, w2_;
};

/// An embedding pair (A [r, vocabulary], B [dim, r], as in PEFT) that feeds a convolution pair
/// (A [r, channels, 3, 3], B [out, r, 1, 1]), cross-entropy on the mean over the image.
class ImageNetwork : public Network {
 public:
  explicit ImageNetwork(torch::ScalarType dtype) {
    torch::manual_seed(3);
    constexpr int64_t kSamples = 64, kSide = 4, kVocabulary = 12, kChannels = 6, kOut = 8, kRank = 3;
    tokens_ = torch::randint(kVocabulary, {kSamples, kSide, kSide});
    labels_ = torch::randint(kOut, {kSamples});
    const auto scaled = [&](std::vector<int64_t> shape) {
      return (torch::randn(shape, torch::kDouble) * 0.4).to(dtype);
    };
    embedding_ = scaled({kVocabulary, kChannels});
    kernel_ = scaled({kOut, kChannels, 3, 3});
    add_pair("embedding", {kRank, kVocabulary}, {kChannels, kRank}, Begin::NonZero, dtype);
    add_pair("convolution", {kRank, kChannels, 3, 3}, {kOut, kRank, 1, 1}, Begin::NonZero, dtype);
  }

  torch::Tensor loss() const override {
    const auto& [embedding_name, embedding_a, embedding_b] = pairs[0];
    const auto& [convolution_name, convolution_a, convolution_b] = pairs[1];
    const auto vectors =
        torch::embedding(embedding_, tokens_) + torch::embedding(embedding_a.t(), tokens_).matmul(embedding_b.t());
    const auto image = vectors.permute({0, 3, 1, 2});
    const auto low = torch::conv2d(image, convolution_a, {}, 1, 1);
    const auto out = torch::conv2d(image, kernel_, {}, 1, 1) + torch::conv2d(low, convolution_b);
    return torch::cross_entropy_loss(torch::tanh(out).mean({2, 3}) * 4, labels_);
  }

 private:
  torch::Tensor tokens_, labels_, embedding_, kernel_;
};

using Pairs = std::vector<FactorPair>;
using MakeOptimizer = std::function<std::unique_ptr<torch::optim::Optimizer>(const Pairs&)>;

/// ΔW of every pair at the start and after every step.
using Trajectory = std::vector<std::vector<torch::Tensor>>;

inline Trajectory train(Network& network, const MakeOptimizer& make_optimizer, int steps) {
  const auto optimizer = make_optimizer(network.pairs);
  Trajectory trajectory = {network.products()};
  for (int step = 0; step < steps; ++step) {
    optimizer->zero_grad();
    network.loss().backward();
    optimizer->step();
    trajectory.push_back(network.products());
  }
  return trajectory;
}

/// Smallest movement of any pair's ΔW over the trajectory, relative to where it started; from zero, the
/// movement itself.
inline double movement(const Trajectory& trajectory) {
  double smallest = INFINITY;
  for (size_t pair = 0; pair < trajectory[0].size(); ++pair) {
    const double start = frobenius(trajectory[0][pair]);
    const double moved = frobenius(trajectory.back()[pair] - trajectory[0][pair]);
    smallest = std::min(smallest, start > 0 ? moved / start : moved);
  }
  return smallest;
}

/// Largest ‖ΔW − ΔW'‖ of any pair at any step, relative to how far that pair's ΔW moved in all.
/// NaN counts as infinite.
inline double difference(const Trajectory& left, const Trajectory& right) {
  double largest = 0;
  for (size_t step = 0; step < left.size(); ++step) {
    for (size_t pair = 0; pair < left[step].size(); ++pair) {
      const double moved = frobenius(left.back()[pair] - left[0][pair]);
      const double error = relative_difference(left[step][pair], right[step][pair], moved);
      largest = std::isnan(error) ? INFINITY : std::max(largest, error);
    }
  }
  return largest;
}

}  // namespace lora_rite::test
