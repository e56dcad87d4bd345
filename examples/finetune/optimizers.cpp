#include "optimizers.hpp"

#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>

#include <lora_rite/lora_rite.hpp>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "error.hpp"

namespace finetune {
namespace {

// Adam and AdamW: the factors in one param group, the head in another.
template <class Optimizer, class Options>
TrainingOptimizer make_adam(const RunOptions& options, const SentenceClassifier& model) {
  std::vector<torch::Tensor> factors;
  std::vector<torch::Tensor> head;
  for (const auto& item : model.named_parameters()) {
    if (!item.value().requires_grad()) continue;
    const bool is_factor = item.key().find(".lora_") != std::string::npos;
    (is_factor ? factors : head).push_back(item.value());
  }
  const Options factor_options = Options(options.lr).weight_decay(options.weight_decay);
  const Options head_options = Options(options.head_lr).weight_decay(0);
  std::vector<torch::optim::OptimizerParamGroup> groups;
  groups.emplace_back(std::move(factors), std::make_unique<Options>(factor_options));
  groups.emplace_back(std::move(head), std::make_unique<Options>(head_options));
  return {std::make_unique<Optimizer>(std::move(groups), factor_options), [] { return int64_t{0}; }};
}

TrainingOptimizer make_rite(const RunOptions& options, const SentenceClassifier& model) {
  auto rite = std::make_unique<lora_rite::LoraRite<>>(model,
                                                      lora_rite::LoraRiteOptions(options.lr)
                                                          .weight_decay(options.weight_decay)
                                                          .clip_unmagnified_norm(options.clip)
                                                          .escape(options.escape),
                                                      torch::optim::AdamWOptions(options.head_lr).weight_decay(0));
  auto* observed = rite.get();
  return {std::move(rite), [observed] { return observed->skipped_steps(); }};
}

double tensor_bytes(torch::serialize::InputArchive& archive) {
  double bytes = 0;
  for (const std::string& key : archive.keys()) {
    torch::Tensor tensor;
    torch::serialize::InputArchive nested;
    if (archive.try_read(key, tensor) || archive.try_read(key, tensor, /*is_buffer=*/true)) {
      if (tensor.defined()) bytes += static_cast<double>(tensor.nbytes());
    } else if (archive.try_read(key, nested)) {
      bytes += tensor_bytes(nested);
    }
  }
  return bytes;
}

}  // namespace

TrainingOptimizer make_optimizer(const RunOptions& options, const SentenceClassifier& model) {
  if (options.optimizer == "rite") return make_rite(options, model);
  if (options.optimizer == "adam") return make_adam<torch::optim::Adam, torch::optim::AdamOptions>(options, model);
  if (options.optimizer == "adamw") return make_adam<torch::optim::AdamW, torch::optim::AdamWOptions>(options, model);
  fail("--optimizer ", options.optimizer, ": is not known; choose rite, adam or adamw");
}

// Asked through what the optimizer saves: that is exactly what it remembers, whatever its class.
double state_megabytes(const torch::optim::Optimizer& optimizer) {
  torch::serialize::OutputArchive saved;
  optimizer.save(saved);
  std::stringstream stream;
  saved.save_to(stream);
  torch::serialize::InputArchive archive;
  archive.load_from(stream);
  return tensor_bytes(archive) / 1e6;
}

}  // namespace finetune
