#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/Exception.h>
#include <torch/version.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lora_rite/io/files.hpp"
#include "lora_rite/io/json.hpp"

/// Safetensors files, single and sharded: see docs/files.md. Needs nlohmann-json; POSIX and little-endian machines
/// only.
namespace lora_rite {

/// The content of a safetensors file: tensors by name, and the free-form texts of its `__metadata__`.
struct Safetensors {
  std::map<std::string, at::Tensor> tensors;
  std::map<std::string, std::string> metadata;
};

namespace detail {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "safetensors data is little-endian and is used as it lies");

/// The format's own limit on the header; a longer one is a damaged length.
inline constexpr uint64_t kMaxSafetensorsHeader = 100'000'000;
inline constexpr uint64_t kSafetensorsLengthBytes = 8;
/// What LibTorch's operators take; a shape that is longer is no tensor's.
inline constexpr size_t kMaxDimensions = 64;
inline constexpr const char* kMetadataKey = "__metadata__";

/// The format's names of LibTorch's dtypes.
inline constexpr std::pair<std::string_view, at::ScalarType> kSafetensorsDtypes[] = {
    {"F64", at::kDouble},
    {"F32", at::kFloat},
    {"F16", at::kHalf},
    {"BF16", at::kBFloat16},
    {"F8_E4M3", at::kFloat8_e4m3fn},
    {"F8_E4M3FNUZ", at::kFloat8_e4m3fnuz},
    {"F8_E5M2", at::kFloat8_e5m2},
    {"F8_E5M2FNUZ", at::kFloat8_e5m2fnuz},
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 7
    {"F8_E8M0", at::kFloat8_e8m0fnu},
#endif
    {"C64", at::kComplexFloat},
    {"I64", at::kLong},
    {"I32", at::kInt},
    {"I16", at::kShort},
    {"I8", at::kChar},
    {"U64", at::kUInt64},
    {"U32", at::kUInt32},
    {"U16", at::kUInt16},
    {"U8", at::kByte},
    {"BOOL", at::kBool},
};

/// The format's name of a dtype; empty if it has none.
inline std::string_view safetensors_dtype(at::ScalarType dtype) {
  for (const auto& [name, type] : kSafetensorsDtypes) {
    if (type == dtype) return name;
  }
  return {};
}

/// A tensor of a file: what it is, and where in the data section its bytes lie.
struct SafetensorsEntry {
  at::ScalarType dtype = at::kFloat;
  std::vector<int64_t> shape;
  uint64_t begin = 0;
  uint64_t end = 0;
};

/// The tensors and the metadata that a header describes.
struct SafetensorsHeader {
  std::map<std::string, SafetensorsEntry> entries;
  std::map<std::string, std::string> metadata;
};

/// Reads a header into a `SafetensorsHeader`: {name: {dtype, shape, data_offsets}, …, "__metadata__": {key: text, …}}.
class SafetensorsHeaderReader : public JsonReader {
 public:
  using JsonReader::JsonReader;

  bool start_object(size_t) override {
    if (place_ == Place::Start) return go(Place::Header);
    if (place_ == Place::Entry) return go(name_ == kMetadataKey ? Place::Metadata : Place::Tensor);
    return refuse("an object");
  }

  bool key(string_t& key) override {
    if (place_ == Place::Header) {
      check_new(names_, key, "the header");
      name_ = key;
      entry_ = {};
      fields_.clear();
      return go(Place::Entry);
    }
    if (place_ == Place::Metadata) {
      TORCH_CHECK(header_.metadata.count(key) == 0, label(), kMetadataKey, " names ", in_quotes(key), " twice");
      metadata_key_ = key;
      return go(Place::MetadataText);
    }
    check_new(fields_, key, "tensor " + in_quotes(name_));
    if (key == "dtype") return go(Place::Dtype);
    if (key == "shape") return go(Place::Shape);
    if (key == "data_offsets") return go(Place::Offsets);
    TORCH_CHECK(false, label(), "tensor ", in_quotes(name_), " has a field ", in_quotes(key),
                ", expected dtype, shape and data_offsets");
  }

  bool string(string_t& text) override {
    if (place_ == Place::MetadataText) {
      header_.metadata.emplace(metadata_key_, text);
      return go(Place::Metadata);
    }
    if (place_ != Place::Dtype) return refuse("the text " + in_quotes(text));
    for (const auto& [name, type] : kSafetensorsDtypes) {
      if (name != text) continue;
      entry_.dtype = type;
      return go(Place::Tensor);
    }
    return refuse(in_quotes(text));
  }

