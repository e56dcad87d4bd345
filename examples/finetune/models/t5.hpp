#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "models/config.hpp"
#include "models/language_model.hpp"

namespace finetune {

/// An encoder-decoder: T5 (Raffel et al., 2020), T5 1.1 and mT5.
class T5Model : public LanguageModel {
 public:
  /// Without weights; see load_model.
  explicit T5Model(const T5Config& config);

  torch::Tensor hidden_states(const LanguageInput& input) override;
  torch::Tensor logits(const torch::Tensor& hidden) override;
  bool is_encoder_decoder() const override { return true; }
  const SpecialTokens& special_tokens() const override { return config_.special_tokens; }
  const T5Config& config() const { return config_; }

 protected:
  torch::Tensor begin(const LanguageInput& prompt, int64_t max_new_tokens, Generation& generation) override;
  torch::Tensor advance(const torch::Tensor& tokens, Generation& generation) override;

 private:
  struct Stack;

  std::string parameter_of(const std::string& tensor) const override;
  torch::Tensor& embedding_weight() override { return embedding_->weight; }
  void set_output(std::shared_ptr<Linear> output) override;

  // tokens [b, s] → [b, s, d]
  torch::Tensor encode(const torch::Tensor& tokens, const torch::Tensor& mask);

  // tokens [b, l] at the positions from `begin` of a target, of which mask [b, begin + l] tells the padding; `source`
  // [b, s, d] may be undefined once `generation` has its keys and values → [b, l, d].
  torch::Tensor decode(const torch::Tensor& tokens, const torch::Tensor& mask, const torch::Tensor& source,
                       const torch::Tensor& source_mask, int64_t begin, Generation* generation);

  T5Config config_;
  std::shared_ptr<Embedding> embedding_;
  std::shared_ptr<Stack> encoder_, decoder_;
  std::shared_ptr<Linear> output_;
};

/// The bucket of every distance key - query: queries at the positions begin ... end-1, keys at 0 ... keys-1
/// → [queries, keys] int64 in [0, buckets). Half of the buckets are for one distance each, the others widen up to
/// `max_distance`; with `bidirectional` later keys have buckets of their own.
torch::Tensor relative_position_buckets(int64_t begin, int64_t end, int64_t keys, bool bidirectional, int64_t buckets,
                                        int64_t max_distance, torch::Device device);

}  // namespace finetune
