#include "models/decoder.hpp"

#include <torch/nn/module.h>
#include <torch/types.h>

#include <cmath>

#include "common/error.hpp"
#include "models/layers/recompute.hpp"
#include "models/layers/rope.hpp"

namespace finetune {
namespace {

// Shapes: b = batch, l = length, d = hidden size, h = heads, g = key and value heads, e = a head's size.

// What the layers of one forward pass have in common.
struct Context {
  Rotation rotation;
  AttentionMask full;    // for layers that see the whole text
  AttentionMask window;  // for those that see its last tokens
  int64_t begin = 0;     // position of the first token
  int64_t capacity = 0;  // of the caches
};

struct SelfAttention : torch::nn::Module {
  explicit SelfAttention(const DecoderConfig& config)
      : q(linear("q_proj", config.hidden_size, config.num_attention_heads * config.head_dim, config)),
        k(linear("k_proj", config.hidden_size, config.num_key_value_heads * config.head_dim, config)),
        v(linear("v_proj", config.hidden_size, config.num_key_value_heads * config.head_dim, config)),
        o(linear("o_proj", config.num_attention_heads * config.head_dim, config.hidden_size, config)),
        head_size(config.head_dim),
        dropout(config.attention_dropout),
        options{config.attention_scale, config.attn_logit_softcapping, 0} {}

  // x [b, l, d] → [b, l, d]
  torch::Tensor forward(const torch::Tensor& x, const Context& context, const AttentionMask& mask,
                        KeyValueCache* cache) {
    const auto split_heads = [&](const torch::Tensor& joined) {
      return joined.unflatten(-1, {-1, head_size}).transpose(1, 2);
    };
    const torch::Tensor queries = context.rotation.apply(split_heads(q->forward(x)));  // [b, h, l, e]
    torch::Tensor keys = context.rotation.apply(split_heads(k->forward(x)));           // [b, g, l, e]
    torch::Tensor values = split_heads(v->forward(x));
    if (cache != nullptr) cache->append(context.begin, context.capacity, keys, values);
    AttentionOptions now = options;
    now.dropout = is_training() ? dropout : 0;
    return o->forward(attend(queries, keys, values, mask, now).transpose(1, 2).flatten(2));
  }

  std::shared_ptr<Linear> linear(const char* name, int64_t in, int64_t out, const DecoderConfig& config) {
    return register_module(name, make_linear(in, out, config.attention_bias));
  }

  std::shared_ptr<Linear> q, k, v, o;
  int64_t head_size;
  double dropout;
  AttentionOptions options;
};

// down(act(gate x) ∘ up x)
struct FeedForward : torch::nn::Module {
  explicit FeedForward(const DecoderConfig& config)
      : gate(linear("gate_proj", config.hidden_size, config.intermediate_size, config)),
        up(linear("up_proj", config.hidden_size, config.intermediate_size, config)),
        down(linear("down_proj", config.intermediate_size, config.hidden_size, config)),
        activation(config.activation) {}

  torch::Tensor forward(const torch::Tensor& x) {
    return down->forward(activate(activation, gate->forward(x)) * up->forward(x));
  }

  std::shared_ptr<Linear> linear(const char* name, int64_t in, int64_t out, const DecoderConfig& config) {
    return register_module(name, make_linear(in, out, config.mlp_bias));
  }

  std::shared_ptr<Linear> gate, up, down;
  Activation activation;
};

}  // namespace

struct DecoderModel::Layer : torch::nn::Module {
  Layer(const DecoderConfig& config, int64_t index)
      : attention(register_module("self_attn", std::make_shared<SelfAttention>(config))),
        feed_forward(register_module("mlp", std::make_shared<FeedForward>(config))),
        before_attention(norm("input_layernorm", config)),
        windowed(config.windows[index] > 0) {
    // The same name stands for another place where there are norms behind.
    if (config.norms_after) {
      after_attention = norm("post_attention_layernorm", config);
      before_feed_forward = norm("pre_feedforward_layernorm", config);
      after_feed_forward = norm("post_feedforward_layernorm", config);
    } else {
      before_feed_forward = norm("post_attention_layernorm", config);
    }
  }

  // x [b, l, d] → [b, l, d]
  torch::Tensor forward(const torch::Tensor& x, const Context& context, KeyValueCache* cache) {
    const AttentionMask& mask = windowed ? context.window : context.full;
    torch::Tensor attended = attention->forward(before_attention->forward(x), context, mask, cache);
    if (after_attention) attended = after_attention->forward(attended);
    const torch::Tensor between = x + attended;
    torch::Tensor fed = feed_forward->forward(before_feed_forward->forward(between));
    if (after_feed_forward) fed = after_feed_forward->forward(fed);
    return between + fed;
  }

  std::shared_ptr<RmsNorm> norm(const char* name, const DecoderConfig& config) {
    return register_module(name, std::make_shared<RmsNorm>(config.hidden_size, config.rms_norm_eps, config.gemma));
  }

