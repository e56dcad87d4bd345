#pragma once

#include <cstdlib>
#include <optional>
#include <string>
#include <utility>

#include "common/subprocess.hpp"

namespace finetune {

/// Whether the program's own Python has a package.
inline bool python_has(const std::string& package) {
  return run_program({find_python(""), "-c",
                      "import importlib.util, sys; sys.exit(importlib.util.find_spec('" + package + "') is None)"}) ==
         0;
}

/// A variable of the environment as it is for a while; nothing unsets it.
class Environment {
 public:
  Environment(std::string name, const std::optional<std::string>& value) : name_(std::move(name)) {
    if (const char* before = std::getenv(name_.c_str()); before != nullptr) before_ = before;
    set(value);
  }
  ~Environment() { set(before_); }
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;

 private:
  void set(const std::optional<std::string>& value) const {
    if (value) {
      setenv(name_.c_str(), value->c_str(), /*overwrite=*/1);
    } else {
      unsetenv(name_.c_str());
    }
  }

  std::string name_;
  std::optional<std::string> before_;
};

}  // namespace finetune
