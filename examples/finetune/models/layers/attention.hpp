#pragma once

#include <torch/types.h>

#include <cstdint>

namespace finetune {

/// What every query may look at.
struct AttentionMask {
  /// Undefined, or broadcasting to [batch, heads, queries, keys]: bool (true = visible), or float added to the scores.
  torch::Tensor mask;
  /// Without `mask` only: query i sees the keys 0 ... i.
  bool causal = false;
};

/// How scores become weights: softmax(cap(scale · q kᵀ) + mask), cap(s) = softcap · tanh(s / softcap).
struct AttentionOptions {
  double scale = 1;
  double softcap = 0;  ///< 0 = none
  double dropout = 0;  ///< of the weights
};

/// q [b, h, queries, d], k and v [b, g, keys, d] with g dividing h: every h/g heads share a key head
/// → [b, h, queries, d].
torch::Tensor attend(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v, const AttentionMask& mask,
                     const AttentionOptions& options);

/// Which of the keys 0 ... end-1 the queries begin ... end-1 see: those up to themselves, of which only the last
/// `window` (0 = all), and of those only real tokens: padding [batch, end] bool, true = a token; undefined = all are.
/// Every query sees itself, so that one at padding has something to look at. No mask is made where none is needed.
AttentionMask make_causal_mask(int64_t begin, int64_t end, int64_t window, const torch::Tensor& padding,
                               torch::Device device);

/// Real tokens see and are seen by all: padding [batch, keys] bool, undefined = all are → [batch, 1, 1, keys], or none.
AttentionMask make_padding_mask(const torch::Tensor& padding);

/// The keys and values of the tokens so far, in one layer.
struct KeyValueCache {
  torch::Tensor keys;    ///< [batch, key heads, capacity, head size]; undefined before the first append
  torch::Tensor values;  ///< likewise

  /// Puts k and v [batch, key heads, tokens, head size] at the positions from `begin`, and makes them all up to there.
  void append(int64_t begin, int64_t capacity, torch::Tensor& k, torch::Tensor& v);
};

}  // namespace finetune
