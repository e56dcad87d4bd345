#pragma once

#include <cstdint>

#include "lora_rite/engine/cuda/elements.hpp"
#include "lora_rite/rule/hyperparameters.hpp"

/// What the kernels work on: plain structs of numbers and pointers to the device's memory.
namespace lora_rite::cuda {

/// Rows of a factor that one block moves.
constexpr int kTileRows = 512;

/// Factors of one set, so that their pointers fit into a kernel's 32 KB of parameters.
constexpr int kMostFactors = 2000;

/// One factor of a set. Factors 2i and 2i + 1 are A and B of pair i. What is remembered of it stands in `PairState`.
struct Factor {
  int64_t rows;        ///< n
  int32_t first_tile;  ///< of this factor among all tiles
  int32_t tiles;
  int64_t rank_first;  ///< 1: element (i, j) at j·n + i (as in A), 0: at i·r + j
  float* momentum;     ///< N, null before the first gradient
  float* master;       ///< float copy of half-type factors, null if not wanted
  double *second_moment, *inverse_root, *escaped_mass, *step;
  double *previous_scale, *previous_rate;
  double *squared_sums, *weighted_sums;  ///< `PairState::column_sums` [r] each
  double *unmagnified_norm, *clip_factor;

  LORA_RITE_FUNCTION int64_t offset(int64_t row, int64_t column, int64_t rank) const {
    return rank_first != 0 ? column * rows + row : row * rank + column;
  }
};

/// Where a factor's values and gradient lie in this step.
struct Pointers {
  void* values;
  const void* gradient;  ///< null: none
};
struct AllPointers {
  Pointers at[kMostFactors];

  /// Does a pair take part in this step? Else all of it stays as it is.
  LORA_RITE_FUNCTION bool moves(int factor) const {
    return at[factor].gradient != nullptr || at[factor ^ 1].gradient != nullptr;
  }
};

/// Decided numbers of one factor.
struct Decided {
  double squared_norm;  ///< ‖Ḡ‖²
  double kept, rate;    ///< X ← kept·X − rate·N
  double step, escaped_mass;
};

/// The factors that go through the acts together: of one rank, dtype and device. Matrices are r×r, rows without gaps.
struct Set {
  int32_t factor_count, tile_count, rank;
  Dtype dtype;
  double factor_epsilon;  ///< of what is stepped: with master copies a half factor is known to float precision
  const Factor* factors;
  const int32_t* factor_of_tile;
  // Of each tile: XᵀX, XᵀN and column sums of what is stored, kept from step to step; GᵀG within a step.
  double *tile_gram, *tile_cross, *tile_columns, *tile_gradient_gram;
  bool* tile_finite;
  double* eigenvalues;  ///< of V, ascending, of each factor [r], kept likewise; the first is NaN where they are unknown
  // Of each factor, within a step.
  double *gradient_gram, *projected_gram, *inverse_root, *change;  ///< `rule::Unmagnified`
  double *second_moment, *next_eigenvalues;
  double* maps;  ///< N ← N·first + G·second [2, r, r]
  bool* partner_edited;
  Decided* decided;
  double* spill;  ///< matrices that shared memory has no room for, `Pool::global_size` for each block of act 2
};

/// What `decide` needs where nobody else has a say in whether the step is taken and how it is clipped: it then asks all
/// factors itself, and no operator of ATen runs between the acts.
struct Alone {
  const bool* finite;  ///< of all tiles of all sets
  const Decided* decided;
  int32_t tiles, factors;
  double clip_unmagnified_norm;  ///< the bound, 0 = off
  bool* step_allowed;            ///< out
  double* clip_factor;           ///< out
  int64_t* skipped;              ///< counts the steps that were not allowed
};

/// One step.
struct Arguments {
  Set set;
  rule::Hyperparameters numbers;
  bool qr_basis;
  bool sums_unknown;          ///< the first step, or the first after a load: nothing is known of the tiles
  const double* rates;        ///< η of A and of B, on the device; null: those of `numbers`
  const double* clip_factor;  ///< c; unread before `decide`
  const bool* step_allowed;   ///< unread before `unmagnify`
  Alone alone;                ///< its pointers are null where others have a say
};

static_assert(kMostFactors % 2 == 0, "a pair is not divided");
static_assert(sizeof(Arguments) + sizeof(AllPointers) + sizeof(int) <= 32764, "what a kernel takes of parameters");

}  // namespace lora_rite::cuda
