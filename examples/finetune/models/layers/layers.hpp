#pragma once

#include <torch/nn/module.h>

#include <cstdint>
#include <string>
#include <vector>

namespace finetune {

/// A module without behaviour of its own, for the levels that only lend their name to parameters.
struct Scope : torch::nn::Module {};

/// A table of vectors, one a row: parameter `weight` [rows, columns].
struct Embedding : torch::nn::Module {
  /// Without memory of its own, to be filled by load_weights.
  Embedding(int64_t rows, int64_t columns);

  /// indices [...] int64 → [..., columns].
  torch::Tensor forward(const torch::Tensor& indices) const;

  torch::Tensor weight;
};

/// Root-mean-square normalisation (Zhang & Sennrich, 2019): x / √(mean(x²) + eps) · weight, reckoned in float32.
struct RmsNorm : torch::nn::Module {
  /// Parameter `weight` [size]. With `around_one` the factor is 1 + weight, and is applied before rounding to
  /// x's dtype (Gemma); without, after it (Llama, T5).
  RmsNorm(int64_t size, double eps, bool around_one);

  /// x [..., size] → [..., size], x's dtype.
  torch::Tensor forward(const torch::Tensor& x) const;

  torch::Tensor weight;
  double eps;
  bool around_one;
};

/// A module's parameters that are trained, at any depth.
std::vector<torch::Tensor> trainable_parameters(const torch::nn::Module& module);

/// The non-linearity of a feed-forward layer.
enum class Activation { Silu, Relu, Gelu, GeluTanh };

/// Applies it to every element.
torch::Tensor activate(Activation activation, const torch::Tensor& x);

/// By transformers' name ("silu", "swish", "relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast"); `origin` says
/// in the Error where an unknown name stood, such as "config.json: 'hidden_act'".
Activation parse_activation(const std::string& name, const std::string& origin);

}  // namespace finetune
