#include "tasks/scores.hpp"

#include <fstream>
#include <nlohmann/json.hpp>

#include "finetune/support.hpp"

namespace finetune {
namespace {

// What Python's packages and regular expressions say: make_golden.py.
nlohmann::json read_golden() {
  std::ifstream file(std::filesystem::path(LORA_RITE_TEST_DATA_DIR) / "finetune/tasks/golden/scores.json");
  return nlohmann::json::parse(file);
}

TEST(TextScore, RougeAndExactMatchAreThoseOfThePackages) {
  const nlohmann::json cases = read_golden()["texts"];
  ASSERT_GE(cases.size(), 10U);
  for (const nlohmann::json& test : cases) {
    const auto prediction = test["prediction"].get<std::string>();
    const auto references = test["references"].get<std::vector<std::string>>();
    // A few operations in double, in the same order.
    EXPECT_NEAR(rouge_l(prediction, references), test["rouge_l"].get<double>(), 1e-15) << prediction;
    EXPECT_EQ(exact_match(prediction, references), test["exact_match"].get<bool>()) << prediction;
  }
}

TEST(TextScore, RougeIsSymmetricAndOneForItself) {
  EXPECT_EQ(rouge_l("a b c d", std::string_view("b d x")), rouge_l("b d x", std::string_view("a b c d")));
  EXPECT_EQ(rouge_l("a b c d", std::string_view("a b c d")), 1);
}

TEST(Number, IsWhereTheHarnessFindsIt) {
  const nlohmann::json cases = read_golden()["numbers"];
  ASSERT_GE(cases.size(), 20U);
  for (const nlohmann::json& test : cases) {
    const auto text = test["text"].get<std::string>();
    EXPECT_EQ(find_number(text, NumberRule::Strict), test["strict"].get<std::string>()) << text;
    EXPECT_EQ(find_number(text, NumberRule::Flexible), test["flexible"].get<std::string>()) << text;
  }
}

TEST(Number, IsComparedWithTheReferencesLastOne) {
  const std::vector<std::string> reference = {"2000 + 1 = 2001\n#### 2,001"};
  EXPECT_TRUE(number_match("#### 2001", reference, NumberRule::Strict));
  EXPECT_TRUE(number_match("so it is $2,001.", reference, NumberRule::Flexible));
  EXPECT_FALSE(number_match("so it is $2,001.", reference, NumberRule::Strict));
  EXPECT_FALSE(number_match("#### 2000", reference, NumberRule::Strict));
  EXPECT_FALSE(number_match("#### 2001.0", reference, NumberRule::Strict)) << "texts are compared, not values";
  EXPECT_FALSE(number_match("", {"#### "}, NumberRule::Flexible)) << "no number matches nothing";
  EXPECT_TRUE(number_match("7", {"#### 6", "#### 7"}, NumberRule::Flexible));
}

TEST(CutAt, EndsAtTheFirstStop) {
  EXPECT_EQ(cut_at("a</s>b Question: c", {"Question:", "</s>"}), "a");
  EXPECT_EQ(cut_at("a b", {"Question:"}), "a b");
  EXPECT_EQ(cut_at("a b", {}), "a b");
}

}  // namespace
}  // namespace finetune