  std::shared_ptr<SelfAttention> attention;
  std::shared_ptr<FeedForward> feed_forward;
  std::shared_ptr<RmsNorm> before_attention, after_attention, before_feed_forward, after_feed_forward;
  bool windowed;
};

DecoderModel::DecoderModel(const DecoderConfig& config) : config_(config) {
  const auto model = register_module("model", std::make_shared<Scope>());
  const int64_t padding = config.special_tokens.pad;
  const bool has_padding = padding >= 0 && padding < config.vocab_size;
  embedding_ = model->register_module("embed_tokens",
                                      make_embedding(config.vocab_size, config.hidden_size,
                                                     has_padding ? std::optional<int64_t>(padding) : std::nullopt));
  const auto list = model->register_module("layers", std::make_shared<Scope>());
  for (int64_t index = 0; index < config.num_hidden_layers; ++index) {
    layers_.push_back(list->register_module(std::to_string(index), std::make_shared<Layer>(config, index)));
  }
  norm_ =
      model->register_module("norm", std::make_shared<RmsNorm>(config.hidden_size, config.rms_norm_eps, config.gemma));
}

torch::Tensor DecoderModel::run(const torch::Tensor& tokens, const torch::Tensor& mask, int64_t begin,
                                Generation* generation) {
  torch::Tensor hidden = embedding_->forward(tokens);  // [b, l, d]
  if (config_.gemma) {
    // Rounded to the dtype of the weights first, as transformers does.
    hidden = hidden * at::scalar_tensor(std::sqrt(static_cast<double>(config_.hidden_size)), hidden.options());
  }
  const int64_t end = begin + tokens.size(1);
  Context context;
  context.rotation = make_rotation(config_.rope, config_.head_dim, begin, end, hidden.options());
  context.full = make_causal_mask(begin, end, 0, mask, tokens.device());
  for (const int64_t window : config_.windows) {
    if (window == 0) continue;  // all others have the same
    context.window = make_causal_mask(begin, end, window, mask, tokens.device());
    break;
  }
  context.begin = begin;
  context.capacity = generation != nullptr ? generation->capacity : 0;

  for (size_t index = 0; index < layers_.size(); ++index) {
    const auto& layer = layers_[index];
    if (gradient_checkpointing() && generation == nullptr) {
      const Recomputable part = [layer, context](const std::vector<torch::Tensor>& inputs) {
        return layer->forward(inputs[0], context, nullptr);
      };
      hidden = recompute(part, {hidden}, trainable_parameters(*layer));
    } else {
      hidden = layer->forward(hidden, context, generation != nullptr ? &generation->layers[index] : nullptr);
    }
  }
  return norm_->forward(hidden);
}

torch::Tensor DecoderModel::hidden_states(const LanguageInput& input) {
  if (input.target.defined()) fail("a decoder takes no target; put the whole text into tokens");
  check_tokens("tokens", input.tokens, input.mask);
  return run(input.tokens, input.mask, 0, nullptr);
}

torch::Tensor DecoderModel::logits(const torch::Tensor& hidden) {
  const torch::Tensor plain = output_->forward(hidden);
  const double cap = config_.final_logit_softcapping;
  return cap > 0 ? at::tanh(plain / cap) * cap : plain;
}

torch::Tensor DecoderModel::begin(const LanguageInput& prompt, int64_t max_new_tokens, Generation& generation) {
  const int64_t length = prompt.tokens.size(1);
  generation.capacity = length + max_new_tokens;
  if (config_.rope.type == RopeConfig::Type::Dynamic && generation.capacity > config_.rope.max_position_embeddings) {
    fail("prompt and max_new_tokens are ", generation.capacity,
         " tokens, but with rope_type 'dynamic' only texts up to ",
         "max_position_embeddings = ", config_.rope.max_position_embeddings,
         " can be generated: beyond, every token would turn the keys kept so far");
  }
  if (prompt.mask.defined()) {
    const torch::Tensor made = at::ones({prompt.mask.size(0), max_new_tokens}, prompt.mask.options());
    generation.mask = at::cat({prompt.mask, made}, 1);
  }
  generation.layers.resize(layers_.size());
  generation.length = length;
  return run(prompt.tokens, prompt.mask, 0, &generation).select(1, -1);
}

torch::Tensor DecoderModel::advance(const torch::Tensor& tokens, Generation& generation) {
  const int64_t begin = generation.length++;
  const torch::Tensor mask =
      generation.mask.defined() ? generation.mask.slice(1, 0, generation.length) : torch::Tensor();
  return run(tokens, mask, begin, &generation).select(1, -1);
}

std::string DecoderModel::parameter_of(const std::string& tensor) const {
  // Old checkpoints carry the frequencies of the rotary embedding.
  return tensor.find(".rotary_emb.inv_freq") == std::string::npos ? tensor : "";
}

void DecoderModel::set_output(std::shared_ptr<Linear> output) {
  output_ = named_children().contains("lm_head") ? replace_module("lm_head", std::move(output))
                                                 : register_module("lm_head", std::move(output));
}

}  // namespace finetune
