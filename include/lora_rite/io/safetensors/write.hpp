#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/io/files.hpp"
#include "lora_rite/io/json.hpp"
#include "lora_rite/io/safetensors/header.hpp"

namespace lora_rite {

namespace detail {

/// Throws c10::Error unless the text is UTF-8, without which it cannot be written.
inline void check_utf8(const std::string& label, const std::string& what, const std::string& text) {
  try {
    nlohmann::json(text).dump();
  } catch (const nlohmann::json::exception&) {
    TORCH_CHECK(false, label, what, " ", in_quotes(text), " is not valid UTF-8");
  }
}

/// Throws c10::Error beginning with `label` unless the format can hold the tensor by this name.
inline void check_storable(const std::string& label, const std::string& name, const at::Tensor& tensor) {
  const std::string what = label + "tensor " + in_quotes(name);
  TORCH_CHECK(tensor.defined(), what, " is undefined");
  TORCH_CHECK(tensor.layout() == at::kStrided, what, " has layout ", tensor.layout(), ", expected a dense one");
  TORCH_CHECK(!tensor.is_meta(), what, " is on the meta device, which has no data");
  TORCH_CHECK(!safetensors_dtype(tensor.scalar_type()).empty(), what, " has dtype ", tensor.scalar_type(),
              ", which the format lacks; convert it first");
  TORCH_CHECK(name != kMetadataKey, what, " has a name that the format keeps for its metadata");
  check_utf8(label, "the tensor name", name);
}

}  // namespace detail

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
    detail::check_storable(label, item.first, item.second);
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

}  // namespace lora_rite
