#include "safetensors.hpp"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <string_view>
#include <utility>
#include <vector>

#include "error.hpp"
#include "files.hpp"

namespace finetune {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "safetensors data is little-endian and is copied here byte for byte");

// The format's own limit on the header; a longer one is a corrupt length field.
constexpr uint64_t kMaxHeaderBytes = 100'000'000;
constexpr uint64_t kLengthBytes = sizeof(uint64_t);

constexpr std::array<std::pair<std::string_view, at::ScalarType>, 10> kDtypes = {{
    {"F64", at::kDouble},
    {"F32", at::kFloat},
    {"F16", at::kHalf},
    {"BF16", at::kBFloat16},
    {"I64", at::kLong},
    {"I32", at::kInt},
    {"I16", at::kShort},
    {"I8", at::kChar},
    {"U8", at::kByte},
    {"BOOL", at::kBool},
}};

struct Entry {
  std::string name;
  at::ScalarType dtype;
  std::vector<int64_t> shape;
  uint64_t begin;
  uint64_t end;
};

// Reports what is wrong with a file; the advice is the same for every kind of damage.
class HeaderChecker {
 public:
  explicit HeaderChecker(std::filesystem::path path) : path_(std::move(path)) {}

  [[noreturn]] void reject(const std::string& problem) const {
    fail(path_.string(), ": ", problem, "; the file is damaged or no safetensors file, so fetch or write it again");
  }

  void require(bool condition, const std::string& problem) const {
    if (!condition) reject(problem);
  }

  // JSON allows a repeated key and the parser would keep the last; safetensors forbids it.
  nlohmann::json parse(const std::string& text) const {
    std::set<std::string> seen;
    auto refuse_duplicates = [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& value) {
      if (event == nlohmann::json::parse_event_t::key && depth == 1) {
        const auto name = value.get<std::string>();
        require(seen.insert(name).second, concat("its header names '", name, "' twice"));
      }
      return true;
    };
    try {
      nlohmann::json header = nlohmann::json::parse(text, refuse_duplicates);
      require(header.is_object(), "its header is not a JSON object");
      return header;
    } catch (const nlohmann::json::exception&) {
      reject("its header is not valid JSON");
    }
  }

  Entry entry(const std::string& name, const nlohmann::json& value) const {
    require(value.is_object() && value.contains("dtype") && value.contains("shape") && value.contains("data_offsets"),
            concat("tensor '", name, "' lacks dtype, shape or data_offsets"));
    return {name, dtype(name, value["dtype"]), shape(name, value["shape"]), offset(name, value["data_offsets"], 0),
            offset(name, value["data_offsets"], 1)};
  }

  uint64_t byte_count(const Entry& entry) const {
    uint64_t bytes = c10::elementSize(entry.dtype);
    for (const int64_t side : entry.shape) {
      const auto factor = static_cast<uint64_t>(side);
      require(factor == 0 || bytes <= std::numeric_limits<uint64_t>::max() / factor,
              concat("the shape of tensor '", entry.name, "' overflows"));
      bytes *= factor;
    }
    return bytes;
  }

  // Sorted by offset, the entries must tile the data section: no gap, no overlap, no surplus.
  void check_tiling(std::vector<Entry>& entries, uint64_t data_bytes) const {
    std::sort(entries.begin(), entries.end(), [](const Entry& left, const Entry& right) {
      return std::pair(left.begin, left.end) < std::pair(right.begin, right.end);
    });
    uint64_t position = 0;
    for (const Entry& entry : entries) {
      require(entry.begin <= entry.end && entry.end - entry.begin == byte_count(entry),
              concat("tensor '", entry.name, "' spans bytes ", entry.begin, " to ", entry.end,
                     ", but its shape and dtype need ", byte_count(entry), " bytes"));
      require(entry.begin == position, concat("tensor '", entry.name, "' begins at byte ", entry.begin, " where ",
                                              position, " was expected (an overlap or a gap)"));
      position = entry.end;
    }
    require(position == data_bytes, concat("its tensors need ", position, " bytes of data, but it holds ", data_bytes));
  }

 private:
  at::ScalarType dtype(const std::string& name, const nlohmann::json& value) const {
    const auto text = value.is_string() ? value.get<std::string>() : value.dump();
    for (const auto& [label, type] : kDtypes) {
      if (label == text) return type;
    }
    reject(concat("tensor '", name, "' has the unknown dtype ", text));
  }

