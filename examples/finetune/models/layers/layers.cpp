#include "models/layers/layers.hpp"

#include <torch/nn/module.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/types.h>

#include "common/error.hpp"
#include "models/layers/embedding.hpp"
#include "models/layers/linear.hpp"

namespace finetune {
namespace {

// One zero seen as a whole tensor: the checkpoint's tensor takes its place, so that nothing is held twice.
torch::Tensor placeholder(at::IntArrayRef shape) { return at::zeros({}).expand(shape); }

// LibTorch's linear layer over given tensors: its own constructor would allocate them and draw random numbers.
struct GivenLinear : torch::nn::LinearImpl {
  GivenLinear(const torch::Tensor& given_weight, const torch::Tensor& given_bias)
      : torch::nn::LinearImpl(torch::nn::LinearOptions(1, 1).bias(given_bias.defined())) {
    options.in_features(given_weight.size(1)).out_features(given_weight.size(0));
    parameters_["weight"] = weight = given_weight;
    parameters_["bias"] = bias = given_bias;
  }
};

// LibTorch's table likewise.
struct GivenEmbedding : torch::nn::EmbeddingImpl {
  GivenEmbedding(const torch::Tensor& given, std::optional<int64_t> padding)
      : torch::nn::EmbeddingImpl(torch::nn::EmbeddingOptions(1, 1)) {
    options.num_embeddings(given.size(0)).embedding_dim(given.size(1)).padding_idx(padding);
    parameters_["weight"] = weight = given;
  }
};

std::shared_ptr<Linear> over(const torch::Tensor& weight, const torch::Tensor& bias) {
  const std::shared_ptr<torch::nn::LinearImpl> base = std::make_shared<GivenLinear>(weight, bias);
  return std::make_shared<Linear>(torch::nn::Linear(base));
}

}  // namespace

std::shared_ptr<Linear> make_linear(int64_t in_features, int64_t out_features, bool bias) {
  return over(placeholder({out_features, in_features}), bias ? placeholder({out_features}) : torch::Tensor());
}

std::shared_ptr<Linear> make_linear(const torch::Tensor& weight) { return over(weight, torch::Tensor()); }

std::shared_ptr<TokenEmbedding> make_embedding(int64_t rows, int64_t columns, std::optional<int64_t> padding) {
  return make_embedding(placeholder({rows, columns}), padding);
}

std::shared_ptr<TokenEmbedding> make_embedding(const torch::Tensor& weight, std::optional<int64_t> padding) {
  const std::shared_ptr<torch::nn::EmbeddingImpl> base = std::make_shared<GivenEmbedding>(weight, padding);
  return std::make_shared<TokenEmbedding>(torch::nn::Embedding(base));
}

Embedding::Embedding(int64_t rows, int64_t columns)
    : weight(register_parameter("weight", placeholder({rows, columns}), false)) {}

torch::Tensor Embedding::forward(const torch::Tensor& indices) const { return at::embedding(weight, indices); }

RmsNorm::RmsNorm(int64_t size, double eps, bool around_one)
    : weight(register_parameter("weight", placeholder({size}), false)), eps(eps), around_one(around_one) {}

torch::Tensor RmsNorm::forward(const torch::Tensor& x) const {
  const torch::Tensor wide = x.to(at::kFloat);
  if (around_one) return at::rms_norm(wide, weight.sizes(), weight.to(at::kFloat).add(1), eps).to(x.scalar_type());
  return weight * at::rms_norm(wide, weight.sizes(), std::nullopt, eps).to(x.scalar_type());
}

std::vector<torch::Tensor> trainable_parameters(const torch::nn::Module& module) {
  std::vector<torch::Tensor> found;
  for (const torch::Tensor& parameter : module.parameters()) {
    if (parameter.requires_grad()) found.push_back(parameter);
  }
  return found;
}

torch::Tensor activate(Activation activation, const torch::Tensor& x) {
  switch (activation) {
    case Activation::Silu:
      return at::silu(x);
    case Activation::Relu:
      return at::relu(x);
    case Activation::Gelu:
      return at::gelu(x);
    case Activation::GeluTanh:
      return at::gelu(x, "tanh");
  }
  fail("unknown activation ", static_cast<int>(activation));
}

Activation parse_activation(const std::string& name, const std::string& origin) {
  if (name == "silu" || name == "swish") return Activation::Silu;
  if (name == "relu") return Activation::Relu;
  if (name == "gelu") return Activation::Gelu;
  if (name == "gelu_new" || name == "gelu_pytorch_tanh" || name == "gelu_fast") return Activation::GeluTanh;
  fail(origin, " is '", name,
       "', but only silu, swish, relu, gelu, gelu_new, gelu_fast and gelu_pytorch_tanh are supported");
}

}  // namespace finetune
