#pragma once

#include "training/run_options.hpp"

namespace finetune {

/// Throws Error naming the option whose value is out of its range.
void check_values(const RunOptions& options);

/// Throws Error naming an option that the others make meaningless: one that would be ignored is a mistake. Those that
/// only some models or optimizers have are refused where the model or the optimizer is made.
void check_combinations(const RunOptions& options);

}  // namespace finetune
