#pragma once

// Between LibTorch's factors in PEFT's layout and the oracle's tall Eigen matrices.

#include "oracle.hpp"
#include "support/torch.hpp"

namespace lora_rite::test {

/// Any floating tensor [rows, cols] as an Eigen matrix.
inline Matrix to_matrix(const torch::Tensor& tensor) {
  using RowMajor = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const auto dense = tensor.detach().to(torch::kDouble).contiguous();
  return Eigen::Map<const RowMajor>(dense.data_ptr<double>(), dense.size(0), dense.size(1));
}

/// The rank dimension last, all others flattened: [n, r]. It is 0 for an A factor and 1 for a B.
inline torch::Tensor tall(const torch::Tensor& factor, int64_t rank_dimension) {
  const auto moved = factor.movedim(rank_dimension, -1);
  return moved.reshape({-1, moved.size(-1)});
}

inline Matrix tall_a(const torch::Tensor& a) { return to_matrix(tall(a.detach(), 0)); }
inline Matrix tall_b(const torch::Tensor& b) { return to_matrix(tall(b.detach(), 1)); }

/// ΔW = B A as [out, in] in double, every dimension other than the rank flattened.
inline torch::Tensor product(const torch::Tensor& a, const torch::Tensor& b) {
  const auto a_tall = tall(a.detach(), 0).to(torch::kDouble);
  return tall(b.detach(), 1).to(torch::kDouble).matmul(a_tall.t());
}

/// The inverse of `tall`: an [n, r] matrix in the shape, dtype and layout of `like`.
inline torch::Tensor from_tall(const Matrix& matrix, const torch::Tensor& like, int64_t rank_dimension) {
  auto result = torch::empty({matrix.rows(), matrix.cols()}, torch::kDouble);
  auto values = result.accessor<double, 2>();
  for (Eigen::Index i = 0; i < matrix.rows(); ++i) {
    for (Eigen::Index j = 0; j < matrix.cols(); ++j) values[i][j] = matrix(i, j);
  }
  const auto moved_shape = like.movedim(rank_dimension, -1).sizes().vec();
  return result.reshape(moved_shape).movedim(-1, rank_dimension).to(like.scalar_type());
}

/// ‖left − right‖ / scale, in double.
inline double relative_difference(const torch::Tensor& left, const torch::Tensor& right, double scale) {
  return (left.detach().to(torch::kDouble) - right.detach().to(torch::kDouble)).norm().item<double>() / scale;
}

inline double frobenius(const torch::Tensor& tensor) {
  return tensor.detach().to(torch::kDouble).norm().item<double>();
}

/// Every element finite.
inline bool all_finite(const torch::Tensor& tensor) { return torch::isfinite(tensor.detach()).all().item<bool>(); }

/// The same shape, dtype and bits (NaN equals NaN).
inline bool same_bits(const torch::Tensor& left, const torch::Tensor& right) {
  if (left.sizes() != right.sizes() || left.scalar_type() != right.scalar_type()) return false;
  return torch::equal(left.detach().contiguous().view(-1).view(torch::kUInt8),
                      right.detach().contiguous().view(-1).view(torch::kUInt8));
}

}  // namespace lora_rite::test
