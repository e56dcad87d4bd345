#pragma once

#include <cmath>
#include <cstdint>

/// The few operations that the rule is written in. `Matrix` is a batch of r×r matrices, `Scalar` one number for each of
/// them, `Values` r numbers for each; all are double. The types are at::Tensor ([..., r, r], [..., 1, 1], [..., 1, r])
/// for the device engine, and lanes of vector registers for the host engine. Arithmetic, `matmul`, `sqrt`, `rsqrt`,
/// `reciprocal` and `pow` exist for every type. A default-constructed Matrix is undefined, which `defined()` tells.
///
/// at::Tensor is only declared here, so that the rule needs nothing but the standard library. The tensors' operations
/// must be declared before the rule's templates, because argument-dependent lookup does not find them (at::Tensor is in
/// another namespace); `engine/device/tensor_algebra.hpp` defines them. `engine/host/lane_algebra.hpp` has the lanes'.

/// Before every function of act 2 (`basis.hpp`, `roots.hpp`, `decide.hpp`). Who compiles them for a GPU defines
/// LORA_RITE_DEVICE_RULE, as tests/rule/on_device.cu does; a user's .cu file sees ordinary functions.
#if defined(__CUDACC__) && defined(LORA_RITE_DEVICE_RULE)
#define LORA_RITE_FUNCTION __host__ __device__
#else
#define LORA_RITE_FUNCTION
#endif

namespace at {
class Tensor;
}

namespace lora_rite {

/// S = Q diag(λ) Qᵀ.
template <class Matrix, class Values>
struct Spectrum {
  Values values;   ///< λ
  Matrix vectors;  ///< Q
};

/// The type of scalars that goes with a type of matrices.
template <class Matrix>
struct ScalarOf;
template <class Matrix>
using Scalar = typename ScalarOf<Matrix>::type;

// --- Plain numbers -------------------------------------------------------------------------------------------------

LORA_RITE_FUNCTION inline double at_least(double x, double bound) { return x > bound ? x : bound; }
LORA_RITE_FUNCTION inline double at_most(double x, double bound) { return x < bound ? x : bound; }
LORA_RITE_FUNCTION inline double choose(bool condition, double yes, double no) { return condition ? yes : no; }
LORA_RITE_FUNCTION inline double square_root(double x) { return std::sqrt(x); }

/// X Y where that is known to be symmetric: a type may compute half of it.
template <class Left, class Right>
LORA_RITE_FUNCTION auto symmetric_product(const Left& x, const Right& y) {
  return matmul(x, y);
}

// --- Tensors ---------------------------------------------------------------------------------------------------------

/// Eigenvalues and eigenvectors of symmetric matrices.
inline Spectrum<at::Tensor, at::Tensor> eigh(const at::Tensor& symmetric);

/// Eigenvalues, ascending.
inline at::Tensor eigenvalues(const at::Tensor& symmetric);

/// f(λ, λ_max) of every eigenvalue; λ_max is at least 0.
template <class Function>
at::Tensor map_values(const at::Tensor& values, const Function& function);

/// f(λ, x) of every eigenvalue and the number at the same place.
template <class Function>
at::Tensor map_values(const at::Tensor& values, const at::Tensor& others, const Function& function);

/// λ_min
inline at::Tensor smallest(const at::Tensor& values);

/// Does the flag that `question()` returns hold for every matrix? Asked only where the answer is at hand: reading it
/// from a GPU would stall, so for tensors the result is false without asking. It may save work, and never decides a
/// result.
template <class Question>
bool surely(const at::Tensor& matrix, const Question& question);

/// max_i (a_i − b_i)
inline at::Tensor largest_difference(const at::Tensor& a, const at::Tensor& b);

inline at::Tensor at_least(const at::Tensor& x, double bound);
inline at::Tensor at_least(const at::Tensor& x, const at::Tensor& bound);
inline at::Tensor at_most(const at::Tensor& x, double bound);
inline at::Tensor at_most(const at::Tensor& x, const at::Tensor& bound);

/// `condition ? yes : no`, element by element, broadcast.
inline at::Tensor choose(const at::Tensor& condition, const at::Tensor& yes, const at::Tensor& no);
inline at::Tensor choose(const at::Tensor& condition, const at::Tensor& yes, double no);
inline at::Tensor square_root(const at::Tensor& x);

inline int64_t rank_of(const at::Tensor& matrix);
inline at::Tensor transpose(const at::Tensor& matrix);
inline at::Tensor symmetrized(const at::Tensor& matrix);
inline at::Tensor identity_like(const at::Tensor& matrix);
inline at::Tensor trace_of(const at::Tensor& matrix);

/// M diag(d)
inline at::Tensor scale_columns(const at::Tensor& matrix, const at::Tensor& values);

/// diag(S)^{1/2} M: rows of M times the norms of X's columns, S being XᵀX.
inline at::Tensor scale_rows_by_norms(const at::Tensor& gram, const at::Tensor& matrix);

/// ‖diag(S)^{1/2} M‖²
inline at::Tensor squared_norm_of_scaled_rows(const at::Tensor& gram, const at::Tensor& matrix);

/// Squared norms of columns.
inline at::Tensor squared_column_norms(const at::Tensor& matrix);

/// S^{-1} = L^{-T} L^{-1} of positive definite S = L Lᵀ.
inline at::Tensor positive_inverse(const at::Tensor& matrix);

/// O of matrix = O R with O orthogonal and R upper triangular, its diagonal non-negative.
inline at::Tensor orthogonal_factor(const at::Tensor& matrix);

}  // namespace lora_rite
