// The command lines that docs/finetune.md, docs/merge.md and the --help texts show are such as the program takes.

#include <fstream>

#include "cli/cli.hpp"
#include "commands/evaluate.hpp"
#include "commands/export.hpp"
#include "commands/inspect.hpp"
#include "commands/merge.hpp"
#include "support.hpp"

namespace finetune {
namespace {

void add_commands(CLI::App& app, std::function<int()>& action) {
  add_evaluate_command(app, action);
  add_merge_command(app, action);
  add_export_command(app, action);
  add_inspect_command(app, action);
}

// The lines of a text that begin with "finetune" and one of these commands, in words and without comments.
std::vector<std::vector<std::string>> lines_in(const std::string& text) {
  std::vector<std::vector<std::string>> found;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) {
    std::istringstream rest(line.substr(0, line.find(" #")));
    std::vector<std::string> words;
    for (std::string word; rest >> word;) words.push_back(word);
    if (words.size() < 2 || words[0] != "finetune") continue;
    for (const char* command : {"eval", "merge", "export", "inspect"}) {
      if (words[1] == command) found.push_back({words.begin() + 1, words.end()});
    }
  }
  return found;
}

void expect_taken(const std::vector<std::string>& words) {
  CLI::App app("finetune");
  std::function<int()> action;
  add_commands(app, action);
  std::vector<std::string> reversed(words.rbegin(), words.rend());  // as CLI11 wants them
  EXPECT_NO_THROW(app.parse(reversed)) << join(words);
  EXPECT_TRUE(action != nullptr) << join(words);
}

TEST(CommandLines, OfTheDocumentationAreTaken) {
  std::string blocks;  // what stands between ```sh and ```
  for (const char* page : {"docs/finetune.md", "docs/merge.md"}) {
    std::ifstream file(std::filesystem::path(LORA_RITE_TEST_DATA_DIR).parent_path() / page);
    ASSERT_TRUE(file.is_open()) << page;
    bool is_shown = false;
    for (std::string line; std::getline(file, line);) {
      if (line.rfind("```", 0) == 0) {
        is_shown = line == "```sh";
      } else if (is_shown) {
        blocks += line + "\n";
      }
    }
  }
  const auto lines = lines_in(blocks);
  EXPECT_GE(lines.size(), 8U);
  for (const auto& words : lines) expect_taken(words);
}

TEST(CommandLines, OfTheHelpAreTaken) {
  CLI::App app("finetune");
  std::function<int()> action;
  add_commands(app, action);
  for (const char* command : {"eval", "merge", "export", "inspect"}) {
    const auto lines = lines_in(app.get_subcommand(command)->get_footer());
    EXPECT_GE(lines.size(), 1U) << command;
    for (const auto& words : lines) {
      EXPECT_EQ(words[0], command);
      expect_taken(words);
    }
  }
}

TEST(CommandLines, TheHelpNamesThePythonThatIsTaken) {
  CLI::App app("finetune");
  std::function<int()> action;
  add_commands(app, action);
  for (const char* command : {"eval", "inspect"}) {
    EXPECT_EQ(app.get_subcommand(command)->get_option("--python")->get_default_str(), "$FINETUNE_PYTHON, else python3")
        << command;
  }
}

TEST(CommandLines, AnErrorIsSaidOnTheErrorStreamAndIsCode1) {
  const char* arguments[] = {"finetune", "inspect", "/nowhere"};
  ::testing::internal::CaptureStderr();
  EXPECT_EQ(run_command_line(3, arguments), 1);
  const std::string output = ::testing::internal::GetCapturedStderr();
  EXPECT_EQ(output.rfind("finetune: ", 0), 0U) << output;
  EXPECT_NE(output.find("/nowhere/adapter_config.json"), std::string::npos) << output;
}

}  // namespace
}  // namespace finetune
