// PythonRegex: the dialect that PEFT's patterns are written in, held against Python's own re (make_regex_golden.py).

#include <gtest/gtest.h>

#include <fstream>
#include <lora_rite/nn/python_regex.hpp>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "support/pairs.hpp"

namespace lora_rite::test {
namespace {

using nn::detail::PythonRegex;

const nlohmann::json& golden() {
  static const auto data = nlohmann::json::parse(std::ifstream(LORA_RITE_TEST_DATA_DIR "/nn/regex_golden.json"));
  return data;
}

TEST(PythonRegex, TakesTheTextsThatPythonTakes) {
  const auto names = golden()["names"].get<std::vector<std::string>>();
  ASSERT_GT(golden()["cases"].size(), 500u);
  for (const auto& data : golden()["cases"]) {
    const auto pattern = data["pattern"].get<std::string>();
    const PythonRegex regex("field", pattern);
    std::vector<size_t> full, match;
    for (size_t i = 0; i < names.size(); ++i) {
      if (regex.full_match(names[i])) full.push_back(i);
      if (regex.match(names[i])) match.push_back(i);
    }
    EXPECT_EQ(full, data["full"].get<std::vector<size_t>>()) << pattern;
    EXPECT_EQ(match, data["match"].get<std::vector<size_t>>()) << pattern;
  }
}

TEST(PythonRegex, RefusesWhatPythonRefuses) {
  for (const auto& data : golden()["errors"]) {
    const auto pattern = data.get<std::string>();
    EXPECT_TRUE(mentions(error_of([&] { PythonRegex("target_modules", pattern); }),
                         "LoraConfig: target_modules is '" + pattern + "', expected a regular expression"))
        << pattern;
  }
}

TEST(PythonRegex, RefusesByNameWhatItHasNot) {
  for (const auto& [pattern, reason] : golden()["refused"].items()) {
    EXPECT_TRUE(mentions(error_of([&, &text = pattern] { PythonRegex("field", text); }), reason.get<std::string>()))
        << pattern;
  }
}

/// Of a file from anywhere: neither the stack nor the time runs out.
TEST(PythonRegex, EndsSoonWhateverThePattern) {
  const std::string letters(60, 'a');
  EXPECT_FALSE(PythonRegex("field", "(([a-z]*)*)*!").full_match(letters));  // backtracking would take 2^60 steps
  EXPECT_FALSE(PythonRegex("field", "(a?){60}a{61}").full_match(letters));
  EXPECT_TRUE(PythonRegex("field", "(a|aa){4000000000}|a*").full_match(letters));
  std::string nested = "x", ahead = "x";
  for (int i = 0; i < 50; ++i) {
    nested = "(?:(?:" + nested + "|a){5}|b)";
    ahead = "(?=.*" + ahead + ")";
  }
  for (const std::string& pattern : {nested, ahead}) {
    const std::string message = error_of([&] { PythonRegex("field", pattern).full_match(letters); });
    EXPECT_TRUE(message.empty() || mentions(message, "matched in 1000000 steps")) << message;
  }
}

}  // namespace
}  // namespace lora_rite::test
