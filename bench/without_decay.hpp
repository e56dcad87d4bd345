#pragma once

#include <lora_rite/baselines/registry.hpp>

namespace bench {

/// Of all contenders Muon alone decays weights unless told otherwise.
inline void without_decay(torch::optim::Optimizer& optimizer) {
  for (auto& group : optimizer.param_groups()) {
    if (auto* muon = dynamic_cast<lora_rite::baselines::MuonOptions*>(&group.options())) muon->weight_decay(0);
  }
}

}  // namespace bench
