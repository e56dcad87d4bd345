#include "models/config.hpp"

#include <cmath>
#include <nlohmann/json.hpp>
#include <utility>

#include "common/error.hpp"
#include "common/files.hpp"

namespace finetune {
namespace {

// Reads fields of one JSON object and names file and field where one is not as it must be. A null says that there is
// none, where an absent field means the default of transformers' class, which read_fields puts in.
class Fields {
 public:
  Fields(nlohmann::json json, std::string origin) : json_(std::move(json)), origin_(std::move(origin)) {
    if (!json_.is_object()) fail(origin_, ": is no JSON object; a Hugging Face config.json is expected");
  }

  bool has(const std::string& name) const { return json_.contains(name) && !json_[name].is_null(); }

  // An object counts as absent if it is empty.
  bool has_any(const std::string& name) const { return has(name) && !(json_[name].is_object() && json_[name].empty()); }

  // A whole number of at least `least`.
  int64_t whole(const std::string& name, int64_t least = 1) const {
    if (!has(name)) fail(origin_, ": lacks the number '", name, "'; a complete config.json is expected");
    const nlohmann::json& value = json_[name];
    if (!value.is_number_integer() || value.get<int64_t>() < least) {
      reject(name, concat("a whole number of at least ", least));
    }
    return value.get<int64_t>();
  }

  int64_t whole_or(const std::string& name, int64_t otherwise, int64_t least = 1) const {
    return has(name) ? whole(name, least) : otherwise;
  }

  // A number of at least 0, or above it with `positive`.
  double number_or(const std::string& name, double otherwise, bool positive = false) const {
    if (!has(name)) return otherwise;
    const nlohmann::json& value = json_[name];
    if (!value.is_number() || value.get<double>() < 0 || (positive && value.get<double>() == 0)) {
      reject(name, positive ? "a number above 0" : "a number of at least 0");
    }
    return value.get<double>();
  }

  double number(const std::string& name, bool positive = false) const {
    if (!has(name)) fail(origin_, ": lacks the number '", name, "'; a complete config.json is expected");
    return number_or(name, 0, positive);
  }

  double probability(const std::string& name) const {
    const double value = number_or(name, 0);
    if (value >= 1) reject(name, "a number of at least 0 and below 1");
    return value;
  }

  bool flag_or(const std::string& name, bool otherwise) const {
    if (!has(name)) return otherwise;
    if (!json_[name].is_boolean()) reject(name, "true or false");
    return json_[name].get<bool>();
  }

  std::string text(const std::string& name) const {
    if (!has(name)) fail(origin_, ": lacks the text '", name, "'; a complete config.json is expected");
    return text_or(name, "");
  }

  std::string text_or(const std::string& name, const std::string& otherwise) const {
    if (!has(name)) return otherwise;
    if (!json_[name].is_string()) reject(name, "a string");
    return json_[name].get<std::string>();
  }

  std::vector<std::string> texts(const std::string& name) const {
    std::vector<std::string> values;
    const nlohmann::json& list = json_[name];
    if (!list.is_array()) reject(name, "a list of strings");
    for (const auto& value : list) {
      if (!value.is_string()) reject(name, "a list of strings");
      values.push_back(value.get<std::string>());
    }
    return values;
  }

  // One token id or a list of them.
  std::vector<int64_t> tokens(const std::string& name) const {
    if (!has(name)) return {};
    if (!json_[name].is_array()) return {whole(name, 0)};
    std::vector<int64_t> values;
    for (const auto& value : json_[name]) {
      if (!value.is_number_integer() || value.get<int64_t>() < 0) reject(name, "a token id or a list of them");
      values.push_back(value.get<int64_t>());
    }
    return values;
  }

  Fields object(const std::string& name) const {
    if (!json_[name].is_object()) reject(name, "an object");
    return {json_[name], concat(origin_, ": ", name)};
  }

  // A field that changes the model in a way nothing here does must not be there.
  void refuse(const std::string& name, const std::string& what) const {
    if (!has(name) || json_[name] == false) return;
    fail(origin_, ": '", name, "' is ", json_[name].dump(), ", but ", what, " is not supported");
  }

  std::string where(const std::string& name) const { return concat(origin_, ": '", name, "'"); }

  [[noreturn]] void reject(const std::string& name, const std::string& expected) const {
    fail(where(name), " is ", json_[name].dump(), "; expected is ", expected);
  }

