#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace lora_rite {

/// What is remembered of one factor X [n, r] (partner Y), as copies, for people. Symbols are those of
/// `LoraRiteOptions`.
struct FactorState {
  int64_t steps = 0;    ///< t, the steps in which it had a gradient
  at::Tensor momentum;  ///< N in the factor's shape, float or double: a step of rate 1 subtracts it from the factor
                        ///< (decay and balance apart; bounds are in it); undefined before the first gradient
  at::Tensor second_moment;  ///< V [r, r], double, in the basis Y R⁺
  at::Tensor inverse_root;   ///< R⁺ of Y [r, r], double
  double escaped_mass = 0;   ///< ρ
  at::Tensor rows;    ///< second moments of the rows [n], float or double; undefined if row_equilibration was never on
  at::Tensor master;  ///< float copy of a half-type factor; undefined without master_weights
};

/// The same of both factors of a pair.
struct StateOfPair {
  FactorState a;  ///< of A, whose partner Y is B
  FactorState b;  ///< of B, whose partner Y is A
};

}  // namespace lora_rite
