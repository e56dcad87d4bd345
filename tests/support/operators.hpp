#pragma once

#include <ATen/record_function.h>

#include <cstdint>
#include <map>
#include <string>

namespace lora_rite::test {

/// The ATen operators that run on this thread while `function` does, nested ones included, and how often each.
template <class Function>
std::map<std::string, int64_t> operators_of(const Function& function) {
  static thread_local std::map<std::string, int64_t> calls;
  calls.clear();
  const auto handle = at::addThreadLocalCallback(
      at::RecordFunctionCallback([](const at::RecordFunction& call) -> std::unique_ptr<at::ObserverContext> {
        ++calls[call.name()];
        return nullptr;
      }).scopes({at::RecordScope::FUNCTION}));
  function();
  at::removeCallback(handle);
  return calls;
}

}  // namespace lora_rite::test
