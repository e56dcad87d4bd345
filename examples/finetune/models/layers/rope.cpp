#include "models/layers/rope.hpp"

#include <torch/types.h>

#include <algorithm>
#include <cmath>

namespace finetune {
namespace {

constexpr double kTwoPi = 6.283185307179586;

// Wavelengths beyond original/low_freq_factor are stretched, those below original/high_freq_factor kept.
torch::Tensor stretch_llama3(const RopeConfig& config, const torch::Tensor& frequencies) {
  const auto original = static_cast<double>(config.original_max_position_embeddings);
  const torch::Tensor turns = frequencies * (original / kTwoPi);  // how often each turns within the original length
  const torch::Tensor kept =
      ((turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)).clamp(0, 1);
  return frequencies * kept + frequencies * (1 - kept) / config.factor;
}

}  // namespace

torch::Tensor rope_frequencies(const RopeConfig& config, int64_t head_size, int64_t length, torch::Device device) {
  const auto size = static_cast<double>(head_size);
  double theta = config.theta;
  if (config.type == RopeConfig::Type::Dynamic) {
    const auto limit = static_cast<double>(config.max_position_embeddings);
    const double stretch = config.factor * std::max(static_cast<double>(length), limit) / limit - (config.factor - 1);
    theta *= std::pow(stretch, size / (size - 2));
  }
  const torch::Tensor exponents = at::arange(0, head_size, 2, torch::dtype(torch::kFloat).device(device)) / size;
  const torch::Tensor frequencies = at::pow(theta, exponents).reciprocal();
  if (config.type == RopeConfig::Type::Linear) return frequencies / config.factor;
  if (config.type == RopeConfig::Type::Llama3) return stretch_llama3(config, frequencies);
  return frequencies;
}

torch::Tensor Rotation::apply(const torch::Tensor& x) const {
  const auto halves = x.chunk(2, -1);
  return x * cosine + at::cat({halves[1].neg(), halves[0]}, -1) * sine;
}

Rotation make_rotation(const RopeConfig& config, int64_t head_size, int64_t begin, int64_t end,
                       const torch::TensorOptions& options) {
  const torch::Tensor positions = at::arange(begin, end, options.dtype(torch::kFloat));
  const torch::Tensor angles = at::outer(positions, rope_frequencies(config, head_size, end, options.device()));
  const torch::Tensor both = at::cat({angles, angles}, -1);  // [positions, head_size]
  return {both.cos().to(options), both.sin().to(options)};
}

}  // namespace finetune
