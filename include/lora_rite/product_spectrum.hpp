#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "lora_rite/factor_pair.hpp"

namespace lora_rite {

/// What a factor pair is worth as the product ΔW = scale · B A.
struct ProductSpectrum {
  /// Of ΔW, descending: all that can be nonzero, min(r, in, out) of them.
  std::vector<double> singular_values;
  int64_t numerical_rank = 0;  ///< how many of them are more than round-off of double
  double frobenius_norm = 0;   ///< ‖ΔW‖_F
  double spectral_norm = 0;    ///< the largest singular value
  /// The largest singular value divided by the smallest of the list; infinite where that one is round-off, also for
  /// ΔW = 0.
  double condition_number = 0;
  /// exp of the entropy of σ_i / Σ σ (Roy & Vetterli, 2007), between 1 and r; 0 for ΔW = 0.
  double effective_rank = 0;

  double norm_a = 0;              ///< ‖A‖_F
  double norm_b = 0;              ///< ‖B‖_F
  double condition_number_a = 0;  ///< of A: σ_max / σ_min of its min(r, in) singular values; infinite if deficient
  double condition_number_b = 0;  ///< of B, likewise
  /// ‖B‖_F / ‖A‖_F: the share that the factors have in the product, which alone does not tell; infinite where A is 0
  /// and B is not, 1 where both are.
  double balance = 1;
};

namespace detail {

/// σ_max / σ_min of descending values, those up to `round_off` being zeros.
inline double condition_of(const std::vector<double>& values, double round_off) {
  return values.back() > round_off ? values.front() / values.back() : std::numeric_limits<double>::infinity();
}

inline std::vector<double> singular_values_of(const at::Tensor& matrix) {
  const at::Tensor values = at::linalg_svdvals(matrix).contiguous();
  return {values.const_data_ptr<double>(), values.const_data_ptr<double>() + values.numel()};
}

}  // namespace detail

/// The singular values of ΔW = scale · B A and what follows from them, without forming ΔW: from the triangles of
/// Aᵀ = Q_A R_A and B = Q_B R_B, as ΔW = scale · Q_B (R_B R_Aᵀ) Q_Aᵀ. In double on the CPU, in O((in + out) r² + r³).
/// Convolutions are flattened as FactorPair says. Values up to (in + out) · ε · |scale| ‖A‖₂ ‖B‖₂ count as round-off.
/// Throws c10::Error naming the pair if the factors do not fit together or are not finite, or the scale is not.
inline ProductSpectrum product_spectrum(const FactorPair& pair, double scale = 1) {
  const std::string label = "product_spectrum: pair '" + pair.name + "'";
  const at::NoGradGuard no_grad;
  const FactorPair plain{pair.name, pair.a.defined() ? pair.a.detach() : pair.a,
                         pair.b.defined() ? pair.b.detach() : pair.b};
  detail::check_factor_pair(plain, label);
  TORCH_CHECK(std::isfinite(scale), label, ": scale is ", scale, ", expected a finite number");
  const auto tall = [](const at::Tensor& factor) { return factor.to(at::kCPU, at::kDouble); };
  const at::Tensor a = tall(plain.a).flatten(1).mT();                  // [in, r]
  const at::Tensor b = tall(plain.b).transpose(0, 1).flatten(1).mT();  // [out, r]
  for (const auto& [which, factor] : {std::pair{"a", a}, std::pair{"b", b}}) {
    TORCH_CHECK(at::isfinite(factor).all().item<bool>(), label, ": factor ", which,
                " holds values that are not finite");
  }
  const at::Tensor root_a = std::get<1>(at::linalg_qr(a, "r"));  // [min(r, in), r]
  const at::Tensor root_b = std::get<1>(at::linalg_qr(b, "r"));  // [min(r, out), r]
  const std::vector<double> values_a = detail::singular_values_of(root_a);
  const std::vector<double> values_b = detail::singular_values_of(root_b);

  ProductSpectrum spectrum;
  spectrum.singular_values = detail::singular_values_of(at::matmul(root_b, root_a.mT()).mul(scale));
  const std::vector<double>& values = spectrum.singular_values;
  const double epsilon = std::numeric_limits<double>::epsilon() * static_cast<double>(a.size(0) + b.size(0));
  const double round_off = epsilon * std::abs(scale) * values_a.front() * values_b.front();
  double sum = 0, squares = 0;
  for (const double value : values) {
    if (value > round_off) ++spectrum.numerical_rank;
    sum += value;
    squares += value * value;
  }
  spectrum.frobenius_norm = std::sqrt(squares);
  spectrum.spectral_norm = values.front();
  spectrum.condition_number = detail::condition_of(values, round_off);
  if (spectrum.numerical_rank > 0) {
    double entropy = 0;
    for (const double value : values) {
      if (value > 0) entropy -= value / sum * std::log(value / sum);
    }
    spectrum.effective_rank = std::exp(entropy);
  }
  spectrum.norm_a = a.norm().item<double>();
  spectrum.norm_b = b.norm().item<double>();
  spectrum.condition_number_a = detail::condition_of(values_a, epsilon * values_a.front());
  spectrum.condition_number_b = detail::condition_of(values_b, epsilon * values_b.front());
  if (spectrum.norm_a > 0 || spectrum.norm_b > 0) spectrum.balance = spectrum.norm_b / spectrum.norm_a;
  return spectrum;
}

}  // namespace lora_rite
