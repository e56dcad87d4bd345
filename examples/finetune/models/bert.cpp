#include "models/bert.hpp"

#include <utility>

#include "common/error.hpp"
#include "models/base_checkpoint.hpp"
#include "models/layers/layers.hpp"
#include "models/layers/linear.hpp"

namespace finetune {
namespace {

// Shapes: b = batch, l = length (padded), n = real tokens in the batch, d = hidden size, h = heads.

// Where the real tokens stand in a padded batch. Everything but the attention works token by token, so it runs on the n
// real tokens alone: in batches of unlike sentences nearly half of the padded work is saved.
struct TokenLayout {
  explicit TokenLayout(const torch::Tensor& mask)
      : batch(mask.size(0)),
        length(mask.size(1)),
        places(mask.flatten().nonzero().squeeze(1)),
        attention_mask(mask.unsqueeze(1).unsqueeze(1)) {}

  // [b, l, …] → [n, …]
  torch::Tensor pack(const torch::Tensor& padded) const { return padded.flatten(0, 1).index_select(0, places); }

  // [n, d] → [b, l, d], zero where there is no token
  torch::Tensor unpack(const torch::Tensor& packed) const {
    return at::zeros({batch * length, packed.size(1)}, packed.options())
        .index_copy(0, places, packed)
        .unflatten(0, {batch, length});
  }

  int64_t batch;
  int64_t length;
  torch::Tensor places;          // [n] int64, ascending places in the flattened batch
  torch::Tensor attention_mask;  // [b, 1, 1, l]
};

struct LayerNorm : torch::nn::Module {
  LayerNorm(int64_t size, double eps)
      : weight(register_parameter("weight", torch::zeros({size}), false)),
        bias(register_parameter("bias", torch::zeros({size}), false)),
        eps(eps) {}

  torch::Tensor forward(const torch::Tensor& x) { return at::layer_norm(x, weight.sizes(), weight, bias, eps); }

  torch::Tensor weight;
  torch::Tensor bias;
  double eps;
};

struct SelfAttention : torch::nn::Module {
  explicit SelfAttention(const BertConfig& config)
      : query(register_module("query", linear(config))),
        key(register_module("key", linear(config))),
        value(register_module("value", linear(config))),
        heads(config.num_attention_heads) {}

  // x [n, d] → [n, d].
  torch::Tensor forward(const torch::Tensor& x, const TokenLayout& layout) {
    const auto split_heads = [&](const torch::Tensor& packed) {
      return layout.unpack(packed).unflatten(-1, {heads, -1}).transpose(1, 2);  // [b, h, l, d/h]
    };
    const torch::Tensor attended =
        at::scaled_dot_product_attention(split_heads(query->forward(x)), split_heads(key->forward(x)),
                                         split_heads(value->forward(x)), layout.attention_mask);  // [b, h, l, d/h]
    return layout.pack(attended.transpose(1, 2)).flatten(1);
  }

  static std::shared_ptr<Linear> linear(const BertConfig& config) {
    return make_linear(config.hidden_size, config.hidden_size, /*bias=*/true);
  }

  std::shared_ptr<Linear> query, key, value;
  int64_t heads;
};

// A linear layer whose result is added to the residual stream and normalised.
struct ResidualOutput : torch::nn::Module {
  ResidualOutput(int64_t in_features, const BertConfig& config)
      : dense(register_module("dense", make_linear(in_features, config.hidden_size, /*bias=*/true))),
        norm(register_module("LayerNorm", std::make_shared<LayerNorm>(config.hidden_size, config.layer_norm_eps))) {}

  torch::Tensor forward(const torch::Tensor& x, const torch::Tensor& residual) {
    return norm->forward(dense->forward(x) + residual);
  }

  std::shared_ptr<Linear> dense;
  std::shared_ptr<LayerNorm> norm;
};

struct Attention : torch::nn::Module {
  explicit Attention(const BertConfig& config)
      : self(register_module("self", std::make_shared<SelfAttention>(config))),
        output(register_module("output", std::make_shared<ResidualOutput>(config.hidden_size, config))) {}

  torch::Tensor forward(const torch::Tensor& x, const TokenLayout& layout) {
    return output->forward(self->forward(x, layout), x);
  }

  std::shared_ptr<SelfAttention> self;
  std::shared_ptr<ResidualOutput> output;
};

struct Intermediate : torch::nn::Module {
  explicit Intermediate(const BertConfig& config)
      : dense(register_module("dense", make_linear(config.hidden_size, config.intermediate_size, /*bias=*/true))) {}

