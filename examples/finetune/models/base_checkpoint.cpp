#include "models/base_checkpoint.hpp"

#include <torch/types.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "adapters/adapter_files.hpp"
#include "common/error.hpp"
#include "models/config.hpp"

namespace finetune {
namespace {

namespace fs = std::filesystem;

constexpr const char* kCompiled = "_orig_mod.";

// Where the libraries for quantised weights keep them and their scales: GPTQ and AWQ, compressed-tensors and FP8,
// bitsandbytes of 8 and of 4 bits.
constexpr const char* kQuantised[] = {".qweight",          ".qzeros", ".weight_packed", ".weight_scale",
                                      ".weight_scale_inv", ".SCB",    ".weight.absmax"};

// By plain names. Of T5's three for one matrix the first is the real one.
constexpr const char* kEmbeddings[] = {"embed_tokens.weight", "shared.weight", "encoder.embed_tokens.weight",
                                       "decoder.embed_tokens.weight"};
constexpr const char* kOutput = "lm_head.weight";

bool is_float8(c10::ScalarType dtype) { return c10::isFloatingType(dtype) && c10::elementSize(dtype) == 1; }

void check_tensor(const fs::path& folder, const std::string& name, c10::ScalarType dtype) {
  if (name.find(kCompiled) != std::string::npos) {
    fail(folder.string(), ": tensor '", name, "': what torch.compile made was saved ('", kCompiled,
         "' in the names), and no reader knows these names; save the model itself (its attribute _orig_mod)");
  }
  const bool is_quantised = is_float8(dtype) || std::any_of(std::begin(kQuantised), std::end(kQuantised),
                                                            [&](const char* end) { return ends_with(name, end); });
  if (is_quantised) refuse_quantised(concat(folder.string(), ": tensor '", name, "' is ", c10::toString(dtype)));
}

bool are_equal(const torch::Tensor& left, const torch::Tensor& right) {
  if (left.sizes() != right.sizes()) return false;
  return left.scalar_type() == right.scalar_type() ? left.equal(right) : left.to(right.scalar_type()).equal(right);
}

}  // namespace

std::string plain_name(const std::string& model_type, std::string name) {
  const auto strip = [&](const std::string& prefix) {
    if (name.rfind(prefix, 0) != 0) return false;
    name.erase(0, prefix.size());
    return true;
  };
  while (strip("model.") || strip("language_model.") || strip("transformer.") || strip("vlm.") ||
         strip(model_type + ".")) {
  }
  const std::string tower = "vision_tower.", inner = "vision_model.";
  if (name.rfind(tower + inner, 0) == 0) name.erase(tower.size(), inner.size());
  for (const auto& [old, now] :
       {std::pair("LayerNorm.gamma", "LayerNorm.weight"), {"LayerNorm.beta", "LayerNorm.bias"}}) {
    if (ends_with(name, old)) name.replace(name.size() - std::string(old).size(), std::string::npos, now);
  }
  return name;
}

BaseCheckpoint::BaseCheckpoint(fs::path folder) : folder_(std::move(folder)) {
  const nlohmann::json config = read_config(folder_ / "config.json");
  model_type_ = config["model_type"].get<std::string>();
  config_ties_ = ties_embedding(config);
  // Of a model with a vision tower the language model's counts: resizing its embedding leaves the other as it was.
  const nlohmann::json inner = config.value("text_config", nlohmann::json::object());
  for (const nlohmann::json* object : {&config, &inner}) {
    const auto found = object->find("vocab_size");
    if (found != object->end() && found->is_number_integer()) vocab_size_ = found->get<int64_t>();
  }
  checkpoint_ = lora_rite::open_checkpoint(folder_);
  for (size_t index = 0; index < checkpoint_.files.size(); ++index) {
    const lora_rite::CheckpointFile& part = checkpoint_.files[index];
    metadata_[part.name] = part.file.metadata();
    for (const std::string& name : part.tensors) {
      check_tensor(folder_, name, part.file.info(name).dtype);
      part_of_[name] = index;
      file_of_[name] = part.name;
      spellings_[plain_name(model_type_, name)].push_back(name);
    }
  }
  // BERT's output for masked words is its embedding again. A checkpoint of the encoder alone has no such output.
  if (model_type_ == "bert") {
    config_ties_ = config_ties_ && std::any_of(spellings_.begin(), spellings_.end(), [](const auto& item) {
                     return item.first.rfind("cls.predictions.", 0) == 0;
                   });
  }
  const auto first_of = [&](const char* plain) {
    const auto found = spellings_.find(plain);
    return found == spellings_.end() ? std::string() : found->second.front();
  };
  for (const char* name : kEmbeddings) {
    if (embedding_.empty()) embedding_ = first_of(name);
  }
  output_ = first_of(kOutput);
}

const lora_rite::SafetensorsFile& BaseCheckpoint::holder_of(const std::string& name) const {
  const auto found = part_of_.find(name);
  TORCH_CHECK(found != part_of_.end(), folder_.string(), ": has no tensor '", name, "'");
  return checkpoint_.files[found->second].file;
}

const std::map<std::string, torch::Tensor>& BaseCheckpoint::tensors() const {
  if (tensors_.empty()) {
    for (const auto& item : part_of_) tensors_[item.first] = tensor(item.first);
  }
  return tensors_;
}

torch::Tensor BaseCheckpoint::tensor(const std::string& name) const { return holder_of(name).tensor(name); }

lora_rite::TensorInfo BaseCheckpoint::info(const std::string& name) const { return holder_of(name).info(name); }

std::vector<std::string> BaseCheckpoint::merged_adapters() const {
  std::set<std::string> merged;
  for (const auto& [file, texts] : metadata_) {
    const auto found = texts.find(kMergedKey);
    if (found == texts.end()) continue;
    const nlohmann::json list = nlohmann::json::parse(found->second, nullptr, /*allow_exceptions=*/false);
    if (!list.is_array()) {
      fail((folder_ / file).string(), ": the text '", kMergedKey, "' of its header is '", found->second,
           "', expected a JSON list; take the weights from where they came");
    }
    for (const auto& entry : list) {
      if (entry.is_string()) merged.insert(entry.get<std::string>());
    }
  }
  return {merged.begin(), merged.end()};
}

std::string BaseCheckpoint::find(const std::string& name) const {
  if (part_of_.count(name) > 0) return name;
  const auto found = spellings_.find(plain_name(model_type_, name));
  if (found == spellings_.end()) return {};
  if (found->second.size() > 1) {
    fail(folder_.string(), ": '", name, "' may be '", found->second[0], "' or '", found->second[1],
         "'; expected is one tensor of such a name");
  }
  return found->second.front();
}

std::string BaseCheckpoint::tensor_of(const std::string& module, const std::string& parameter,
                                      const fs::path& adapter) const {
  const std::string name = module.empty() ? parameter : module + "." + parameter;
  const std::string found = find(name);
  if (!found.empty()) {
    if (const c10::ScalarType dtype = info(found).dtype; !c10::isFloatingType(dtype)) {
      fail(folder_.string(), ": tensor '", found, "' has dtype ", c10::toString(dtype),
           "; expected are floating-point weights");
    }
    return found;
  }
  // Those that are called alike first.
  const std::string ending = name.substr(name.rfind('.', name.size() - parameter.size() - 2) + 1);
  std::vector<std::string> some;
  for (const bool alike : {true, false}) {
    for (const auto& item : file_of_) {
      if (some.size() < 4 && ends_with(item.first, ending) == alike && info(item.first).shape.size() >= 2) {
        some.push_back(item.first);
      }
    }
  }
  fail(folder_.string(), ": has no tensor '", name, "', which the adapter ", adapter.string(), " changes (there are ",
       join(some), ", …); it was trained on another base model, or its names are others: an adapter names ",
       "modules as the model has them in memory, and the files of model_type '", model_type_,
       "' may call them otherwise");
}

bool BaseCheckpoint::is_tied() const {
  if (!is_tied_) {
    is_tied_ =
        config_ties_ && (embedding_.empty() || output_.empty() || are_equal(tensor(embedding_), tensor(output_)));
  }
  return *is_tied_;
}

void drop_copies(AdapterFile& adapter, const BaseCheckpoint& base) {
  const auto is_own = [&](const std::string& name) {
    const std::string stored = base.find(name);
    return !stored.empty() && is_copy(adapter.adapter.tensors.at(name), base.tensor(stored));
  };
  std::vector<std::string> kept;
  for (const std::string& name : adapter.others) {
    if (adapter.adapter.tensors.count(name) > 0 && is_own(name)) {
      adapter.adapter.tensors.erase(name);
    } else {
      kept.push_back(name);
    }
  }
  adapter.others = std::move(kept);
}

void check_not_merged(const AdapterFile& adapter, const BaseCheckpoint& base) {
  const std::vector<std::string> merged = base.merged_adapters();
  if (merged.empty() || std::find(merged.begin(), merged.end(), fingerprint(adapter)) == merged.end()) return;
  fail(adapter.folder.string(), ": was merged into ", base.folder().string(),
       " already, and its change would be added twice. Use the base it was trained on, or the merged one without it");
}

}  // namespace finetune
