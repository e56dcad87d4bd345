#include "training/optimizers.hpp"

#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>

#include <lora_rite/baselines/registry.hpp>
#include <lora_rite/lora_rite.hpp>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "common/error.hpp"

namespace finetune {
namespace {

// Adam and AdamW have these options under the same names; the other optimizers keep their defaults.
template <class Options>
bool set_options(torch::optim::OptimizerOptions& options, const RunOptions& wanted) {
  auto* known = dynamic_cast<Options*>(&options);
  if (known == nullptr) return false;
  known->weight_decay(wanted.weight_decay).betas({0.9, wanted.beta2});
  return true;
}

// The only one of the others that decays weights by default, which --weight-decay's own default of 0 would hide.
bool set_decay_of_muon(torch::optim::OptimizerOptions& options, const RunOptions& wanted) {
  auto* known = dynamic_cast<lora_rite::baselines::MuonOptions*>(&options);
  if (known != nullptr) known->weight_decay(wanted.weight_decay);
  return known != nullptr;
}

// An option that would be ignored is a mistake.
void refuse_options_of_rite(const RunOptions& options) {
  const RunOptions usual;
  const auto refuse = [&](const char* flag, bool is_given) {
    if (is_given) {
      fail(flag, ": ", options.optimizer,
           " has no such option, only rite and rite-qr do; leave it out, or choose one of them");
    }
  };
  refuse("--clip", options.clip != usual.clip);
  refuse("--escape", options.escape != usual.escape);
  refuse("--preconditioner-exponent", options.preconditioner_exponent != usual.preconditioner_exponent);
  // 0 is no bound, which is what they have.
  refuse("--max-relative-change",
         options.max_relative_change != usual.max_relative_change && options.max_relative_change != 0);
  refuse("--row-equilibration", options.row_equilibration != usual.row_equilibration);
  refuse("--lr-ratio-b", options.lr_ratio_b != usual.lr_ratio_b);
  refuse("--shard-optimizer", options.shard_optimizer);
}

// What is trained and is no factor.
std::vector<torch::Tensor> head_of(const torch::nn::Module& model) {
  std::set<const void*> factors;
  for (const lora_rite::FactorPair& pair : lora_rite::find_factor_pairs(model)) {
    factors.insert({pair.a.unsafeGetTensorImpl(), pair.b.unsafeGetTensorImpl()});
  }
  std::vector<torch::Tensor> head;
  for (const torch::Tensor& parameter : model.parameters()) {
    if (parameter.requires_grad() && factors.count(parameter.unsafeGetTensorImpl()) == 0) head.push_back(parameter);
  }
  return head;
}

TrainingOptimizer make_by_name(const RunOptions& options, const torch::nn::Module& model) {
  refuse_options_of_rite(options);
  TrainingOptimizer result;
  result.optimizers.push_back(
      lora_rite::make_optimizer(options.optimizer, lora_rite::find_factor_pairs(model), options.lr));
  for (torch::optim::OptimizerParamGroup& group : result.optimizers[0]->param_groups()) {
    const bool is_set = set_options<torch::optim::AdamOptions>(group.options(), options) ||
                        set_options<torch::optim::AdamWOptions>(group.options(), options);
    if (!is_set && !set_decay_of_muon(group.options(), options) && options.weight_decay != 0) {
      fail("--weight-decay ", options.weight_decay, ": ", options.optimizer,
           " does not take one here; leave it out, or choose rite, adam, adamw, lora+ or muon");
    }
    if (!is_set && options.beta2 != RunOptions().beta2) {
      fail("--beta2 ", options.beta2, ": ", options.optimizer,
           " does not take it here; leave it out, or choose rite, adam, adamw or lora+");
    }
  }
  if (const std::vector<torch::Tensor> head = head_of(model); !head.empty()) {
    result.optimizers.push_back(
        std::make_unique<torch::optim::AdamW>(head, torch::optim::AdamWOptions(options.head_lr).weight_decay(0)));
  }
  result.skipped_steps = [] { return int64_t{0}; };
  return result;
}

template <class Basis>
TrainingOptimizer make_rite(const RunOptions& options, const torch::nn::Module& model, const Processes& processes) {
  const auto rite_options = lora_rite::LoraRiteOptions(options.lr)
                                .betas({0.9, options.beta2})
                                .weight_decay(options.weight_decay)
                                .clip_unmagnified_norm(options.clip)
                                .escape(options.escape)
                                .preconditioner_exponent(options.preconditioner_exponent)
                                .max_relative_change(options.max_relative_change)
                                .row_equilibration(options.row_equilibration)
                                .lr_ratio_b(options.lr_ratio_b);
  const auto head_options = torch::optim::AdamWOptions(options.head_lr).weight_decay(0);
  std::unique_ptr<lora_rite::LoraRite<Basis>> rite;
  if (options.shard_optimizer && processes.size > 1) {
    rite = std::make_unique<lora_rite::ShardedLoraRite<Basis>>(processes.group, lora_rite::find_factor_pairs(model),
                                                               rite_options);
    const std::vector<torch::Tensor> head = head_of(model);
    if (!head.empty()) rite->add_parameters(head, head_options);
  } else {
    rite = std::make_unique<lora_rite::LoraRite<Basis>>(model, rite_options, head_options);
  }
  TrainingOptimizer result;
  result.skipped_steps = [observed = rite.get()] { return observed->skipped_steps(); };
  result.optimizers.push_back(std::move(rite));
  return result;
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

std::vector<torch::Tensor> TrainingOptimizer::parameters() const {
  std::vector<torch::Tensor> result;
  for (const auto& optimizer : optimizers) {
    for (const auto& group : optimizer->param_groups()) {
      result.insert(result.end(), group.params().begin(), group.params().end());
    }
  }
  return result;
}

std::vector<std::string> optimizer_names() { return lora_rite::optimizer_names(); }

TrainingOptimizer make_optimizer(const RunOptions& options, const torch::nn::Module& model,
                                 const Processes& processes) {
  if (options.optimizer == "rite") return make_rite<lora_rite::PolarBasis>(options, model, processes);
  if (options.optimizer == "rite-qr") return make_rite<lora_rite::QrBasis>(options, model, processes);
  return make_by_name(options, model);
}

std::unique_ptr<lora_rite::WarmupScheduler> make_scheduler(const RunOptions& options,
                                                           torch::optim::Optimizer& optimizer) {
  if (options.schedule == "cosine") {
    return std::make_unique<lora_rite::WarmupCosine>(optimizer, options.warmup, options.steps, options.min_lr_ratio);
  }
  // A constant rate is a line that goes down to itself.
  const double ratio = options.schedule == "constant" ? 1 : options.min_lr_ratio;
  return std::make_unique<lora_rite::WarmupLinear>(optimizer, options.warmup, options.steps, ratio);
}

// Asked through what the optimizers save: that is exactly what they remember, whatever their class.
double state_megabytes(const TrainingOptimizer& training) {
  double bytes = 0;
  for (const auto& optimizer : training.optimizers) {
    torch::serialize::OutputArchive saved;
    optimizer->save(saved);
    std::stringstream stream;
    saved.save_to(stream);
    torch::serialize::InputArchive archive;
    archive.load_from(stream);
    bytes += tensor_bytes(archive);
  }
  return bytes / 1e6;
}

}  // namespace finetune
