#pragma once

#include <torch/nn/init.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/nn/lora_layer.hpp"

namespace lora_rite::nn {

/// torch::nn::Linear that can have LoRA adapters: forward(x [..., in]) → [..., out], A [r, in], B [out, r]. Without an
/// adapter it computes, and its parameters are called, as a torch::nn::Linear; LoraLayer tells the rest.
class LoraLinearImpl : public LoraLayerImpl<LoraLinearImpl, torch::nn::Linear> {
 public:
  static constexpr bool kFactorsAreModules = true;  ///< a factor is called "lora_A.<adapter>.weight"
  static constexpr bool kHasBias = true;            ///< the base layer can have a bias

  /// A layer of its own, with torch::nn::Linear's arguments and initial weights.
  LoraLinearImpl(int64_t in_features, int64_t out_features)
      : LoraLinearImpl(torch::nn::LinearOptions(in_features, out_features)) {}
  /// The same by LibTorch's options.
  explicit LoraLinearImpl(const torch::nn::LinearOptions& options) : LoraLinearImpl(torch::nn::Linear(options)) {}

  /// Over an existing layer, whose parameters are shared.
  explicit LoraLinearImpl(torch::nn::Linear base) : LoraLayerImpl(std::move(base)) {}

  const char* type_name() const override { return "LoraLinear"; }
  std::pair<const char*, const char*> factor_tokens() const override { return {"lora_A", "lora_B"}; }

  std::pair<std::vector<int64_t>, std::vector<int64_t>> factor_shapes(int64_t rank) const override {
    const torch::Tensor& weight = base_layer()->weight;  // [out, in]
    return {{rank, weight.size(1)}, {weight.size(0), rank}};
  }

 protected:
  torch::Tensor product(const torch::Tensor& a, const torch::Tensor& b) const override { return torch::matmul(b, a); }

  torch::Tensor adapter_output(const torch::Tensor& input, const LoraAdapter& adapter) override {
    return torch::linear(torch::linear(adapter_input(input, adapter), adapter.a), adapter.b);
  }

  void check_fits(const std::string& label, const LoraConfig& config, bool draws) const override {
    if (!draws) return;
    const torch::Tensor& weight = base_layer()->weight;  // [out, in]
    TORCH_CHECK(config.init != LoraInit::Orthogonal || config.rank % 2 == 0, label, "rank is ", config.rank,
                ", expected an even one for LoraInit::Orthogonal");
    if (config.init != LoraInit::Pissa) return;
    const int64_t most = std::min(weight.size(0), weight.size(1));
    TORCH_CHECK(config.rank <= most, label, "rank is ", config.rank, ", expected at most ", most,
                " singular values of a weight ", weight.sizes(), " for LoraInit::Pissa");
    TORCH_CHECK(config.alpha > 0, label, "alpha is ", config.alpha, ", expected > 0 for LoraInit::Pissa");
  }

  std::pair<torch::Tensor, torch::Tensor> initial_factors(const std::string&, const LoraConfig& config,
                                                          const torch::TensorOptions& options) const override {
    const torch::Tensor& weight = base_layer()->weight;  // [out, in]
    const int64_t out = weight.size(0), in = weight.size(1), r = config.rank;
    torch::Tensor a = torch::empty({r, in}, options), b = torch::zeros({out, r}, options);
    switch (config.init) {
      case LoraInit::Kaiming:
        torch::nn::init::kaiming_uniform_(a, std::sqrt(5.0));
        break;
      case LoraInit::Gaussian:
        a.normal_(0, 1 / static_cast<double>(r));
        break;
      case LoraInit::Random:
        torch::nn::init::kaiming_uniform_(a, std::sqrt(5.0));
        torch::nn::init::kaiming_uniform_(b, std::sqrt(5.0));
        break;
      case LoraInit::Orthogonal: {
        // Rows of an orthogonal matrix, every other one for A and for B: A's row space and B's column space meet at a
        // right angle in between, so B A = 0 with neither of them zero.
        const torch::Tensor q = std::get<0>(torch::linalg_qr(torch::randn({r, r}, options))).view({r / 2, 2, r});
        a = torch::matmul(torch::randn({in, r / 2}, options), q.select(1, 0)).t() / 10;
        b = torch::matmul(torch::randn({out, r / 2}, options), q.select(1, 1)) / 10;
        break;
      }
      case LoraInit::Pissa: {
        // W ≈ U S Vᵀ: A = √(S/scale) Vᵀ, B = U √(S/scale), so that scale · B A is W's best approximation of rank r.
        const auto [u, s, vh] = torch::linalg_svd(weight.detach().to(options), /*full_matrices=*/false);
        const torch::Tensor root = s.narrow(0, 0, r).div(config.scale()).sqrt();
        a = vh.narrow(0, 0, r) * root.unsqueeze(1);
        b = u.narrow(1, 0, r) * root;
        break;
      }
    }
    return {a, b};
  }
};

/// Holds a LoraLinearImpl, as torch::nn::Linear does a torch::nn::LinearImpl.
TORCH_MODULE(LoraLinear);

}  // namespace lora_rite::nn
