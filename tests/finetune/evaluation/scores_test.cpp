#include "evaluation/scores.hpp"

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>

#include "evaluation/lower_case.hpp"
#include "finetune/support.hpp"

namespace finetune {
namespace {

// What Python's packages and regular expressions say: make_golden.py.
nlohmann::json read_golden() {
  std::ifstream file(std::filesystem::path(LORA_RITE_TEST_DATA_DIR) / "finetune/evaluation/golden/scores.json");
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

std::string utf8(char32_t code) {
  const auto byte = [](char32_t value) { return std::string(1, static_cast<char>(value)); };
  const auto rest = [&](int shift) { return byte(0x80 | (code >> shift & 0x3F)); };
  if (code < 0x80) return byte(code);
  if (code < 0x800) return byte(0xC0 | code >> 6) + rest(0);
  if (code < 0x10000) return byte(0xE0 | code >> 12) + rest(6) + rest(0);
  return byte(0xF0 | code >> 18) + rest(12) + rest(6) + rest(0);
}

TEST(LowerCase, OfEveryCharacterIsThatOfPython) {
  const nlohmann::json golden = read_golden()["lower_case"];
  ASSERT_EQ(golden["ascii"].size(), 2U);
  uint64_t sum = 0;
  size_t into_ascii = 0;
  std::string spaces;
  for (char32_t code = 0; code <= 0x10FFFF; ++code) {
    if (code >= 0xD800 && code < 0xE000) continue;
    if (is_space(code)) spaces += utf8(code);
    const std::u32string lower = lower_case(utf8(code));
    ASSERT_FALSE(lower.empty());
    if (code < 128) continue;
    for (const char32_t part : lower) sum += uint64_t{code} * part;
    if (std::none_of(lower.begin(), lower.end(), [](char32_t part) { return part < 128; })) continue;
    ++into_ascii;
    std::string text;
    for (const char32_t part : lower) text += utf8(part);
    EXPECT_EQ(golden["ascii"].value(utf8(code), ""), text);
  }
  EXPECT_EQ(into_ascii, 2U);
  EXPECT_EQ(std::to_string(sum), golden["sum"]);
  EXPECT_EQ(spaces, golden["spaces"]);
  EXPECT_EQ(lower_case("AZ az 09"), U"az az 09");
}

TEST(LowerCase, BytesThatAreNoUtf8StayApart) {
  const std::u32string found = lower_case("A\xC3(\xE2\x84\xAA\xFF\xC0\x80");
  EXPECT_EQ(found, (std::u32string{U'a', 0x1100C3, U'(', U'k', 0x1100FF, 0x1100C0, 0x110080}));
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
