#pragma once

#include <CLI/App.hpp>
#include <cstdint>
#include <string>

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

}  // namespace finetune
