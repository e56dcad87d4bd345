// Fine-tunes models with LoRA: see cli.cpp for the commands, commands/ for each of them.

#include "cli.hpp"

int main(int argc, char** argv) { return finetune::run_command_line(argc, argv); }
