#include "models/language_model.hpp"

#include <limits>

#include "support.hpp"

// What transformers computes for tiny random models: make_goldens.py.
//
// Tolerances: a logit is a sum of about 16 products of numbers around 1 that went through some ten such sums, and exp
// and tanh between them: 1e-5, about 100 ε of float, is what rounding may do to it.

namespace finetune {
namespace {

constexpr double kRounding = 100 * std::numeric_limits<float>::epsilon();

// The texts as they would be without a cache: all of it again for every token.
torch::Tensor generate_by_recomputing(LanguageModel& model, LanguageInput input, int64_t count) {
  const torch::NoGradGuard no_grad;
  const int64_t batch = input.tokens.size(0);
  const bool has_target = model.is_encoder_decoder();
  if (has_target) input.target = torch::full({batch, 1}, model.special_tokens().decoder_start, torch::kLong);
  std::vector<torch::Tensor> made;
  torch::Tensor ended = torch::zeros({batch}, torch::kBool);
  for (int64_t i = 0; i < count && !ended.all().item<bool>(); ++i) {
    const torch::Tensor logits = model.forward(input).select(1, -1);
    const torch::Tensor next = torch::where(ended, model.special_tokens().pad, logits.argmax(-1));
    for (const int64_t end : model.special_tokens().end) ended = ended.logical_or(next == end);
    made.push_back(next);
    torch::Tensor& text = has_target ? input.target : input.tokens;
    text = torch::cat({text, next.unsqueeze(1)}, 1);
    if (!has_target && input.mask.defined()) {
      input.mask = torch::cat({input.mask, torch::ones({batch, 1}, torch::kBool)}, 1);
    }
  }
  return torch::stack(made, 1);
}

TEST(LanguageModel, LogitsAreThoseOfTransformersWithAndWithoutPadding) {
  const torch::NoGradGuard no_grad;
  double worst = 0;
  for (const std::string& name : model_names()) {
    const Tensors expected = expected_of(name);
    const auto model = load_model(model_golden(name));
    for (const std::string padding : {"", "left", "right"}) {
      const LanguageInput input = input_of(expected, padding);
      const torch::Tensor real = real_places(input);
      const torch::Tensor wanted = expected.at(padding.empty() ? "logits" : padding + ".logits");
      EXPECT_GT(wanted.std().item<double>(), 0.1);
      const double error = relative_distance(model->forward(input) * real, wanted * real);
      EXPECT_LT(error, kRounding) << name << " " << padding;
      worst = std::max(worst, error);
    }
  }
  RecordProperty("largest_difference", std::to_string(worst));
}

TEST(LanguageModel, PaddingChangesTheLogitsOfTheOthers) {
  // Without the mask the test above would compare the same three times.
  for (const std::string& name : model_names()) {
    const Tensors expected = expected_of(name);
    EXPECT_GT(distance(expected.at("left.logits"), expected.at("logits")), 0.01) << name;
  }
}

TEST(LanguageModel, PaddingBehindADecodersTextNeedsNoMask) {
  const torch::NoGradGuard no_grad;
  for (const std::string name : {"llama", "gemma2"}) {
    const Tensors expected = expected_of(name);
    const LanguageInput padded = input_of(expected, "right");
    const torch::Tensor real = real_places(padded);
    const auto model = load_model(model_golden(name));
    EXPECT_LT(distance(model->forward(input_of(expected)) * real, expected.at("right.logits") * real), 1e-5) << name;
  }
}

TEST(LanguageModel, GradientsOfLoraFactorsAreThoseOfTransformers) {
  for (const std::string& name : model_names()) {
    const Tensors expected = expected_of(name);
    const auto model = load_model(model_golden(name));
    const Tensors factors = inject_factors(*model, expected);
    EXPECT_EQ(factors.size(), 12U);
    const LanguageInput input = input_of(expected, "left");
    const torch::Tensor logits = model->forward(input);
    const torch::Tensor real = real_places(input);
    EXPECT_LT(relative_distance(logits * real, expected.at("lora.logits") * real), kRounding) << name;
    (logits * expected.at("lora.weights")).sum().backward();
    for (const auto& [factor, tensor] : factors) {
      // Gradients are sums over all tokens, which cancel in part: ten times a logit's rounding.
      const torch::Tensor& wanted = expected.at("gradient." + factor);
      EXPECT_GT(wanted.abs().max().item<double>(), 1e-3) << name << " " << factor;
      EXPECT_LT(relative_distance(tensor.grad(), wanted), 10 * kRounding) << name << " " << factor;
    }
  }
}

TEST(LanguageModel, GeneratesTheTokensOfTransformersAndOfFullRecomputing) {
  for (const std::string& name : model_names()) {
    if (name == "llama_dynamic") continue;  // see the next test
    const Tensors expected = expected_of(name);
    const auto model = load_model(model_golden(name));
    const torch::Tensor wanted = expected.at("generated");
    for (const std::string padding : {"left", ""}) {
      LanguageInput prompt = input_of(expected, padding);
      prompt.target = torch::Tensor();
      prompt.target_mask = torch::Tensor();
      const torch::Tensor made = model->generate(prompt, wanted.size(1));
      EXPECT_TRUE(made.equal(generate_by_recomputing(*model, prompt, wanted.size(1)))) << name << "\n" << made;
      if (!padding.empty()) {
        EXPECT_TRUE(made.equal(wanted)) << name << "\n" << made << "\n" << wanted;
      }
    }
  }
}

TEST(LanguageModel, AStretchedDynamicRopeIsNotGeneratedWith) {
  const auto model = load_model(model_golden("llama_dynamic"));
  const LanguageInput prompt{torch::tensor({{5, 6, 7, 8}}), {}, {}, {}};
  const torch::Tensor made = model->generate(prompt, 3);
  EXPECT_TRUE(made.equal(generate_by_recomputing(*model, prompt, 3)));
  const std::string message = error_of([&] { model->generate(prompt, 4); });
  EXPECT_NE(message.find("are 8 tokens"), std::string::npos) << message;
  EXPECT_NE(message.find("max_position_embeddings = 7"), std::string::npos) << message;
}

TEST(LanguageModel, ARowThatReachedAnEndTokenGoesOnWithPadding) {
  const Tensors expected = expected_of("mt5");
  const auto model = load_model(model_golden("mt5"));
  const torch::Tensor row = expected.at("generated")[1];
  EXPECT_EQ(row[4].item<int64_t>(), 21);
  EXPECT_EQ(row.slice(0, 5).abs().max().item<int64_t>(), 0);
  // Alone it stops there.
  const LanguageInput prompt{expected.at("tokens").slice(0, 1, 2), expected.at("left.mask").slice(0, 1, 2), {}, {}};
  EXPECT_TRUE(model->generate(prompt, 8).equal(row.slice(0, 0, 5).unsqueeze(0)));
}

TEST(LanguageModel, Bfloat16IsNearFloat) {
  const torch::NoGradGuard no_grad;
  for (const std::string& name : model_names()) {
    const Tensors expected = expected_of(name);
    const auto model = load_model(model_golden(name), torch::kBFloat16);
    const torch::Tensor logits = model->forward(input_of(expected));
    EXPECT_EQ(logits.scalar_type(), torch::kBFloat16) << name;
    // Eight bits instead of 24, and at worst some 25 roundings in a row that add up.
    const double error = relative_distance(logits.to(torch::kFloat), expected.at("logits"));
    EXPECT_LT(error, 25 * 0.00390625) << name;
    EXPECT_GT(error, 1e-4) << name << ": it was computed in float";
  }
}

TEST(LanguageModel, Bfloat16TrainsFactorsInFloat) {
  for (const std::string name : {"llama", "gemma2", "t5_gated"}) {
    const Tensors expected = expected_of(name);
    const auto model = load_model(model_golden(name), torch::kBFloat16);
    const Tensors factors = inject_factors(*model, expected);
    for (const bool again : {false, true}) {
      model->set_gradient_checkpointing(again);
      model->zero_grad();
      (model->forward(input_of(expected, "left")) * expected.at("lora.weights")).sum().backward();
      for (const auto& [factor, tensor] : factors) {
        ASSERT_TRUE(tensor.grad().defined()) << name << " " << factor;
        EXPECT_EQ(tensor.grad().scalar_type(), torch::kFloat);
        const torch::Tensor wanted = expected.at("gradient." + factor).flatten();
        EXPECT_GT(torch::cosine_similarity(tensor.grad().flatten(), wanted, 0).item<double>(), 0.95)
            << name << " " << factor;
      }
    }
  }
}

TEST(LanguageModel, EverythingIsFrozenButFactors) {
  for (const std::string& name : model_names()) {
    const auto model = load_model(model_golden(name));
    EXPECT_FALSE(model->is_training());
    for (const auto& item : model->named_parameters()) EXPECT_FALSE(item.value().requires_grad()) << item.key();
    const Tensors expected = expected_of(name);
    inject_factors(*model, expected);
    for (const auto& item : model->named_parameters()) {
      EXPECT_EQ(item.value().requires_grad(), item.key().find(".lora_") != std::string::npos) << item.key();
    }
  }
}

TEST(LanguageModel, ParametersAreNamedAsInTheCheckpoint) {
  for (const std::string& name : model_names()) {
    const Tensors file = lora_rite::load_safetensors(model_golden(name) / "model.safetensors").tensors;
    const auto parameters = load_model(model_golden(name))->named_parameters();
    for (const auto& [tensor, values] : file) {
      const torch::Tensor* own = parameters.find(tensor);
      ASSERT_NE(own, nullptr) << name << " " << tensor;
      EXPECT_TRUE(own->equal(values)) << name << " " << tensor;
    }
    for (const auto& item : parameters) {
      if (file.count(item.key()) > 0 || item.key() == "lm_head.weight") continue;
      const torch::Tensor* shared = parameters.find("shared.weight");  // T5's stacks name it once more
      ASSERT_NE(shared, nullptr) << name << " " << item.key();
      EXPECT_TRUE(item.value().is_same(*shared)) << name << " " << item.key();
    }
  }
}

TEST(LanguageModel, DropoutActsInTrainingOnly) {
  const torch::NoGradGuard no_grad;
  for (const std::string name : {"t5", "t5_gated"}) {
    const Tensors expected = expected_of(name);
    const auto model = load_model(model_golden(name));
    model->train();
    torch::manual_seed(0);
    const torch::Tensor first = model->forward(input_of(expected));
    EXPECT_GT(distance(first, model->forward(input_of(expected))), 0.01) << name;
    torch::manual_seed(0);
    EXPECT_EQ(distance(first, model->forward(input_of(expected))), 0) << name;
    model->eval();
    EXPECT_LT(relative_distance(model->forward(input_of(expected)), expected.at("logits")), kRounding) << name;
  }
}

TEST(LanguageModel, LabelsAreShiftedBehindTheStartToken) {
  const SpecialTokens tokens{/*pad=*/7, {1}, /*decoder_start=*/9};
  const torch::Tensor labels = torch::tensor({{3, 4, 5}, {6, -100, -100}});
  EXPECT_TRUE(shift_right(labels, tokens).equal(torch::tensor({{9, 3, 4}, {9, 6, 7}})));
  EXPECT_NE(error_of([&] { shift_right(labels, {}); }).find("no decoder_start_token_id"), std::string::npos);
}

TEST(LanguageModel, WhatCannotBeGeneratedOrComputedIsRefused) {
  const auto decoder = load_model(model_golden("llama"));
  const auto t5 = load_model(model_golden("t5"));
  const torch::Tensor tokens = torch::tensor({{3, 4, 5}});
  const torch::Tensor ragged = torch::tensor({{1, 1, 0}}).to(torch::kBool);
  const auto expect = [&](const std::function<void()>& action, const std::string& part) {
    const std::string message = error_of(action);
    EXPECT_NE(message.find(part), std::string::npos) << message;
  };
  expect([&] { decoder->generate({tokens, ragged, {}, {}}, 2); }, "pad the shorter prompts on the left");
  expect([&] { decoder->generate({tokens, {}, {}, {}}, 0); }, "max_new_tokens is 0");
  expect([&] { decoder->generate({tokens.slice(1, 0, 0), {}, {}, {}}, 2); }, "tokens is Long [1, 0]; expected is");
  expect([&] { t5->generate({tokens, {}, tokens, {}}, 2); }, "takes no target");
  expect([&] { decoder->forward({tokens, {}, tokens, {}}); }, "a decoder takes no target");
  expect([&] { t5->forward({tokens, {}, {}, {}}); }, "needs a target");
  expect([&] { decoder->forward({{}, {}, {}, {}}); }, "tokens is undefined; expected is Long [batch, length]");
  expect([&] { decoder->forward({tokens[0], {}, {}, {}}); }, "tokens is Long [3]; expected is Long [batch, length]");
  expect([&] { decoder->forward({tokens.to(torch::kInt), {}, {}, {}}); }, "tokens is Int [1, 3]");
  expect(
      [&] {
        decoder->forward({tokens, torch::ones({1, 3}), {}, {}});
      },
      "the mask of tokens is Float [1, 3]; expected is Bool [1, 3]");
  expect(
      [&] {
        t5->forward({tokens, {}, tokens, ragged.slice(1, 0, 2)});
      },
      "the mask of target is Bool [1, 2]; expected is Bool [1, 3]");
}

TEST(LanguageModel, ASourceOfNothingButPaddingGivesNoNan) {
  const torch::NoGradGuard no_grad;
  const auto model = load_model(model_golden("t5"));
  const torch::Tensor tokens = torch::tensor({{3, 4, 5}, {6, 7, 8}});
  const torch::Tensor mask = torch::tensor({{1, 1, 0}, {0, 0, 0}}).to(torch::kBool);
  EXPECT_TRUE(model->forward({tokens, mask, tokens, {}}).isfinite().all().item<bool>());
}

}  // namespace
}  // namespace finetune
