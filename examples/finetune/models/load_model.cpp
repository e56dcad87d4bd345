#include "models/load_model.hpp"

#include <torch/torch.h>

#include <map>
#include <set>

#include "error.hpp"
#include "lora_rite/io/safetensors.hpp"
#include "models/config.hpp"
#include "models/decoder.hpp"
#include "models/t5.hpp"

namespace finetune {
namespace {

constexpr const char* kOutput = "lm_head.weight";

// The checkpoint's tensors by name, mapped rather than read: the only place that knows who reads safetensors.
std::map<std::string, torch::Tensor> read_tensors(const std::filesystem::path& folder) {
  return lora_rite::load_sharded(folder).tensors;
}

}  // namespace

// Moves tensors from the files into a model's parameters, one by one, so that hardly anything is held twice.
class CheckpointLoader {
 public:
  CheckpointLoader(LanguageModel& model, std::filesystem::path folder, c10::ScalarType dtype)
      : model_(model), folder_(std::move(folder)), dtype_(dtype) {
    std::set<const void*> seen;  // one tensor may have several names
    for (const auto& item : model.named_parameters()) {
      if (seen.insert(item.value().unsafeGetTensorImpl()).second) waiting_[item.key()] = item.value();
    }
    embedding_name_ = name_of(model.embedding_weight());
  }

  void load() {
    auto tensors = read_tensors(folder_);
    while (!tensors.empty()) {
      const auto tensor = tensors.extract(tensors.begin());
      take(tensor.key(), tensor.mapped());
    }
    finish_output();
    if (!waiting_.empty()) {
      fail(folder_.string(), ": the weights lack the tensor '", waiting_.begin()->first, "' of shape ",
           waiting_.begin()->second.sizes(), " (and ", waiting_.size() - 1,
           " more); they do not belong to the config.json beside them");
    }
  }

 private:
  std::string name_of(const torch::Tensor& parameter) const {
    for (const auto& [name, candidate] : waiting_) {
      if (candidate.is_same(parameter)) return name;
    }
    fail("the embedding is no parameter of the model");
  }

  void take(const std::string& tensor, const torch::Tensor& values) {
    const std::string name = model_.parameter_of(tensor);
    if (name.empty()) return;
    if (name == kOutput) {
      check_shape(tensor, values, model_.embedding_weight().sizes());
      output_ = values.to(dtype_);
      return;
    }
    const auto place = waiting_.find(name);
    if (place == waiting_.end()) {
      if (filled_.count(name) > 0 && name == embedding_name_) return;  // a copy under another name
      fail(folder_.string(), ": holds the tensor '", tensor, "' of shape ", values.sizes(),
           filled_.count(name) > 0 ? ", which was there already"
                                   : ", which the model of the config.json beside it has not");
    }
    check_shape(tensor, values, place->second.sizes());
    // Assigning the data keeps the handles that the modules hold.
    place->second.set_data(values.to(dtype_));
    waiting_.erase(place);
    filled_.insert(name);
  }

  void check_shape(const std::string& tensor, const torch::Tensor& values, at::IntArrayRef expected) const {
    if (values.sizes() != expected) {
      fail(folder_.string(), ": tensor '", tensor, "' has shape ", values.sizes(), ", but config.json asks for ",
           expected);
    }
    if (!values.is_floating_point()) {
      fail(folder_.string(), ": tensor '", tensor, "' has dtype ", c10::toString(values.scalar_type()),
           "; expected are floating-point weights");
    }
  }

  // Of a tied pair either may be in the file; both, and different, are no pair whatever config.json says.
  void finish_output() {
    torch::Tensor& embedding = model_.embedding_weight();
    const bool has_embedding = filled_.count(embedding_name_) > 0;
    if (!has_embedding && output_.defined() && model_.ties_embedding()) {
      embedding.set_data(output_);
      waiting_.erase(embedding_name_);
    }
    const bool tied =
        model_.ties_embedding() && (!output_.defined() || !has_embedding || output_.equal(embedding.detach()));
    if (!tied && !output_.defined()) {
      fail(folder_.string(), ": the weights lack the tensor '", kOutput, "' of shape ", embedding.sizes(),
           ", and config.json does not tie it to the embedding");
    }
    model_.set_output(make_linear(tied ? embedding : output_));
  }

  LanguageModel& model_;
  std::filesystem::path folder_;
  c10::ScalarType dtype_;
  std::map<std::string, torch::Tensor> waiting_;
  std::set<std::string> filled_;
  std::string embedding_name_;
  torch::Tensor output_;
};

std::shared_ptr<LanguageModel> build_model(const std::filesystem::path& folder) {
  const std::filesystem::path config = folder / "config.json";
  const std::string type = read_model_type(config);
  if (type == "llama" || type == "gemma" || type == "gemma2") {
    return std::make_shared<DecoderModel>(DecoderConfig::from_file(config));
  }
  if (type == "t5" || type == "mt5") return std::make_shared<T5Model>(T5Config::from_file(config));
  fail(config.string(), ": 'model_type' is '", type, "', but only llama, gemma, gemma2, t5 and mt5 are supported");
}

std::shared_ptr<LanguageModel> load_model(const std::filesystem::path& folder, c10::ScalarType dtype) {
  if (dtype != torch::kFloat && dtype != torch::kBFloat16) {
    fail("the model's dtype is ", c10::toString(dtype), ", but only Float and BFloat16 are supported");
  }
  const auto model = build_model(folder);
  CheckpointLoader(*model, folder, dtype).load();
  model->eval();
  return model;
}

}  // namespace finetune