  bool start_array(size_t) override {
    if (place_ == Place::Shape) return go(Place::Sides);
    if (place_ == Place::Offsets) return go(Place::Begin);
    return refuse("a list");
  }

  bool number_unsigned(number_unsigned_t number) override {
    if (place_ == Place::Begin) {
      entry_.begin = number;
      return go(Place::End);
    }
    if (place_ == Place::End) {
      entry_.end = number;
      return go(Place::AfterOffsets);
    }
    if (place_ != Place::Sides || number > INT64_MAX) return refuse(std::to_string(number));
    TORCH_CHECK(entry_.shape.size() < kMaxDimensions, label(), "tensor ", in_quotes(name_), " has more than ",
                kMaxDimensions, " dimensions, expected at most that");
    entry_.shape.push_back(static_cast<int64_t>(number));
    return true;
  }

  bool end_array() override {
    if (place_ == Place::Begin || place_ == Place::End) return refuse("missing");
    return go(Place::Tensor);
  }

  bool end_object() override {
    if (place_ == Place::Header) return go(Place::Start);
    if (place_ == Place::Tensor) {
      for (const char* field : {"dtype", "shape", "data_offsets"}) {
        TORCH_CHECK(fields_.count(field) == 1, label(), "tensor ", in_quotes(name_), " has no ", field);
      }
      header_.entries.emplace(name_, std::move(entry_));
    }
    return go(Place::Header);
  }

  /// What was read.
  SafetensorsHeader take() { return std::move(header_); }

 protected:
  std::string place() const override {
    switch (place_) {
      case Place::Entry:
        return name_ == kMetadataKey ? name_ : "tensor " + in_quotes(name_);
      case Place::MetadataText:
        return kMetadataKey + (" " + in_quotes(metadata_key_));
      case Place::Dtype:
        return "the dtype of tensor " + in_quotes(name_);
      case Place::Shape:
        return "the shape of tensor " + in_quotes(name_);
      case Place::Sides:
        return "dimension " + std::to_string(entry_.shape.size()) + " of tensor " + in_quotes(name_);
      case Place::Offsets:
        return "data_offsets of tensor " + in_quotes(name_);
      case Place::Begin:
        return "the begin in data_offsets of tensor " + in_quotes(name_);
      case Place::End:
        return "the end in data_offsets of tensor " + in_quotes(name_);
      case Place::AfterOffsets:
        return "a third number in data_offsets of tensor " + in_quotes(name_);
      default:
        return "the header";
    }
  }

  std::string expectation() const override {
    switch (place_) {
      case Place::MetadataText:
        return "a text";
      case Place::Dtype:
        return dtype_names();
      case Place::Shape:
        return "a list of sizes";
      case Place::Sides:
        return "a whole number from 0 to 2^63 - 1";
      case Place::Offsets:
        return "a list of two byte offsets";
      case Place::Begin:
      case Place::End:
        return "a byte offset";
      case Place::AfterOffsets:
        return "two";
      default:
        return "an object";
    }
  }

 private:
  /// Where in the header the parser stands.
  enum class Place {
    Start,
    Header,
    Entry,
    Metadata,
    MetadataText,
    Tensor,
    Dtype,
    Shape,
    Sides,
    Offsets,
    Begin,
    End,
    AfterOffsets
  };

  bool go(Place place) {
    place_ = place;
    return true;
  }

  void check_new(std::set<std::string>& seen, const std::string& key, const std::string& where) const {
    TORCH_CHECK(seen.insert(key).second, label(), where, " names ", in_quotes(key), " twice");
  }

  static std::string dtype_names() {
    std::string names;
    for (const auto& [name, type] : kSafetensorsDtypes) names += (names.empty() ? "" : ", ") + std::string(name);
    return names;
  }