 private:
  nlohmann::json json_;
  std::string origin_;
};

Fields read_fields(const std::filesystem::path& path) {
  const nlohmann::json file = read_config(path);
  nlohmann::json config = config_defaults(file["model_type"].get<std::string>());
  config.update(file);
  return {std::move(config), path.string()};
}

// Today's files hold everything in rope_parameters; older ones rope_theta beside rope_scaling, which is null or an
// object.
RopeConfig read_rope(const Fields& fields, int64_t head_dim) {
  RopeConfig rope;
  rope.theta = fields.number_or("rope_theta", 10000, /*positive=*/true);
  const double rotary_share = fields.number_or("partial_rotary_factor", 1);
  if (rotary_share != 1) fields.reject("partial_rotary_factor", "1: rotating a part of a head is not supported");
  const std::string name = fields.has_any("rope_scaling") ? "rope_scaling" : "rope_parameters";
  if (!fields.has(name)) return rope;

  const Fields scaling = fields.object(name);
  rope.theta = scaling.number_or("rope_theta", rope.theta, /*positive=*/true);
  if (scaling.number_or("partial_rotary_factor", 1) != 1) {
    scaling.reject("partial_rotary_factor", "1: rotating a part of a head is not supported");
  }
  const std::string type_name = scaling.has("rope_type") ? "rope_type" : "type";
  const std::string type = scaling.text_or(type_name, "default");
  if (type == "default") return rope;
  if (type == "linear") {
    rope.type = RopeConfig::Type::Linear;
  } else if (type == "dynamic") {
    rope.type = RopeConfig::Type::Dynamic;
    rope.max_position_embeddings = fields.whole("max_position_embeddings");
    if (head_dim <= 2) fields.reject(name, "a head_dim above 2 for rope_type 'dynamic'");
  } else if (type == "llama3") {
    rope.type = RopeConfig::Type::Llama3;
    rope.low_freq_factor = scaling.number("low_freq_factor", /*positive=*/true);
    rope.high_freq_factor = scaling.number("high_freq_factor", /*positive=*/true);
    if (rope.high_freq_factor <= rope.low_freq_factor) {
      scaling.reject("high_freq_factor", concat("a number above low_freq_factor ", rope.low_freq_factor));
    }
    // transformers' order: the outer one counts first, for the sake of Phi-3 and for every model.
    const std::string original = "original_max_position_embeddings";
    rope.original_max_position_embeddings = fields.has(original)    ? fields.whole(original)
                                            : scaling.has(original) ? scaling.whole(original)
                                                                    : fields.whole("max_position_embeddings");
  } else {
    fail(scaling.where(type_name), " is '", type, "', but only default, linear, dynamic and llama3 are supported");
  }
  rope.factor = scaling.number("factor", /*positive=*/true);
  return rope;
}

SpecialTokens read_special_tokens(const Fields& fields, const std::filesystem::path& folder) {
  SpecialTokens tokens;
  if (fields.has("pad_token_id")) tokens.pad = fields.whole("pad_token_id", /*least=*/-1);  // -1 is Llama's "none"
  const std::filesystem::path generation = folder / "generation_config.json";
  if (std::filesystem::exists(generation)) {
    tokens.end = Fields(read_json(generation), generation.string()).tokens("eos_token_id");
  }
  if (tokens.end.empty()) tokens.end = fields.tokens("eos_token_id");
  tokens.decoder_start = fields.whole_or("decoder_start_token_id", -1, /*least=*/0);
  return tokens;
}

// Gemma 2 alternates: the layers 0, 2, … see the window only.
std::vector<int64_t> read_windows(const Fields& fields, int64_t layers) {
  std::vector<int64_t> windows(layers, 0);
  if (!fields.has("layer_types")) {
    for (int64_t layer = 0; layer < layers; layer += 2) windows[layer] = fields.whole("sliding_window");
    return windows;
  }
  const std::vector<std::string> types = fields.texts("layer_types");
  if (static_cast<int64_t>(types.size()) != layers) {
    fields.reject("layer_types", concat("a list of num_hidden_layers = ", layers, " strings"));
  }
  for (int64_t layer = 0; layer < layers; ++layer) {
    if (types[layer] == "sliding_attention") {
      if (!fields.has("sliding_window")) {
        fields.reject("layer_types", "no 'sliding_attention' without a 'sliding_window'");
      }
      windows[layer] = fields.whole("sliding_window");
    } else if (types[layer] != "full_attention") {
      fields.reject("layer_types", "a list of 'full_attention' and 'sliding_attention'");
    }
  }
  return windows;
}

Activation read_decoder_activation(const Fields& fields, const std::string& model_type) {
  const std::string name = model_type == "gemma2" ? "hidden_activation" : "hidden_act";
  const std::string found = fields.text(name);
  // The first Gemma's files say "gelu" and mean the approximation.
  return parse_activation(model_type == "gemma" && found == "gelu" ? "gelu_pytorch_tanh" : found, fields.where(name));
}

// What "relu", "gated-gelu", … say, unless the file has the two fields that follow from it.
void read_feed_forward(const Fields& fields, T5Config& config) {
  const std::string name = "feed_forward_proj";
  std::string activation = fields.text(name);
  const bool gated = activation.rfind("gated-", 0) == 0;
  if (gated) activation = activation.substr(std::string("gated-").size());
  config.gated = fields.flag_or("is_gated_act", gated);
  if (fields.has("dense_act_fn")) {
    config.activation = parse_activation(fields.text("dense_act_fn"), fields.where("dense_act_fn"));
  } else {
    // What T5 1.1 calls gated-gelu is the approximation by tanh.
    config.activation = parse_activation(gated && activation == "gelu" ? "gelu_new" : activation, fields.where(name));
  }
}

// T5's other names for its fields, which count before them.
void refuse_other_names(const Fields& fields) {
  for (const auto& [other, name] : {std::pair("hidden_size", "d_model"),
                                    {"num_attention_heads", "num_heads"},
                                    {"num_hidden_layers", "num_layers"},
                                    {"head_dim", "d_kv"}}) {
    if (fields.has(other) && fields.whole(other) != fields.whole(name)) {
      fields.reject(other, concat("the same as '", name, "', ", fields.whole(name)));
    }
  }
}

// The object that says how weights are quantised, of a config.json or of one that stands in it; null if there is none.
nlohmann::json quantisation_of(const nlohmann::json& config) {
  for (const char* name : {"quantization_config", "compression_config", "quantization"}) {
    if (config.contains(name) && !config[name].is_null() && config[name] != false) return config[name];
  }
  for (const auto& [name, inner] : config.items()) {
    if (!inner.is_object() || !ends_with(name, "_config")) continue;
    if (nlohmann::json found = quantisation_of(inner); !found.is_null()) return found;
  }
  return nullptr;
}

}  // namespace

void refuse_quantised(const std::string& what) {
  fail(what, ", but a quantised checkpoint is not supported: its files hold codes and scales in place of weights; use ",
       "the model that it was made from");
}

nlohmann::json read_config(const std::filesystem::path& path) {
  nlohmann::json config = read_json(path);
  if (!config.is_object()) fail(path.string(), ": is no JSON object; a Hugging Face config.json is expected");
  if (!config.contains("model_type") || !config["model_type"].is_string()) {
    fail(path.string(), ": lacks the text 'model_type'; the config.json of a transformers model is expected");
  }
  if (config.contains("transformers_weights") && !config["transformers_weights"].is_null()) {
    fail(path.string(), ": 'transformers_weights' is ", config["transformers_weights"].dump(),
         ", but only model.safetensors and its shards are read; rename the file and leave the field out");
  }
  if (const nlohmann::json found = quantisation_of(config); !found.is_null()) {
    const bool is_named = found.is_object() && found.contains("quant_method") && found["quant_method"].is_string();
    refuse_quantised(concat(path.string(), ": says how the weights are quantised (",
                            is_named ? found["quant_method"].get<std::string>() : found.dump(), ")"));
  }
  return config;
}

const nlohmann::json& config_defaults(const std::string& model_type) {
  static const nlohmann::json table = nlohmann::json::parse(R"({
    "llama": {
      "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
      "num_attention_heads": 32, "num_key_value_heads": null, "head_dim": null, "hidden_act": "silu",
      "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "pad_token_id": null, "eos_token_id": 2,
      "tie_word_embeddings": false, "attention_bias": false, "attention_dropout": 0, "mlp_bias": false
    },
    "gemma": {
      "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
      "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
      "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "pad_token_id": 0, "eos_token_id": 1,
      "tie_word_embeddings": true, "attention_bias": false, "attention_dropout": 0
    },
    "gemma2": {
      "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
      "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
      "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "pad_token_id": 0, "eos_token_id": 1,
      "tie_word_embeddings": true, "attention_bias": false, "attention_dropout": 0, "query_pre_attn_scalar": 256,
      "sliding_window": 4096, "layer_types": null, "attn_logit_softcapping": 50, "final_logit_softcapping": 30
    },
    "t5": {
      "vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_decoder_layers": null,
      "num_heads": 8, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
      "dropout_rate": 0.1, "layer_norm_epsilon": 1e-6, "feed_forward_proj": "relu", "pad_token_id": 0,
      "eos_token_id": 1
    },
    "mt5": {
      "vocab_size": 250112, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_decoder_layers": null,
      "num_heads": 6, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
      "dropout_rate": 0.1, "layer_norm_epsilon": 1e-6, "feed_forward_proj": "gated-gelu", "pad_token_id": 0,
      "eos_token_id": 1, "decoder_start_token_id": 0
    },
    "bert": {
      "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
      "intermediate_size": 3072, "hidden_act": "gelu", "max_position_embeddings": 512, "type_vocab_size": 2,
      "layer_norm_eps": 1e-12, "pad_token_id": 0
    }
  })");
  static const nlohmann::json none = nlohmann::json::object();
  return table.contains(model_type) ? table[model_type] : none;
}

