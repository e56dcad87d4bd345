#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "lora_rite/engine/device/tensor_algebra.hpp"
#include "lora_rite/rule/types.hpp"

/// What act 2 takes and gives, of several batches of pairs as one: the tensors of these structs are [2, k, …].
namespace lora_rite::device {

/// The batches one after the other.
inline at::Tensor joined(const std::vector<at::Tensor>& parts) {
  return parts.size() == 1 ? parts[0] : at::cat(parts, 1);
}

/// The same of every field; a field is defined in all parts or in none.
template <class Struct>
Struct joined(std::vector<Struct> parts) {
  if (parts.size() == 1) return std::move(parts[0]);
  std::vector<std::vector<at::Tensor>> of_fields;  // by field and part
  for (Struct& part : parts) {
    size_t next = 0;
    Struct::for_each_field(part, [&](at::Tensor& field) {
      if (of_fields.size() == next) of_fields.emplace_back();
      of_fields[next++].push_back(std::move(field));
    });
  }
  Struct whole;
  size_t next = 0;
  Struct::for_each_field(whole, [&](at::Tensor& field) {
    const std::vector<at::Tensor>& tensors = of_fields[next++];
    if (tensors[0].defined()) field = at::cat(tensors, 1);
  });
  return whole;
}

/// One batch of them: `count` pairs from `begin` on.
template <class Struct>
Struct part_of(const Struct& whole, int64_t begin, int64_t count) {
  Struct part = whole;
  Struct::for_each_field(part, [&](at::Tensor& field) {
    if (field.defined() && field.size(1) != count) field = field.narrow(1, begin, count);
  });
  return part;
}

}  // namespace lora_rite::device
