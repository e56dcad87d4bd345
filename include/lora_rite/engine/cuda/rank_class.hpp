#pragma once

#include <cstdint>
#include <type_traits>

namespace lora_rite::cuda {

/// The largest rank that the kernels are compiled for.
constexpr int64_t kMostRank = 64;

/// f(constant) of the smallest rank that the kernels are compiled for and that holds `rank`: loops over constants need
/// no division.
template <class Function>
auto with_rank_class(int64_t rank, const Function& function) {
  if (rank <= 4) return function(std::integral_constant<int, 4>());
  if (rank <= 8) return function(std::integral_constant<int, 8>());
  if (rank <= 16) return function(std::integral_constant<int, 16>());
  if (rank <= 32) return function(std::integral_constant<int, 32>());
  return function(std::integral_constant<int, kMostRank>());
}

}  // namespace lora_rite::cuda
