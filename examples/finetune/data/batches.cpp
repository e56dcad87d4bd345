#include "data/batches.hpp"

#include <torch/types.h>

#include <algorithm>

#include "common/error.hpp"
#include "data/dataset.hpp"

namespace finetune {
namespace {

int64_t size_of(const std::vector<int64_t>& tokens) { return static_cast<int64_t>(tokens.size()); }

int64_t padding(const SpecialTokens& tokens) { return std::max<int64_t>(tokens.pad, 0); }

}  // namespace

LanguageBatch make_language_batch(const std::vector<TextRecord>& records, const std::vector<int64_t>& indices,
                                  bool encoder_decoder, const SpecialTokens& tokens, torch::Device device) {
  const auto rows = static_cast<int64_t>(indices.size());
  int64_t longest_prompt = 0;
  int64_t longest_completion = 0;
  int64_t longest = 0;
  LanguageBatch batch;
  for (const int64_t index : indices) {
    const TextRecord& record = records.at(index);
    longest_prompt = std::max(longest_prompt, size_of(record.prompt));
    longest_completion = std::max(longest_completion, size_of(record.completion));
    longest = std::max(longest, size_of(record.prompt) + size_of(record.completion));
    batch.completion_tokens += size_of(record.completion);
  }
  const int64_t columns = encoder_decoder ? longest_prompt : longest;
  const int64_t label_columns = encoder_decoder ? longest_completion : longest;
  torch::Tensor text = torch::full({rows, columns}, padding(tokens), torch::kLong);
  torch::Tensor mask = torch::zeros({rows, columns}, torch::kBool);
  torch::Tensor labels = torch::full({rows, label_columns}, kNoLabel, torch::kLong);
  for (int64_t row = 0; row < rows; ++row) {
    const TextRecord& record = records[indices[row]];
    int64_t* row_text = text.data_ptr<int64_t>() + row * columns;
    int64_t* row_labels = labels.data_ptr<int64_t>() + row * label_columns;
    std::copy(record.prompt.begin(), record.prompt.end(), row_text);
    std::fill_n(mask.data_ptr<bool>() + row * columns, record.prompt.size(), true);
    if (!encoder_decoder) {
      std::copy(record.completion.begin(), record.completion.end(), row_text + record.prompt.size());
      row_labels += record.prompt.size();
    }
    std::copy(record.completion.begin(), record.completion.end(), row_labels);
  }
  batch.labels = labels.to(device);
  batch.input.tokens = text.to(device);
  if (encoder_decoder) {
    if (!mask.all().item<bool>()) batch.input.mask = mask.to(device);
    batch.input.target = shift_right(labels, tokens).to(device);
  }
  return batch;
}

LanguageInput make_prompt_batch(const std::vector<const std::vector<int64_t>*>& prompts, bool encoder_decoder,
                                const SpecialTokens& tokens, torch::Device device) {
  const auto rows = static_cast<int64_t>(prompts.size());
  int64_t columns = 0;
  for (const auto* prompt : prompts) columns = std::max(columns, size_of(*prompt));
  torch::Tensor text = torch::full({rows, columns}, padding(tokens), torch::kLong);
  torch::Tensor mask = torch::zeros({rows, columns}, torch::kBool);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t begin = row * columns + (encoder_decoder ? 0 : columns - size_of(*prompts[row]));
    std::copy(prompts[row]->begin(), prompts[row]->end(), text.data_ptr<int64_t>() + begin);
    std::fill_n(mask.data_ptr<bool>() + begin, prompts[row]->size(), true);
  }
  LanguageInput input;
  input.tokens = text.to(device);
  if (!mask.all().item<bool>()) input.mask = mask.to(device);
  return input;
}

LengthBuckets::LengthBuckets(std::vector<int64_t> lengths, int64_t batch, uint64_t seed, int64_t stretch)
    : lengths_(std::move(lengths)), batch_(batch), seed_(seed), stretch_(stretch) {
  if (lengths_.empty()) fail("there are no records to make batches of");
  if (batch < 1) fail("batch is ", batch, "; it must be at least 1");
  if (stretch < 1) fail("stretch is ", stretch, "; it must be at least 1");
  // Only the last stretch is not whole.
  steps_per_epoch_ = (static_cast<int64_t>(lengths_.size()) + batch - 1) / batch;
}

const std::vector<int64_t>& LengthBuckets::indices(int64_t step) {
  if (step / steps_per_epoch_ != epoch_) shuffle(step / steps_per_epoch_);
  return batches_[step % steps_per_epoch_];
}

void LengthBuckets::shuffle(int64_t epoch) {
  const auto size = static_cast<int64_t>(lengths_.size());
  // A BatchOrder whose batch is everything gives an epoch's order.
  std::vector<int64_t> order = BatchOrder(size, size, seed_).indices(epoch);
  std::vector<std::vector<int64_t>> sorted;
  for (int64_t begin = 0; begin < size; begin += batch_ * stretch_) {
    const auto first = order.begin() + begin;
    const auto last = order.begin() + std::min(begin + batch_ * stretch_, size);
    std::stable_sort(first, last, [&](int64_t left, int64_t right) { return lengths_[left] < lengths_[right]; });
    for (auto at = first; at < last; at += std::min<int64_t>(batch_, last - at)) {
      sorted.emplace_back(at, at + std::min<int64_t>(batch_, last - at));
    }
  }
  batches_.clear();
  for (const int64_t index : BatchOrder(steps_per_epoch_, steps_per_epoch_, seed_).indices(epoch)) {
    batches_.push_back(std::move(sorted[index]));
  }
  epoch_ = epoch;
}

std::vector<int64_t> record_lengths(const std::vector<TextRecord>& records, bool encoder_decoder) {
  std::vector<int64_t> lengths;
  lengths.reserve(records.size());
  for (const TextRecord& record : records) {
    const int64_t prompt = size_of(record.prompt);
    const int64_t completion = size_of(record.completion);
    lengths.push_back(encoder_decoder ? std::max(prompt, completion) : prompt + completion);
  }
  return lengths;
}

torch::Tensor completion_loss(LanguageModel& model, const LanguageBatch& batch) {
  torch::Tensor hidden = model.hidden_states(batch.input);  // [batch, length, hidden]
  torch::Tensor labels = batch.labels;
  if (!model.is_encoder_decoder()) {
    hidden = hidden.slice(1, 0, -1);
    labels = labels.slice(1, 1);
  }
  const torch::Tensor asked = labels.ne(kNoLabel);
  const torch::Tensor logits = model.logits(hidden.index({asked}));  // [completion tokens, vocab]
  return at::cross_entropy_loss(logits.to(torch::kFloat), labels.index({asked}), {}, at::Reduction::Sum);
}

torch::Device device_of(const LanguageModel& model) {
  const std::vector<torch::Tensor> parameters = model.parameters();
  return parameters.empty() ? torch::Device(torch::kCPU) : parameters.front().device();
}

}  // namespace finetune
