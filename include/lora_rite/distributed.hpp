#pragma once

/// Training with several processes, on LibTorch's own process groups: Gloo on a CPU, NCCL on GPUs (not tested there).
/// See docs/distributed.md. Calls are collective unless they say otherwise: every process of the group makes them, in
/// the same order.

#include "lora_rite/distributed/averaging.hpp"
#include "lora_rite/distributed/checkpoints.hpp"
#include "lora_rite/distributed/process_group.hpp"
#include "lora_rite/distributed/row_sharded.hpp"
#include "lora_rite/distributed/sharded.hpp"
