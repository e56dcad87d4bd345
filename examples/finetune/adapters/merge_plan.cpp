#include "adapters/merge_plan.hpp"

#include <torch/types.h>

#include <algorithm>
#include <lora_rite/nn/module_names.hpp>
#include <nlohmann/json.hpp>

#include "adapters/tied_decoders.hpp"
#include "common/error.hpp"
#include "common/files.hpp"

namespace finetune {
namespace {

namespace fs = std::filesystem;
using lora_rite::nn::detail::is_or_ends_in;

constexpr const char* kAdvice = "train without that layer (--exclude-modules)";

constexpr const char* kEmbedding = "embed_tokens";
constexpr const char* kOutput = "lm_head";
// What embeddings and outputs are called in other models.
constexpr const char* kVocabulary[] = {"embed_tokens",
                                       "lm_head",
                                       "wte",
                                       "word_embeddings",
                                       "embed_in",
                                       "embed_out",
                                       "tok_embeddings",
                                       "cls.predictions.decoder",
                                       "embeddings",
                                       "shared",
                                       "tokens_embed",
                                       "w",
                                       "proj_out",
                                       "output_projection"};

// Embeddings of something else, in any model.
constexpr const char* kNoVocabulary[] = {"wpe", "position_embeddings", "embed_positions", "token_type_embeddings"};

std::string weight_of(const std::string& module) { return module + ".weight"; }

bool is_called(const std::string& module, const char* const* begin, const char* const* end) {
  return std::any_of(begin, end, [&](const char* word) { return is_or_ends_in(module, word); });
}

// Throws: a tied matrix of a kind of which it is not known how a checkpoint holds two.
[[noreturn]] void refuse_tied(const BaseCheckpoint& base, const std::string& module, const AdapterFile& adapter) {
  fail(adapter.folder.string(), ": the adapter changes '", module, "', but ", base.folder().string(), " (model_type ",
       base.model_type(),
       ") uses one matrix as embedding and as output (tie_word_embeddings), and how a checkpoint of ",
       "this kind holds two is not known here; ", kAdvice);
}

bool is_encoder_decoder(const BaseCheckpoint& base) { return base.model_type() == "t5" || base.model_type() == "mt5"; }

// The one matrix of a decoder's embedding and output, if a checkpoint of its kind can hold two (kTiedDecoders).
std::optional<TiedMatrix> find_tied(const BaseCheckpoint& base) {
  const bool is_known = std::any_of(std::begin(kTiedDecoders), std::end(kTiedDecoders),
                                    [&](const char* type) { return base.model_type() == type; });
  if (!is_known || !base.is_tied()) return std::nullopt;
  const std::string &embedding = base.embedding_name(), &output = base.output_name();
  if (embedding.empty() && output.empty()) return std::nullopt;
  const std::string stored = embedding.empty() ? output : embedding;
  return TiedMatrix{embedding.empty() ? weight_of(std::string("model.") + kEmbedding) : embedding, weight_of(kOutput),
                    stored};
}

// Whether a module of the adapter, whatever its prefixes, has this tensor for a weight.
bool is_weight_of(const BaseCheckpoint& base, const std::string& tensor, const std::string& module) {
  return plain_name(base.model_type(), tensor) == plain_name(base.model_type(), weight_of(module));
}

// T5 has one matrix for three embeddings, and none of them can change alone.
void check_not_of_t5(const BaseCheckpoint& base, const std::string& module, const AdapterFile& adapter) {
  if (!is_encoder_decoder(base)) return;
  const bool is_embedding = is_or_ends_in(module, kEmbedding) || is_or_ends_in(module, "shared");
  const bool is_tied_output = is_or_ends_in(module, kOutput) && base.is_tied();
  if (!is_embedding && !is_tied_output) return;
  fail(adapter.folder.string(), ": the adapter changes '", module, "', but ", base.folder().string(), " (model_type ",
       base.model_type(), ") uses one matrix for the embeddings of encoder and decoder",
       base.is_tied() ? " and for the output" : "",
       ", and readers of a checkpoint (transformers before 5 among them) make one of several; ", kAdvice);
}

// The name under which the merged checkpoint has the weight of a module. `is_embedding`: its factors are those of an
// embedding.
std::string merged_weight(const BaseCheckpoint& base, const std::string& module, bool is_embedding,
                          const AdapterFile& adapter, MergePlan& plan) {
  check_not_of_t5(base, module, adapter);
  if (plan.tied) {
    for (const std::string& name : {plan.tied->embedding, plan.tied->output}) {
      if (!is_weight_of(base, name, module)) continue;
      if (plan.tied->embedding.size() <= weight_of(kEmbedding).size()) {
        fail(adapter.folder.string(), ": the adapter changes '", module, "', but ", base.folder().string(),
             " has one matrix for embedding and output, '", plan.tied->stored, "', in a checkpoint without a head, ",
             "which has no place for a second one; use a checkpoint of the model with its head (…ForCausalLM)");
      }
      plan.unties = true;
      return name;
    }
  }
  // Before the tensor is looked for: the files may have one of the two.
  const bool is_called_so = is_called(module, std::begin(kVocabulary), std::end(kVocabulary));
  if (is_called_so && base.is_tied()) refuse_tied(base, module, adapter);
  const std::string name = base.tensor_of(module, "weight", adapter.folder);
  if (is_encoder_decoder(base)) return name;
  const int64_t rows = base.info(name).shape.empty() ? 0 : base.info(name).shape[0];
  const bool may_be_vocabulary = is_embedding && rows >= base.vocab_size() &&
                                 !is_called(module, std::begin(kNoVocabulary), std::end(kNoVocabulary));
  const bool is_of_vocabulary = may_be_vocabulary || name == base.embedding_name() || name == base.output_name();
  if (is_of_vocabulary && base.is_tied()) refuse_tied(base, module, adapter);
  return name;
}

void check_same_shape(const BaseCheckpoint& base, const std::string& name, const torch::Tensor& own,
                      const torch::Tensor& found, const char* what) {
  if (own.sizes() == found.sizes()) return;
  fail(base.folder().string(), ": tensor '", name, "' has shape ", found.sizes(), ", but the adapter's ", what, " ",
       own.sizes(), "; it was trained on another base model",
       own.dim() == found.dim() && own.sizes().slice(1) == found.sizes().slice(1) ? ", or one with another vocabulary"
                                                                                  : "");
}

}  // namespace

MergePlan::MergePlan(const BaseCheckpoint& base) : tied(find_tied(base)) {}

std::map<std::string, std::string> MergePlan::tensors(const BaseCheckpoint& base) const {
  std::map<std::string, std::string> sources;
  for (const auto& item : base.tensors()) sources[item.first] = item.first;
  if (!unties) return sources;
  sources.emplace(tied->embedding, tied->stored);
  sources.emplace(tied->output, tied->stored);
  return sources;
}

std::string stored_weight(const BaseCheckpoint& base, const std::string& module, const AdapterFile& adapter) {
  const bool is_embedding = is_or_ends_in(module, kEmbedding), is_output = is_or_ends_in(module, kOutput);
  if ((is_embedding || is_output) && base.find(weight_of(module)).empty()) {
    const bool is_one = is_encoder_decoder(base) && is_embedding;
    const std::string& stored = base.embedding_name().empty() ? base.output_name() : base.embedding_name();
    if (!stored.empty() && (is_one || base.is_tied())) return stored;
  }
  return base.tensor_of(module, "weight", adapter.folder);
}

void plan_adapter(const BaseCheckpoint& base, const AdapterFile& adapter, double weight, bool is_alone,
                  MergePlan& plan) {
  check_plain(adapter);
  check_fits_ordinary_base(adapter);
  // What replaces the base's has no sum and no share.
  const auto replace = [&](const std::string& name, const torch::Tensor& tensor, const char* what) {
    if (!(is_alone && weight == 1)) {
      fail(adapter.folder.string(), ": has ", what, " ('", name,
           "'), which replace the base's and have no sum or share; merge it alone and without a weight");
    }
    const auto [place, is_new] = plan.replacements.emplace(name, tensor);
    if (!is_new && !place->second.equal(tensor)) {
      fail(adapter.folder.string(), ": has two different tensors for the base's '", name, "'; which one counts is ",
           "not to be known");
    }
  };
  for (const AdapterLayer& layer : adapter.layers) {
    const torch::Tensor& own = base.tensors().at(stored_weight(base, layer.module, adapter));
    const std::string name = merged_weight(base, layer.module, layer.embedding, adapter, plan);
    check_shape(layer, own.sizes(), concat(base.folder().string(), ": tensor '", name, "'"));
    plan.changes[name].push_back({&layer, weight});
    if (!layer.base_weight.defined() || is_copy(layer.base_weight, own)) continue;
    check_same_shape(base, name, layer.base_weight, own, "weight beneath the factors");
    const char* what = "another weight than the base's beneath the factors";
    replace(name, layer.base_weight, what);
    // To PEFT, too, it is the weight of both uses.
    if (plan.unties && name == plan.tied->embedding) replace(plan.tied->output, layer.base_weight, what);
    if (plan.unties && name == plan.tied->output) replace(plan.tied->embedding, layer.base_weight, what);
  }
  for (const auto& [module, bias] : adapter.biases) {
    const std::string name = base.tensor_of(module, "bias", adapter.folder);
    check_same_shape(base, name, bias, base.tensors().at(name), "bias");
    if (!is_copy(bias, base.tensors().at(name))) replace(name, bias, "trained biases");
  }
  for (const auto& [full_name, tensor] : adapter.whole) {
    const size_t dot = full_name.rfind('.');
    const std::string module = full_name.substr(0, dot), parameter = full_name.substr(dot + 1);
    const bool is_weight = parameter == "weight";
    if (base.find(full_name).empty() && !is_or_ends_in(module, kEmbedding) && !is_or_ends_in(module, kOutput)) {
      fail(adapter.folder.string(), ": brings '", full_name, "', which ", base.folder().string(),
           " has not: a part of a module of its own (a head for classes?), or one that the files call otherwise than ",
           "the model in memory; it cannot be merged into it; use the base with the adapter beside it");
    }
    const std::string stored =
        is_weight ? stored_weight(base, module, adapter) : base.tensor_of(module, parameter, adapter.folder);
    check_same_shape(base, stored, tensor, base.tensors().at(stored), "module that was trained whole");
    if (is_copy(tensor, base.tensors().at(stored))) continue;
    replace(is_weight ? merged_weight(base, module, /*is_embedding=*/false, adapter, plan) : stored, tensor,
            "modules that were trained whole");
  }
}

torch::Tensor merged_tensor(const BaseCheckpoint& base, const MergePlan& plan, const std::string& name,
                            const std::string& source, c10::ScalarType dtype) {
  const auto replacement = plan.replacements.find(name);
  const bool is_replaced = replacement != plan.replacements.end();
  const torch::Tensor& own = base.tensors().at(source);
  torch::Tensor result = is_replaced ? replacement->second : own;
  const auto changes = plan.changes.find(name);
  const bool is_changed = is_replaced || changes != plan.changes.end();
  if (changes == plan.changes.end()) {
    result = result.to(dtype);
  } else {
    const auto wide = result.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat;
    const torch::Tensor sum = result.to(wide, /*non_blocking=*/false, /*copy=*/true);
    for (const WeightChange& change : changes->second) {
      sum.add_(delta_weight(*change.layer, sum.sizes()), change.weight);
    }
    result = sum.to(dtype);
  }
  if (result.is_same(own)) return result;
  // What is not finite in the base itself stays as it is.
  const torch::Tensor is_finite = at::isfinite(result);
  if (!is_finite.all().item<bool>() && at::isfinite(own).logical_and_(is_finite.logical_not()).any().item<bool>()) {
    fail(base.folder().string(), ": tensor '", name, "' would hold values that are not finite in ",
         c10::toString(dtype), is_changed ? "; check the adapter with 'finetune inspect', or" : ";",
         " choose another --dtype");
  }
  return result;
}

void write_untied(const fs::path& path) {
  nlohmann::json config = read_json(path);
  config["tie_word_embeddings"] = false;
  write_json(path, config);
}

}  // namespace finetune
