#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "models/layers/layers.hpp"
#include "models/layers/rope.hpp"

namespace finetune {

/// The token ids that generation and training need; -1 where config.json has none.
struct SpecialTokens {
  int64_t pad = -1;
  /// Any of them ends a text: generation_config.json's, and config.json's where there is no such file or it names none.
  std::vector<int64_t> end;
  int64_t decoder_start = -1;  ///< what the decoder of an encoder-decoder model begins with
};

/// The parts of a Hugging Face `config.json` that the forward pass of a decoder (Llama, Gemma, Gemma 2) depends on.
struct DecoderConfig {
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_hidden_layers = 0;
  int64_t num_attention_heads = 0;
  int64_t num_key_value_heads = 0;
  int64_t head_dim = 0;
  double rms_norm_eps = 1e-6;
  Activation activation = Activation::Silu;
  bool attention_bias = false;
  bool mlp_bias = false;
  double attention_dropout = 0;
  RopeConfig rope;
  SpecialTokens special_tokens;

  // Gemma's: embeddings times √hidden_size, norms by 1 + weight.
  bool gemma = false;
  // Gemma 2's: norms also after attention and feed-forward, soft caps (0 = none), layers with a sliding window.
  bool norms_after = false;
  double attention_scale = 0;  ///< of the scores: 1/√head_dim, or 1/√query_pre_attn_scalar
  double attn_logit_softcapping = 0;
  double final_logit_softcapping = 0;
  std::vector<int64_t> windows;  ///< a layer's sliding window, 0 = it sees the whole text

  /// Reads config.json of model_type "llama", "gemma" or "gemma2". Throws Error naming the file and field where one is
  /// missing, of the wrong kind, or asks for something this program has not.
  static DecoderConfig from_file(const std::filesystem::path& path);
};

/// The parts of a Hugging Face `config.json` that the forward pass of T5 (1.0, 1.1) and mT5 depends on.
struct T5Config {
  int64_t vocab_size = 0;
  int64_t d_model = 0;
  int64_t d_kv = 0;
  int64_t d_ff = 0;
  int64_t num_layers = 0;
  int64_t num_decoder_layers = 0;
  int64_t num_heads = 0;
  int64_t relative_attention_num_buckets = 32;
  int64_t relative_attention_max_distance = 128;
  double dropout_rate = 0.1;
  double layer_norm_epsilon = 1e-6;
  Activation activation = Activation::Relu;
  bool gated = false;
  bool scale_decoder_outputs = true;  ///< by 1/√d_model before the output matrix, as T5 1.0 does
  SpecialTokens special_tokens;

  /// Reads config.json of model_type "t5" or "mt5"; errors as DecoderConfig::from_file.
  static T5Config from_file(const std::filesystem::path& path);
};

/// The parts of a Hugging Face `config.json` that a BERT encoder's forward pass depends on.
struct BertConfig {
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t num_hidden_layers = 0;
  int64_t num_attention_heads = 0;
  int64_t intermediate_size = 0;
  int64_t max_position_embeddings = 0;
  int64_t type_vocab_size = 0;
  int64_t pad_token_id = 0;
  double layer_norm_eps = 1e-12;

  /// Reads config.json of model_type "bert"; errors as DecoderConfig::from_file.
  static BertConfig from_file(const std::filesystem::path& path);
};

/// A config.json as it is. Throws Error naming the file and field if it is no object with the text `model_type`, or
/// says that the weights are quantised (it, or a text_config within) or are in a file of another name.
nlohmann::json read_config(const std::filesystem::path& path);

/// Throws the Error for a quantised checkpoint; `what` says where that was seen and how.
[[noreturn]] void refuse_quantised(const std::string& what);

/// What transformers 5.24's class takes for the fields that a config.json of this `model_type` (llama, gemma, gemma2,
/// t5, mt5, bert) has not, null where it takes none; no fields for other types. Only such as are read here.
const nlohmann::json& config_defaults(const std::string& model_type);

/// Whether transformers makes one matrix of embedding and output by this config.json, unless the files hold two that
/// differ. T5's and mT5's does so whatever it says. Of a type that is not known here,
/// true unless the file says otherwise.
bool ties_embedding(const nlohmann::json& config);

/// The field `model_type` of a config.json; errors as read_config.
std::string read_model_type(const std::filesystem::path& path);

}  // namespace finetune
