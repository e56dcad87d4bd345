#include "common/subprocess.hpp"

#include <gtest/gtest.h>

#include "finetune/python.hpp"

namespace finetune {
namespace {

TEST(FindPython, IsThePreferredElseTheEnvironmentsElsePython3) {
  {
    const Environment named("FINETUNE_PYTHON", "/own/python");
    EXPECT_EQ(find_python("/given/python"), "/given/python");
    EXPECT_EQ(find_python(""), "/own/python");
  }
  for (const auto& nothing : {std::optional<std::string>(), std::optional<std::string>("")}) {
    const Environment named("FINETUNE_PYTHON", nothing);
    EXPECT_EQ(find_python("/given/python"), "/given/python");
    EXPECT_EQ(find_python(""), "python3");
  }
}

}  // namespace
}  // namespace finetune
