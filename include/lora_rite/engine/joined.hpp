#pragma once

#include <ATen/ATen.h>

#include <array>
#include <cstdint>
#include <vector>

#include "lora_rite/rule.hpp"

/// What act 2 takes and gives, of several batches of pairs as one: the tensors of these structs are [2, k, …].
namespace lora_rite::engine {

inline std::array<at::Tensor*, 6> fields_of(rule::Statistics<at::Tensor>& s) {
  return {&s.coordinates, &s.gram, &s.cross, &s.gradient_gram, &s.plain_gradient_gram, &s.steps};
}
inline std::array<at::Tensor*, 4> fields_of(rule::Moments<at::Tensor>& m) {
  return {&m.second_moment, &m.escaped_mass, &m.inverse_root, &m.step};
}
inline std::array<at::Tensor*, 6> fields_of(rule::Unmagnified<at::Tensor>& u) {
  return {&u.inverse_root, &u.change, &u.magnified_gram, &u.gradient_gram, &u.plain_gradient_gram, &u.damping};
}
inline std::array<at::Tensor*, 7> fields_of(rule::Decision<at::Tensor>& d) {
  return {&d.moments.second_moment,
          &d.moments.escaped_mass,
          &d.moments.inverse_root,
          &d.moments.step,
          &d.momentum_map,
          &d.gradient_map,
          &d.plain_map};
}

/// The batches one behind the other.
inline at::Tensor joined(const std::vector<at::Tensor>& parts) {
  return parts.size() == 1 ? parts[0] : at::cat(parts, 1);
}

/// Likewise of every field; those that are undefined are so in all parts.
template <class Struct>
Struct joined(std::vector<Struct> parts) {
  Struct whole;
  const auto fields = fields_of(whole);
  for (size_t i = 0; i < fields.size(); ++i) {
    std::vector<at::Tensor> of_parts;
    for (Struct& part : parts) of_parts.push_back(*fields_of(part)[i]);
    if (of_parts[0].defined()) *fields[i] = joined(of_parts);
  }
  return whole;
}

/// One batch of them: `count` pairs from `begin` on.
template <class Struct>
Struct part_of(Struct& whole, int64_t begin, int64_t count) {
  Struct part;
  const auto fields = fields_of(whole), own = fields_of(part);
  for (size_t i = 0; i < fields.size(); ++i) {
    if (!fields[i]->defined()) continue;
    *own[i] = fields[i]->size(1) == count ? *fields[i] : fields[i]->narrow(1, begin, count);
  }
  return part;
}

}  // namespace lora_rite::engine
