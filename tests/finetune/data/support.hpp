#pragma once

#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "data/batches.hpp"
#include "finetune/support.hpp"
#include "support/torch.hpp"

namespace finetune {

/// A language model as small as can be: a token's state is a function of the sum of all real tokens up to it (and, for
/// an encoder-decoder, of the source's). In double, so that padding and batching change nothing that float32 could see.
class SumModel : public LanguageModel {
 public:
  static constexpr int64_t kVocabulary = 32;
  static constexpr int64_t kEnd = 1;

  explicit SumModel(bool encoder_decoder) : encoder_decoder_(encoder_decoder) {
    torch::manual_seed(7);
    embedding_ = register_parameter("embedding", torch::randn({kVocabulary, 16}, torch::kDouble));
    output_ = register_parameter("output", torch::randn({16, kVocabulary}, torch::kDouble));
    tokens_.pad = 0;
    tokens_.end = {kEnd, 3, 4, 5, 6, 7, 8};  // as some models have several, and often enough to be met
    if (encoder_decoder) tokens_.decoder_start = 2;
  }

  torch::Tensor hidden_states(const LanguageInput& input) override {
    rows += input.tokens.size(0);
    const torch::Tensor text = states(input.tokens, input.mask);
    if (!encoder_decoder_) return at::tanh(text.cumsum(1));
    return at::tanh(states(input.target, {}).cumsum(1) + text.sum(1, /*keepdim=*/true));
  }

  torch::Tensor logits(const torch::Tensor& hidden) override {
    asked += hidden.numel() / hidden.size(-1);
    return hidden.matmul(output_);
  }

  bool is_encoder_decoder() const override { return encoder_decoder_; }
  const SpecialTokens& special_tokens() const override { return tokens_; }

  int64_t rows = 0;   ///< how many texts it has read
  int64_t asked = 0;  ///< for how many tokens it has made logits

 protected:
  torch::Tensor begin(const LanguageInput& prompt, int64_t, Generation&) override {
    sum_ = states(prompt.tokens, prompt.mask).sum(1);
    if (encoder_decoder_) sum_ = sum_ + embedding_[tokens_.decoder_start];
    return at::tanh(sum_);
  }

  torch::Tensor advance(const torch::Tensor& tokens, Generation&) override {
    sum_ = sum_ + states(tokens, {}).squeeze(1);
    return at::tanh(sum_);
  }

 private:
  torch::Tensor states(const torch::Tensor& tokens, const torch::Tensor& mask) const {
    const torch::Tensor all = at::embedding(embedding_, tokens);
    return mask.defined() ? all * mask.unsqueeze(-1) : all;
  }

  std::string parameter_of(const std::string&) const override { return {}; }
  torch::Tensor& embedding_weight() override { throw std::logic_error("SumModel has no Embedding"); }
  void set_output(std::shared_ptr<Linear>) override {}

  bool encoder_decoder_;
  SpecialTokens tokens_;
  torch::Tensor embedding_;
  torch::Tensor output_;
  torch::Tensor sum_;  // of what generate has read, [batch, 16]
};

/// Token ids of no special meaning.
inline std::vector<int64_t> random_tokens(std::mt19937& random, int64_t least, int64_t most) {
  std::vector<int64_t> tokens(least + random() % (most - least + 1));
  for (int64_t& token : tokens) token = 3 + random() % (SumModel::kVocabulary - 3);
  return tokens;
}

/// Records of unlike lengths, the completions with the end token.
inline std::vector<TextRecord> random_records(int64_t count, int64_t longest_prompt = 9) {
  std::mt19937 random(11);
  std::vector<TextRecord> records(count);
  for (TextRecord& record : records) {
    record.prompt = random_tokens(random, 1, longest_prompt);
    record.completion = random_tokens(random, 0, 5);
    record.completion.push_back(SumModel::kEnd);
    record.references = {"yes"};
  }
  return records;
}

/// log p(completion | prompt), one record, one token at a time, in double.
inline double naive_log_likelihood(SumModel& model, const std::vector<int64_t>& prompt,
                                   const std::vector<int64_t>& completion) {
  const torch::NoGradGuard no_grad;
  std::vector<int64_t> text = prompt;
  std::vector<int64_t> target = {model.special_tokens().decoder_start};
  double sum = 0;
  for (const int64_t token : completion) {
    LanguageInput input;
    input.tokens = torch::tensor(text, torch::kLong).unsqueeze(0);
    if (model.is_encoder_decoder()) input.target = torch::tensor(target, torch::kLong).unsqueeze(0);
    sum += model.forward(input)[0][-1].log_softmax(0)[token].item<double>();
    (model.is_encoder_decoder() ? target : text).push_back(token);
  }
  return sum;
}

/// Of a sum of `tokens` log-probabilities in float32: a logit of at most 16 and a sum over 32 words are rounded each
/// time, to a relative epsilon.
inline double sum_tolerance(int64_t tokens) {
  return static_cast<double>(tokens) * (16 + SumModel::kVocabulary) * std::numeric_limits<float>::epsilon();
}

}  // namespace finetune
