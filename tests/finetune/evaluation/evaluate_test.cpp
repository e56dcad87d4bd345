#include "evaluation/evaluate.hpp"

#include <algorithm>
#include <cmath>
#include <fstream>

#include "finetune/data/support.hpp"

namespace finetune {
namespace {

std::vector<ChoiceRecord> random_choices() {
  std::mt19937 random(13);
  std::vector<ChoiceRecord> records(7);
  for (size_t index = 0; index < records.size(); ++index) {
    ChoiceRecord& record = records[index];
    const size_t choices = 2 + index % 3;
    // Every third has a prompt for each choice.
    for (size_t prompt = 0; prompt < (index % 3 == 0 ? choices : 1); ++prompt) {
      record.prompts.push_back(random_tokens(random, 1, 6));
    }
    for (size_t choice = 0; choice < choices; ++choice) record.choices.push_back(random_tokens(random, 1, 6));
    record.characters.assign(choices, 1);
    record.bytes.assign(choices, 1);
  }
  // Alike but for the last token, and with the same token more than once.
  records[1].choices[1] = records[1].choices[0];
  records[1].choices[1].back() = 31;
  records[1].choices[0].back() = 30;
  return records;
}

class Choices : public testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(Model, Choices, testing::Bool(),
                         [](const auto& info) { return info.param ? "EncoderDecoder" : "Decoder"; });

TEST_P(Choices, AreAsProbableInABatchAsAlone) {
  SumModel model(GetParam());
  const std::vector<ChoiceRecord> records = random_choices();
  for (const int64_t batch : {1, 3, 100}) {
    const auto log_likelihoods = choice_log_likelihoods(model, records, batch);
    ASSERT_EQ(log_likelihoods.size(), records.size());
    for (size_t record = 0; record < records.size(); ++record) {
      ASSERT_EQ(log_likelihoods[record].size(), records[record].choices.size());
      for (size_t choice = 0; choice < records[record].choices.size(); ++choice) {
        const std::vector<int64_t>& tokens = records[record].choices[choice];
        const double expected = naive_log_likelihood(model, records[record].prompt(choice), tokens);
        EXPECT_NEAR(log_likelihoods[record][choice], expected, sum_tolerance(static_cast<int64_t>(tokens.size())))
            << "batch " << batch << ", record " << record << ", choice " << choice;
      }
    }
  }
}

TEST_P(Choices, ThatDifferInTheirLastTokenAreReadOnce) {
  SumModel model(GetParam());
  ChoiceRecord record{{{4, 5}}, {{6, 7}, {6, 8}, {9, 8}, {6}}, {1, 1, 1, 1}, {1, 1, 1, 1}, 0};
  choice_log_likelihoods(model, {record, record}, 100);
  EXPECT_EQ(model.rows, 2 * 3);
  record.prompts = {{4, 5}, {4, 6}, {4, 5}, {4, 5}};
  model.rows = 0;
  choice_log_likelihoods(model, {record}, 100);
  EXPECT_EQ(model.rows, 4) << "other prompts are other texts";
}

TEST(ChoiceScores, DivideByLengthsInCharactersAndInBytes) {
  // Right by sum; right by neither length; right by characters alone; right by bytes alone.
  const std::vector<ChoiceRecord> records = {
      {{{1}}, {{1}, {1}}, {2, 10}, {2, 10}, 0},
      {{{1}}, {{1}, {1}}, {2, 10}, {2, 10}, 0},
      {{{1}}, {{1}, {1}}, {2, 10}, {4, 10}, 1},
      {{{1}}, {{1}, {1}}, {4, 4}, {4, 12}, 1},
  };
  const std::vector<std::vector<double>> log_likelihoods = {
      {-1, -20},  // sums: 0; characters -.5, -2: 0; bytes: 0
      {-3, -10},  // sums: 0; characters -1.5, -1: 1; bytes: 1
      {-3, -9},   // sums: 0; characters -1.5, -.9: 1; bytes -.75, -.9: 0
      {-4, -5},   // sums: 0; characters -1, -1.25: 0; bytes -1, -.42: 1
  };
  const ChoiceScores scores = score_choices(records, log_likelihoods);
  EXPECT_EQ(scores.count, 4);
  EXPECT_EQ(scores.acc, 0.5);
  EXPECT_EQ(scores.acc_norm, 0.5);
  EXPECT_EQ(scores.acc_bytes, 0.5);
  EXPECT_EQ(scores.acc_error, 0.25);
  const auto one = [&](size_t record) { return score_choices({records[record]}, {log_likelihoods[record]}); };
  EXPECT_EQ(one(1).acc, 1);
  EXPECT_EQ(one(1).acc_norm, 0);
  EXPECT_EQ(one(1).acc_bytes, 0);
  EXPECT_EQ(one(2).acc, 0);
  EXPECT_EQ(one(2).acc_norm, 1);
  EXPECT_EQ(one(2).acc_bytes, 0);
  EXPECT_EQ(one(3).acc, 0);
  EXPECT_EQ(one(3).acc_norm, 0);
  EXPECT_EQ(one(3).acc_bytes, 1);
}

TEST(ChoiceScores, GiveATieToTheFirst) {
  EXPECT_EQ(score_choices({{{{1}}, {{1}, {1}}, {1, 1}, {1, 1}, 0}}, {{-1, -1}}).acc, 1);
  EXPECT_EQ(score_choices({{{{1}}, {{1}, {1}}, {1, 1}, {1, 1}, 1}}, {{-1, -1}}).acc, 0);
}

TEST(ChoiceScores, RefuseAnotherNumberOfRecords) {
  EXPECT_TRUE(std::isnan(score_choices({{{{1}}, {{1}, {1}}, {1, 1}, {1, 1}, 0}}, {{std::nan(""), -1}}).acc))
      << "a model that has diverged";
  EXPECT_NE(error_of([] { score_choices({}, {}); }).find("for 0 records"), std::string::npos);
  EXPECT_NE(error_of([] { score_choices({}, {{1}}); }).find("1 log-likelihoods for 0"), std::string::npos);
}

class Completions : public testing::TestWithParam<bool> {
 protected:
  SumModel model_{GetParam()};
  std::vector<TextRecord> records_ = random_records(8);
};
INSTANTIATE_TEST_SUITE_P(Model, Completions, testing::Bool(),
                         [](const auto& info) { return info.param ? "EncoderDecoder" : "Decoder"; });

TEST_P(Completions, HaveThePerplexityOfTheirMeanLoss) {
  double sum = 0;
  int64_t tokens = 0;
  for (const TextRecord& record : records_) {
    sum -= naive_log_likelihood(model_, record.prompt, record.completion);
    tokens += static_cast<int64_t>(record.completion.size());
  }
  const double loss = sum / static_cast<double>(tokens);
  for (const int64_t batch : {1, 3, 100}) {
    const CompletionLoss found = evaluate_completions(model_, records_, batch);
    EXPECT_EQ(found.tokens, tokens);
    EXPECT_NEAR(found.loss, loss, sum_tolerance(1) + 1e-6 * loss);
    EXPECT_NEAR(found.perplexity, std::exp(loss), std::exp(loss) * 2 * (sum_tolerance(1) + 1e-6 * loss));
  }
}

TEST_P(Completions, AreWrittenGreedilyUpToTheEnd) {
  constexpr int64_t kMost = 12;
  const std::vector<int64_t>& end = model_.special_tokens().end;
  const torch::NoGradGuard no_grad;
  size_t ended = 0;
  for (const int64_t batch : {1, 3, 100}) {
    const auto made = generate_completions(model_, records_, batch, kMost);
    ASSERT_EQ(made.size(), records_.size());
    for (size_t record = 0; record < records_.size(); ++record) {
      std::vector<int64_t> text = records_[record].prompt;
      std::vector<int64_t> target = {model_.special_tokens().decoder_start};
      std::vector<int64_t> expected;
      while (static_cast<int64_t>(expected.size()) < kMost) {
        LanguageInput input;
        input.tokens = torch::tensor(text, torch::kLong).unsqueeze(0);
        if (GetParam()) input.target = torch::tensor(target, torch::kLong).unsqueeze(0);
        const int64_t next = model_.forward(input)[0][-1].argmax().item<int64_t>();
        if (std::find(end.begin(), end.end(), next) != end.end()) break;
        expected.push_back(next);
        (GetParam() ? target : text).push_back(next);
      }
      ended += static_cast<int64_t>(expected.size()) < kMost;
      EXPECT_EQ(made[record], expected) << "batch " << batch << ", record " << record;
    }
  }
  EXPECT_GT(ended, 0U) << "no text came to its end: the test tries too little";
}

TEST_P(Completions, AreEvaluatedWithoutChangingTheModelsMode) {
  for (const bool training : {true, false}) {
    model_.train(training);
    evaluate_completions(model_, records_, 4);
    generate_completions(model_, records_, 4, 2);
    choice_log_likelihoods(model_, random_choices(), 4);
    EXPECT_EQ(model_.is_training(), training);
  }
  EXPECT_TRUE(torch::GradMode::is_enabled());
  EXPECT_NE(error_of([&] { evaluate_completions(model_, records_, 0); }).find("batch is 0"), std::string::npos);
}

TEST(TextScores, AreMeansOverTheRecordsUpToTheStops) {
  std::vector<TextRecord> records(2);
  records[0].references = {"so #### 5"};
  records[1].references = {"so #### 6"};
  const TextScores scores = score_texts(records, {"so #### 5 Question: 7", "9"}, stops_of("gsm8k"));
  EXPECT_EQ(scores.count, 2);
  EXPECT_EQ(scores.rouge_l, 0.5);
  EXPECT_EQ(scores.exact_match, 0.5);
  EXPECT_EQ(scores.strict_number, 0.5);
  EXPECT_EQ(scores.flexible_number, 0.5);
  EXPECT_EQ(score_texts(records, {"so #### 5 Question: 7", "9"}).flexible_number, 0) << "without stops, 7 is the last";
  EXPECT_NE(error_of([&] { score_texts(records, {"a"}); }).find("1 texts for 2 records"), std::string::npos);
}

// A stand-in for the interpreter, which keeps what it was given and writes fixed texts.
TEST(DecodeTokens, GivesAndTakesALineAText) {
  const TemporaryFolder folder;
  const auto interpreter = folder / "python3";
  std::ofstream(interpreter) << "#!/bin/sh\nwhile [ $# -gt 0 ]; do case $1 in --input) cp \"$2\" '"
                             << (folder / "given").string() << "';; --output) out=$2;; esac; shift; done\n"
                             << "printf '%s\\n' '\"a\\nb\"' '\"\\u00e9\"' > \"$out\"\n";
  std::filesystem::permissions(interpreter, std::filesystem::perms::owner_all);
  TokenizerOptions options;
  options.model = folder / "model";
  options.python = interpreter.string();
  EXPECT_EQ(decode_tokens({{1, 22}, {}}, options, folder / "texts"), (std::vector<std::string>{"a\nb", "é"}));
  std::ifstream given(folder / "given");
  EXPECT_EQ(std::string(std::istreambuf_iterator<char>(given), {}), "1 22 \n\n");
  EXPECT_FALSE(std::filesystem::exists(folder / "texts"));
  EXPECT_FALSE(std::filesystem::exists(folder / "texts.ids"));
  EXPECT_NE(error_of([&] { decode_tokens({{1}}, options, folder / "texts"); }).find("holds 2 texts where 1"),
            std::string::npos);
  options.python = "/nowhere/python3";
  EXPECT_NE(error_of([&] { decode_tokens({{1}}, options, folder / "texts"); }).find("code 127 (not found)"),
            std::string::npos);
}

}  // namespace
}  // namespace finetune
