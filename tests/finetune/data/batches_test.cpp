#include "data/batches.hpp"

#include <algorithm>
#include <numeric>
#include <set>

#include "data/dataset.hpp"
#include "support.hpp"

namespace finetune {
namespace {

const std::vector<TextRecord> kRecords = {{{5, 6, 7}, {8, 1}, {}}, {{9}, {10, 11, 1}, {}}, {{12, 13, 14, 15}, {1}, {}}};

SpecialTokens special_tokens(bool encoder_decoder) { return SumModel(encoder_decoder).special_tokens(); }

TEST(LanguageBatch, OfADecoderHasLabelsAtTheCompletionsAlone) {
  const LanguageBatch batch = make_language_batch(kRecords, {1, 0, 2}, false, special_tokens(false));
  const int64_t none = kNoLabel;
  EXPECT_TRUE(
      batch.input.tokens.equal(torch::tensor({{9, 10, 11, 1, 0}, {5, 6, 7, 8, 1}, {12, 13, 14, 15, 1}}, torch::kLong)));
  EXPECT_TRUE(batch.labels.equal(torch::tensor({{none, int64_t{10}, int64_t{11}, int64_t{1}, none},
                                                {none, none, none, int64_t{8}, int64_t{1}},
                                                {none, none, none, none, int64_t{1}}})));
  EXPECT_EQ(batch.completion_tokens, 6);
  EXPECT_FALSE(batch.input.mask.defined());
  EXPECT_FALSE(batch.input.target.defined());
}

TEST(LanguageBatch, OfAnEncoderDecoderHasAMaskedSourceAndAShiftedTarget) {
  const LanguageBatch batch = make_language_batch(kRecords, {0, 1}, true, special_tokens(true));
  EXPECT_TRUE(batch.input.tokens.equal(torch::tensor({{5, 6, 7}, {9, 0, 0}}, torch::kLong)));
  EXPECT_TRUE(batch.input.mask.equal(torch::tensor({{1, 1, 1}, {1, 0, 0}}).to(torch::kBool)));
  EXPECT_TRUE(batch.labels.equal(torch::tensor({{8, 1, -100}, {10, 11, 1}}, torch::kLong)));
  EXPECT_TRUE(batch.input.target.equal(torch::tensor({{2, 8, 1}, {2, 10, 11}}, torch::kLong)));
  EXPECT_FALSE(make_language_batch(kRecords, {0}, true, special_tokens(true)).input.mask.defined());
}

TEST(PromptBatch, OfADecoderEndsWithThePrompts) {
  const LanguageInput input =
      make_prompt_batch({&kRecords[0].prompt, &kRecords[1].prompt}, false, special_tokens(false));
  EXPECT_TRUE(input.tokens.equal(torch::tensor({{5, 6, 7}, {0, 0, 9}}, torch::kLong)));
  EXPECT_TRUE(input.mask.equal(torch::tensor({{1, 1, 1}, {0, 0, 1}}).to(torch::kBool)));
  EXPECT_FALSE(make_prompt_batch({&kRecords[0].prompt}, false, special_tokens(false)).mask.defined());
}

TEST(PromptBatch, OfAnEncoderDecoderBeginsWithThePrompts) {
  const LanguageInput input = make_prompt_batch({&kRecords[0].prompt, &kRecords[1].prompt}, true, special_tokens(true));
  EXPECT_TRUE(input.tokens.equal(torch::tensor({{5, 6, 7}, {9, 0, 0}}, torch::kLong)));
  EXPECT_TRUE(input.mask.equal(torch::tensor({{1, 1, 1}, {1, 0, 0}}).to(torch::kBool)));
}

std::vector<int64_t> random_lengths(int64_t count) {
  std::mt19937 random(3);
  std::vector<int64_t> lengths(count);
  for (int64_t& length : lengths) length = 1 + random() % 200;
  return lengths;
}

std::vector<std::vector<int64_t>> epoch_of(LengthBuckets& buckets, int64_t epoch) {
  std::vector<std::vector<int64_t>> batches;
  for (int64_t step = 0; step < buckets.steps_per_epoch(); ++step) {
    batches.push_back(buckets.indices(epoch * buckets.steps_per_epoch() + step));
  }
  return batches;
}

TEST(LengthBuckets, TakeEveryRecordOnceAnEpochInANewOrder) {
  LengthBuckets buckets(random_lengths(103), 4, 5, 7);
  EXPECT_EQ(buckets.steps_per_epoch(), 26);
  const auto first = epoch_of(buckets, 0);
  const auto second = epoch_of(buckets, 1);
  EXPECT_NE(first, second);
  for (const auto& batches : {first, second}) {
    std::vector<int64_t> taken;
    for (const auto& batch : batches) {
      EXPECT_GE(batch.size(), 1U);
      EXPECT_LE(batch.size(), 4U);
      taken.insert(taken.end(), batch.begin(), batch.end());
    }
    std::sort(taken.begin(), taken.end());
    std::vector<int64_t> all(103);
    std::iota(all.begin(), all.end(), 0);
    EXPECT_EQ(taken, all);
  }
}

TEST(LengthBuckets, PadLittle) {
  const std::vector<int64_t> lengths = random_lengths(2000);
  const auto padding = [&](const std::vector<std::vector<int64_t>>& batches) {
    int64_t padded = 0;
    int64_t tokens = 0;
    for (const auto& batch : batches) {
      int64_t longest = 0;
      for (const int64_t index : batch) {
        longest = std::max(longest, lengths[index]);
        tokens += lengths[index];
      }
      padded += longest * static_cast<int64_t>(batch.size());
    }
    return static_cast<double>(padded - tokens) / static_cast<double>(tokens);
  };
  LengthBuckets buckets(lengths, 8, 1);
  BatchOrder order(2000, 8, 1);
  std::vector<std::vector<int64_t>> shuffled;
  for (int64_t step = 0; step < 250; ++step) shuffled.push_back(order.indices(step));
  // Uniform lengths: the longest of 8 is 8/9 of the most and the mean a half, so 7/9 too many; within a stretch of 50
  // batches a batch spans a fiftieth of the lengths, half of which is padding: a fiftieth of the mean.
  EXPECT_GT(padding(shuffled), 0.7);
  EXPECT_LT(padding(epoch_of(buckets, 0)), 0.03);
  // Long and short batches alternate: no trend of lengths within an epoch.
  const auto batches = epoch_of(buckets, 0);
  const auto trend = [&](size_t step) { return lengths[batches[step][0]] < lengths[batches[step + 1][0]] ? 1 : -1; };
  int64_t rises = 0;
  for (size_t step = 0; step + 1 < batches.size(); ++step) rises += trend(step);
  EXPECT_LT(std::abs(rises), 75) << "of 249";
}

TEST(LengthBuckets, DependOnLengthsSeedAndStepAlone) {
  LengthBuckets forward(random_lengths(100), 7, 5);
  LengthBuckets jumping(random_lengths(100), 7, 5);
  LengthBuckets other(random_lengths(100), 7, 6);
  std::vector<std::vector<int64_t>> expected;
  for (int64_t step = 0; step < 40; ++step) expected.push_back(forward.indices(step));
  for (const int64_t step : {39, 0, 14, 15}) EXPECT_EQ(jumping.indices(step), expected[step]);
  // Not the order of the batches alone.
  const auto members = [](LengthBuckets& buckets, int64_t epoch) {
    const auto batches = epoch_of(buckets, epoch);
    return std::set<std::vector<int64_t>>(batches.begin(), batches.end());
  };
  LengthBuckets short_stretches(random_lengths(100), 7, 5, 3);
  LengthBuckets other_short(random_lengths(100), 7, 6, 3);
  EXPECT_NE(members(short_stretches, 0), members(short_stretches, 1));
  EXPECT_NE(members(short_stretches, 0), members(other_short, 0));
  EXPECT_NE(other.indices(0), expected[0]);
}

TEST(LengthBuckets, AreTheSameOnEveryMachine) {
  LengthBuckets buckets(random_lengths(100), 5, 42, 4);
  EXPECT_EQ(buckets.indices(0), (std::vector<int64_t>{27, 73, 89, 40, 63}));
  EXPECT_EQ(buckets.indices(21), (std::vector<int64_t>{62, 88, 89, 51, 80}));
}

TEST(LengthBuckets, RefuseNonsense) {
  EXPECT_NE(error_of([] { LengthBuckets({}, 1, 0); }).find("no records"), std::string::npos);
  EXPECT_NE(error_of([] { LengthBuckets({1}, 0, 0); }).find("batch is 0"), std::string::npos);
  EXPECT_NE(error_of([] { LengthBuckets({1}, 1, 0, -1); }).find("stretch is -1"), std::string::npos);
}

TEST(RecordLengths, AreWhatABatchIsPaddedTo) {
  EXPECT_EQ(record_lengths(kRecords, false), (std::vector<int64_t>{5, 4, 5}));
  EXPECT_EQ(record_lengths(kRecords, true), (std::vector<int64_t>{3, 3, 4}));
}

class CompletionLossOf : public testing::TestWithParam<bool> {
 protected:
  SumModel model_{GetParam()};
  std::vector<TextRecord> records_ = random_records(9);
};
INSTANTIATE_TEST_SUITE_P(Model, CompletionLossOf, testing::Bool(),
                         [](const auto& info) { return info.param ? "EncoderDecoder" : "Decoder"; });

TEST_P(CompletionLossOf, EqualsEachRecordsAlone) {
  const std::vector<int64_t> indices = {4, 0, 8, 3, 5};
  const LanguageBatch batch = make_language_batch(records_, indices, GetParam(), model_.special_tokens());
  double expected = 0;
  int64_t tokens = 0;
  for (const int64_t index : indices) {
    expected -= naive_log_likelihood(model_, records_[index].prompt, records_[index].completion);
    tokens += static_cast<int64_t>(records_[index].completion.size());
  }
  EXPECT_EQ(batch.completion_tokens, tokens);
  const torch::Tensor loss = completion_loss(model_, batch);
  EXPECT_EQ(loss.scalar_type(), torch::kFloat);
  EXPECT_NEAR(loss.item<double>(), expected, sum_tolerance(tokens) + 1e-6 * expected) << "the sum is rounded as well";
}

TEST_P(CompletionLossOf, AsksForNoOtherLogits) {
  const LanguageBatch batch = make_language_batch(records_, {0, 1, 2, 3}, GetParam(), model_.special_tokens());
  completion_loss(model_, batch);
  EXPECT_EQ(model_.asked, batch.completion_tokens);
}

TEST_P(CompletionLossOf, IsReckonedInFloat32ForAHalfModel) {
  model_.to(torch::kBFloat16);
  const LanguageBatch batch = make_language_batch(records_, {0, 1}, GetParam(), model_.special_tokens());
  torch::Tensor logits = model_.forward(batch.input).to(torch::kFloat);
  torch::Tensor labels = batch.labels;
  if (!GetParam()) {
    logits = logits.slice(1, 0, -1);
    labels = labels.slice(1, 1);
  }
  const torch::Tensor expected =
      at::cross_entropy_loss(logits.flatten(0, 1), labels.flatten(), {}, at::Reduction::Sum, kNoLabel);
  const torch::Tensor loss = completion_loss(model_, batch);
  EXPECT_EQ(loss.scalar_type(), torch::kFloat);
  // bfloat16 logits are the same; float sums over other rows, in another order. In bfloat16 it would be off by 4e-3.
  EXPECT_NEAR(loss.item<double>() / expected.item<double>(), 1, 1e-5);
}

TEST_P(CompletionLossOf, TrainsTheModel) {
  torch::optim::SGD optimizer(model_.parameters(), 0.02);
  const LanguageBatch batch = make_language_batch(records_, {0, 1, 2, 3}, GetParam(), model_.special_tokens());
  const double before = completion_loss(model_, batch).item<double>();
  for (int step = 0; step < 20; ++step) {
    optimizer.zero_grad();
    (completion_loss(model_, batch) / batch.completion_tokens).backward();
    optimizer.step();
  }
  EXPECT_LT(completion_loss(model_, batch).item<double>(), 0.9 * before);
}

}  // namespace
}  // namespace finetune
