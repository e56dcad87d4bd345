// Fine-tunes models with LoRA: see cli/ for the command line, commands/ for each command.

#include "cli/cli.hpp"

int main(int argc, char** argv) { return finetune::run_command_line(argc, argv); }
