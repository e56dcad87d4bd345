#pragma once

#include <torch/types.h>

#include <cstdint>
#include <lora_rite/nn/lora_embedding.hpp>
#include <memory>
#include <optional>

namespace finetune {

/// A table of the vocabulary's vectors: plain, with a frozen `weight` [rows, columns], until lora_rite::nn::inject_lora
/// gives it an adapter.
using TokenEmbedding = lora_rite::nn::LoraEmbeddingImpl;

/// A table without memory of its own, to be filled by load_model. The token `padding` gets no gradient.
std::shared_ptr<TokenEmbedding> make_embedding(int64_t rows, int64_t columns, std::optional<int64_t> padding);

/// A table whose weight is the very tensor `weight` [rows, columns].
std::shared_ptr<TokenEmbedding> make_embedding(const torch::Tensor& weight, std::optional<int64_t> padding);

}  // namespace finetune
