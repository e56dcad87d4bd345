#pragma once

#include <torch/types.h>

#include <cstdint>

namespace finetune {

/// Rotary position embedding (Su et al., 2021) and how it is stretched to longer texts.
struct RopeConfig {
  enum class Type {
    Default,  ///< frequencies theta^(-2i/d)
    Linear,   ///< divided by factor
    Dynamic,  ///< a larger theta for texts longer than max_position_embeddings ("NTK-aware")
    Llama3,   ///< low frequencies divided by factor, high ones kept, a ramp between
  };

  Type type = Type::Default;
  double theta = 10000;
  double factor = 1;
  double low_freq_factor = 1;                    ///< Llama3 only
  double high_freq_factor = 4;                   ///< Llama3 only
  int64_t original_max_position_embeddings = 0;  ///< Llama3 only
  int64_t max_position_embeddings = 0;           ///< Dynamic only
};

/// The angle a position turns every pair of a head's elements by: [head_size / 2] float32. `length` is the text's.
torch::Tensor rope_frequencies(const RopeConfig& config, int64_t head_size, int64_t length, torch::Device device);

/// Cosines and sines for some consecutive positions, [positions, head_size] each.
struct Rotation {
  torch::Tensor cosine;
  torch::Tensor sine;

  /// x [batch, heads, positions, head_size] → the same, turned; element i is paired with i + head_size / 2.
  torch::Tensor apply(const torch::Tensor& x) const;
};

/// For the positions begin ... end-1 of a text of `end` tokens, in `options`' dtype and on its device.
Rotation make_rotation(const RopeConfig& config, int64_t head_size, int64_t begin, int64_t end,
                       const torch::TensorOptions& options);

}  // namespace finetune
