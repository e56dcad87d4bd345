#pragma once

#include <c10/util/Exception.h>
#include <torch/optim/optimizer.h>
#include <torch/serialize/archive.h>
#include <torch/types.h>

#include <cstddef>
#include <map>
#include <string>
#include <vector>

#include "lora_rite/checkpoint/training_state.hpp"

/// Entries of an archive of LibTorch, written and read: values, lists of them by name, and what objects save of
/// themselves.
namespace lora_rite::detail {

/// What the archive holds, as bytes.
inline std::string archive_bytes(torch::serialize::OutputArchive& archive) {
  std::string bytes;
  archive.save_to([&bytes](const void* data, size_t size) {
    bytes.append(static_cast<const char*>(data), size);
    return size;
  });
  return bytes;
}

/// What an object saves of itself, for a way back.
template <class Object>
std::string saved_object(const Object& object) {
  torch::serialize::OutputArchive archive;
  object.save(archive);
  return archive_bytes(archive);
}

/// Loads an optimizer into a state of nothing: LibTorch's keep what they remember of a parameter of which the archive
/// says nothing.
inline void load_object(torch::optim::Optimizer& optimizer, torch::serialize::InputArchive& archive) {
  optimizer.state().clear();
  optimizer.load(archive);
}

inline void load_object(Stateful& object, torch::serialize::InputArchive& archive) { object.load(archive); }

/// Entries by their place, with a list of the names beside them: not every name can be an archive's key.
template <class Map>
void write_named(torch::serialize::OutputArchive& archive, const std::string& key, const Map& entries) {
  torch::serialize::OutputArchive nested(archive.compilation_unit());
  c10::List<std::string> names;
  for (const auto& [name, value] : entries) {
    nested.write(std::to_string(names.size()), c10::IValue(value));
    names.push_back(name);
  }
  nested.write("names", c10::IValue(names));
  archive.write(key, nested);
}

/// The value under a key; c10::Error if there is none.
inline c10::IValue read_value(torch::serialize::InputArchive& archive, const std::string& key) {
  c10::IValue value;
  TORCH_CHECK(archive.try_read(key, value), "entry '", key, "' is missing");
  return value;
}

/// The archive under a key; c10::Error if there is none.
inline torch::serialize::InputArchive read_nested(torch::serialize::InputArchive& archive, const std::string& key) {
  torch::serialize::InputArchive nested;
  TORCH_CHECK(archive.try_read(key, nested), "entry '", key, "' is missing");
  return nested;
}

inline std::vector<std::string> to_strings(const c10::IValue& value) {
  std::vector<std::string> result;
  for (const c10::IValue& element : value.toListRef()) result.push_back(element.toStringRef());
  return result;
}

/// What `write_named` wrote.
inline std::map<std::string, c10::IValue> read_named(torch::serialize::InputArchive& archive, const std::string& key) {
  torch::serialize::InputArchive nested = read_nested(archive, key);
  const std::vector<std::string> names = to_strings(read_value(nested, "names"));
  std::map<std::string, c10::IValue> result;
  for (size_t i = 0; i < names.size(); ++i) result[names[i]] = read_value(nested, std::to_string(i));
  return result;
}

/// Writes what an object saves of itself, and its class. `parameters` are the names of what an optimizer steps.
template <class Object>
void write_object(torch::serialize::OutputArchive& archive, const std::string& key, const std::string& type,
                  const std::vector<std::string>& parameters, const Object& object) {
  torch::serialize::OutputArchive nested(archive.compilation_unit()), own(archive.compilation_unit());
  object.save(own);
  nested.write("type", c10::IValue(type));
  nested.write("parameters", c10::IValue(c10::List<std::string>(c10::ArrayRef<std::string>(parameters))));
  nested.write("state", own);
  archive.write(key, nested);
}

/// The object's own part of what `write_object` wrote; c10::Error unless it was written of such an object.
inline torch::serialize::InputArchive read_object(torch::serialize::InputArchive& archive, const std::string& key,
                                                  const std::string& type, const std::vector<std::string>& parameters) {
  torch::serialize::InputArchive nested = read_nested(archive, key);
  const std::string found_type = read_value(nested, "type").toStringRef();
  TORCH_CHECK(found_type == type, key, " is of ", found_type, ", expected ", type);
  const std::vector<std::string> found = to_strings(read_value(nested, "parameters"));
  TORCH_CHECK(found.size() == parameters.size(), key, " has ", found.size(), " parameters, expected ",
              parameters.size());
  for (size_t i = 0; i < found.size(); ++i) {
    TORCH_CHECK(found[i] == parameters[i], key, ": parameter ", i, " is '", found[i], "', expected '", parameters[i],
                "'");
  }
  return read_nested(nested, "state");
}

}  // namespace lora_rite::detail