bool ties_embedding(const nlohmann::json& config) {
  const std::string type = config["model_type"].get<std::string>();
  if (type == "t5" || type == "mt5") return true;  // whatever the field says: a file's own output matrix unties
  const auto says = [](const nlohmann::json& object, bool otherwise) {
    const auto found = object.find("tie_word_embeddings");
    return found != object.end() && found->is_boolean() ? found->get<bool>() : otherwise;
  };
  const bool usual = type != "llava" && type != "llava_next" && type != "qwen2_vl" && type != "qwen2_5_vl";
  const bool own = says(config, config_defaults(type).value("tie_word_embeddings", usual));
  // Files of before transformers 5 have the field of a model with a vision tower in here.
  return own ||
         (config.contains("text_config") && config["text_config"].is_object() && says(config["text_config"], false));
}

DecoderConfig DecoderConfig::from_file(const std::filesystem::path& path) {
  const Fields fields = read_fields(path);
  const std::string model_type = fields.text("model_type");
  if (model_type != "llama" && model_type != "gemma" && model_type != "gemma2") {
    fail(fields.where("model_type"), " is '", model_type, "', but a decoder is one of llama, gemma, gemma2");
  }
  fields.refuse("use_bidirectional_attention", "attention to later tokens");
  const bool llama = model_type == "llama";
  const bool gemma2 = model_type == "gemma2";

  DecoderConfig config;
  config.vocab_size = fields.whole("vocab_size");
  config.hidden_size = fields.whole("hidden_size");
  config.intermediate_size = fields.whole("intermediate_size");
  config.num_hidden_layers = fields.whole("num_hidden_layers");
  config.num_attention_heads = fields.whole("num_attention_heads");
  config.num_key_value_heads =
      llama ? fields.whole_or("num_key_value_heads", config.num_attention_heads) : fields.whole("num_key_value_heads");
  if (config.num_attention_heads % config.num_key_value_heads != 0) {
    fields.reject("num_key_value_heads", concat("a divisor of num_attention_heads ", config.num_attention_heads));
  }
  config.head_dim =
      llama ? fields.whole_or("head_dim", config.hidden_size / config.num_attention_heads) : fields.whole("head_dim");
  if (llama && !fields.has("head_dim") && config.hidden_size % config.num_attention_heads != 0) {
    fields.reject("hidden_size", concat("a multiple of num_attention_heads ", config.num_attention_heads));
  }
  if (config.head_dim % 2 != 0) {
    fail(path.string(), ": the head size is ", config.head_dim, "; rotary embedding needs an even one");
  }
  config.rms_norm_eps = fields.number("rms_norm_eps");
  config.activation = read_decoder_activation(fields, model_type);
  config.attention_bias = fields.flag_or("attention_bias", false);
  config.mlp_bias = llama && fields.flag_or("mlp_bias", false);
  config.attention_dropout = fields.probability("attention_dropout");
  config.rope = read_rope(fields, config.head_dim);
  config.special_tokens = read_special_tokens(fields, path.parent_path());

  config.gemma = !llama;
  config.norms_after = gemma2;
  config.attention_scale = 1 / std::sqrt(static_cast<double>(config.head_dim));
  config.windows.assign(config.num_hidden_layers, 0);
  if (gemma2) {
    config.attention_scale = 1 / std::sqrt(fields.number("query_pre_attn_scalar", /*positive=*/true));
    const auto cap = [&](const char* name) { return fields.has(name) ? fields.number(name, /*positive=*/true) : 0; };
    config.attn_logit_softcapping = cap("attn_logit_softcapping");
    config.final_logit_softcapping = cap("final_logit_softcapping");
    config.windows = read_windows(fields, config.num_hidden_layers);
  }
  return config;
}

