#include "models/config.hpp"

#include <cmath>
#include <nlohmann/json.hpp>
#include <utility>

#include "error.hpp"
#include "files.hpp"

namespace finetune {
namespace {

// Reads fields of one JSON object and names file and field where one is not as it must be. A null counts as absent, as
// in transformers.
class Fields {
 public:
  Fields(nlohmann::json json, std::string origin) : json_(std::move(json)), origin_(std::move(origin)) {
    if (!json_.is_object()) fail(origin_, ": is no JSON object; a Hugging Face config.json is expected");
  }

  bool has(const std::string& name) const { return json_.contains(name) && !json_[name].is_null(); }

  bool is_null(const std::string& name) const { return json_.contains(name) && json_[name].is_null(); }

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

  double number(const std::string& name, bool positive) const {
    if (!has(name)) fail(origin_, ": lacks the number '", name, "'; a complete config.json is expected");
    return number_or(name, 0, positive);
  }

  double probability_or(const std::string& name, double otherwise) const {
    const double value = number_or(name, otherwise);
    if (value >= 1) reject(name, "a number of at least 0 and below 1");
    return value;
  }

  bool flag_or(const std::string& name, bool otherwise) const {
    if (!has(name)) return otherwise;
    if (!json_[name].is_boolean()) reject(name, "true or false");
    return json_[name].get<bool>();
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

Fields read_fields(const std::filesystem::path& path) { return {read_json(path), path.string()}; }

// Today's files hold everything in rope_parameters; older ones rope_theta beside rope_scaling, which is null or an
// object.
RopeConfig read_rope(const Fields& fields, int64_t head_dim) {
  RopeConfig rope;
  rope.theta = fields.number_or("rope_theta", 10000, /*positive=*/true);
  const double rotary_share = fields.number_or("partial_rotary_factor", 1);
  if (rotary_share != 1) fields.reject("partial_rotary_factor", "1: rotating a part of a head is not supported");
  const std::string name = fields.has("rope_scaling") ? "rope_scaling" : "rope_parameters";
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
    rope.original_max_position_embeddings = scaling.has("original_max_position_embeddings")
                                                ? scaling.whole("original_max_position_embeddings")
                                                : fields.whole("max_position_embeddings");
  } else {
    fail(scaling.where(type_name), " is '", type, "', but only default, linear, dynamic and llama3 are supported");
  }
  rope.factor = scaling.number("factor", /*positive=*/true);
  return rope;
}

SpecialTokens read_special_tokens(const Fields& fields) {
  SpecialTokens tokens;
  if (fields.has("pad_token_id")) tokens.pad = fields.whole("pad_token_id", /*least=*/-1);  // -1 is Llama's "none"
  tokens.end = fields.tokens("eos_token_id");
  tokens.decoder_start = fields.whole_or("decoder_start_token_id", -1, /*least=*/0);
  return tokens;
}

// Gemma 2 alternates: the layers 0, 2, … see the window only.
std::vector<int64_t> read_windows(const Fields& fields, int64_t layers) {
  const int64_t window = fields.has("sliding_window") ? fields.whole("sliding_window") : 0;
  std::vector<int64_t> windows(layers, 0);
  if (!fields.has("layer_types")) {
    for (int64_t layer = 0; layer < layers; layer += 2) windows[layer] = window;
    return windows;
  }
  const std::vector<std::string> types = fields.texts("layer_types");
  if (static_cast<int64_t>(types.size()) != layers) {
    fields.reject("layer_types", concat("a list of num_hidden_layers = ", layers, " strings"));
  }
  for (int64_t layer = 0; layer < layers; ++layer) {
    if (types[layer] == "sliding_attention") {
      if (window == 0) fields.reject("layer_types", "no 'sliding_attention' without a 'sliding_window'");
      windows[layer] = window;
    } else if (types[layer] != "full_attention") {
      fields.reject("layer_types", "a list of 'full_attention' and 'sliding_attention'");
    }
  }
  return windows;
}

Activation read_decoder_activation(const Fields& fields, const std::string& model_type) {
  if (model_type == "llama") {
    return parse_activation(fields.text_or("hidden_act", "silu"), fields.where("hidden_act"));
  }
  const std::string standard = "gelu_pytorch_tanh";
  const std::string name =
      fields.has("hidden_activation") || model_type == "gemma2" ? "hidden_activation" : "hidden_act";
  const std::string found = fields.text_or(name, standard);
  // The first Gemma's files say "gelu" and mean the approximation.
  return parse_activation(name == "hidden_act" && found == "gelu" ? standard : found, fields.where(name));
}

void refuse_unsupported(const Fields& fields) {
  fields.refuse("quantization_config", "a quantised checkpoint");
  fields.refuse("use_bidirectional_attention", "attention to later tokens");
}

}  // namespace

DecoderConfig DecoderConfig::from_file(const std::filesystem::path& path) {
  const Fields fields = read_fields(path);
  const std::string model_type = fields.text_or("model_type", "");
  if (model_type != "llama" && model_type != "gemma" && model_type != "gemma2") {
    fail(fields.where("model_type"), " is '", model_type, "', but a decoder is one of llama, gemma, gemma2");
  }
  refuse_unsupported(fields);
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
  config.head_dim = fields.whole_or("head_dim", llama ? config.hidden_size / config.num_attention_heads : 256);
  if (llama && !fields.has("head_dim") && config.hidden_size % config.num_attention_heads != 0) {
    fields.reject("hidden_size", concat("a multiple of num_attention_heads ", config.num_attention_heads));
  }
  if (config.head_dim % 2 != 0) {
    fail(path.string(), ": the head size is ", config.head_dim, "; rotary embedding needs an even one");
  }
  config.rms_norm_eps = fields.number_or("rms_norm_eps", 1e-6);
  config.activation = read_decoder_activation(fields, model_type);
  config.attention_bias = fields.flag_or("attention_bias", false);
  config.mlp_bias = llama && fields.flag_or("mlp_bias", false);
  config.tie_word_embeddings = fields.flag_or("tie_word_embeddings", !llama);
  config.attention_dropout = fields.probability_or("attention_dropout", 0);
  config.rope = read_rope(fields, config.head_dim);
  config.special_tokens = read_special_tokens(fields);

  config.gemma = !llama;
  config.norms_after = gemma2;
  config.attention_scale = 1 / std::sqrt(static_cast<double>(config.head_dim));
  config.windows.assign(config.num_hidden_layers, 0);
  if (gemma2) {
    config.attention_scale = 1 / std::sqrt(fields.number_or("query_pre_attn_scalar", 256, /*positive=*/true));
    // Absent means the usual cap, null means none.
    const auto cap = [&](const char* name, double usual) {
      return fields.has(name) ? fields.number(name, /*positive=*/true) : fields.is_null(name) ? 0 : usual;
    };
    config.attn_logit_softcapping = cap("attn_logit_softcapping", 50);
    config.final_logit_softcapping = cap("final_logit_softcapping", 30);
    config.windows = read_windows(fields, config.num_hidden_layers);
  }
  return config;
}

T5Config T5Config::from_file(const std::filesystem::path& path) {
  const Fields fields = read_fields(path);
  const std::string model_type = fields.text_or("model_type", "");
  if (model_type != "t5" && model_type != "mt5") {
    fail(fields.where("model_type"), " is '", model_type, "', but an encoder-decoder is one of t5, mt5");
  }
  refuse_unsupported(fields);
  const bool mt5 = model_type == "mt5";

  T5Config config;
  config.vocab_size = fields.whole("vocab_size");
  config.d_model = fields.whole("d_model");
  config.d_kv = fields.whole("d_kv");
  config.d_ff = fields.whole("d_ff");
  config.num_layers = fields.whole("num_layers");
  config.num_decoder_layers = fields.whole_or("num_decoder_layers", config.num_layers);
  config.num_heads = fields.whole("num_heads");
  config.relative_attention_num_buckets = fields.whole_or("relative_attention_num_buckets", 32, /*least=*/4);
  config.relative_attention_max_distance =
      fields.whole_or("relative_attention_max_distance", 128, config.relative_attention_num_buckets / 2 + 1);
  config.dropout_rate = fields.probability_or("dropout_rate", 0.1);
  config.layer_norm_epsilon = fields.number_or("layer_norm_epsilon", 1e-6);

  std::string activation = fields.text_or("feed_forward_proj", mt5 ? "gated-gelu" : "relu");
  config.gated = activation.rfind("gated-", 0) == 0;
  if (config.gated) activation = activation.substr(std::string("gated-").size());
  // What T5 1.1 calls gated-gelu is the approximation by tanh.
  config.activation = parse_activation(config.gated && activation == "gelu" ? "gelu_new" : activation,
                                       fields.where("feed_forward_proj"));

  // T5 1.0 ties its output matrix and scales before it, 1.1 does neither; newer files say the latter by itself. mT5
  // never scales.
  config.tie_word_embeddings = fields.flag_or("tie_word_embeddings", true);
  config.scale_decoder_outputs = !mt5 && fields.flag_or("scale_decoder_outputs", config.tie_word_embeddings);
  config.special_tokens = read_special_tokens(fields);
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

std::string read_model_type(const std::filesystem::path& path) { return read_fields(path).text_or("model_type", ""); }

}  // namespace finetune
