#pragma once

#include <torch/nn/init.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/nn/lora_layer.hpp"

namespace lora_rite::nn {

/// torch::nn::Conv2d without groups that can have LoRA adapters: A [r, in, kh, kw] is a convolution like the base's
/// (stride, padding, dilation), B [out, r, 1, 1] one by points. LoraLayer tells the rest.
class LoraConv2dImpl : public LoraLayerImpl<LoraConv2dImpl, torch::nn::Conv2d> {
 public:
  static constexpr bool kFactorsAreModules = true;  ///< a factor is called "lora_A.<adapter>.weight"
  static constexpr bool kHasBias = true;            ///< the base layer can have a bias

  /// A layer of its own, with torch::nn::Conv2d's arguments and initial weights.
  LoraConv2dImpl(int64_t in_channels, int64_t out_channels, torch::ExpandingArray<2> kernel_size)
      : LoraConv2dImpl(torch::nn::Conv2dOptions(in_channels, out_channels, kernel_size)) {}
  /// The same by LibTorch's options.
  explicit LoraConv2dImpl(const torch::nn::Conv2dOptions& options) : LoraConv2dImpl(torch::nn::Conv2d(options)) {}

  /// Over an existing layer, whose parameters are shared.
  explicit LoraConv2dImpl(torch::nn::Conv2d base) : LoraLayerImpl(std::move(base)) {}

  const char* type_name() const override { return "LoraConv2d"; }
  std::pair<const char*, const char*> factor_tokens() const override { return {"lora_A", "lora_B"}; }

  std::pair<std::vector<int64_t>, std::vector<int64_t>> factor_shapes(int64_t rank) const override {
    const torch::Tensor& weight = base_layer()->weight;  // [out, in, kh, kw]
    return {{rank, weight.size(1), weight.size(2), weight.size(3)}, {weight.size(0), rank, 1, 1}};
  }

 protected:
  torch::Tensor product(const torch::Tensor& a, const torch::Tensor& b) const override {
    return torch::matmul(b.flatten(1), a.flatten(1)).view(base_layer()->weight.sizes());
  }

  torch::Tensor adapter_output(const torch::Tensor& input, const LoraAdapter& adapter) override {
    // The base layer with A for its weight: padding and its modes are then LibTorch's own.
    torch::nn::Conv2dImpl down(*base_layer());
    down.weight = adapter.a;
    down.bias = torch::Tensor();
    return torch::conv2d(down.forward(adapter_input(input, adapter)), adapter.b);
  }

  void check_fits(const std::string& label, const LoraConfig& config, bool draws) const override {
    TORCH_CHECK(base_layer()->options.groups() == 1, label, "the base has ", base_layer()->options.groups(),
                " groups, expected 1");
    TORCH_CHECK(!draws || (config.init != LoraInit::Orthogonal && config.init != LoraInit::Pissa), label,
                "a convolution cannot start by LoraInit::Orthogonal or LoraInit::Pissa, expected another one");
  }

  std::pair<torch::Tensor, torch::Tensor> initial_factors(const std::string&, const LoraConfig& config,
                                                          const torch::TensorOptions& options) const override {
    const torch::Tensor& weight = base_layer()->weight;  // [out, in, kh, kw]
    const int64_t r = config.rank;
    const torch::Tensor a = torch::empty({r, weight.size(1), weight.size(2), weight.size(3)}, options);
    const torch::Tensor b = torch::zeros({weight.size(0), r, 1, 1}, options);
    if (config.init == LoraInit::Gaussian) {
      a.normal_(0, 1 / static_cast<double>(r));
    } else {
      torch::nn::init::kaiming_uniform_(a, std::sqrt(5.0));
    }
    if (config.init == LoraInit::Random) torch::nn::init::kaiming_uniform_(b, std::sqrt(5.0));
    return {a, b};
  }
};

/// Holds a LoraConv2dImpl, as torch::nn::Conv2d does a torch::nn::Conv2dImpl.
TORCH_MODULE(LoraConv2d);

}  // namespace lora_rite::nn
