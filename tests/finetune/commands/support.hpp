#pragma once

#include <gtest/gtest.h>

#include <CLI/App.hpp>
#include <algorithm>
#include <exception>
#include <filesystem>
#include <functional>
#include <lora_rite/io/peft.hpp>
#include <lora_rite/nn/peft.hpp>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "commands/merge.hpp"
#include "common/files.hpp"
#include "finetune/models/support.hpp"
#include "support/torch.hpp"

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

inline void expect_words(const std::string& words, const std::string& message) {
  EXPECT_NE(message.find(words), std::string::npos) << message;
}

inline MergeOptions merge_options(const std::filesystem::path& model, const std::vector<WeightedAdapter>& adapters,
                                  const std::filesystem::path& out, const std::string& dtype = "") {
  MergeOptions options;
  options.model = model;
  options.adapters = adapters;
  options.out = out;
  options.dtype = dtype;
  return options;
}

/// What merging says, empty if it succeeds: then, and only then, there is a result.
inline std::string merge_message(const MergeOptions& options) {
  std::ostringstream ignored;
  const std::string message = message_of([&] { merge_adapters(options, ignored); });
  EXPECT_EQ(std::filesystem::exists(options.out), message.empty()) << message;
  return message;
}
inline std::string merge_message(const std::filesystem::path& model, const std::vector<WeightedAdapter>& adapters,
                                 const std::filesystem::path& out, const std::string& dtype = "") {
  return merge_message(merge_options(model, adapters, out, dtype));
}

/// A checkpoint of these tensors in one file.
inline void write_model(const std::filesystem::path& folder, const nlohmann::json& config, const Tensors& tensors) {
  std::filesystem::create_directories(folder);
  write_json(folder / "config.json", config);
  save_safetensors(folder / "model.safetensors", tensors, {{"format", "pt"}});
}

inline Tensors tensors_of(const std::filesystem::path& folder) { return lora_rite::load_sharded(folder).tensors; }

/// ΔW of every layer with linear factors, by the weight's name, in float. Of an adapter of one rank and alpha.
inline Tensors deltas_of(const std::filesystem::path& folder) {
  const lora_rite::Adapter adapter = lora_rite::load_adapter(folder);
  const double scale = adapter.config.lora_alpha / static_cast<double>(adapter.config.r);
  Tensors deltas;
  for (const auto& [name, a] : adapter.tensors) {
    const size_t at = name.find(".lora_A.weight");
    if (at == std::string::npos) continue;
    const std::string module = name.substr(0, at);
    deltas[module + ".weight"] = torch::matmul(adapter.tensors.at(module + ".lora_B.weight"), a) * scale;
  }
  EXPECT_GE(deltas.size(), 4U);
  return deltas;
}

/// A program of these lines for /bin/sh.
inline std::filesystem::path write_program(const std::filesystem::path& path, const std::string& lines) {
  lora_rite::test::write_bytes(path, "#!/bin/sh\n" + lines);
  std::filesystem::permissions(path, std::filesystem::perms::owner_all);
  return path;
}

/// The columns of a line of a table, which are two spaces or more apart.
inline std::vector<std::string> columns_of(const std::string& line) {
  std::vector<std::string> columns;
  for (size_t begin = line.find_first_not_of(' '); begin != std::string::npos;) {
    const size_t end = std::min(line.find("  ", begin), line.size());
    columns.push_back(line.substr(begin, end - begin));
    begin = line.find_first_not_of(' ', end);
  }
  return columns;
}

/// The same of every line.
inline std::vector<std::vector<std::string>> table_in(const std::string& text) {
  std::vector<std::vector<std::string>> table;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) table.push_back(columns_of(line));
  return table;
}

/// The names and bytes of all files below a folder.
inline std::map<std::string, std::string> content_of(const std::filesystem::path& folder) {
  std::map<std::string, std::string> content;
  if (!std::filesystem::exists(folder)) return content;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
    if (!entry.is_regular_file()) continue;
    content[std::filesystem::relative(entry.path(), folder).string()] = lora_rite::test::read_bytes(entry.path());
  }
  return content;
}

}  // namespace finetune
