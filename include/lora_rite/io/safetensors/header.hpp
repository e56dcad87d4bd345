#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>
#include <torch/version.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lora_rite/io/json.hpp"

/// What the header of a safetensors file says, and whether it is true of the file.

namespace lora_rite::detail {

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

}  // namespace lora_rite::detail
