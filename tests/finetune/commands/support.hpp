#pragma once

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <CLI/App.hpp>
#include <exception>
#include <filesystem>
#include <functional>
#include <lora_rite/io/peft.hpp>
#include <lora_rite/nn/peft.hpp>
#include <memory>
#include <string>
#include <vector>

#include "finetune/models/support.hpp"

namespace finetune {

/// The message of whatever `action` throws, empty if nothing.
inline std::string message_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  } catch (const std::exception& error) {
    return error.what();
  }
  return {};
}

/// Runs one command as main() would: registers it, parses the arguments behind the program's name, and does it.
inline int run_command(void (*add)(CLI::App&, std::function<int()>&), const std::vector<std::string>& arguments) {
  CLI::App app("finetune");
  std::function<int()> action;
  add(app, action);
  std::vector<std::string> reversed(arguments.rbegin(), arguments.rend());  // as CLI11 wants them
  app.parse(reversed);
  return action();
}

/// A model of golden/ with the adapter that make_goldens.py gave it.
inline std::shared_ptr<LanguageModel> adapted_golden(const std::string& name) {
  auto model = load_model(model_golden(name));
  inject_factors(*model, expected_of(name));
  return model;
}

/// Writes that adapter as PEFT does.
inline std::filesystem::path save_golden_adapter(const std::string& name, const std::filesystem::path& folder) {
  lora_rite::save_adapter(folder, lora_rite::nn::peft_adapter(*adapted_golden(name)));
  return folder;
}

/// The names and bytes of all files below a folder.
inline std::map<std::string, std::string> content_of(const std::filesystem::path& folder) {
  std::map<std::string, std::string> content;
  if (!std::filesystem::exists(folder)) return content;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
    if (!entry.is_regular_file()) continue;
    content[std::filesystem::relative(entry.path(), folder).string()] = lora_rite::testing::read_bytes(entry.path());
  }
  return content;
}

}  // namespace finetune
