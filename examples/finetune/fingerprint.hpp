#pragma once

#include <cstdint>
#include <vector>

namespace finetune {

/// Tells lists of numbers apart (FNV-1a): it has to notice mistakes, not attacks.
class Fingerprint {
 public:
  void add(int64_t number) { hash_ = (hash_ ^ static_cast<uint64_t>(number)) * 0x100000001b3; }

  /// A list, so that [1], [2] and [1, 2] differ.
  void add(const std::vector<int64_t>& numbers) {
    add(-1);
    for (const int64_t number : numbers) add(number);
  }

  uint64_t value() const { return hash_; }

 private:
  uint64_t hash_ = 0xcbf29ce484222325;
};

}  // namespace finetune