  std::vector<int64_t> shape(const std::string& name, const nlohmann::json& value) const {
    require(value.is_array(), concat("the shape of tensor '", name, "' is not a list"));
    std::vector<int64_t> sides;
    for (const auto& side : value) {
      require(side.is_number_unsigned() && side.get<uint64_t>() <= INT64_MAX,
              concat("the shape of tensor '", name, "' holds ", side.dump()));
      sides.push_back(side.get<int64_t>());
    }
    return sides;
  }

  uint64_t offset(const std::string& name, const nlohmann::json& value, size_t index) const {
    require(value.is_array() && value.size() == 2 && value[index].is_number_unsigned(),
            concat("the data_offsets of tensor '", name, "' are not two byte counts"));
    return value[index].get<uint64_t>();
  }

  std::filesystem::path path_;
};

std::string_view dtype_label(at::ScalarType dtype, const std::string& name) {
  for (const auto& [label, type] : kDtypes) {
    if (type == dtype) return label;
  }
  fail("tensor '", name, "' has dtype ", c10::toString(dtype), ", which safetensors cannot hold; convert it first");
}

}  // namespace

Safetensors load_safetensors(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(path.string(), ": cannot be opened; check that the path names a readable file");
  const HeaderChecker checker(path);
  const uint64_t file_bytes = std::filesystem::file_size(path);

  uint64_t header_bytes = 0;
  checker.require(file_bytes >= kLengthBytes, "it is shorter than its 8-byte header length");
  file.read(reinterpret_cast<char*>(&header_bytes), kLengthBytes);
  checker.require(header_bytes <= std::min(kMaxHeaderBytes, file_bytes - kLengthBytes),
                  concat("its header claims ", header_bytes, " bytes, but the file holds ", file_bytes - kLengthBytes));
  std::string text(header_bytes, '\0');
  file.read(text.data(), static_cast<std::streamsize>(header_bytes));

  Safetensors content;
  std::vector<Entry> entries;
  const nlohmann::json header = checker.parse(text);
  for (const auto& [name, value] : header.items()) {
    if (name != "__metadata__") {
      entries.push_back(checker.entry(name, value));
      continue;
    }
    checker.require(value.is_object(), "its __metadata__ is not an object");
    for (const auto& [key, note] : value.items()) {
      checker.require(note.is_string(), concat("its metadata '", key, "' is not a string"));
      content.metadata[key] = note.get<std::string>();
    }
  }
  checker.check_tiling(entries, file_bytes - kLengthBytes - header_bytes);

  for (const Entry& entry : entries) {
    at::Tensor tensor = at::empty(entry.shape, entry.dtype);
    file.read(static_cast<char*>(tensor.data_ptr()), static_cast<std::streamsize>(entry.end - entry.begin));
    checker.require(file.good(), concat("tensor '", entry.name, "' could not be read"));
    content.tensors[entry.name] = std::move(tensor);
  }
  return content;
}

void save_safetensors(const std::filesystem::path& path, const Safetensors& content) {
  nlohmann::json header = nlohmann::json::object();
  if (!content.metadata.empty()) header["__metadata__"] = content.metadata;
  // Widest elements first: every tensor is then aligned to its element size.
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const auto& [name, tensor] : content.tensors) {
    tensors.emplace_back(name, tensor.detach().cpu().contiguous());
  }
  std::stable_sort(tensors.begin(), tensors.end(), [](const auto& left, const auto& right) {
    return left.second.element_size() > right.second.element_size();
  });
  uint64_t position = 0;
  for (const auto& [name, tensor] : tensors) {
    const uint64_t end = position + tensor.nbytes();
    header[name] = {{"dtype", dtype_label(tensor.scalar_type(), name)},
                    {"shape", tensor.sizes().vec()},
                    {"data_offsets", {position, end}}};
    position = end;
  }
  std::string text = header.dump();
  // Spaces after the header align the data to 8 bytes, so that readers may map it.
  text.resize((text.size() + 7) / 8 * 8, ' ');

  replace_file(path, [&](std::ostream& file) {
    const uint64_t header_bytes = text.size();
    file.write(reinterpret_cast<const char*>(&header_bytes), kLengthBytes);
    file.write(text.data(), static_cast<std::streamsize>(text.size()));
    for (const auto& [name, tensor] : tensors) {
      file.write(static_cast<const char*>(tensor.data_ptr()), static_cast<std::streamsize>(tensor.nbytes()));
    }
  });
}

}  // namespace finetune
