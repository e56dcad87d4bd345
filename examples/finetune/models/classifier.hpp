#pragma once

#include <torch/nn/module.h>
#include <torch/nn/modules/linear.h>

#include <cstdint>
#include <memory>

#include "models/bert.hpp"

namespace finetune {

constexpr const char* kHeadFile = "head.safetensors";  ///< beside an adapter: the head that was trained with it

/// A sentence classifier: BERT encoder with adapters, mean pooling, a linear head.
///
/// Trainable parameters: `bert.….lora_A.weight` / `bert.….lora_B.weight`, `head.weight`
/// [classes, hidden] and `head.bias` [classes].
class SentenceClassifier : public torch::nn::Module {
 public:
  SentenceClassifier(std::shared_ptr<BertModel> bert, int64_t classes)
      : bert_(register_module("bert", std::move(bert))),
        head_(register_module("head", torch::nn::Linear(bert_->config().hidden_size, classes))) {}

  /// tokens [batch, length] int64, mask [batch, length] bool → logits [batch, classes].
  torch::Tensor forward(const torch::Tensor& tokens, const torch::Tensor& mask) {
    return head_->forward(mean_pool(bert_->forward(tokens, mask), mask));
  }

  BertModel& bert() { return *bert_; }
  torch::nn::LinearImpl& head() { return *head_; }

 private:
  std::shared_ptr<BertModel> bert_;
  torch::nn::Linear head_;
};

}  // namespace finetune