T5Config T5Config::from_file(const std::filesystem::path& path) {
  const Fields fields = read_fields(path);
  const std::string model_type = fields.text("model_type");
  if (model_type != "t5" && model_type != "mt5") {
    fail(fields.where("model_type"), " is '", model_type, "', but an encoder-decoder is one of t5, mt5");
  }
  refuse_other_names(fields);

  T5Config config;
  config.vocab_size = fields.whole("vocab_size");
  config.d_model = fields.whole("d_model");
  config.d_kv = fields.whole("d_kv");
  config.d_ff = fields.whole("d_ff");
  config.num_layers = fields.whole("num_layers");
  config.num_decoder_layers = fields.whole_or("num_decoder_layers", config.num_layers);
  config.num_heads = fields.whole("num_heads");
  config.relative_attention_num_buckets = fields.whole("relative_attention_num_buckets", /*least=*/4);
  config.relative_attention_max_distance =
      fields.whole("relative_attention_max_distance", config.relative_attention_num_buckets / 2 + 1);
  config.dropout_rate = fields.probability("dropout_rate");
  config.layer_norm_epsilon = fields.number("layer_norm_epsilon");
  read_feed_forward(fields, config);

  // T5 1.0 ties its output matrix and scales before it, 1.1 does neither, and its files say so by the tie; newer ones
  // say it by itself. mT5 never scales.
  config.scale_decoder_outputs =
      model_type == "t5" && fields.flag_or("scale_decoder_outputs", fields.flag_or("tie_word_embeddings", true));
  config.special_tokens = read_special_tokens(fields, path.parent_path());
  if (config.special_tokens.decoder_start < 0) config.special_tokens.decoder_start = config.special_tokens.pad;
  if (config.special_tokens.decoder_start < 0) {
    fail(path.string(), ": lacks both 'decoder_start_token_id' and 'pad_token_id'; the decoder needs a first token");
  }
  return config;
}

