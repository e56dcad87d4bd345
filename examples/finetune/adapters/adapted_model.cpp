#include "adapters/adapted_model.hpp"

#include <torch/nn/module.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <algorithm>
#include <lora_rite/io/adapter_modules.hpp>
#include <lora_rite/io/safetensors.hpp>
#include <lora_rite/nn/adapters.hpp>
#include <lora_rite/nn/peft.hpp>
#include <map>
#include <nlohmann/json.hpp>
#include <utility>
#include <variant>

#include "adapters/adapter_files.hpp"
#include "common/error.hpp"
#include "models/base_checkpoint.hpp"
#include "models/load_model.hpp"

namespace finetune {
namespace {

namespace fs = std::filesystem;

// Another name of the same tensor, empty if there is none.
std::string other_name(const torch::OrderedDict<std::string, torch::Tensor>& parameters, const std::string& name) {
  for (const auto& item : parameters) {
    if (item.key() != name && item.value().is_same(parameters[name])) return item.key();
  }
  return {};
}

// The parameters of modules that were trained whole take the place of the model's.
void replace_whole_modules(torch::nn::Module& model, const AdapterFile& file) {
  for (const auto& [name, tensor] : file.whole) {
    auto parameters = model.named_parameters();
    const std::string label = concat(file.folder.string(), ": '", name, "' was trained whole (modules_to_save)");
    if (!parameters.contains(name)) {
      fail(label, ", but the model has no such parameter; it was trained on another kind of model");
    }
    if (parameters[name].sizes() != tensor.sizes()) {
      fail(label, " and is ", tensor.sizes(), ", but the model's is ", parameters[name].sizes(),
           "; it was trained on another base model");
    }
    if (is_copy(tensor, parameters[name])) continue;
    // As in PEFT, where such a module has a copy of its own, the other use of a tied matrix stays what it was.
    auto* language = dynamic_cast<LanguageModel*>(&model);
    if (language != nullptr && !other_name(parameters, name).empty()) {
      language->untie_output();
      parameters = model.named_parameters();
    }
    if (const std::string other = other_name(parameters, name); !other.empty()) {
      fail(label, ", but in the model it is one matrix with '", other, "', and cannot change alone");
    }
    const torch::NoGradGuard no_grad;
    parameters[name].copy_(tensor);
  }
}

// The adapter without these modules, which have no factors, whatever target_modules says.
lora_rite::Adapter without_whole_modules(const torch::nn::Module& model, const AdapterFile& file) {
  lora_rite::Adapter adapter = file.adapter;
  if (!adapter.config.modules_to_save) return adapter;
  for (const auto& item : file.whole) adapter.tensors.erase(item.first);
  std::vector<std::string> names;
  for (const auto& layer : lora_rite::nn::lora_layers(model)) {
    const bool has_factors = std::any_of(file.layers.begin(), file.layers.end(),
                                         [&](const AdapterLayer& own) { return own.module == layer.name; });
    if (!has_factors && lora_rite::is_saved_whole(adapter.config, layer.name)) names.push_back(layer.name);
  }
  adapter.config.modules_to_save = {};
  lora_rite::ModuleNames& excluded = adapter.config.exclude_modules;
  if (auto* pattern = std::get_if<std::string>(&excluded)) {
    for (const std::string& name : names) *pattern += "|" + lora_rite::nn::detail::pattern_of(name).substr(1);
  } else {
    if (const auto* list = std::get_if<std::vector<std::string>>(&excluded)) {
      names.insert(names.end(), list->begin(), list->end());
    }
    excluded = names;
  }
  return adapter;
}

// Throws Error if there are factors of a module that transformers never calls: they change nothing there.
void check_called(const torch::nn::Module& model, const AdapterFile& file) {
  const auto* language = dynamic_cast<const LanguageModel*>(&model);
  if (language == nullptr || !language->is_encoder_decoder()) return;
  for (const AdapterLayer& layer : file.layers) {
    if (layer.module != "shared") continue;
    fail(file.folder.string(), ": has factors of 'shared', which a T5 of transformers never calls, so they change ",
         "nothing there (it calls encoder.embed_tokens and decoder.embed_tokens); train without that layer");
  }
}

void add_adapter(torch::nn::Module& model, const fs::path& base, const fs::path& folder) {
  AdapterFile file = read_adapter(folder);
  const BaseCheckpoint checkpoint(base);
  drop_copies(file, checkpoint);
  check_plain(file);
  check_fits_ordinary_base(file);
  check_not_merged(file, checkpoint);
  check_called(model, file);
  replace_whole_modules(model, file);
  lora_rite::nn::inject_adapter(model, without_whole_modules(model, file));
}

// Where the head of a classifier lies.
fs::path head_path(const fs::path& folder, const fs::path& adapter) {
  return (adapter.empty() ? folder : adapter) / kHeadFile;
}

// A head as its file has it.
struct Head {
  std::vector<std::string> classes;
  std::map<std::string, torch::Tensor> tensors;
};

Head read_head(const fs::path& path) {
  if (!fs::exists(path)) {
    fail(path.string(), ": does not exist; a BERT encoder alone tells no classes apart. --adapter is a folder that ",
         "'finetune train' or 'finetune export' wrote, or --model one of 'finetune merge'");
  }
  lora_rite::Safetensors file = lora_rite::load_safetensors(path);
  const auto labels = file.metadata.find("labels");
  try {
    if (labels == file.metadata.end()) throw std::runtime_error("there are none");
    return {nlohmann::json::parse(labels->second).get<std::vector<std::string>>(), std::move(file.tensors)};
  } catch (const std::exception& error) {
    fail(path.string(), ": has no JSON list 'labels' in its metadata (", error.what(),
         "); a head.safetensors that 'finetune train' wrote is expected");
  }
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

std::vector<std::string> read_classes(const fs::path& folder, const fs::path& adapter) {
  return read_head(head_path(folder, adapter)).classes;
}

TrainedClassifier load_adapted_classifier(const fs::path& folder, const fs::path& adapter, torch::Device device) {
  const fs::path path = head_path(folder, adapter);
  const Head head = read_head(path);
  TrainedClassifier result;
  result.classes = head.classes;
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
