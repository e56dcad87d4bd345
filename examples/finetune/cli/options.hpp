#pragma once

#include <CLI/App.hpp>
#include <cstdint>
#include <filesystem>
#include <string>
#include <system_error>

#include "common/error.hpp"

namespace finetune {

constexpr int64_t kMaxThreads = 1024;  ///< of --threads: far more crash in LibTorch

/// Adds an option whose default the help shows.
template <class T>
CLI::Option* add_option(CLI::App& app, const std::string& name, T& value, const std::string& help) {
  return app.add_option(name, value, help)->capture_default_str();
}

/// Throws Error "--lr -1: expected at least 0" unless `condition`.
template <class T>
void require(bool condition, const char* option, const T& found, const std::string& expected) {
  if (!condition) fail(option, " ", found, ": expected ", expected);
}

/// Throws Error, naming the option, if no file can be written to `path` because its folder is not there or a folder is
/// called so; an empty path will do. For the beginning of what takes long.
inline void check_place(const char* option, const std::filesystem::path& path) {
  if (path.empty()) return;
  const std::filesystem::path folder = path.has_parent_path() ? path.parent_path() : ".";
  std::error_code ignored;
  if (!std::filesystem::is_directory(folder, ignored)) {
    fail(option, " ", path.string(), ": there is no folder ", folder.string(), "; make it, or name another");
  }
  if (std::filesystem::is_directory(path, ignored)) {
    fail(option, " ", path.string(), ": is a folder; name a file in it");
  }
}

}  // namespace finetune
