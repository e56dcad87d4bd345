#pragma once

#include <ATen/ATen.h>
#include <torch/serialize/archive.h>

#include <cstdint>
#include <string>

/// Entries of an optimizer's archive, read with a message that names them.
namespace lora_rite::detail {

inline constexpr const char* kFormat = "lora_rite.LoraRite 1";

/// The entry `key`; throws c10::Error naming it if it is missing or `is_right` says no. `where` begins the message.
template <class IsRight>
c10::IValue read_entry(torch::serialize::InputArchive& archive, const std::string& where, const std::string& key,
                       const char* expected, const IsRight& is_right) {
  c10::IValue value;
  TORCH_CHECK(archive.try_read(key, value), "load: ", where, " has no entry '", key, "', expected ", expected);
  TORCH_CHECK(is_right(value), "load: ", where, ": entry '", key, "' is ", value, ", expected ", expected);
  return value;
}

inline std::string read_text(torch::serialize::InputArchive& archive, const std::string& where,
                             const std::string& key) {
  return read_entry(archive, where, key, "a text", [](const c10::IValue& v) { return v.isString(); }).toStringRef();
}

inline int64_t read_count(torch::serialize::InputArchive& archive, const std::string& where, const std::string& key) {
  const auto is_right = [](const c10::IValue& v) { return v.isInt() && v.toInt() >= 0; };
  return read_entry(archive, where, key, "a whole number, 0 or more", is_right).toInt();
}

inline bool read_bool(torch::serialize::InputArchive& archive, const std::string& where, const std::string& key) {
  return read_entry(archive, where, key, "true or false", [](const c10::IValue& v) { return v.isBool(); }).toBool();
}

inline torch::serialize::InputArchive read_archive(torch::serialize::InputArchive& archive, const std::string& where,
                                                   const std::string& key) {
  torch::serialize::InputArchive entry;
  TORCH_CHECK(archive.try_read(key, entry), "load: ", where, " is missing in the archive");
  return entry;
}

/// ", t of A t of B" of a pair in an archive, whoever keeps it; what is missing is told when it is read.
inline std::string steps_of_pair(torch::serialize::InputArchive& group_archive, size_t pair) {
  torch::serialize::InputArchive entry;
  at::Tensor scalars;
  if (!group_archive.try_read(std::to_string(pair), entry) || !entry.try_read("scalars", scalars, /*is_buffer=*/true) ||
      scalars.numel() < 2)
    return ", -";
  const at::Tensor steps = scalars.flatten().to(at::kCPU, at::kDouble);
  return c10::str(", ", steps[0].item<double>(), " ", steps[1].item<double>());
}

}  // namespace lora_rite::detail
