#include "models/language_model.hpp"

#include <torch/types.h>
#include <torch/utils.h>

#include <algorithm>

#include "common/error.hpp"

namespace finetune {
torch::Tensor LanguageModel::generate(const LanguageInput& prompt, int64_t max_new_tokens) {
  if (max_new_tokens < 1) fail("max_new_tokens is ", max_new_tokens, "; it must be at least 1");
  if (prompt.target.defined()) fail("generate takes no target: it makes one");
  check_tokens("tokens", prompt.tokens, prompt.mask);
  if (!is_encoder_decoder() && prompt.mask.defined() && !prompt.mask.select(1, -1).all().item<bool>()) {
    fail("a prompt ends in padding; pad the shorter prompts on the left");
  }
  const torch::NoGradGuard no_grad;
  const std::vector<int64_t>& end = special_tokens().end;
  const int64_t filler = special_tokens().pad >= 0 ? special_tokens().pad : end.empty() ? 0 : end.front();
  Generation generation;
  torch::Tensor state = begin(prompt, max_new_tokens, generation);
  torch::Tensor ended = at::zeros({prompt.tokens.size(0)}, prompt.tokens.options().dtype(torch::kBool));
  std::vector<torch::Tensor> made;
  while (true) {
    const torch::Tensor next = logits(state).argmax(-1).masked_fill(ended, filler);  // [batch]
    made.push_back(next);
    for (const int64_t token : end) ended = ended.logical_or(next == token);
    if (static_cast<int64_t>(made.size()) == max_new_tokens || ended.all().item<bool>()) break;
    state = advance(next.unsqueeze(1), generation);
  }
  return at::stack(made, 1);
}

void LanguageModel::untie_output() {
  const auto parameters = named_parameters();
  const torch::Tensor* output = parameters.find("lm_head.weight");
  if (output == nullptr || !output->is_same(embedding_weight())) return;
  set_output(make_linear(output->detach().clone()));
}

void LanguageModel::check_tokens(const std::string& what, const torch::Tensor& tokens, const torch::Tensor& mask) {
  const auto describe = [](const torch::Tensor& tensor) {
    return tensor.defined() ? concat(c10::toString(tensor.scalar_type()), " ", tensor.sizes())
                            : std::string("undefined");
  };
  if (!tokens.defined() || tokens.scalar_type() != torch::kLong || tokens.dim() != 2 || tokens.numel() == 0) {
    fail(what, " is ", describe(tokens), "; expected is Long [batch, length] with at least one token");
  }
  if (mask.defined() && (mask.scalar_type() != torch::kBool || mask.sizes() != tokens.sizes())) {
    fail("the mask of ", what, " is ", describe(mask), "; expected is Bool ", tokens.sizes());
  }
}

torch::Tensor shift_right(const torch::Tensor& labels, const SpecialTokens& tokens) {
  if (tokens.decoder_start < 0)
    fail("the model has no decoder_start_token_id; only an encoder-decoder shifts its labels");
  const torch::Tensor start = at::full({labels.size(0), 1}, tokens.decoder_start, labels.options());
  const torch::Tensor rest = labels.slice(1, 0, -1);
  return at::cat({start, rest.masked_fill(rest < 0, std::max<int64_t>(tokens.pad, 0))}, 1);
}

}  // namespace finetune
