#pragma once

#include <stdexcept>

#include "common/text.hpp"

namespace finetune {

/// An error the user can act on: its message is one sentence that names the file or parameter, what was found, what was
/// expected and the way out. main() prints it without a stack trace.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Throws Error; the message is all arguments in a row.
template <class... Args>
[[noreturn]] void fail(const Args&... args) {
  throw Error(concat(args...));
}

}  // namespace finetune
