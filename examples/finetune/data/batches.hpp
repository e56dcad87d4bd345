#pragma once

#include <torch/types.h>

#include <cstdint>
#include <vector>

#include "data/records.hpp"
#include "models/language_model.hpp"

namespace finetune {

/// The label of a token without a loss.
constexpr int64_t kNoLabel = -100;

/// What a language model takes in one step of training, and what it should say.
struct LanguageBatch {
  LanguageInput input;
  /// [batch, length] int64, kNoLabel but at the completion. A decoder's stand at the token itself (the loss shifts
  /// them); an encoder-decoder's are the target.
  torch::Tensor labels;
  int64_t completion_tokens = 0;  ///< how many labels are tokens
};

/// Gathers the records at `indices`, padded on the right to the batch's longest. Only an encoder-decoder's source gets
/// a mask: nothing looks at what comes later in a decoder.
LanguageBatch make_language_batch(const std::vector<TextRecord>& records, const std::vector<int64_t>& indices,
                                  bool encoder_decoder, const SpecialTokens& tokens,
                                  torch::Device device = torch::kCPU);

/// Prompts to be continued: padded on the left for a decoder, on the right for an encoder-decoder, with a mask where
/// there is padding.
LanguageInput make_prompt_batch(const std::vector<const std::vector<int64_t>*>& prompts, bool encoder_decoder,
                                const SpecialTokens& tokens, torch::Device device = torch::kCPU);

/// Which records each training step takes, so that a batch's lengths are alike and little is padding.
///
/// Every epoch takes every record once, in a new order: the shuffled records are cut into stretches of `stretch`
/// batches, each is sorted by length and cut into batches, and the batches are shuffled. The last batch of a stretch
/// may be smaller. A pure function of lengths, seed and step, the same on every machine, as BatchOrder.
class LengthBuckets {
 public:
  /// `lengths` of the records, in tokens. Throws Error where there are none, or batch or stretch is below 1.
  LengthBuckets(std::vector<int64_t> lengths, int64_t batch, uint64_t seed, int64_t stretch = 50);

  /// Indices of the records of `step` (from 0).
  const std::vector<int64_t>& indices(int64_t step);

  int64_t steps_per_epoch() const { return steps_per_epoch_; }

 private:
  void shuffle(int64_t epoch);

  std::vector<int64_t> lengths_;
  int64_t batch_;
  uint64_t seed_;
  int64_t stretch_;
  int64_t steps_per_epoch_;
  int64_t epoch_ = -1;
  std::vector<std::vector<int64_t>> batches_;
};

/// What LengthBuckets sorts by: prompt and completion together; an encoder-decoder's longer of both.
std::vector<int64_t> record_lengths(const std::vector<TextRecord>& records, bool encoder_decoder);

/// The sum of the completions' cross-entropy, a float32 scalar in the graph; divide by `completion_tokens` of the whole
/// step. Logits are computed at the completions alone, and the loss in float32 whatever the model's dtype.
torch::Tensor completion_loss(LanguageModel& model, const LanguageBatch& batch);

/// Where the model's parameters lie.
torch::Device device_of(const LanguageModel& model);

}  // namespace finetune
