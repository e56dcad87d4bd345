#include <torch/nn/functional/loss.h>

#include <chrono>
#include <cmath>

#include "support.hpp"

// The real SmolLM2-135M, where prepare_smollm2.py has put it: make_smollm2_golden.py.

namespace finetune {
namespace {

std::filesystem::path smollm2() { return std::filesystem::path(LORA_RITE_MINILM_DIR).parent_path() / "smollm2"; }

double seconds_of(const std::function<void()>& action) {
  const auto start = std::chrono::steady_clock::now();
  action();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

TEST(SmolLm2, ReadsAndWritesAPageOfTextAsTransformersDoes) {
  if (!std::filesystem::exists(smollm2() / "model.safetensors")) GTEST_SKIP() << smollm2() << " is not there";
  const torch::NoGradGuard no_grad;
  const Tensors expected = lora_rite::load_safetensors(model_golden("smollm2_expected.safetensors")).tensors;
  const torch::Tensor tokens = expected.at("tokens"), wanted = expected.at("losses");
  const auto model = load_model(smollm2());

  torch::Tensor losses;
  const double reading = seconds_of([&] {
    const torch::Tensor logits = model->forward({tokens, {}, {}, {}});
    const auto options = torch::nn::functional::CrossEntropyFuncOptions().reduction(torch::kNone);
    losses = torch::nn::functional::cross_entropy(logits[0].slice(0, 0, -1), tokens[0].slice(0, 1), options);
  });
  // 30 layers of sums of 576 and 1536 products, in another order: up to 1e-4 of losses up to 20.
  const double error = distance(losses, wanted[0]);
  EXPECT_LT(error, 20 * 1e-4);
  const double perplexity = std::exp(losses.mean().item<double>());
  EXPECT_NEAR(perplexity, std::exp(wanted.mean().item<double>()), 1e-3 * perplexity);
  EXPECT_LT(perplexity, 100) << "a language model of random weights has 49152";

  torch::Tensor made;
  const LanguageInput prompt{tokens.slice(1, 0, 32), {}, {}, {}};
  const double writing = seconds_of([&] { made = model->generate(prompt, expected.at("generated").size(1)); });
  EXPECT_TRUE(made.equal(expected.at("generated"))) << made << expected.at("generated");

  std::printf(
      "perplexity %.5f (transformers %.5f), largest difference of a loss %.1e, read %.0f and wrote %.1f tokens/s\n",
      perplexity, std::exp(wanted.mean().item<double>()), error, static_cast<double>(tokens.size(1)) / reading,
      static_cast<double>(made.size(1)) / writing);
}

}  // namespace
}  // namespace finetune