  Place place_ = Place::Start;
  std::set<std::string> names_, fields_;
  std::string name_, metadata_key_;
  SafetensorsEntry entry_;
  SafetensorsHeader header_;
};

/// Throws c10::Error unless shape and dtype need exactly the bytes that the entry spans.
inline void check_span(const std::string& label, const std::string& name, const SafetensorsEntry& entry) {
  constexpr auto kMost = static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
  uint64_t bytes = c10::elementSize(entry.dtype);
  bool empty = false;
  for (const int64_t side : entry.shape) {
    // As if no dimension was 0: LibTorch computes strides of empty tensors, too, and they must not overflow.
    const auto factor = static_cast<uint64_t>(std::max<int64_t>(side, 1));
    TORCH_CHECK(bytes <= kMost / factor, label, "tensor ", in_quotes(name), " has the shape ",
                at::IntArrayRef(entry.shape), ", which is more than 2^63 bytes");
    bytes *= factor;
    empty = empty || side == 0;
  }
  if (empty) bytes = 0;
  TORCH_CHECK(entry.begin <= entry.end && entry.end - entry.begin == bytes, label, "tensor ", in_quotes(name),
              " spans bytes ", entry.begin, " to ", entry.end, ", expected ", bytes, " bytes for ",
              safetensors_dtype(entry.dtype), at::IntArrayRef(entry.shape));
}

/// Throws c10::Error unless the tensors, in the order of their bytes, fill the data section: no gap, no overlap,
/// nothing beyond.
inline void check_tiling(const std::string& label, const SafetensorsHeader& header, uint64_t data_bytes) {
  std::vector<const std::pair<const std::string, SafetensorsEntry>*> order;
  for (const auto& item : header.entries) {
    check_span(label, item.first, item.second);
    order.push_back(&item);
  }
  std::sort(order.begin(), order.end(), [](const auto* left, const auto* right) {
    return std::pair(left->second.begin, left->second.end) < std::pair(right->second.begin, right->second.end);
  });
  uint64_t position = 0;
  for (const auto* item : order) {
    TORCH_CHECK(item->second.begin == position, label, "tensor ", in_quotes(item->first), " begins at byte ",
                item->second.begin, ", expected ", position, " (",
                item->second.begin < position ? "an overlap" : "a gap", ")");
    position = item->second.end;
  }
  TORCH_CHECK(position == data_bytes, label, "the tensors need ", position, " bytes of data, but the file holds ",
              data_bytes, data_bytes < position ? " (it is truncated)" : "");
}

/// Throws c10::Error unless all bytes of a BOOL tensor are 0 or 1: others are no value of a bool, and to use them is
/// undefined.
inline void check_bools(const std::string& label, const std::string& name, const char* bytes, uint64_t size) {
  for (uint64_t i = 0; i < size; ++i) {
    const auto byte = static_cast<unsigned char>(bytes[i]);
    TORCH_CHECK(byte <= 1, label, "element ", i, " of the BOOL tensor ", in_quotes(name), " is ", int{byte},
                ", expected 0 or 1");
  }
}

/// Throws c10::Error unless the text is UTF-8, without which it cannot be written.
inline void check_utf8(const std::string& label, const std::string& what, const std::string& text) {
  try {
    nlohmann::json(text).dump();
  } catch (const nlohmann::json::exception&) {
    TORCH_CHECK(false, label, what, " ", in_quotes(text), " is not valid UTF-8");
  }
}

}  // namespace detail

/// What a tensor of a file is.
struct TensorInfo {
  at::ScalarType dtype;
  std::vector<int64_t> shape;
};

/// A safetensors file, mapped into memory: opening it reads the header alone, and a tensor's bytes are read when they
/// are used. The file may be replaced or removed meanwhile (its tensors stay what they are), but must not be cut short
/// or written over in place. Copies share the mapping.
class SafetensorsFile {
 public:
  /// Opens and checks the file. Its header is not trusted. Throws c10::Error naming the file, the tensor, what was
  /// found and what was expected unless the header is valid JSON of at most 100 MB with names, dtypes, shapes and
  /// offsets that agree, and the tensors fill the data section without gap or overlap. Dtypes that LibTorch lacks (F4,
  /// F6_…) are refused by name.
  explicit SafetensorsFile(const std::filesystem::path& path) : label_("safetensors file " + path.string() + ": ") {
    mapping_ = std::make_shared<const detail::MappedFile>(path, label_);
    const uint64_t size = mapping_->size();
    TORCH_CHECK(size >= detail::kSafetensorsLengthBytes, label_, "has ", size, " bytes, expected at least ",
                detail::kSafetensorsLengthBytes);
    uint64_t header_bytes = 0;
    std::memcpy(&header_bytes, mapping_->data(), sizeof header_bytes);
    const uint64_t rest = size - detail::kSafetensorsLengthBytes;
    TORCH_CHECK(header_bytes <= rest, label_, "claims a header of ", header_bytes, " bytes, but only ", rest,
                " bytes follow (it is truncated, or no safetensors file)");
    TORCH_CHECK(header_bytes <= detail::kMaxSafetensorsHeader, label_, "claims a header of ", header_bytes,
                " bytes, expected at most ", detail::kMaxSafetensorsHeader);
    const char* begin = mapping_->data() + detail::kSafetensorsLengthBytes;
    TORCH_CHECK(header_bytes > 0 && *begin == '{', label_, "its header is no JSON object (it does not begin with '{')");
    detail::SafetensorsHeaderReader reader(label_, "its header ");
    reader.read(begin, begin + header_bytes);
    header_ = reader.take();
    detail::check_tiling(label_, header_, rest - header_bytes);
    data_ = mapping_->data() + detail::kSafetensorsLengthBytes + header_bytes;
  }

