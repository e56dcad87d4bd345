#include "data/records.hpp"

#include <fstream>

#include "finetune/support.hpp"

namespace finetune {
namespace {

const std::string kTextHeader = R"({"format":"finetune-tasks 1","task":"gsm8k","kind":"text","encoder_decoder":false})"
                                "\n";
const std::string kChoiceHeader =
    R"({"format":"finetune-tasks 1","task":"arc","kind":"choices","encoder_decoder":false})"
    "\n";
const std::string kText = R"({"prompt":[0,5],"completion":[6,1],"references":["ö","b"]})"
                          "\n";
const std::string kChoice = R"({"prompts":[[4]],"choices":[[5,6],[7]],"characters":[3,1],"bytes":[4,1],"answer":1})"
                            "\n";

class TaskRecords : public testing::Test {
 protected:
  std::filesystem::path write(const std::string& content) {
    std::ofstream(folder_ / "task.jsonl", std::ios::binary) << content;
    return folder_ / "task.jsonl";
  }

  static TaskReading reading(Malformed malformed = Malformed::Refuse) { return {10, false, malformed}; }

  TemporaryFolder folder_;
};

TEST_F(TaskRecords, OfTextAreRead) {
  const auto file = read_text_records(write(kTextHeader + kText), reading());
  EXPECT_EQ(file.task, "gsm8k");
  ASSERT_EQ(file.records.size(), 1U);
  EXPECT_EQ(file.records[0].prompt, (std::vector<int64_t>{0, 5}));
  EXPECT_EQ(file.records[0].completion, (std::vector<int64_t>{6, 1}));
  EXPECT_EQ(file.records[0].references, (std::vector<std::string>{"ö", "b"}));
}

TEST_F(TaskRecords, OfChoicesAreReadWithOnePromptOrOneEach) {
  const std::string own = R"({"prompts":[[4],[3,2]],"choices":[[5],[5]],"characters":[1,2],"bytes":[1,2],"answer":0})";
  const auto file = read_choice_records(write(kChoiceHeader + kChoice + own), reading());
  ASSERT_EQ(file.records.size(), 2U);
  EXPECT_EQ(file.records[0].prompt(0), (std::vector<int64_t>{4}));
  EXPECT_EQ(file.records[0].prompt(1), (std::vector<int64_t>{4}));
  EXPECT_EQ(file.records[0].choices, (std::vector<std::vector<int64_t>>{{5, 6}, {7}}));
  EXPECT_EQ(file.records[0].characters, (std::vector<int64_t>{3, 1}));
  EXPECT_EQ(file.records[0].bytes, (std::vector<int64_t>{4, 1}));
  EXPECT_EQ(file.records[0].answer, 1);
  EXPECT_EQ(file.records[1].prompt(1), (std::vector<int64_t>{3, 2}));
}

// Each case is a record of its own kind with one thing changed, between two good ones.
TEST_F(TaskRecords, ThatAreMalformedAreNamedOrSkipped) {
  struct Case {
    std::string record, from, to, expected;
  };
  const std::vector<Case> cases = {
      {kText, "\"prompt\":[0,5],", "", "has no 'prompt'"},
      {kText, "[0,5]", "[]", "has no list of numbers in 'prompt'"},
      {kText, "[0,5]", "7", "has no list of numbers in 'prompt'"},
      {kText, "[0,5]", "[0,10]", "has 10 in 'prompt' where a number from 0 to 9"},
      {kText, "[0,5]", "[-1]", "has -1 in 'prompt'"},
      {kText, "[0,5]", "[1.5]", "has 1.5 in 'prompt'"},
      {kText, "[0,5]", "[18446744073709551615]", "has 18446744073709551615 in 'prompt'"},
      {kText, "[6,1]", "[\"6\"]", "has \"6\" in 'completion'"},
      {kText, "[\"ö\",\"b\"]", "[]", "has no list of texts in 'references'"},
      {kText, "\"b\"", "7", "has 7 in 'references' where a text"},
      {kText, "}", ",\"x\":1}", "has an unknown field 'x'"},
      {kText, "{", "[", "is no JSON object"},
      {kText, "ö", "\xff", "is no JSON object"},
      {kText, kText, "\n", "is no JSON object"},
      {kChoice, "\"answer\":1", "\"answer\":2", "has 2 in 'answer' where a number from 0 to 1"},
      {kChoice, "[[4]]", "[[4],[4],[4]]", "has 3 'prompts' for 2 'choices'"},
      {kChoice, "[[4]]", "[4]", "has no list of numbers in 'prompts'"},
      {kChoice, "[[5,6],[7]]", "[]", "has no list of token lists in 'choices'"},
      {kChoice, "[7]", "[]", "has no list of numbers in 'choices'"},
      {kChoice, "[3,1]", "[3]", "has 1 'characters' and 2 'bytes' for 2 'choices'"},
      {kChoice, "[4,1]", "[4,0]", "has 0 in 'bytes'"},
  };
  for (const Case& test : cases) {
    std::string broken = test.record;
    broken.replace(broken.find(test.from), test.from.size(), test.to);
    const bool text = test.record == kText;
    const auto path = write((text ? kTextHeader : kChoiceHeader) + test.record + broken + test.record);
    const auto read = [&](Malformed malformed) {
      if (text) {
        const auto file = read_text_records(path, reading(malformed));
        return std::make_pair(file.records.size(), file.skipped);
      }
      const auto file = read_choice_records(path, reading(malformed));
      return std::make_pair(file.records.size(), file.skipped);
    };
    const std::string message = error_of([&] { read(Malformed::Refuse); });
    EXPECT_NE(message.find("task.jsonl:3: " + test.expected), std::string::npos) << message << "\n" << broken;
    const auto [count, skipped] = read(Malformed::Skip);
    EXPECT_EQ(count, 2U) << broken;
    ASSERT_EQ(skipped.size(), 1U) << broken;
    EXPECT_NE(skipped[0].find("task.jsonl:3: " + test.expected), std::string::npos) << skipped[0];
  }
}

TEST_F(TaskRecords, OfAnotherFileAreRefusedEvenWhenSkipping) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", "task.jsonl: holds no record"},
      {kTextHeader, "task.jsonl: holds no record"},
      {kTextHeader + "{}\n", "task.jsonl: holds no record"},
      {kText, "task.jsonl:1: is not the first line"},
      {"label\ttext\n", "task.jsonl:1: is not the first line"},
      {R"({"format":"finetune-tasks 2","task":"a","kind":"text","encoder_decoder":false})", "is not the first line"},
      {R"({"format":"finetune-tasks 1","kind":"text","encoder_decoder":false})", "is not the first line"},
      {kChoiceHeader + kChoice, "holds \"choices\" records where \"text\" is expected; prepare_tasks.py --for train"},
      {R"({"format":"finetune-tasks 1","task":"a","kind":"text","encoder_decoder":true})",
       "made for an encoder-decoder and the model is a decoder"},
  };
  for (const auto& [content, expected] : cases) {
    const auto path = write(content);
    const std::string message = error_of([&, &path = path] { read_text_records(path, reading(Malformed::Skip)); });
    EXPECT_NE(message.find(expected), std::string::npos) << message << "\n" << content;
  }
  const auto path = write(kTextHeader + kText);
  EXPECT_NE(error_of([&] {
              read_choice_records(path, reading());
            }).find("\"choices\" is expected; prepare_tasks.py --for evaluate"),
            std::string::npos);
  EXPECT_NE(error_of([&] {
              read_text_records(path, {10, true});
            }).find("made for a decoder and the model is an encoder-decoder"),
            std::string::npos);
  EXPECT_NE(error_of([] { read_text_records("/nowhere", {10}); }).find("/nowhere: cannot be read"), std::string::npos);
}

}  // namespace
}  // namespace finetune
