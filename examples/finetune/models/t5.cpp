#include "models/t5.hpp"

#include <torch/nn/module.h>
#include <torch/types.h>

#include <cmath>
#include <limits>

#include "common/error.hpp"
#include "models/layers/embedding.hpp"
#include "models/layers/recompute.hpp"

namespace finetune {
namespace {

// Shapes: b = batch, s = source length, l = target length, d = d_model, h = heads, e = d_kv.

// What the blocks of one pass through a stack have in common.
struct Context {
  AttentionMask own;     // of the self-attention: the position bias, and -∞ (nearly) where nothing is to be seen
  AttentionMask source;  // of the attention to the source
  int64_t begin = 0;     // position of the first token
  int64_t capacity = 0;  // of the caches
};

// The caches of one block.
struct Caches {
  KeyValueCache* own = nullptr;
  KeyValueCache* source = nullptr;
};

struct Attention : torch::nn::Module {
  Attention(const T5Config& config, bool has_bias)
      : q(register_module("q", make_linear(config.d_model, config.num_heads * config.d_kv, false))),
        k(register_module("k", make_linear(config.d_model, config.num_heads * config.d_kv, false))),
        v(register_module("v", make_linear(config.d_model, config.num_heads * config.d_kv, false))),
        o(register_module("o", make_linear(config.num_heads * config.d_kv, config.d_model, false))),
        head_size(config.d_kv),
        dropout(config.dropout_rate) {
    if (!has_bias) return;
    bias = register_module("relative_attention_bias",
                           std::make_shared<Embedding>(config.relative_attention_num_buckets, config.num_heads));
  }

  // x [b, l, d] → [b, l, d]
  torch::Tensor to_itself(const torch::Tensor& x, const Context& context, KeyValueCache* cache) {
    torch::Tensor keys = split_heads(k->forward(x));
    torch::Tensor values = split_heads(v->forward(x));
    if (cache != nullptr) cache->append(context.begin, context.capacity, keys, values);
    return finish(x, keys, values, context.own);
  }

  // x [b, l, d], source [b, s, d] → [b, l, d]
  torch::Tensor to_source(const torch::Tensor& x, const torch::Tensor& source, const Context& context,
                          KeyValueCache* cache) {
    if (cache != nullptr && cache->keys.defined()) return finish(x, cache->keys, cache->values, context.source);
    torch::Tensor keys = split_heads(k->forward(source));
    torch::Tensor values = split_heads(v->forward(source));
    if (cache != nullptr) *cache = {keys, values};
    return finish(x, keys, values, context.source);
  }

  torch::Tensor split_heads(const torch::Tensor& joined) const {
    return joined.unflatten(-1, {-1, head_size}).transpose(1, 2);  // [b, h, l, e]
  }

  torch::Tensor finish(const torch::Tensor& x, const torch::Tensor& keys, const torch::Tensor& values,
                       const AttentionMask& mask) {
    // T5 does not scale its scores: the initialisation of q does it instead.
    const AttentionOptions options{/*scale=*/1, /*softcap=*/0, is_training() ? dropout : 0};
    return o->forward(attend(split_heads(q->forward(x)), keys, values, mask, options).transpose(1, 2).flatten(2));
  }

  std::shared_ptr<Linear> q, k, v, o;
  std::shared_ptr<Embedding> bias;
  int64_t head_size;
  double dropout;
};

// wo(act(wi x)), or wo(act(wi_0 x) ∘ wi_1 x)
struct FeedForward : torch::nn::Module {
  explicit FeedForward(const T5Config& config) : activation(config.activation), dropout(config.dropout_rate) {
    wi = register_module(config.gated ? "wi_0" : "wi", make_linear(config.d_model, config.d_ff, false));
    if (config.gated) factor = register_module("wi_1", make_linear(config.d_model, config.d_ff, false));
    wo = register_module("wo", make_linear(config.d_ff, config.d_model, false));
  }

  torch::Tensor forward(const torch::Tensor& x) {
    torch::Tensor inner = activate(activation, wi->forward(x));
    if (factor) inner = inner * factor->forward(x);
    return wo->forward(at::dropout(inner, dropout, is_training()));
  }

  std::shared_ptr<Linear> wi, factor, wo;
  Activation activation;
  double dropout;
};

// A part of a block: x + dropout(part(norm(x))).
template <class Part>
struct Residual : torch::nn::Module {
  Residual(const char* name, std::shared_ptr<Part> inner, const T5Config& config)
      : part(register_module(name, std::move(inner))),
        norm(
            register_module("layer_norm", std::make_shared<RmsNorm>(config.d_model, config.layer_norm_epsilon, false))),
        dropout(config.dropout_rate) {}

  template <class Run>
  torch::Tensor forward(const torch::Tensor& x, const Run& run) {
    return x + at::dropout(run(*part, norm->forward(x)), dropout, is_training());
  }

