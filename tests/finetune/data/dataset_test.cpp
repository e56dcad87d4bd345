#include "data/dataset.hpp"

#include <algorithm>
#include <fstream>
#include <set>

#include "data/tokenize.hpp"
#include "finetune/support.hpp"

namespace finetune {
namespace {

class DatasetFile : public testing::Test {
 protected:
  std::filesystem::path write(const std::string& content) {
    std::ofstream(folder_ / "data.tsv", std::ios::binary) << content;
    return folder_ / "data.tsv";
  }

  TemporaryFolder folder_;
};

TEST_F(DatasetFile, LinesAreLabelTabText) {
  const auto rows = read_tsv(write("\xEF\xBB\xBFgood\tI liked it.\r\n\nbad\tNo\tnot\tat all\n"));
  ASSERT_EQ(rows.size(), 2U);
  EXPECT_EQ(rows[0].label, "good");
  EXPECT_EQ(rows[0].text, "I liked it.");
  EXPECT_EQ(rows[1].label, "bad");
  EXPECT_EQ(rows[1].text, "No\tnot\tat all");
  EXPECT_EQ(rows[1].line, 3) << "blank lines count for messages";
}

TEST_F(DatasetFile, AMalformedLineIsNamed) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"a\tx\nno tab here\n", "data.tsv:2: has no tab"},
      {"a\tx\n\n\ttext\n", "data.tsv:3: has no label"},
      {"a\t \n", "data.tsv:1: has no text after the label 'a'"},
      {"\n\n", "data.tsv: holds no example"},
  };
  for (const auto& [content, expected] : cases) {
    const auto path = write(content);
    const std::string message = error_of([&, &path = path] { read_tsv(path); });
    EXPECT_NE(message.find(expected), std::string::npos) << message;
  }
  EXPECT_NE(error_of([] { read_tsv("/nowhere.tsv"); }).find("/nowhere.tsv: cannot be read"), std::string::npos);
}

TEST_F(DatasetFile, ClassesAreTheSortedLabels) {
  const auto rows = read_tsv(write("c\tx\na\ty\nb\tz\na\tw\n"));
  const auto classes = find_classes(rows, "data.tsv");
  EXPECT_EQ(classes, (std::vector<std::string>{"a", "b", "c"}));
  EXPECT_EQ(index_labels(rows, classes, "data.tsv"), (std::vector<int64_t>{2, 0, 1, 0}));
}

TEST_F(DatasetFile, ASingleClassIsRefused) {
  const auto rows = read_tsv(write("a\tx\na\ty\n"));
  EXPECT_NE(error_of([&] { find_classes(rows, "train.tsv"); }).find("train.tsv: all 2 lines have the label 'a'"),
            std::string::npos);
}

TEST_F(DatasetFile, ALabelThatIsNotUtf8IsRefused) {
  const auto rows = read_tsv(write("tea\tx\ncaf\xE9\ty\n"));
  EXPECT_NE(error_of([&] { find_classes(rows, "train.tsv"); }).find("train.tsv:2: the label 'caf\xE9' is not UTF-8"),
            std::string::npos);
}

TEST_F(DatasetFile, ALabelUnknownInTrainingIsNamedWithItsLine) {
  const auto rows = read_tsv(write("a\tx\n\nz\ty\n"));
  const std::string message = error_of([&] { index_labels(rows, {"a", "b"}, "test.tsv"); });
  EXPECT_NE(message.find("test.tsv:3: the label 'z' does not occur"), std::string::npos) << message;
  EXPECT_NE(message.find("a, b"), std::string::npos) << message;
}

TEST(Batch, IsPaddedToItsLongestSentence) {
  const Dataset data{{{1, 2, 3}, {4}, {5, 6, 7, 8}}, {0, 1, 2}};
  const Batch batch = make_batch(data, {1, 0}, 9);
  EXPECT_TRUE(batch.tokens.equal(torch::tensor({{4, 9, 9}, {1, 2, 3}}, torch::kLong)));
  EXPECT_TRUE(batch.mask.equal(torch::tensor({{1, 0, 0}, {1, 1, 1}}).to(torch::kBool)));
  EXPECT_TRUE(batch.labels.equal(torch::tensor({1, 0}, torch::kLong)));
}

