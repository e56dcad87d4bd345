#include "cli/cli.hpp"

#include <c10/util/Exception.h>

#include <CLI/CLI.hpp>
#include <exception>
#include <functional>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>

#include "commands/evaluate.hpp"
#include "commands/export.hpp"
#include "commands/inspect.hpp"
#include "commands/merge.hpp"
#include "commands/train.hpp"

namespace finetune {
namespace {

constexpr const char* kDescription =
    "Fine-tunes language models and sentence classifiers with LoRA adapters, by LoRA-RITE or other optimizers.\n"
    "\n"
    "The kind of model follows from 'model_type' in the model's config.json: bert becomes a sentence classifier;\n"
    "llama, gemma, gemma2, t5 and mt5 stay language models. Adapters are those of Python's PEFT, in its format.\n";

constexpr const char* kFooter =
    "\nHelp on a command: finetune train --help\n"
    "\n"
    "Exit codes: 0 success, 1 an error, 130 stopped by Ctrl-C or SIGTERM, others a command line that cannot be read.\n";

// In the list of commands, the first line of each one's description.
class CommandList : public CLI::Formatter {
 public:
  std::string make_subcommand(const CLI::App* command) const override {
    std::ostringstream line;
    const std::string description = command->get_description();
    CLI::detail::format_help(line, command->get_name(), description.substr(0, description.find('\n')),
                             get_column_width());
    return line.str();
  }
};

}  // namespace

int run_command_line(int argc, const char* const* argv) {
  CLI::App app(kDescription);
  app.formatter(std::make_shared<CommandList>());
  app.require_subcommand(1);
  std::function<int()> action;
  add_train_command(app, action);
  add_evaluate_command(app, action);
  add_merge_command(app, action);
  add_export_command(app, action);
  add_inspect_command(app, action);
  app.footer(kFooter);  // after the commands, which would take it for theirs
  try {
    app.parse(argc, argv);
    return action();
  } catch (const CLI::ParseError& error) {
    return app.exit(error);
  } catch (const c10::Error& error) {
    std::cerr << "finetune: " << error.what_without_backtrace() << '\n';
  } catch (const std::exception& error) {
    std::cerr << "finetune: " << error.what() << '\n';
  }
  return 1;
}

}  // namespace finetune