  std::shared_ptr<Part> part;
  std::shared_ptr<RmsNorm> norm;
  double dropout;
};

struct Block : torch::nn::Module {
  Block(const T5Config& config, bool decoder, bool has_bias) {
    const auto list = register_module("layer", std::make_shared<Scope>());
    own = list->register_module("0", std::make_shared<Residual<Attention>>(
                                         "SelfAttention", std::make_shared<Attention>(config, has_bias), config));
    if (decoder) {
      source = list->register_module("1", std::make_shared<Residual<Attention>>(
                                              "EncDecAttention", std::make_shared<Attention>(config, false), config));
    }
    feed_forward = list->register_module(
        decoder ? "2" : "1",
        std::make_shared<Residual<FeedForward>>("DenseReluDense", std::make_shared<FeedForward>(config), config));
  }

  // x [b, l, d] → [b, l, d]; `seen` is the source [b, s, d] in the decoder
  torch::Tensor forward(torch::Tensor x, const torch::Tensor& seen, const Context& context, const Caches& caches) {
    // A view of the block's own: the gradients of its uses are summed here first, in the order in which recomputing
    // does it.
    const torch::Tensor source_here = seen.defined() ? seen.view_as(seen) : seen;
    x = own->forward(
        x, [&](Attention& part, const torch::Tensor& normal) { return part.to_itself(normal, context, caches.own); });
    if (source) {
      x = source->forward(x, [&](Attention& part, const torch::Tensor& normal) {
        return part.to_source(normal, source_here, context, caches.source);
      });
    }
    return feed_forward->forward(x,
                                 [](FeedForward& part, const torch::Tensor& normal) { return part.forward(normal); });
  }

  std::shared_ptr<Residual<Attention>> own, source;
  std::shared_ptr<Residual<FeedForward>> feed_forward;
};

}  // namespace

// The encoder or the decoder.
struct T5Model::Stack : torch::nn::Module {
  Stack(const T5Config& config, bool decoder, const torch::Tensor& vocabulary)
      : decoder(decoder),
        buckets(config.relative_attention_num_buckets),
        max_distance(config.relative_attention_max_distance),
        dropout(config.dropout_rate),
        embedding(register_module("embed_tokens", make_embedding(vocabulary, std::nullopt))) {
    const auto list = register_module("block", std::make_shared<Scope>());
    const int64_t count = decoder ? config.num_decoder_layers : config.num_layers;
    for (int64_t index = 0; index < count; ++index) {
      blocks.push_back(
          list->register_module(std::to_string(index), std::make_shared<Block>(config, decoder, index == 0)));
    }
    norm = register_module("final_layer_norm",
                           std::make_shared<RmsNorm>(config.d_model, config.layer_norm_epsilon, false));
  }

  // The first block's position bias serves all; visible bool, or undefined = everything → float [b or 1, h, l, end].
  torch::Tensor make_bias(int64_t begin, int64_t end, const torch::Tensor& visible) const {
    const torch::Tensor& weight = blocks.front()->own->part->bias->weight;
    const torch::Tensor places =
        relative_position_buckets(begin, end, end, !decoder, buckets, max_distance, weight.device());
    const torch::Tensor bias = at::embedding(weight, places).permute({2, 0, 1}).unsqueeze(0);
    if (!visible.defined()) return bias;
    return at::where(visible, bias, at::scalar_tensor(-INFINITY, bias.options()));
  }

  // x [b, l, d] → [b, l, d]
  torch::Tensor forward(torch::Tensor x, const torch::Tensor& source, const Context& context, Generation* generation,
                        bool checkpointing) {
    x = at::dropout(x, dropout, is_training());
    for (size_t index = 0; index < blocks.size(); ++index) {
      const auto& block = blocks[index];
      if (checkpointing) {
        x = recompute_block(block, x, source, context);
      } else {
        Caches caches;
        if (generation != nullptr) caches = {&generation->layers[index], &generation->sources[index]};
        x = block->forward(x, source, context, caches);
      }
    }
    return at::dropout(norm->forward(x), dropout, is_training());
  }

  // Source and position bias are inputs too: gradients flow through them to the encoder and to a trained bias.
  static torch::Tensor recompute_block(const std::shared_ptr<Block>& block, const torch::Tensor& x,
                                       const torch::Tensor& source, const Context& context) {
    std::vector<torch::Tensor> inputs = {x, context.own.mask};
    if (source.defined()) inputs.push_back(source);
    const Recomputable part = [block, context](const std::vector<torch::Tensor>& again) {
      Context now = context;
      now.own.mask = again[1];
      return block->forward(again[0], again.size() > 2 ? again[2] : torch::Tensor(), now, {});
    };
    return recompute(part, inputs, trainable_parameters(*block));
  }

