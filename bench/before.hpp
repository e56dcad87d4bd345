// LoRA-RITE of another revision of this library, in the same program (scripts/bench --before REVISION).
#pragma once

#include <torch/torch.h>

#include <functional>
#include <utility>
#include <vector>

namespace bench {

/// A step of it over pairs of factors A and B.
std::function<void()> step_before(const std::vector<std::pair<torch::Tensor, torch::Tensor>>& pairs, double lr);

}  // namespace bench
