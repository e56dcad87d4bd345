#pragma once

#include <cstdint>

#include "lora_rite/rule/hyperparameters.hpp"
#include "lora_rite/rule/side.hpp"
#include "lora_rite/rule/vocabulary.hpp"

/// The scalar formulas of acts 1 and 3: how rows move, what is bounded, and how an edit is noticed. They stand here
/// once; an engine moves the rows. `Number` is a plain double, or a tensor with one number for each pair.
///
/// The order within act 3: maps (`decide`) → cap of the RMS → decay and step → balance → sums of what was stored.
namespace lora_rite::rule {

/// η of a side.
LORA_RITE_FUNCTION inline double rate_of(Side side, const Hyperparameters& numbers) {
  return numbers.lr * (side == Side::A ? 1.0 : numbers.lr_ratio_b);
}

/// How to get back from X to the factor one step ago: X_old = scale · X + rate · N.
template <class Number>
struct WayBack {
  Number scale;  ///< α
  Number rate;   ///< γ
};

/// α = 1 / (1−ηλ), γ = η / (1−ηλ), from X = (1−ηλ) X_old − ηN. `kept` is 1−ηλ.
template <class Number>
LORA_RITE_FUNCTION WayBack<Number> way_back(const Number& kept, const Number& rate) {
  return {1.0 / kept, rate / kept};
}

/// (XC)ᵀ X_old, given (XC)ᵀ X and (XC)ᵀ N.
template <class Matrix, class Number>
LORA_RITE_FUNCTION Matrix cross_gram(const WayBack<Number>& back, const Matrix& gram, const Matrix& with_momentum) {
  return back.scale * gram + back.rate * with_momentum;
}

/// s with which A ← s A and B ← B / s have equal norms, given ‖A‖² and ‖B‖². Momenta are vectors in the factors' own
/// coordinates and scale alike; R⁺ of a factor scales inversely.
template <class Number>
Number balancing_scale(const Number& squared_a, const Number& squared_b) {
  return square_root(square_root(squared_b / squared_a));
}

/// What M is divided by so that its RMS is at most `bound`: max(1, RMS / bound). `squared` is ‖M‖².
template <class Number>
Number rms_excess(const Number& squared, const Number& elements, double bound) {
  return at_least(square_root(squared / elements) / bound, 1.0);
}

/// row ← β₂' row + (1−β₂') fresh, the second moment of a row; `fresh` is the mean of S₀² over the row.
template <class Number>
Number row_moment(const Number& decay, const Number& old, const Number& fresh) {
  return decay * old + (1.0 - decay) * fresh;
}

/// w_i = frac(i·φ) + ½: irregular, so that no change of signs and no exchange of rows goes unnoticed.
LORA_RITE_FUNCTION inline double column_weight(int64_t row) {
  const double multiple = static_cast<double>(row) * 0.61803398874989485;
  return multiple - static_cast<double>(static_cast<int64_t>(multiple)) + 0.5;
}

/// ‖x‖² and Σ w_i x_i are remembered of a factor's column x, to notice that someone else wrote to it. Formed twice,
/// they differ by no more than this share of what goes into them.
constexpr double kSumRoundOff = 1e-12;

/// Do the squared norms differ by more than round-off?
template <class Number>
LORA_RITE_FUNCTION auto norm_changed(const Number& known, const Number& now) {
  return at_least(now - known, known - now) > kSumRoundOff * known;
}

/// Do the weighted sums? |wᵀx| ≤ ‖w‖ ‖x‖ and ‖w‖ ≈ √n bound their round-off. `known_norm` is ‖x‖².
template <class Number>
LORA_RITE_FUNCTION auto weighted_sum_changed(const Number& known_norm, const Number& rows, const Number& known,
                                             const Number& now) {
  return at_least(now - known, known - now) > kSumRoundOff * square_root(known_norm * rows);
}

}  // namespace lora_rite::rule
