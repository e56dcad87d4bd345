#pragma once

#include <cstdint>
#include <string>

#include "lora_rite/bodies.hpp"

namespace lora_rite {

/// In how many steps Engine::Host formed a product of one factor in double, because floats were not exact enough.
struct DoubleSteps {
  int64_t momentum_map = 0;   ///< N's map
  int64_t gradient_map = 0;   ///< G's map
  int64_t cross_product = 0;  ///< XᵀN; in every step at ranks that make doubles as fast
};

/// How one factor X (partner Y) stands, read without disturbing training.
struct FactorDiagnostics {
  /// σ_max / σ_min of the factor now; infinite where it is rank-deficient, NaN where an element is NaN or infinite
  double condition_number = 0;
  double unmagnified_gradient_norm = 0;  ///< ‖Ḡ‖_F in the last step, before the clip
  double escaped_mass = 0;               ///< ρ
  double effective_rank = 0;             ///< (tr V)² / tr V², between 1 and r; 0 before the first gradient
  double update_rms = 0;  ///< RMS of the momentum M in the orthonormal basis: what a step of rate 1 moves

  /// Since the first step or the last load; 0 with other engines. How often costs time, not accuracy.
  DoubleSteps in_double;
};

/// How one pair stands.
struct PairDiagnostics {
  std::string name;           ///< the FactorPair's
  FactorDiagnostics a;        ///< of A, whose partner is B
  FactorDiagnostics b;        ///< of B, whose partner is A
  double clip_factor = 1;     ///< c of the last step, one for all pairs of a group
  int64_t skipped_steps = 0;  ///< steps skipped so far because a gradient (or a factor) was not finite
};

/// The kernels that Engine::Host runs with on this machine: "avx512", "avx2", "baseline" (what the compiler's flags
/// allow, not on x86-64), "plain" (Eigen, with compilers other than Clang and GCC from 12), or "none":
/// Engine::Automatic then takes Engine::Device, and Engine::Host is refused. The environment variable LORA_RITE_KERNELS
/// chooses among those that the machine has, or none; it is read once. Throws std::invalid_argument if it names others,
/// as the first step does that asks for them.
LORA_RITE_BODY std::string kernel_name();

}  // namespace lora_rite
