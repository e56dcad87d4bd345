#pragma once

#include <torch/nn/module.h>

#include <filesystem>
#include <memory>
#include <vector>

#include "models/config.hpp"

namespace finetune {

/// A BERT encoder (Devlin et al., 2018) without pooler and without the base's dropout.
///
/// Module and parameter names are those of transformers' `BertModel`, so checkpoints and adapters
/// fit by name. All parameters are frozen; lora_rite::nn::inject_lora adds trainable factors.
class BertModel : public torch::nn::Module {
 public:
  /// An encoder without memory of its own; see load_bert.
  explicit BertModel(const BertConfig& config);

  /// tokens [batch, length] int64, mask [batch, length] bool (true = a token, false = padding)
  /// → last hidden state [batch, length, hidden], zero where there is padding.
  torch::Tensor forward(const torch::Tensor& tokens, const torch::Tensor& mask);

  const BertConfig& config() const { return config_; }

 private:
  struct Embeddings;
  struct Layer;

  BertConfig config_;
  std::shared_ptr<Embeddings> embeddings_;
  std::vector<std::shared_ptr<Layer>> layers_;
};

/// Builds the encoder from `folder`'s config.json and its BaseCheckpoint, whose errors are thrown. A tensor that is
/// missing, or has another shape, is an Error; the pooler and other heads in the files are ignored.
std::shared_ptr<BertModel> load_bert(const std::filesystem::path& folder);

/// Mean of the hidden states over the real tokens: hidden [batch, length, d], mask [batch, length]
/// → [batch, d]. This is how MiniLM embeds a sentence.
torch::Tensor mean_pool(const torch::Tensor& hidden, const torch::Tensor& mask);

}  // namespace finetune