TEST(BatchOrder, EveryEpochTakesEveryExampleOnceInANewOrder) {
  BatchOrder order(10, 4, 3);
  std::vector<int64_t> taken;
  for (int64_t step = 0; step < 5; ++step) {
    const auto indices = order.indices(step);
    taken.insert(taken.end(), indices.begin(), indices.end());
  }
  const std::vector<int64_t> first(taken.begin(), taken.begin() + 10);
  const std::vector<int64_t> second(taken.begin() + 10, taken.end());
  EXPECT_NE(first, second);
  EXPECT_EQ(std::set<int64_t>(first.begin(), first.end()).size(), 10U);
  EXPECT_EQ(std::set<int64_t>(second.begin(), second.end()).size(), 10U);
}

TEST(BatchOrder, DependsOnSeedAndStepAlone) {
  BatchOrder forward(100, 7, 5);
  BatchOrder jumping(100, 7, 5);
  BatchOrder other(100, 7, 6);
  std::vector<std::vector<int64_t>> expected;
  for (int64_t step = 0; step < 40; ++step) expected.push_back(forward.indices(step));
  for (const int64_t step : {39, 0, 14, 13}) EXPECT_EQ(jumping.indices(step), expected[step]);
  EXPECT_NE(other.indices(0), expected[0]);
}

TEST(BatchOrder, IsTheSameOnEveryMachine) {
  EXPECT_EQ(BatchOrder(1000, 5, 42).indices(0), (std::vector<int64_t>{704, 253, 610, 3, 136}));
}

TEST(BatchesByLength, CoverTheDataFromShortToLong) {
  const Dataset data{{{1, 2, 3}, {4}, {5, 6}, {7}, {8, 9}}, {0, 0, 0, 0, 0}};
  EXPECT_EQ(batches_by_length(data, 2), (std::vector<std::vector<int64_t>>{{1, 3}, {2, 4}, {0}}));
}

// A tokenizer.json only has to exist for these: no Python runs, or one that does not exist.
class TokenCache : public testing::Test {
 protected:
  TokenCache() { std::ofstream(folder_ / "tokenizer.json") << "{}"; }

  TokenizerOptions options(int64_t max_length = 8) const { return {folder_.string(), max_length, "/nowhere/python3"}; }

  TemporaryFolder folder_;
};

TEST_F(TokenCache, AFailingInterpreterIsReportedWithTheWayOut) {
  const std::string message = error_of([&] { tokenize({"a"}, options(), 10, folder_ / "tokens"); });
  EXPECT_NE(message.find("'/nowhere/python3 "), std::string::npos) << message;
  EXPECT_NE(message.find("code 127 (not found)"), std::string::npos) << message;
  EXPECT_NE(message.find("-m pip install tokenizers"), std::string::npos) << message;
  EXPECT_NE(message.find("--python"), std::string::npos) << message;
}

// A stand-in for the interpreter that writes fixed ids under the header it was given, and counts its calls.
TEST_F(TokenCache, IsUsedUntilTextsOrOptionsChange) {
  const auto interpreter = folder_ / "python3";
  std::ofstream(interpreter) << "#!/bin/sh\necho call >> '" << folder_.string() << "/calls'\n"
                             << "while [ $# -gt 0 ]; do case $1 in --output) out=$2;; --header) header=$2;; esac; "
                                "shift; done\n"
                             << "printf '%s\\n1 2\\n3\\n' \"$header\" > \"$out\"\n";
  std::filesystem::permissions(interpreter, std::filesystem::perms::owner_all);
  const auto calls = [&] {
    std::ifstream file(folder_ / "calls");
    return std::count(std::istreambuf_iterator<char>(file), {}, '\n');
  };
  TokenizerOptions with_stand_in = options();
  with_stand_in.python = interpreter.string();
  const auto run = [&](const std::vector<std::string>& texts) {
    return tokenize(texts, with_stand_in, 10, folder_ / "tokens");
  };
  EXPECT_EQ(run({"a", "b"}), (std::vector<std::vector<int64_t>>{{1, 2}, {3}}));
  run({"a", "b"});
  EXPECT_EQ(calls(), 1);
  run({"a", "c"});
  EXPECT_EQ(calls(), 2);
  with_stand_in.max_length = 9;
  run({"a", "c"});
  EXPECT_EQ(calls(), 3);
  EXPECT_NE(error_of([&] { run({"a", "b", "c"}); }).find("holds 2 sentences where 3"), std::string::npos);
  EXPECT_NE(error_of([&] {
              tokenize({"a", "b"}, with_stand_in, 3, folder_ / "tokens");
            }).find("tokens:3: is no list"),
            std::string::npos);
}

}  // namespace
}  // namespace finetune
