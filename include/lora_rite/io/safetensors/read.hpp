#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "lora_rite/io/files.hpp"
#include "lora_rite/io/safetensors/header.hpp"

namespace lora_rite {

/// The content of a safetensors file: tensors by name, and the free-form texts of its `__metadata__`.
struct Safetensors {
  std::map<std::string, at::Tensor> tensors;    ///< by name
  std::map<std::string, std::string> metadata;  ///< empty if the file has none
};

namespace detail {

/// Throws c10::Error unless all bytes of a BOOL tensor are 0 or 1: others are no value of a bool, and to use them is
/// undefined.
inline void check_bools(const std::string& label, const std::string& name, const char* bytes, uint64_t size) {
  for (uint64_t i = 0; i < size; ++i) {
    const auto byte = static_cast<unsigned char>(bytes[i]);
    TORCH_CHECK(byte <= 1, label, "element ", i, " of the BOOL tensor ", in_quotes(name), " is ", int{byte},
                ", expected 0 or 1");
  }
}

}  // namespace detail

/// What a tensor of a file is.
struct TensorInfo {
  at::ScalarType dtype;        ///< kBFloat16 for the file's "BF16", and so on
  std::vector<int64_t> shape;  ///< empty for a scalar
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

}  // namespace lora_rite
