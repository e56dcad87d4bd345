#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>

#include "lora_rite/io/files.hpp"

/// The file of a checkpoint: magic, version, size of the payload, payload, checksum of all that. It is whole, or
/// refused when it is read; `replace_file` writes it so that a crash leaves the old one. See docs/checkpoints.md.
/// POSIX only.
namespace lora_rite::detail {

inline constexpr char kCheckpointMagic[] = "LORARITE";
inline constexpr uint32_t kCheckpointVersion = 1;
inline constexpr size_t kMagicBytes = 8, kVersionBytes = 4, kSizeBytes = 8, kChecksumBytes = 8;
inline constexpr size_t kHeaderBytes = kMagicBytes + kVersionBytes + kSizeBytes;

inline std::string checkpoint_label(const std::filesystem::path& path) { return "checkpoint " + path.string() + ": "; }

/// CRC-64/XZ: detects every burst of up to 64 bits, and any other damage but for one in 2⁶⁴.
inline uint64_t crc64(const char* data, size_t size) {
  static const auto table = [] {
    std::array<uint64_t, 256> entries{};
    for (uint64_t byte = 0; byte < entries.size(); ++byte) {
      uint64_t entry = byte;
      for (int bit = 0; bit < 8; ++bit) entry = (entry >> 1) ^ ((entry & 1) != 0 ? 0xC96C5795D7870F42U : 0);
      entries[byte] = entry;
    }
    return entries;
  }();
  uint64_t crc = ~uint64_t{0};
  for (size_t i = 0; i < size; ++i) crc = (crc >> 8) ^ table[(crc ^ static_cast<unsigned char>(data[i])) & 0xFF];
  return ~crc;
}

/// The lowest `bytes` bytes of `number`, the lowest first.
inline std::string little_endian(uint64_t number, size_t bytes) {
  std::string text;
  for (size_t i = 0; i < bytes; ++i) text += static_cast<char>((number >> (8 * i)) & 0xFF);
  return text;
}

/// The inverse, read at `position`.
inline uint64_t read_little_endian(const std::string& text, size_t position, size_t bytes) {
  uint64_t number = 0;
  for (size_t i = 0; i < bytes; ++i) number |= uint64_t{static_cast<unsigned char>(text[position + i])} << (8 * i);
  return number;
}

/// The whole file around a payload.
inline std::string checkpoint_file(const std::string& payload) {
  std::string file(kCheckpointMagic, kMagicBytes);
  file += little_endian(kCheckpointVersion, kVersionBytes);
  file += little_endian(payload.size(), kSizeBytes);
  file += payload;
  file += little_endian(crc64(file.data(), file.size()), kChecksumBytes);
  return file;
}

/// Verifies what surrounds a file's payload. Throws c10::Error with the label, what was found and what was expected:
/// the file is no whole checkpoint, or one of a later version.
inline void check_checkpoint_file(const std::string& file, const std::string& label) {
  TORCH_CHECK(file.compare(0, kMagicBytes, kCheckpointMagic, std::min(file.size(), kMagicBytes)) == 0, label,
              "is no checkpoint (its first bytes are not '", kCheckpointMagic, "')");
  TORCH_CHECK(file.size() >= kHeaderBytes + kChecksumBytes, label, "is truncated: it has ", file.size(),
              " bytes, expected at least ", kHeaderBytes + kChecksumBytes);
  const uint64_t version = read_little_endian(file, kMagicBytes, kVersionBytes);
  TORCH_CHECK(version >= 1 && version <= kCheckpointVersion, label, "is of version ", version,
              ", this library reads up to ", kCheckpointVersion);
  const uint64_t found = file.size() - kHeaderBytes - kChecksumBytes;
  const uint64_t expected = read_little_endian(file, kMagicBytes + kVersionBytes, kSizeBytes);
  TORCH_CHECK(found == expected, label, "is ", found < expected ? "truncated" : "damaged", ": its payload has ", found,
              " bytes, expected ", expected);
  const size_t end = file.size() - kChecksumBytes;
  TORCH_CHECK(crc64(file.data(), end) == read_little_endian(file, end, kChecksumBytes), label,
              "checksum differs: the file is damaged");
}

/// The file, verified. Throws c10::Error naming the file, what was found and what was expected, or what the system
/// says.
inline std::string read_checkpoint_file(const std::filesystem::path& path) {
  const std::string label = checkpoint_label(path);
  std::string file = read_file(path, label);
  check_checkpoint_file(file, label);
  return file;
}

}  // namespace lora_rite::detail