  /// The names of all tensors, in ascending order.
  std::vector<std::string> names() const {
    std::vector<std::string> result;
    for (const auto& item : header_.entries) result.push_back(item.first);
    return result;
  }

  /// Whether there is a tensor of this name.
  bool contains(const std::string& name) const { return header_.entries.count(name) == 1; }

  /// Dtype and shape of a tensor, from the header. Throws c10::Error if there is none of this name.
  TensorInfo info(const std::string& name) const {
    const detail::SafetensorsEntry& found = entry(name);
    return {found.dtype, found.shape};
  }

  /// A tensor on the CPU that views the mapping and keeps it alive; a copy if the file has the data at an address that
  /// its dtype does not allow. Writing to it changes the process's own copy of the page, never the file, and is seen by
  /// other views of the same tensor. Throws c10::Error if there is none of this name, or a BOOL tensor holds something
  /// else than 0 and 1.
  at::Tensor tensor(const std::string& name) const {
    const detail::SafetensorsEntry& found = entry(name);
    const uint64_t size = found.end - found.begin;
    char* bytes = data_ + found.begin;
    if (found.dtype == at::kBool) detail::check_bools(label_, name, bytes, size);
    const auto address = reinterpret_cast<uintptr_t>(bytes);
    if (size > 0 && address % c10::elementSize(found.dtype) == 0) {
      return at::from_blob(
          bytes, found.shape, [mapping = mapping_](void*) {}, at::TensorOptions(found.dtype));
    }
    at::Tensor copy = at::empty(found.shape, at::TensorOptions(found.dtype));
    if (size > 0) std::memcpy(copy.data_ptr(), bytes, size);
    return copy;
  }

  /// The free-form texts.
  const std::map<std::string, std::string>& metadata() const { return header_.metadata; }

 private:
  const detail::SafetensorsEntry& entry(const std::string& name) const {
    const auto found = header_.entries.find(name);
    TORCH_CHECK(found != header_.entries.end(), label_, "has no tensor ", detail::in_quotes(name));
    return found->second;
  }

  std::string label_;
  std::shared_ptr<const detail::MappedFile> mapping_;
  detail::SafetensorsHeader header_;
  char* data_ = nullptr;
};

/// All tensors of a file, as `SafetensorsFile::tensor` gives them, and its metadata. Throws as SafetensorsFile does.
inline Safetensors load_safetensors(const std::filesystem::path& path) {
  const SafetensorsFile file(path);
  Safetensors content;
  for (const std::string& name : file.names()) content.tensors.emplace(name, file.tensor(name));
  content.metadata = file.metadata();
  return content;
}

