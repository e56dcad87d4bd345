#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

/// Where floats are exact enough. Factors, momenta and gradients are floats, so products with them seem to need no
/// more. That is so in most steps, and then they cost half. It is wrong where a map amplifies what was rounded.
namespace lora_rite::host {

/// May N's map be in float? β Qᵀ R⁺ᵀ is near βI where the partner moved little, and then it may. In coordinates in
/// which the partner is ill-conditioned its entries are large and cancel, and their round-off is amplified once more on
/// the way back to M. `map` [r, r], rows `stride` apart.
inline bool momentum_map_fits_float(const double* map, int64_t stride, int64_t rank) {
  constexpr double most = 4;
  double largest = 0;
  for (int64_t i = 0; i < rank; ++i)
    for (int64_t j = 0; j < rank; ++j) largest = std::max(largest, std::abs(map[i * stride + j]));
  return largest <= most;
}

/// May G·map be in float? Column j of N multiplies partner column y_j, and round-off u |g_i| |map_ij| of each product
/// moves ΔW by that times ‖y_j‖. The gradient's own round-off is amplified by the map as a whole, which is less: where
/// the map amplifies faint directions its entries are large and cancel. Together these errors must stay below 128 u of
/// what a step is long, which is ‖M‖ = length · (n r)^{1/2} where second moments fit the gradients.
///
/// And they must be no more than X's own round-off, column by column: rate · ‖|G| |map_j|‖ ≤ ‖x_j‖. The rule knows how
/// much a step rounds X, and takes a direction of X that is no more for none (`rule::RoundOff`). While X is near zero,
/// as B is at first, a step's round-off is larger, and where G lacks directions it would pass for new ones. At rate 0,
/// a warm-up's first, the answer is no: N is kept for steps whose rate is not known.
///
/// `gram` is GᵀG, `own_products` begins with XᵀX, `partner_products` with YᵀY, with rows of their stride; `length` is
/// (1−β₁') c.
struct GradientMap {
  const double *map, *gram, *own_products, *partner_products;
  int64_t rank, stride, products_stride;
  double rows, length, rate;

  bool fits_float() const {
    constexpr double most = 128, least_float = 1e-20, most_float = 1e30;  // floats hold the map, and its products
    if (rate == 0) return false;
    for (int64_t j = 0; j < rank; ++j) {
      double of_column = 0;
      for (int64_t i = 0; i < rank; ++i) {
        const double entry = map[i * stride + j];
        of_column += gram[i * stride + i] * entry * entry;
      }
      if (!(rate * rate * of_column <= own_products[j * products_stride + j])) return false;
    }
    double squared_error = 0, largest = 0;
    for (int64_t i = 0; i < rank; ++i) {
      double of_row = 0;
      for (int64_t j = 0; j < rank; ++j) {
        const double entry = map[i * stride + j];
        of_row += entry * entry * partner_products[j * products_stride + j];
        largest = std::max(largest, std::abs(entry));
      }
      squared_error += of_row * gram[i * stride + i];
    }
    const double bound = most * length;
    return squared_error <= bound * bound * rows * static_cast<double>(rank) && largest <= most_float &&
           largest >= least_float;
  }
};

/// May XᵀN be summed in float? It tells how the basis of X's columns turned in this step: Q = R⁺ᵀ Xᵀ X_old with X_old
/// near X + rate·N. So an error of XᵀN counts as much as N is long in that basis: rate · ‖N R⁺‖, R⁺ being the root of X
/// before the step. Where that is at most 1, a share u of it is no more than X's own round-off. Column by column, so
/// that scales of X's columns make no difference.
///
/// `products` begins with XᵀX, `squares` are ‖n_j‖², `inverse_root` is R⁺ [r, r].
inline bool cross_product_fits_float(const double* products, int64_t products_stride, const double* squares,
                                     const double* inverse_root, int64_t rank, double rate) {
  constexpr double least = 1e-30, most = 1e30;  // within them no product of two floats is lost
  double turned = 0;
  for (int64_t j = 0; j < rank; ++j) {
    const double of_x = products[j * products_stride + j];
    if (!(of_x == 0 || (of_x >= least && of_x <= most)) || !(squares[j] >= least && squares[j] <= most)) return false;
    double of_row = 0;
    for (int64_t i = 0; i < rank; ++i) of_row += inverse_root[j * rank + i] * inverse_root[j * rank + i];
    turned += squares[j] * of_row;
  }
  return rate * rate * turned <= 1;
}

}  // namespace lora_rite::host
