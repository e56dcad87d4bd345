#pragma once

#include <c10/util/Exception.h>
#include <torch/types.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "lora_rite/module_names.hpp"

namespace lora_rite::nn {

/// Which modules are meant: nothing said, a pattern, or a list of names.
using ModuleNames = lora_rite::ModuleNames;

/// How the factors of an adapter start. All but Random and Pissa leave the layer's output as it was.
enum class LoraInit {
  Kaiming,     ///< PEFT's default: A Kaiming-uniform with a = √5, B zero; embeddings: A zero, B standard normal
  Gaussian,    ///< A normal with standard deviation 1/r, B zero; embeddings: as Kaiming
  Orthogonal,  ///< both nonzero with B A = 0 (PEFT's "orthogonal"); an even rank, linear layers only
  Pissa,       ///< the base weight's r largest singular triplets, which the base weight loses; linear layers only
  Random,      ///< both drawn (PEFT's init_lora_weights=False): ΔW is not zero, for tests
};

/// Which biases of the base are trained beside the factors.
enum class LoraBias {
  None,      ///< none
  All,       ///< every parameter called "bias"
  LoraOnly,  ///< those of the layers that have an adapter
};

/// What an adapter is made of and which modules get one. Names, defaults and rules are those of PEFT's LoraConfig.
struct LoraConfig {
  int64_t rank = 8;         ///< r, ≥ 1
  double alpha = 8;         ///< ΔW = alpha / r · B A, finite
  double dropout = 0;       ///< on the adapter's input, in training only, 0 to 1; embeddings have none, as in PEFT
  bool use_rslora = false;  ///< ΔW = alpha / √r · B A instead
  LoraInit init = LoraInit::Kaiming;  ///< how the factors start
  LoraBias bias = LoraBias::None;     ///< for inject_lora

  /// The modules that get an adapter; "all-linear" stands for every linear layer but the `output_heads`.
  ModuleNames target_modules;
  /// Those of them that get none.
  ModuleNames exclude_modules;
  /// Other ranks: the first pattern counts that matches a module's name from its start or from behind one of
  /// its dots to its end.
  std::vector<std::pair<std::string, int64_t>> rank_pattern;
  /// Other alphas, likewise.
  std::vector<std::pair<std::string, double>> alpha_pattern;
  /// With a list of target_modules: only in layers of these numbers (≥ 0), the first number in a module's name; all if
  /// empty.
  std::vector<int64_t> layers_to_transform;
  /// What the list of layers is called ("layers", "h"); any name if empty.
  std::vector<std::string> layers_pattern;
  /// What "all-linear" leaves out, by name or ending. PEFT asks the Python model for its output embedding instead,
  /// which a module of LibTorch cannot tell.
  std::vector<std::string> output_heads = {"lm_head", "embed_out", "cls.predictions.decoder", "score", "classifier"};
  /// The factors' dtype; if unset, float for a half or bfloat16 base (as PEFT), else the base's.
  std::optional<torch::Dtype> factor_dtype;

  /// ΔW = scale() · B A.
  double scale() const {
    const auto r = static_cast<double>(rank);
    return alpha / (use_rslora ? std::sqrt(r) : r);
  }
};

/// Throws c10::Error that begins with `label` and names the field, what it is and what was expected.
inline void check_lora_config(const std::string& label, const LoraConfig& config) {
  const auto& layers = config.layers_to_transform;
  TORCH_CHECK(config.rank >= 1, label, "rank is ", config.rank, ", expected ≥ 1");
  TORCH_CHECK(std::isfinite(config.alpha), label, "alpha is ", config.alpha, ", expected a finite number");
  TORCH_CHECK(config.dropout >= 0 && config.dropout <= 1, label, "dropout is ", config.dropout, ", expected 0 to 1");
  for (const auto& [pattern, rank] : config.rank_pattern) {
    TORCH_CHECK(rank >= 1, label, "rank_pattern['", pattern, "'] is ", rank, ", expected ≥ 1");
  }
  for (const auto& [pattern, alpha] : config.alpha_pattern) {
    TORCH_CHECK(std::isfinite(alpha), label, "alpha_pattern['", pattern, "'] is ", alpha, ", expected a finite number");
  }
  for (const int64_t layer : layers) {
    TORCH_CHECK(layer >= 0, label, "layers_to_transform holds ", layer, ", expected ≥ 0");
  }
  TORCH_CHECK(layers.empty() || std::holds_alternative<std::vector<std::string>>(config.target_modules), label,
              "layers_to_transform needs target_modules to be a list of names");
  TORCH_CHECK(config.layers_pattern.empty() || !layers.empty(), label, "layers_pattern needs layers_to_transform");
  if (config.factor_dtype) {
    TORCH_CHECK(at::isFloatingType(*config.factor_dtype), label, "factor_dtype is ", *config.factor_dtype,
                ", expected a floating one");
  }
}

}  // namespace lora_rite::nn
