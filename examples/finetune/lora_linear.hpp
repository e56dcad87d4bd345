#pragma once

#include <torch/nn/module.h>

#include <cstdint>
#include <memory>

#include "lora_config.hpp"

namespace finetune {

/// A module that is one matrix, so that a factor's parameter is named `lora_A.weight` as in PEFT.
struct Matrix : torch::nn::Module {
  explicit Matrix(torch::Tensor values) : weight(register_parameter("weight", values)) {}

  torch::Tensor weight;
};

/// A linear layer with frozen weights and, once added, a trainable low-rank adapter:
/// y = x Wᵀ + bias + scale · dropout(x) Aᵀ Bᵀ with scale = alpha / rank.
///
/// Parameters: weight [out, in], bias [out], lora_A.weight [rank, in], lora_B.weight [out, rank].
class LoraLinear : public torch::nn::Module {
 public:
  /// A plain linear layer of zeros; the weights come from a checkpoint.
  LoraLinear(int64_t in_features, int64_t out_features);

  /// Adds the adapter with PEFT's initialisation: A Kaiming-uniform with a = √5, B zero, so ΔW = 0.
  void add_adapter(const LoraConfig& config);

  /// x [..., in] → [..., out].
  torch::Tensor forward(const torch::Tensor& x);

  /// ΔW = scale · B A, [out, in]; undefined without an adapter.
  torch::Tensor delta_weight() const;

  bool has_adapter() const { return lora_a_ != nullptr; }

 private:
  torch::Tensor weight_;  // [out, in]
  torch::Tensor bias_;    // [out]
  std::shared_ptr<Matrix> lora_a_;
  std::shared_ptr<Matrix> lora_b_;
  double scale_ = 0;
  double dropout_ = 0;
};

}  // namespace finetune
