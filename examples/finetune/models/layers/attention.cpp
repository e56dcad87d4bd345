#include "models/layers/attention.hpp"

#include <torch/types.h>

namespace finetune {
namespace {

// [b, g, keys, d] → [b, h, keys, d]
torch::Tensor share_heads(const torch::Tensor& x, int64_t heads) {
  const int64_t sharing = heads / x.size(1);
  if (sharing == 1) return x;
  return x.unsqueeze(2).expand({-1, -1, sharing, -1, -1}).flatten(1, 2);
}

// The softmax by itself, because the fused kernels know no soft cap.
torch::Tensor attend_capped(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                            const AttentionMask& mask, const AttentionOptions& options) {
  torch::Tensor scores = at::matmul(q, share_heads(k, q.size(1)).transpose(-2, -1)) * options.scale;
  scores = at::tanh(scores / options.softcap) * options.softcap;  // [b, h, queries, keys]
  torch::Tensor visible = mask.mask;
  if (mask.causal) {
    visible = at::ones({q.size(2), k.size(2)}, torch::dtype(torch::kBool).device(q.device())).tril();
  }
  if (visible.defined()) {
    scores =
        visible.scalar_type() == torch::kBool ? scores.masked_fill(visible.logical_not(), -INFINITY) : scores + visible;
  }
  torch::Tensor weights = at::softmax(scores, -1, torch::kFloat).to(q.scalar_type());
  if (options.dropout > 0) weights = at::dropout(weights, options.dropout, /*train=*/true);
  return at::matmul(weights, share_heads(v, q.size(1)));
}

}  // namespace

torch::Tensor attend(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v, const AttentionMask& mask,
                     const AttentionOptions& options) {
  if (options.softcap > 0) return attend_capped(q, k, v, mask, options);
  const std::optional<torch::Tensor> visible = mask.mask.defined() ? std::optional(mask.mask) : std::nullopt;
  return at::scaled_dot_product_attention(q, share_heads(k, q.size(1)), share_heads(v, q.size(1)), visible,
                                          options.dropout, mask.causal, options.scale);
}

AttentionMask make_causal_mask(int64_t begin, int64_t end, int64_t window, const torch::Tensor& padding,
                               torch::Device device) {
  const bool windowed = window > 0 && window < end;
  if (!padding.defined() && !windowed) {
    if (begin == 0) return {{}, /*causal=*/true};
    if (begin + 1 == end) return {};
  }
  const torch::Tensor keys = at::arange(end, torch::dtype(torch::kLong).device(device));
  const torch::Tensor queries = keys.slice(0, begin).unsqueeze(1);
  torch::Tensor visible = keys <= queries;  // [queries, keys]
  if (windowed) visible = visible.logical_and(keys > queries - window);
  if (!padding.defined()) return {visible};
  const torch::Tensor present = padding.unsqueeze(1).logical_or(keys == queries);  // [b, queries, keys]
  return {visible.logical_and(present).unsqueeze(1)};
}

AttentionMask make_padding_mask(const torch::Tensor& padding) {
  if (!padding.defined()) return {};
  return {padding.unsqueeze(1).unsqueeze(1)};
}

void KeyValueCache::append(int64_t begin, int64_t capacity, torch::Tensor& k, torch::Tensor& v) {
  if (!keys.defined()) {
    keys = at::empty({k.size(0), k.size(1), capacity, k.size(3)}, k.options());
    values = at::empty_like(keys);
  }
  const int64_t end = begin + k.size(2);
  keys.slice(2, begin, end).copy_(k);
  values.slice(2, begin, end).copy_(v);
  k = keys.slice(2, 0, end);
  v = values.slice(2, 0, end);
}

}  // namespace finetune
