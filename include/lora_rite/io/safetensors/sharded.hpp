#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <filesystem>
#include <iterator>
#include <map>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "lora_rite/io/files.hpp"
#include "lora_rite/io/json.hpp"
#include "lora_rite/io/safetensors/header.hpp"
#include "lora_rite/io/safetensors/read.hpp"

namespace lora_rite {

namespace detail {

/// Reads the `weight_map` of a sharded checkpoint's index, {tensor: shard}, and passes over everything else.
class ShardIndexReader : public JsonReader {
 public:
  using JsonReader::JsonReader;

  bool null() override { return skip("null"); }
  bool boolean(bool value) override { return skip(value ? "true" : "false"); }
  bool number_integer(number_integer_t value) override { return skip(std::to_string(value)); }
  bool number_unsigned(number_unsigned_t value) override { return skip(std::to_string(value)); }
  bool number_float(number_float_t, const string_t& text) override { return skip(text); }
  bool string(string_t& text) override {
    if (!in_map()) return skip("the text " + in_quotes(text));
    shards_.emplace(tensor_, text);
    return true;
  }

  bool start_object(size_t) override {
    if (in_map()) return refuse("an object");
    return open();
  }
  bool key(string_t& key) override {
    if (in_map()) {
      TORCH_CHECK(shards_.count(key) == 0, label(), "weight_map names ", in_quotes(key), " twice");
      tensor_ = key;
    } else if (depth_ == 1) {
      at_map_ = key == "weight_map";
      TORCH_CHECK(!at_map_ || !std::exchange(found_, true), label(), "names 'weight_map' twice");
    }
    return true;
  }
  bool end_object() override { return close(); }
  bool start_array(size_t) override {
    if (depth_ == 0 || (depth_ == 1 && at_map_) || in_map()) return refuse("a list");
    return open();
  }
  bool end_array() override { return close(); }

  /// The shard of every tensor. Throws c10::Error if there is no weight_map.
  std::map<std::string, std::string> take() {
    TORCH_CHECK(found_, label(), "has no weight_map");
    return std::move(shards_);
  }

 protected:
  std::string place() const override {
    if (in_map()) return "the shard of tensor " + in_quotes(tensor_);
    return depth_ == 0 ? "its content" : "weight_map";
  }
  std::string expectation() const override { return in_map() ? "a file name" : "an object"; }

 private:
  static constexpr int kMaxDepth = 16;

  bool in_map() const { return at_map_ && depth_ == 2; }

  bool open() {
    TORCH_CHECK(++depth_ <= kMaxDepth, label(), "is nested more than ", kMaxDepth, " deep");
    return true;
  }
  bool close() {
    --depth_;
    return true;
  }
  bool skip(const std::string& found) {
    if (depth_ == 0 || (depth_ == 1 && at_map_) || in_map()) return refuse(found);
    return true;
  }

  int depth_ = 0;
  bool at_map_ = false;  ///< the last key of the outer object was weight_map
  bool found_ = false;
  std::string tensor_;
  std::map<std::string, std::string> shards_;
};

/// Throws c10::Error unless a shard's name, which comes from a file, leads to a file in the folder of the index or
/// below: no absolute path, no "..", no control characters.
inline void check_shard_name(const std::string& label, const std::string& name) {
  const std::filesystem::path path(name);
  bool is_inside = path.has_filename() && !path.is_absolute();
  for (const auto& part : path) is_inside = is_inside && part != ".." && part != ".";
  for (const char character : name) is_inside = is_inside && static_cast<unsigned char>(character) >= 0x20;
  TORCH_CHECK(is_inside, label, "names the shard ", in_quotes(name),
              ", expected the name of a file in the same folder");
}

inline constexpr const char* kWholeCheckpoint = "model.safetensors";
inline constexpr const char* kShardIndex = "model.safetensors.index.json";

/// Whether a file is one of those in which weights are kept, in any library's format, by its name's ending.
inline bool is_weight_file(const std::filesystem::path& path) {
  static constexpr const char* kEndings[] = {".safetensors", ".bin",  ".pt", ".pth", ".ckpt",      ".h5",   ".msgpack",
                                             ".gguf",        ".onnx", ".ot", ".npz", ".onnx_data", ".nemo", ".tflite"};
  const std::string extension = path.extension().string();
  return std::any_of(std::begin(kEndings), std::end(kEndings), [&](const char* ending) { return extension == ending; });
}

/// Throws c10::Error for a folder that holds no safetensors checkpoint, and says what weights there are instead.
[[noreturn]] inline void refuse_folder(const std::filesystem::path& folder) {
  const std::string label = "checkpoint " + folder.string() + ": ";
  std::error_code error;
  TORCH_CHECK(std::filesystem::exists(folder, error), label, "does not exist");
  TORCH_CHECK(std::filesystem::is_directory(folder, error), label, "is no folder");
  std::vector<std::string> others, shards;
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename().string();
    TORCH_CHECK((name != kWholeCheckpoint && name != kShardIndex) || entry.exists(error), label, in_quotes(name),
                " is a symbolic link to a file that is not there");
    if (is_weight_file(entry.path())) others.push_back(name);
    if (name.rfind("model-", 0) == 0 && entry.path().extension() == ".safetensors") shards.push_back(name);
  }
  TORCH_CHECK(shards.empty(), label, "has shards, such as ", in_quotes(*std::min_element(shards.begin(), shards.end())),
              ", but no ", kShardIndex, ", which tells what stands in which; fetch it from where they came");
  const std::string lacks =
      label + "has neither " + kWholeCheckpoint + " nor " + kShardIndex + ", one of which is expected";
  TORCH_CHECK(!others.empty(), lacks);
  std::sort(others.begin(), others.end());
  std::string names;
  for (size_t i = 0; i < others.size() && i < 4; ++i) names += (i == 0 ? "" : ", ") + in_quotes(others[i]);
  if (others.size() > 4) names += ", …";
  const bool is_pickle = std::any_of(others.begin(), others.end(), [](const std::string& name) {
    return std::filesystem::path(name).extension() == ".bin";
  });
  const bool is_safetensors = std::filesystem::path(others.front()).extension() == ".safetensors";
  TORCH_CHECK(false, lacks, "; there is ", names,
              is_pickle ? ". A .bin file is Python's pickle and is not read here: load the model with transformers and "
                          "save it again, which writes safetensors"
              : is_safetensors ? ", which is read under another name only"
                               : ", which is not read here");
}

}  // namespace detail

