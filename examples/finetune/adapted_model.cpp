#include "adapted_model.hpp"

#include <torch/torch.h>

#include <algorithm>
#include <lora_rite/io/safetensors.hpp>
#include <lora_rite/nn/peft.hpp>
#include <nlohmann/json.hpp>
#include <utility>

#include "adapter_files.hpp"
#include "base_checkpoint.hpp"
#include "error.hpp"
#include "models/load_model.hpp"

namespace finetune {
namespace {

namespace fs = std::filesystem;

void add_adapter(torch::nn::Module& model, const fs::path& base, const fs::path& folder) {
  const AdapterFile file = read_adapter(folder);
  check_not_merged(file, BaseCheckpoint(base));
  lora_rite::nn::inject_adapter(model, file.adapter);
}

}  // namespace

std::shared_ptr<LanguageModel> load_adapted_language_model(const fs::path& folder, const fs::path& adapter,
                                                           torch::Dtype dtype, torch::Device device) {
  auto model = load_model(folder, dtype);
  if (!adapter.empty()) add_adapter(*model, folder, adapter);
  model->to(device);
  model->eval();
  return model;
}

TrainedClassifier load_adapted_classifier(const fs::path& folder, const fs::path& adapter, torch::Device device) {
  const fs::path path = (adapter.empty() ? folder : adapter) / kHeadFile;
  if (!fs::exists(path)) {
    fail(path.string(), ": does not exist; a BERT encoder alone tells no classes apart. --adapter is a folder that ",
         "'finetune train' or 'finetune export' wrote, or --model one of 'finetune merge'");
  }
  const lora_rite::Safetensors head = lora_rite::load_safetensors(path);
  const auto labels = head.metadata.find("labels");
  TrainedClassifier result;
  try {
    if (labels == head.metadata.end()) throw std::runtime_error("there are none");
    result.classes = nlohmann::json::parse(labels->second).get<std::vector<std::string>>();
  } catch (const std::exception& error) {
    fail(path.string(), ": has no JSON list 'labels' in its metadata (", error.what(),
         "); a head.safetensors that 'finetune train' wrote is expected");
  }
  auto bert = load_bert(folder);
  if (!adapter.empty()) add_adapter(*bert, folder, adapter);
  result.model = std::make_shared<SentenceClassifier>(std::move(bert), static_cast<int64_t>(result.classes.size()));
  const torch::NoGradGuard no_grad;
  for (const auto& [name, own] :
       {std::pair{"weight", result.model->head().weight}, std::pair{"bias", result.model->head().bias}}) {
    const auto found = head.tensors.find(name);
    if (found == head.tensors.end() || found->second.sizes() != own.sizes()) {
      fail(path.string(), ": tensor '", name, "' is ",
           found == head.tensors.end() ? std::string("missing") : concat("of shape ", found->second.sizes()),
           ", expected ", own.sizes(), " for ", result.classes.size(), " classes; it belongs to another model");
    }
    torch::Tensor(own).copy_(found->second);
  }
  result.model->to(device);
  result.model->eval();
  return result;
}

}  // namespace finetune
