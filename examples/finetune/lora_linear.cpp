#include "lora_linear.hpp"

#include <torch/nn/init.h>

#include <cmath>

#include "error.hpp"

namespace finetune {

LoraLinear::LoraLinear(int64_t in_features, int64_t out_features)
    : weight_(register_parameter("weight", torch::zeros({out_features, in_features}), false)),
      bias_(register_parameter("bias", torch::zeros({out_features}), false)) {}

void LoraLinear::add_adapter(const LoraConfig& config) {
  if (config.rank < 1) fail("the adapter's rank is ", config.rank, "; it must be at least 1");
  if (has_adapter()) fail("the layer has an adapter already; add one adapter a layer");
  torch::Tensor a = torch::empty({config.rank, weight_.size(1)}, weight_.options());
  torch::nn::init::kaiming_uniform_(a, std::sqrt(5.0));
  lora_a_ = register_module("lora_A", std::make_shared<Matrix>(a));
  lora_b_ = register_module("lora_B",
                            std::make_shared<Matrix>(torch::zeros({weight_.size(0), config.rank}, weight_.options())));
  scale_ = config.alpha / static_cast<double>(config.rank);
  dropout_ = config.dropout;
}

torch::Tensor LoraLinear::forward(const torch::Tensor& x) {
  torch::Tensor y = at::linear(x, weight_, bias_);
  if (!has_adapter()) return y;
  const torch::Tensor input = dropout_ > 0 ? at::dropout(x, dropout_, is_training()) : x;
  const torch::Tensor down = at::linear(input, lora_a_->weight);  // [..., rank]
  return y.add(at::linear(down, lora_b_->weight), scale_);
}

torch::Tensor LoraLinear::delta_weight() const {
  return has_adapter() ? at::matmul(lora_b_->weight, lora_a_->weight).mul(scale_) : torch::Tensor();
}

}  // namespace finetune