/// A safetensors file of a checkpoint, of which the header is read, and those of its tensors that belong to the
/// checkpoint.
struct CheckpointFile {
  std::string name;                  ///< in the checkpoint's folder
  SafetensorsFile file;              ///< its tensors are not read yet
  std::vector<std::string> tensors;  ///< names; the file may hold others
};

/// The files of a checkpoint.
struct Checkpoint {
  bool is_sharded = false;            ///< an index lists them
  std::vector<CheckpointFile> files;  ///< in the order of their names
};

/// The files of a checkpoint in a folder, as Hugging Face's libraries write and read it: model.safetensors if it is
/// there, else the shards that model.safetensors.index.json names, in the order of their names and with the tensors
/// that the index puts there. Throws c10::Error naming the file, what was found and what was expected if one is missing
/// or damaged, the index (at most 100 MB) is no such index, a shard's name leads out of the folder (absolute, or with
/// ".."), or a shard lacks a tensor; a folder with neither is told what weights it has, such as pytorch_model.bin.
/// Symbolic links are followed, as in the libraries' caches.
inline Checkpoint open_checkpoint(const std::filesystem::path& folder) {
  const std::filesystem::path index = folder / detail::kShardIndex;
  const std::string whole = detail::kWholeCheckpoint;
  std::error_code error;
  if (std::filesystem::exists(folder / whole, error)) {
    const SafetensorsFile file(folder / whole);
    return {/*is_sharded=*/false, {{whole, file, file.names()}}};
  }
  if (!std::filesystem::exists(index, error)) detail::refuse_folder(folder);
  const std::string label = "shard index " + index.string() + ": ";
  const std::string text = detail::read_file(index, label, detail::kMaxSafetensorsHeader);
  detail::ShardIndexReader reader(label);
  reader.read(text.data(), text.data() + text.size());

  std::map<std::string, std::vector<std::string>> tensors_of;
  for (const auto& [tensor, shard] : reader.take()) {
    detail::check_shard_name(label, shard);
    tensors_of[shard].push_back(tensor);
  }
  Checkpoint checkpoint{/*is_sharded=*/true, {}};
  for (auto& [shard, tensors] : tensors_of) {
    const SafetensorsFile file(folder / shard);
    for (const std::string& tensor : tensors) file.info(tensor);  // throws if it is not there
    checkpoint.files.push_back({shard, file, std::move(tensors)});
  }
  return checkpoint;
}

/// All tensors of open_checkpoint's files, as SafetensorsFile::tensor gives them; metadata is that of
/// model.safetensors, or empty for shards. Throws as both do.
inline Safetensors load_sharded(const std::filesystem::path& folder) {
  const Checkpoint checkpoint = open_checkpoint(folder);
  Safetensors content;
  for (const CheckpointFile& part : checkpoint.files) {
    for (const std::string& tensor : part.tensors) content.tensors.emplace(tensor, part.file.tensor(tensor));
  }
  if (!checkpoint.is_sharded) content.metadata = checkpoint.files.front().file.metadata();
  return content;
}

}  // namespace lora_rite
