#pragma once

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <map>
#include <string>

namespace finetune {

/// The content of a safetensors file: tensors by name, and the free-form `__metadata__` strings.
struct Safetensors {
  std::map<std::string, at::Tensor> tensors;
  std::map<std::string, std::string> metadata;
};

/// Reads a whole safetensors file into freshly allocated CPU tensors.
///
/// The header is not trusted: every byte of the data section must belong to exactly one tensor, sizes
/// must match shapes and dtypes, and names must be unique. Throws Error naming the file and the
/// tensor otherwise.
Safetensors load_safetensors(const std::filesystem::path& path);

/// Writes tensors (any device, any strides) as a safetensors file. The file appears under its final
/// name only when complete.
void save_safetensors(const std::filesystem::path& path, const Safetensors& content);

}  // namespace finetune
