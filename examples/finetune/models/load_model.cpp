#include "models/load_model.hpp"

#include <torch/types.h>

#include <map>
#include <string>
#include <utility>

#include "common/error.hpp"
#include "models/base_checkpoint.hpp"
#include "models/config.hpp"
#include "models/decoder.hpp"
#include "models/t5.hpp"

namespace finetune {
namespace {

constexpr const char* kOutput = "lm_head.weight";

}  // namespace

// Moves tensors from the files into a model's parameters, one by one, so that hardly anything is held twice.
class CheckpointLoader {
 public:
  CheckpointLoader(LanguageModel& model, const BaseCheckpoint& base, c10::ScalarType dtype)
      : model_(model), base_(base), dtype_(dtype) {
    std::set<const void*> seen;  // one tensor may have several names
    for (const auto& item : model.named_parameters()) {
      if (seen.insert(item.value().unsafeGetTensorImpl()).second)
        waiting_[plain(item.key())] = {item.key(), item.value()};
    }
    embedding_name_ = name_of(model.embedding_weight());
  }

  void load() {
    for (const auto& item : base_.file_of()) take(item.first, base_.tensor(item.first));
    finish_output();
    if (!waiting_.empty()) {
      const auto& [name, parameter] = waiting_.begin()->second;
      fail(where(), "the weights lack the tensor '", name, "' of shape ", parameter.sizes(), " (and ",
           waiting_.size() - 1, " more); they do not belong to the config.json beside them");
    }
  }

 private:
  std::string plain(const std::string& name) const { return plain_name(base_.model_type(), name); }
  std::string where() const { return base_.folder().string() + ": "; }

  std::string name_of(const torch::Tensor& parameter) const {
    for (const auto& [name, candidate] : waiting_) {
      if (candidate.second.is_same(parameter)) return name;
    }
    fail("the embedding is no parameter of the model");
  }

  void take(const std::string& tensor, const torch::Tensor& values) {
    const std::string name = plain(model_.parameter_of(tensor));
    if (name.empty()) return;
    if (name == kOutput) {
      check_shape(tensor, values, model_.embedding_weight().sizes());
      output_ = values.to(dtype_);
      return;
    }
    const auto place = waiting_.find(name);
    if (place == waiting_.end()) {
      const auto filled = filled_.find(name);
      if (filled == filled_.end()) {
        fail(where(), "holds the tensor '", tensor, "' of shape ", values.sizes(),
             ", which the model of the config.json beside it has not");
      }
      // Of the embedding there may be copies under other names.
      if (name == embedding_name_ && values.to(dtype_).equal(model_.embedding_weight().detach())) return;
      fail(where(), "holds the tensor '", tensor, "' of shape ", values.sizes(), ", which was there already as '",
           filled->second, "'", name == embedding_name_ ? " with other values" : "");
    }
    auto& parameter = place->second.second;
    check_shape(tensor, values, parameter.sizes());
    // Assigning the data keeps the handles that the modules hold.
    parameter.set_data(values.to(dtype_));
    waiting_.erase(place);
    filled_[name] = tensor;
  }

  void check_shape(const std::string& tensor, const torch::Tensor& values, at::IntArrayRef expected) const {
    if (values.sizes() != expected) {
      fail(where(), "tensor '", tensor, "' has shape ", values.sizes(), ", but config.json asks for ", expected);
    }
    if (!values.is_floating_point()) {
      fail(where(), "tensor '", tensor, "' has dtype ", c10::toString(values.scalar_type()),
           "; expected are floating-point weights");
    }
  }

  // Of a tied pair either may be in the file.
  void finish_output() {
    torch::Tensor& embedding = model_.embedding_weight();
    const bool tied = base_.is_tied();
    if (tied && output_.defined() && filled_.count(embedding_name_) == 0) {
      embedding.set_data(output_);
      waiting_.erase(embedding_name_);
    }
    if (!tied && !output_.defined()) {
      fail(where(), "the weights lack the tensor '", kOutput, "' of shape ", embedding.sizes(),
           ", and config.json does not tie it to the embedding");
    }
    model_.set_output(make_linear(tied ? embedding : output_));
  }

  LanguageModel& model_;
  const BaseCheckpoint& base_;
  c10::ScalarType dtype_;
  std::map<std::string, std::pair<std::string, torch::Tensor>> waiting_;  // names and parameters by plain names
  std::map<std::string, std::string> filled_;                             // from which tensors, by plain names
  std::string embedding_name_;                                            // plain
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
  CheckpointLoader(*model, BaseCheckpoint(folder), dtype).load();
  model->eval();
  return model;
}

}  // namespace finetune
