#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

namespace finetune {

/// Tells lists of numbers, texts and bytes apart: it has to notice mistakes, not attacks.
class Fingerprint {
 public:
  /// A number (FNV-1a).
  void add(int64_t number) { hash_ = (hash_ ^ static_cast<uint64_t>(number)) * 0x100000001b3; }

  /// A list, so that [1], [2] and [1, 2] differ.
  void add(const std::vector<int64_t>& numbers) {
    add(-1);
    for (const int64_t number : numbers) add(number);
  }

  /// A text, so that "a", "b" and "ab" differ.
  void add(std::string_view text) { add_bytes(text.data(), text.size()); }

  /// Bytes, eight at a time: gigabytes of weights take seconds. Any change within eight aligned bytes is noticed.
  void add_bytes(const void* data, size_t size) {
    mix(size);
    const auto* bytes = static_cast<const char*>(data);
    size_t done = 0;
    for (uint64_t word = 0; done + sizeof word <= size; done += sizeof word) {
      std::memcpy(&word, bytes + done, sizeof word);
      mix(word);
    }
    uint64_t rest = 0;
    if (done < size) std::memcpy(&rest, bytes + done, size - done);
    mix(rest);
  }

  uint64_t value() const { return hash_; }

  /// As 16 hexadecimal digits.
  std::string text() const {
    char digits[17];
    std::snprintf(digits, sizeof digits, "%016llx", static_cast<unsigned long long>(hash_));
    return digits;
  }

 private:
  // FNV-1a's product carries upwards only: the sign bits of two floats in the upper halves of their words would cancel.
  void mix(uint64_t word) {
    hash_ = (hash_ ^ word) * 0x9e3779b97f4a7c15;
    hash_ ^= hash_ >> 32;
  }

  uint64_t hash_ = 0xcbf29ce484222325;
};

}  // namespace finetune
