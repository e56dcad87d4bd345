#pragma once

/// Training with several processes, on LibTorch's own process groups: Gloo on a CPU, NCCL on GPUs. See
/// docs/distributed.md. All calls here are collective: every process of the group makes them, in the same order.

#include "lora_rite/distributed/averaging.hpp"
#include "lora_rite/distributed/checkpoints.hpp"
#include "lora_rite/distributed/process_group.hpp"
#include "lora_rite/distributed/row_sharded.hpp"
#include "lora_rite/distributed/sharded.hpp"
