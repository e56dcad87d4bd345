#pragma once

#include <torch/nn/functional/embedding.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/nn/lora_layer.hpp"

namespace lora_rite::nn {

/// torch::nn::Embedding that can have LoRA adapters: forward(indices [...]) → [..., dim], A [r, num_embeddings],
/// B [dim, r], and ΔW = scale · (B A)ᵀ as the weight is [num_embeddings, dim]. As in PEFT there is no dropout, and a
/// padding index gets no gradient. The factors' gradients are dense also if the base's are sparse. LoraLayer tells the
/// rest.
class LoraEmbeddingImpl : public LoraLayerImpl<LoraEmbeddingImpl, torch::nn::Embedding> {
 public:
  static constexpr bool kFactorsAreModules = false;  ///< a factor is called "lora_embedding_A.<adapter>"
  static constexpr bool kHasBias = false;            ///< the base layer never has a bias

  /// A layer of its own, with torch::nn::Embedding's arguments and initial weights.
  LoraEmbeddingImpl(int64_t num_embeddings, int64_t embedding_dim)
      : LoraEmbeddingImpl(torch::nn::EmbeddingOptions(num_embeddings, embedding_dim)) {}
  /// The same by LibTorch's options.
  explicit LoraEmbeddingImpl(const torch::nn::EmbeddingOptions& options)
      : LoraEmbeddingImpl(torch::nn::Embedding(options)) {}

  /// Over an existing layer, whose parameters are shared.
  explicit LoraEmbeddingImpl(torch::nn::Embedding base) : LoraLayerImpl(std::move(base)) {}

  const char* type_name() const override { return "LoraEmbedding"; }
  std::pair<const char*, const char*> factor_tokens() const override {
    return {"lora_embedding_A", "lora_embedding_B"};
  }

  std::pair<std::vector<int64_t>, std::vector<int64_t>> factor_shapes(int64_t rank) const override {
    const torch::Tensor& weight = base_layer()->weight;  // [num_embeddings, dim]
    return {{rank, weight.size(0)}, {weight.size(1), rank}};
  }

 protected:
  torch::Tensor product(const torch::Tensor& a, const torch::Tensor& b) const override {
    return torch::matmul(b, a).t();
  }

  torch::Tensor adapter_output(const torch::Tensor& indices, const LoraAdapter& adapter) override {
    namespace F = torch::nn::functional;
    const auto& options = base_layer()->options;
    const auto rows =
        F::EmbeddingFuncOptions().padding_idx(options.padding_idx()).scale_grad_by_freq(options.scale_grad_by_freq());
    return torch::linear(F::embedding(indices, adapter.a.t(), rows), adapter.b);
  }

  void check_fits(const std::string& label, const LoraConfig& config, bool draws) const override {
    TORCH_CHECK(!draws || (config.init != LoraInit::Orthogonal && config.init != LoraInit::Pissa), label,
                "an embedding cannot start by LoraInit::Orthogonal or LoraInit::Pissa, expected another one");
    TORCH_CHECK(!base_layer()->options.max_norm().has_value(), label,
                "the base has a max_norm, which rewrites its weight in every forward pass, expected none");
  }

  std::pair<torch::Tensor, torch::Tensor> initial_factors(const std::string&, const LoraConfig& config,
                                                          const torch::TensorOptions& options) const override {
    const torch::Tensor& weight = base_layer()->weight;  // [num_embeddings, dim]
    const torch::Tensor a = torch::zeros({config.rank, weight.size(0)}, options);
    if (config.init == LoraInit::Random) a.normal_();
    return {a, torch::randn({weight.size(1), config.rank}, options)};
  }
};

/// Holds a LoraEmbeddingImpl, as torch::nn::Embedding does a torch::nn::EmbeddingImpl.
TORCH_MODULE(LoraEmbedding);

}  // namespace lora_rite::nn