  bool decoder;
  int64_t buckets;
  int64_t max_distance;
  double dropout;
  std::shared_ptr<TokenEmbedding> embedding;  // the shared matrix; an adapter is the stack's own
  std::vector<std::shared_ptr<Block>> blocks;
  std::shared_ptr<RmsNorm> norm;
};

T5Model::T5Model(const T5Config& config)
    : config_(config),
      embedding_(register_module("shared", std::make_shared<Embedding>(config.vocab_size, config.d_model))),
      encoder_(register_module("encoder", std::make_shared<Stack>(config, false, embedding_->weight))),
      decoder_(register_module("decoder", std::make_shared<Stack>(config, true, embedding_->weight))) {}

torch::Tensor T5Model::encode(const torch::Tensor& tokens, const torch::Tensor& mask) {
  Context context;
  context.own.mask = encoder_->make_bias(0, tokens.size(1), make_padding_mask(mask).mask);
  return encoder_->forward(encoder_->embedding->forward(tokens), {}, context, nullptr, gradient_checkpointing());
}

torch::Tensor T5Model::decode(const torch::Tensor& tokens, const torch::Tensor& mask, const torch::Tensor& source,
                              const torch::Tensor& source_mask, int64_t begin, Generation* generation) {
  const int64_t end = begin + tokens.size(1);
  Context context;
  const AttentionMask causal = make_causal_mask(begin, end, 0, mask, tokens.device());
  const torch::Tensor visible =
      causal.causal ? at::ones({end, end}, torch::dtype(torch::kBool).device(tokens.device())).tril() : causal.mask;
  context.own.mask = decoder_->make_bias(begin, end, visible);
  context.source = make_padding_mask(source_mask);
  context.begin = begin;
  context.capacity = generation != nullptr ? generation->capacity : 0;
  const bool checkpointing = gradient_checkpointing() && generation == nullptr;
  return decoder_->forward(decoder_->embedding->forward(tokens), source, context, generation, checkpointing);
}

torch::Tensor T5Model::hidden_states(const LanguageInput& input) {
  if (!input.target.defined()) fail("an encoder-decoder needs a target; see shift_right");
  check_tokens("tokens", input.tokens, input.mask);
  check_tokens("target", input.target, input.target_mask);
  const torch::Tensor source = encode(input.tokens, input.mask);
  return decode(input.target, input.target_mask, source, input.mask, 0, nullptr);
}

torch::Tensor T5Model::logits(const torch::Tensor& hidden) {
  if (!config_.scale_decoder_outputs) return output_->forward(hidden);
  return output_->forward(hidden * (1 / std::sqrt(static_cast<double>(config_.d_model))));
}

torch::Tensor T5Model::begin(const LanguageInput& prompt, int64_t max_new_tokens, Generation& generation) {
  const torch::Tensor source = encode(prompt.tokens, prompt.mask);
  generation.capacity = max_new_tokens;
  generation.source_mask = prompt.mask;
  generation.layers.resize(decoder_->blocks.size());
  generation.sources.resize(decoder_->blocks.size());
  const torch::Tensor start =
      at::full({prompt.tokens.size(0), 1}, config_.special_tokens.decoder_start, prompt.tokens.options());
  generation.length = 1;
  return decode(start, {}, source, prompt.mask, 0, &generation).select(1, -1);
}

torch::Tensor T5Model::advance(const torch::Tensor& tokens, Generation& generation) {
  const int64_t begin = generation.length++;
  return decode(tokens, {}, {}, generation.source_mask, begin, &generation).select(1, -1);
}

std::string T5Model::parameter_of(const std::string& tensor) const {
  // Copies of the embedding, and a table that the first release wrote and nobody reads.
  if (tensor == "encoder.embed_tokens.weight" || tensor == "decoder.embed_tokens.weight") return "shared.weight";
  if (tensor == "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight") return {};
  return tensor;
}

void T5Model::set_output(std::shared_ptr<Linear> output) {
  output_ = named_children().contains("lm_head") ? replace_module("lm_head", std::move(output))
                                                 : register_module("lm_head", std::move(output));
}

torch::Tensor relative_position_buckets(int64_t begin, int64_t end, int64_t keys, bool bidirectional, int64_t buckets,
                                        int64_t max_distance, torch::Device device) {
  const auto positions = [&](int64_t from, int64_t to) {
    return at::arange(from, to, torch::dtype(torch::kLong).device(device));
  };
  const torch::Tensor ahead = positions(0, keys) - positions(begin, end).unsqueeze(1);  // [queries, keys]
  torch::Tensor first = at::zeros_like(ahead);                                          // bucket of the distance 0
  torch::Tensor distance = ahead.neg().clamp_min(0);
  if (bidirectional) {
    buckets /= 2;
    first = (ahead > 0).to(torch::kLong) * buckets;
    distance = ahead.abs();
  }
  const int64_t exact = buckets / 2;
  // In float32, as transformers reckons it: where a bucket ends is a matter of rounding.
  const torch::Tensor widening = exact + (at::log(distance.to(torch::kFloat) / static_cast<double>(exact)) /
                                          std::log(static_cast<double>(max_distance) / static_cast<double>(exact)) *
                                          static_cast<double>(buckets - exact))
                                             .to(torch::kLong);
  return first + at::where(distance < exact, distance, widening.clamp_max(buckets - 1));
}

}  // namespace finetune