  torch::Tensor forward(const torch::Tensor& x) { return at::gelu(dense->forward(x)); }

  std::shared_ptr<Linear> dense;
};

}  // namespace

struct BertModel::Embeddings : torch::nn::Module {
  explicit Embeddings(const BertConfig& config)
      : words(table("word_embeddings", config.vocab_size, config.hidden_size)),
        positions(table("position_embeddings", config.max_position_embeddings, config.hidden_size)),
        types(table("token_type_embeddings", config.type_vocab_size, config.hidden_size)),
        norm(register_module("LayerNorm", std::make_shared<LayerNorm>(config.hidden_size, config.layer_norm_eps))) {}

  // tokens [b, l] → [n, d]. Every token is of type 0: there are no sentence pairs here.
  torch::Tensor forward(const torch::Tensor& tokens, const TokenLayout& layout) {
    const torch::Tensor words_of = words->forward(layout.pack(tokens));
    const torch::Tensor positions_of = positions->forward(layout.places.remainder(layout.length));
    return norm->forward(words_of + positions_of + types->weight[0]);
  }

  std::shared_ptr<Embedding> table(const char* name, int64_t rows, int64_t columns) {
    return register_module(name, std::make_shared<Embedding>(rows, columns));
  }

  std::shared_ptr<Embedding> words, positions, types;
  std::shared_ptr<LayerNorm> norm;
};

struct BertModel::Layer : torch::nn::Module {
  explicit Layer(const BertConfig& config)
      : attention(register_module("attention", std::make_shared<Attention>(config))),
        intermediate(register_module("intermediate", std::make_shared<Intermediate>(config))),
        output(register_module("output", std::make_shared<ResidualOutput>(config.intermediate_size, config))) {}

  torch::Tensor forward(const torch::Tensor& x, const TokenLayout& layout) {
    const torch::Tensor attended = attention->forward(x, layout);
    return output->forward(intermediate->forward(attended), attended);
  }

  std::shared_ptr<Attention> attention;
  std::shared_ptr<Intermediate> intermediate;
  std::shared_ptr<ResidualOutput> output;
};

BertModel::BertModel(const BertConfig& config)
    : config_(config), embeddings_(register_module("embeddings", std::make_shared<Embeddings>(config))) {
  const auto encoder = register_module("encoder", std::make_shared<Scope>());
  const auto list = encoder->register_module("layer", std::make_shared<Scope>());
  for (int64_t index = 0; index < config.num_hidden_layers; ++index) {
    layers_.push_back(list->register_module(std::to_string(index), std::make_shared<Layer>(config)));
  }
  for (torch::Tensor& parameter : parameters()) parameter.set_requires_grad(false);
}

torch::Tensor BertModel::forward(const torch::Tensor& tokens, const torch::Tensor& mask) {
  const TokenLayout layout(mask);
  torch::Tensor hidden = embeddings_->forward(tokens, layout);  // [n, d]
  for (const auto& layer : layers_) hidden = layer->forward(hidden, layout);
  return layout.unpack(hidden);
}

std::shared_ptr<BertModel> load_bert(const std::filesystem::path& folder) {
  auto model = std::make_shared<BertModel>(BertConfig::from_file(folder / "config.json"));
  const BaseCheckpoint base(folder);
  for (auto& item : model->named_parameters()) {
    const std::string name = base.find(item.key());
    if (name.empty()) {
      fail(folder.string(), ": lacks the tensor '", item.key(), "'; it does not belong to the config.json beside it");
    }
    const torch::Tensor values = base.tensor(name);
    if (values.sizes() != item.value().sizes()) {
      fail(folder.string(), ": tensor '", name, "' has shape ", values.sizes(), ", but config.json asks for ",
           item.value().sizes());
    }
    if (!values.is_floating_point()) {
      fail(folder.string(), ": tensor '", name, "' has dtype ", c10::toString(values.scalar_type()),
           "; expected are floating-point weights");
    }
    // Assigning the data keeps the handles that the modules hold, and frees the zeros.
    item.value().set_data(values.to(torch::kFloat));
  }
  return model;
}

torch::Tensor mean_pool(const torch::Tensor& hidden, const torch::Tensor& mask) {
  const torch::Tensor weights = mask.to(hidden.scalar_type());                    // [b, l]
  const torch::Tensor sum = at::matmul(weights.unsqueeze(1), hidden).squeeze(1);  // [b, d]
  return sum / weights.sum(1, /*keepdim=*/true).clamp_min(1);
}

}  // namespace finetune
