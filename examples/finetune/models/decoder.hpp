#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "models/config.hpp"
#include "models/language_model.hpp"
#include "models/layers/embedding.hpp"

namespace finetune {

/// A decoder: Llama (Touvron et al., 2023; also SmolLM2 and TinyLlama), Gemma and Gemma 2.
class DecoderModel : public LanguageModel {
 public:
  /// Without weights; see load_model.
  explicit DecoderModel(const DecoderConfig& config);

  torch::Tensor hidden_states(const LanguageInput& input) override;
  torch::Tensor logits(const torch::Tensor& hidden) override;
  bool is_encoder_decoder() const override { return false; }
  const SpecialTokens& special_tokens() const override { return config_.special_tokens; }
  const DecoderConfig& config() const { return config_; }

 protected:
  torch::Tensor begin(const LanguageInput& prompt, int64_t max_new_tokens, Generation& generation) override;
  torch::Tensor advance(const torch::Tensor& tokens, Generation& generation) override;

 private:
  struct Layer;

  std::string parameter_of(const std::string& tensor) const override;
  torch::Tensor& embedding_weight() override { return embedding_->base_layer().ptr()->weight; }
  void set_output(std::shared_ptr<Linear> output) override;

  // tokens [b, l] that stand at the positions from `begin` of a text, of which mask [b, begin + l] tells the padding
  // → [b, l, d]. Keys and values go to `generation` and come from it, if there is one.
  torch::Tensor run(const torch::Tensor& tokens, const torch::Tensor& mask, int64_t begin, Generation* generation);

  DecoderConfig config_;
  std::shared_ptr<TokenEmbedding> embedding_;
  std::vector<std::shared_ptr<Layer>> layers_;
  std::shared_ptr<RmsNorm> norm_;
  std::shared_ptr<Linear> output_;
};

}  // namespace finetune
