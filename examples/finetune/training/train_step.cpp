#include "training/train_step.hpp"

#include <torch/nn/utils/clip_grad.h>

#include <algorithm>
#include <lora_rite/distributed.hpp>
#include <random>

#include "training/stopwatch.hpp"

namespace finetune {
namespace {

// Leaves gradients of the mean loss over all examples of the step, and returns this process's part of that mean.
double accumulate_gradients(Workload& workload, const std::vector<int64_t>& examples, int64_t micro_batch,
                            const Processes& processes) {
  const std::vector<int64_t> own = processes.part_of(examples);
  const double weight = workload.weight(examples);
  double loss = 0;
  const auto size = static_cast<int64_t>(own.size());
  const int64_t stride = micro_batch > 0 ? micro_batch : size;
  workload.model().zero_grad();
  for (int64_t begin = 0; begin < size; begin += stride) {
    const int64_t end = std::min(begin + stride, size);
    const torch::Tensor part = workload.loss_sum({own.begin() + begin, own.begin() + end}) / weight;
    // The mean over the processes divides by their number.
    (part * processes.size).backward();
    loss += part.item<double>();
  }
  return loss;
}

}  // namespace

StepRecord train_step(const RunOptions& options, Workload& workload, const TrainingOptimizer& training,
                      const std::vector<int64_t>& examples, const Processes& processes) {
  const bool on_gpu = options.device == "cuda";
  StepRecord record;
  const Stopwatch step(on_gpu);
  record.lr = training.optimizers[0]->param_groups()[0].options().get_lr();
  record.tokens = workload.tokens(examples);
  const double loss = accumulate_gradients(workload, examples, options.micro_batch, processes);
  if (processes.size > 1) {
    for (const auto& optimizer : training.optimizers) lora_rite::average_gradients(*optimizer, processes.group);
  }
  if (options.max_grad_norm > 0) torch::nn::utils::clip_grad_norm_(training.parameters(), options.max_grad_norm);
  const Stopwatch optimizer_step(on_gpu);
  for (const auto& optimizer : training.optimizers) optimizer->step();
  record.ms_optimizer = optimizer_step.milliseconds();
  record.loss = processes.sum({loss})[0];
  record.ms_step = step.milliseconds();
  return record;
}

uint64_t dropout_seed(uint64_t seed, int64_t step, int rank) {
  std::seed_seq sequence{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(step),
                         static_cast<uint32_t>(rank)};
  uint32_t result = 0;
  sequence.generate(&result, &result + 1);
  return result;
}

}  // namespace finetune
