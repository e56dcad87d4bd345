#include "memory_plan/activations.hpp"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/error.hpp"
#include "memory_plan/sizes.hpp"
#include "models/bert.hpp"
#include "models/config.hpp"
#include "models/load_model.hpp"

namespace finetune {
namespace {

// The bytes that the layers of one kind keep for the backward pass.
struct Layers {
  double number = 0;
  double kept = 0;   // by one of them
  double input = 0;  // the one tensor that gradient checkpointing keeps of it
};

// What each adapter adds to what the layer keeps anyway, bytes a token: its input in the factors' float32 where the
// layer's is of another dtype, the input after dropout with its mask, and A's result.
double adapter_bytes(const MemoryQuestion& question, double in) {
  double copies = question.dtype == c10::kFloat ? 0 : 1;
  if (question.lora.dropout > 0) copies = 2;
  return kFloatBytes * (copies * in + as_double(question.lora.rank));
}

// An RmsNorm's own copy of its input in float32.
double norm_bytes(const MemoryQuestion& question, double width) {
  return question.dtype == c10::kFloat ? 0 : kFloatBytes * width;
}

// One token of a decoder layer that sees `keys`: the inputs of both halves and their normalised forms; queries, keys,
// values (shared heads are copied) and the result of the attention; four widths of the feed-forward layer.
double decoder_layer_bytes(const MemoryQuestion& question, const DecoderConfig& config, double keys, double element) {
  const double d = as_double(config.hidden_size), f = as_double(config.intermediate_size);
  const double h = as_double(config.num_attention_heads), e = as_double(config.head_dim);
  double bytes = element * (4 * d + 4 * h * e + 4 * f) + 2 * norm_bytes(question, d);
  if (config.norms_after) bytes += element * 2 * d + 2 * norm_bytes(question, d);
  if (config.attn_logit_softcapping > 0) {
    // Scores after the cap, the softmax in float32 and, if that is another, in the dtype of the values.
    bytes += h * keys * (element + kFloatBytes + (question.dtype == c10::kFloat ? 0 : element));
  } else if (config.attention_dropout > 0) {
    bytes += h * keys * 3 * element;  // softmax, mask, and the product of both
  }
  return bytes + 5 * adapter_bytes(question, d) + adapter_bytes(question, h * e) + adapter_bytes(question, f);
}

// One token of T5's attention that sees `keys`: normalised input, queries, result, the mask of the dropout behind it;
// beside its own keys and values also scores, or softmax, mask and product where there is dropout.
double t5_attention_bytes(const MemoryQuestion& question, const T5Config& config, double keys, double element) {
  const double d = as_double(config.d_model), inner = as_double(config.num_heads * config.d_kv);
  const bool drops = config.dropout_rate > 0;
  double bytes = element * (2 * d + 2 * inner) + norm_bytes(question, d);
  if (drops) bytes += element * (d + 3 * as_double(config.num_heads) * keys);
  return bytes + adapter_bytes(question, d) + adapter_bytes(question, inner);
}

// One token that is seen: its key and its value.
double t5_seen_bytes(const MemoryQuestion& question, const T5Config& config, double element) {
  return 2 * (element * as_double(config.num_heads * config.d_kv) + adapter_bytes(question, as_double(config.d_model)));
}

// One token of T5's feed-forward layer: input, normalised input, the mask of the dropout behind it; what the activation
// and the product with the second branch keep; the inner dropout's mask and result.
double t5_feed_forward_bytes(const MemoryQuestion& question, const T5Config& config, double element) {
  const double d = as_double(config.d_model), f = as_double(config.d_ff);
  const bool drops = config.dropout_rate > 0;
  const double inner = (config.gated ? 3 : 1) + (drops ? 2 : config.gated ? 1 : 0);
  const double bytes = element * ((drops ? 3 : 2) * d + inner * f) + norm_bytes(question, d);
  return bytes + adapter_bytes(question, f) + (config.gated ? 2 : 1) * adapter_bytes(question, d);
}

// With the checkpoints of all layers, one of them is computed again at a time.
double kept_bytes(const std::vector<Layers>& stacks, bool checkpointing) {
  double all = 0, largest = 0;
  for (const Layers& layers : stacks) {
    all += layers.number * (checkpointing ? layers.input : layers.kept);
    largest = std::max(largest, layers.kept);
  }
  return checkpointing ? all + largest : all;
}

// In the backward pass: log-softmax, its gradient and the logits' one in float32, and that in the logits' own dtype.
double logit_bytes(const MemoryQuestion& question, double tokens, int64_t vocabulary, bool capped, double element) {
  double bytes = 3 * kFloatBytes + (capped ? element : 0);
  if (question.dtype != c10::kFloat) bytes += element;
  return tokens * as_double(vocabulary) * bytes;
}

// --- The families of models ------------------------------------------------------------------------------------------

ModelNeeds plan_classifier(const MemoryQuestion& question) {
  const BertConfig config = BertConfig::from_file(question.model / "config.json");
  const double tokens = as_double(question.rows * question.length);
  const double d = as_double(config.hidden_size), f = as_double(config.intermediate_size);
  ModelNeeds needs;
  needs.model = std::make_shared<BertModel>(config);
  // Queries, keys, values and the attention's result, padded and packed; the inputs and results of both norms; two
  // widths of the feed-forward layer.
  const double bytes = kFloatBytes * (9 * d + 2 * f) + 5 * adapter_bytes(question, d) + adapter_bytes(question, f);
  // And what the backward pass works with in a feed-forward layer, which large logits would outweigh.
  const double work = kFloatBytes * 4 * (d + f);
  needs.activations = tokens * (as_double(config.num_hidden_layers) * bytes + work);
  needs.head = (d + 1) * as_double(question.classes);
  needs.dimensions = concat(question.rows, " × ", question.length, " tokens");
  return needs;
}

ModelNeeds plan_decoder(const MemoryQuestion& question, double element) {
  const DecoderConfig config = DecoderConfig::from_file(question.model / "config.json");
  const double tokens = as_double(question.rows * question.length);
  ModelNeeds needs;
  const double layer = tokens * decoder_layer_bytes(question, config, as_double(question.length), element);
  const Layers layers{as_double(config.num_hidden_layers), layer, tokens * as_double(config.hidden_size) * element};
  needs.activations = kept_bytes({layers}, question.gradient_checkpointing);
  needs.logits = logit_bytes(question, as_double(question.rows * question.completion), config.vocab_size,
                             config.final_logit_softcapping > 0, element);
  needs.dimensions = concat(question.rows, " × ", question.length, " tokens");
  return needs;
}

ModelNeeds plan_encoder_decoder(const MemoryQuestion& question, double element) {
  const T5Config config = T5Config::from_file(question.model / "config.json");
  const double sources = as_double(question.rows * question.length);
  const double targets = as_double(question.rows * question.completion);
  const double seen = t5_seen_bytes(question, config, element);
  const double feed_forward = t5_feed_forward_bytes(question, config, element);
  const auto attention = [&](int64_t keys) { return t5_attention_bytes(question, config, as_double(keys), element); };
  const double width = as_double(config.d_model) * element;
  const Layers encoder{as_double(config.num_layers), sources * (attention(question.length) + seen + feed_forward),
                       sources * width};
  const Layers decoder{
      as_double(config.num_decoder_layers),
      targets * (attention(question.completion) + seen + attention(question.length) + feed_forward) + sources * seen,
      targets * width};
  ModelNeeds needs;
  needs.activations = kept_bytes({encoder, decoder}, question.gradient_checkpointing);
  needs.logits = logit_bytes(question, targets, config.vocab_size, false, element);
  needs.dimensions = concat(question.rows, " × ", question.length, " + ", question.completion, " tokens");
  return needs;
}

}  // namespace

ModelNeeds plan_model(const MemoryQuestion& question, double element) {
  const std::string type = read_model_type(question.model / "config.json");
  if (type == "bert") return plan_classifier(question);
  ModelNeeds needs =
      type == "t5" || type == "mt5" ? plan_encoder_decoder(question, element) : plan_decoder(question, element);
  needs.model = build_model(question.model);
  return needs;
}

}  // namespace finetune
