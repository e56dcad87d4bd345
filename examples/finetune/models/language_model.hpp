#pragma once

#include <torch/nn/module.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "models/config.hpp"
#include "models/layers/attention.hpp"
#include "models/layers/linear.hpp"

namespace finetune {

/// A batch for a language model.
struct LanguageInput {
  torch::Tensor tokens;  ///< [batch, length] int64: the text, or an encoder-decoder's source
  torch::Tensor mask;    ///< [batch, length] bool, true = a token, false = padding; undefined = no padding
  torch::Tensor target;  ///< [batch, target length] int64: an encoder-decoder's target, see shift_right; else undefined
  torch::Tensor target_mask;  ///< [batch, target length] bool, likewise
};

/// A transformer that predicts tokens: a decoder (Llama, Gemma, Gemma 2), or an encoder-decoder (T5, mT5).
///
/// Module and parameter names are those of transformers' `…ForCausalLM` and `…ForConditionalGeneration`, so checkpoints
/// and adapters fit by name. All parameters are frozen; lora_rite::nn::inject_lora adds trainable factors. A tied
/// output matrix is the embedding's very tensor. Made by load_model, in evaluation mode; dropout acts after train().
class LanguageModel : public torch::nn::Module {
 public:
  /// Logits of the next token [batch, length, vocab]; of the target for an encoder-decoder. What stands at padding is
  /// meaningless. Padding after a decoder's text needs no mask, because no token sees a later one; without a mask the
  /// attention is faster. Throws Error where tokens or a mask have another shape or dtype than LanguageInput says, or a
  /// target is missing or too much.
  torch::Tensor forward(const LanguageInput& input) { return logits(hidden_states(input)); }

  /// The states that forward turns into logits: [batch, length, hidden].
  virtual torch::Tensor hidden_states(const LanguageInput& input) = 0;

  /// hidden [..., hidden] → logits [..., vocab]. With hidden_states this saves the logits of tokens nobody asks about.
  virtual torch::Tensor logits(const torch::Tensor& hidden) = 0;

  /// Continues every text greedily: [batch, at most max_new_tokens] int64, without the prompt. A row that reached an
  /// end token goes on with padding; it stops when all have. Keys and values are kept, so a token costs one token's
  /// work. A decoder's prompts must be padded on the left, if at all; `target` must be undefined.
  torch::Tensor generate(const LanguageInput& prompt, int64_t max_new_tokens);

  /// Whether to keep only every layer's input for the backward pass and compute its inside again (recompute.hpp).
  void set_gradient_checkpointing(bool on) { gradient_checkpointing_ = on; }

  /// Gives the output a matrix of its own with the values it has, if it is the embedding's: then one of them can change
  /// alone.
  void untie_output();

  virtual bool is_encoder_decoder() const = 0;
  virtual const SpecialTokens& special_tokens() const = 0;

 protected:
  /// What generate keeps from token to token.
  struct Generation {
    int64_t capacity = 0;       ///< how many tokens the caches hold
    int64_t length = 0;         ///< how many they hold by now
    torch::Tensor mask;         ///< [batch, capacity] bool of the text, or undefined
    torch::Tensor source_mask;  ///< [batch, source length] bool, or undefined
    std::vector<KeyValueCache> layers;
    std::vector<KeyValueCache> sources;  ///< of the attention to the source
  };

  /// Reads the prompt and returns the last state [batch, hidden].
  virtual torch::Tensor begin(const LanguageInput& prompt, int64_t max_new_tokens, Generation& generation) = 0;

  /// Reads one more token, tokens [batch, 1], and returns its state [batch, hidden].
  virtual torch::Tensor advance(const torch::Tensor& tokens, Generation& generation) = 0;

  /// Throws Error, naming what is wrong, unless `tokens` is int64 [batch, length] with at least one token, and `mask`
  /// bool of the same shape, or undefined. `what` is "tokens" or "target".
  static void check_tokens(const std::string& what, const torch::Tensor& tokens, const torch::Tensor& mask);

  bool gradient_checkpointing() const { return gradient_checkpointing_; }

 private:
  friend class CheckpointLoader;

  // The parameter that a checkpoint's tensor fills, spelt as in files or in memory (plain_name); empty = none, it is
  // left unread on purpose.
  virtual std::string parameter_of(const std::string& tensor) const = 0;
  virtual torch::Tensor& embedding_weight() = 0;
  virtual void set_output(std::shared_ptr<Linear> output) = 0;  // in place of one that is there

  bool gradient_checkpointing_ = false;
};

/// The decoder's input for given labels [batch, length]: the start token, then all labels but the last. A label below 0
/// (one without a loss) becomes padding.
torch::Tensor shift_right(const torch::Tensor& labels, const SpecialTokens& tokens);

}  // namespace finetune