/// Writes tensors (any device, any strides) and texts as a safetensors file: to "<path>.tmp" in the same folder, which
/// then takes the place of `path`. Returns when the disk has it; whatever happens in between, `path` is the old file or
/// the new one, whole. Tensors that share memory are written each. Throws c10::Error naming file and tensor if one is
/// undefined, not dense, without data, or of a dtype that the format lacks, if a name is "__metadata__" or no UTF-8, if
/// the header would be longer than 100 MB, or if the system refuses; an old file is untouched then.
inline void save_safetensors(const std::filesystem::path& path, const std::map<std::string, at::Tensor>& tensors,
                             const std::map<std::string, std::string>& metadata = {}) {
  const std::string label = "safetensors file " + path.string() + ": ";
  nlohmann::json header = nlohmann::json::object();
  for (const auto& [key, text] : metadata) {
    detail::check_utf8(label, "the metadata key", key);
    detail::check_utf8(label, "the metadata text", text);
    header[detail::kMetadataKey][key] = text;
  }
  std::vector<const std::pair<const std::string, at::Tensor>*> order;
  for (const auto& item : tensors) {
    const auto& [name, tensor] = item;
    const std::string what = label + "tensor " + detail::in_quotes(name);
    TORCH_CHECK(tensor.defined(), what, " is undefined");
    TORCH_CHECK(tensor.layout() == at::kStrided, what, " has layout ", tensor.layout(), ", expected a dense one");
    TORCH_CHECK(!tensor.is_meta(), what, " is on the meta device, which has no data");
    TORCH_CHECK(!detail::safetensors_dtype(tensor.scalar_type()).empty(), what, " has dtype ", tensor.scalar_type(),
                ", which the format lacks; convert it first");
    TORCH_CHECK(name != detail::kMetadataKey, what, " has a name that the format keeps for its metadata");
    detail::check_utf8(label, "the tensor name", name);
    order.push_back(&item);
  }
  // Widest elements first: every tensor is then aligned to its element size.
  std::stable_sort(order.begin(), order.end(), [](const auto* left, const auto* right) {
    return left->second.element_size() > right->second.element_size();
  });
  uint64_t position = 0;
  for (const auto* item : order) {
    const auto& [name, tensor] = *item;
    const uint64_t end = position + static_cast<uint64_t>(tensor.numel()) * tensor.element_size();
    header[name] = {{"dtype", detail::safetensors_dtype(tensor.scalar_type())},
                    {"shape", tensor.sizes().vec()},
                    {"data_offsets", {position, end}}};
    position = end;
  }
  std::string text = header.dump();
  // Spaces after the header align the data to 8 bytes, so that readers may map it.
  text.resize((text.size() + 7) / 8 * 8, ' ');
  TORCH_CHECK(text.size() <= detail::kMaxSafetensorsHeader, label, "its header would have ", text.size(),
              " bytes, expected at most ", detail::kMaxSafetensorsHeader);

  detail::replace_file(path, label, [&](detail::FileWriter& file) {
    const uint64_t header_bytes = text.size();
    file.append(&header_bytes, sizeof header_bytes);
    file.append(text.data(), text.size());
    for (const auto* item : order) {
      // One at a time: tensors of another device need no more memory here than the largest. Views that conjugate or
      // negate what they show are resolved.
      const at::Tensor plain = item->second.detach().resolve_conj().resolve_neg().cpu().contiguous();
      file.append(plain.const_data_ptr(), plain.nbytes());
    }
  });
}

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

}  // namespace detail

/// The tensors of a checkpoint in a folder, as Hugging Face's libraries write it: model.safetensors.index.json and the
/// shards that it names, or model.safetensors alone. Of each shard the tensors that the index puts there; metadata is
/// that of model.safetensors, or empty for shards. Throws c10::Error naming the file, what was found and what was
/// expected if one is missing or damaged, the index (at most 100 MB) is no such index, a shard's name leads out of the
/// folder (absolute, or with ".."), or a shard lacks a tensor. Symbolic links are followed, as in the libraries'
/// caches.
inline Safetensors load_sharded(const std::filesystem::path& folder) {
  const std::filesystem::path index = folder / "model.safetensors.index.json";
  std::error_code error;
  if (!std::filesystem::exists(index, error) && std::filesystem::exists(folder / "model.safetensors", error)) {
    return load_safetensors(folder / "model.safetensors");
  }
  const std::string label = "shard index " + index.string() + ": ";
  const std::string text = detail::read_file(index, label, detail::kMaxSafetensorsHeader);
  detail::ShardIndexReader reader(label);
  reader.read(text.data(), text.data() + text.size());
  const std::map<std::string, std::string> shards = reader.take();

  std::map<std::string, std::vector<std::string>> tensors_of;
  for (const auto& [tensor, shard] : shards) {
    detail::check_shard_name(label, shard);
    tensors_of[shard].push_back(tensor);
  }
  Safetensors content;
  for (const auto& [shard, tensors] : tensors_of) {
    const SafetensorsFile file(folder / shard);
    for (const std::string& tensor : tensors) content.tensors.emplace(tensor, file.tensor(tensor));
  }
  return content;
}

}  // namespace lora_rite