BertConfig BertConfig::from_file(const std::filesystem::path& path) {
  const Fields fields = read_fields(path);
  const auto require_text = [&](const char* name, const std::string& expected) {
    const std::string found = fields.text_or(name, expected);
    if (found != expected) {
      fail(fields.where(name), " is '", found, "', but only '", expected,
           "' is supported; choose a BERT model such as MiniLM");
    }
  };
  require_text("model_type", "bert");
  require_text("hidden_act", "gelu");
  require_text("position_embedding_type", "absolute");
  fields.refuse("is_decoder", "attention to earlier tokens alone");

  BertConfig config;
  config.vocab_size = fields.whole("vocab_size");
  config.hidden_size = fields.whole("hidden_size");
  config.num_hidden_layers = fields.whole("num_hidden_layers");
  config.num_attention_heads = fields.whole("num_attention_heads");
  config.intermediate_size = fields.whole("intermediate_size");
  config.max_position_embeddings = fields.whole("max_position_embeddings");
  config.type_vocab_size = fields.whole("type_vocab_size");
  config.layer_norm_eps = fields.number("layer_norm_eps", /*positive=*/false);
  config.pad_token_id = fields.whole_or("pad_token_id", 0, /*least=*/0);
  if (config.hidden_size % config.num_attention_heads != 0) {
    fields.reject("hidden_size", concat("a multiple of num_attention_heads ", config.num_attention_heads));
  }
  return config;
}

std::string read_model_type(const std::filesystem::path& path) {
  return read_config(path)["model_type"].get<std::string>();
}

}  // namespace finetune
