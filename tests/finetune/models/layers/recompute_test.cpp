#include "models/layers/recompute.hpp"

#include <ATen/autocast_mode.h>
#include <torch/autograd.h>

#include <limits>
#include <set>
#include <utility>
#include <vector>

#include "finetune/models/support.hpp"

namespace finetune {
namespace {

// A layer with an inside worth forgetting: tanh(x wᵀ)², dropout.
torch::Tensor layer(const torch::Tensor& x, const torch::Tensor& w) {
  return torch::dropout(torch::tanh(torch::linear(x, w)).square(), 0.25, /*train=*/true);
}

struct Problem {
  torch::Tensor x = torch::randn({5, 4});
  torch::Tensor w = torch::randn({4, 4}).requires_grad_();
  torch::Tensor v = torch::randn({4, 4}).requires_grad_();
};

Recomputable part_of(const torch::Tensor& w) {
  return [w](const std::vector<torch::Tensor>& inputs) { return layer(inputs[0], w); };
}

TEST(Recompute, GradientsAreThoseWithoutIt) {
  torch::manual_seed(1);
  Problem problem;
  torch::manual_seed(2);
  const torch::Tensor plain = layer(layer(problem.x, problem.w), problem.v);
  const auto expected = torch::autograd::grad({plain.sum()}, {problem.w, problem.v});
  torch::manual_seed(2);
  // The first input needs no gradient, although a parameter inside does.
  const torch::Tensor first = recompute(part_of(problem.w), {problem.x}, {problem.w});
  const torch::Tensor second = recompute(part_of(problem.v), {first}, {problem.v});
  EXPECT_TRUE(second.equal(plain));
  const auto found = torch::autograd::grad({second.sum()}, {problem.w, problem.v});
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_GT(expected[i].abs().max().item<double>(), 0.01);
    EXPECT_TRUE(found[i].equal(expected[i])) << i;
  }
}

TEST(Recompute, EveryInputGetsItsGradient) {
  torch::manual_seed(3);
  const torch::Tensor x = torch::randn({3, 4}).requires_grad_(), y = torch::randn({3, 4}).requires_grad_();
  const Recomputable product = [](const std::vector<torch::Tensor>& inputs) { return inputs[0] * inputs[1].exp(); };
  recompute(product, {x, y}, {}).sum().backward();
  EXPECT_TRUE(x.grad().equal(y.detach().exp()));
  EXPECT_TRUE(y.grad().equal((x * y.exp()).detach()));
}

TEST(Recompute, KeepsNothingOfTheInside) {
  torch::manual_seed(4);
  Problem problem;
  c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> inside(torch::Tensor().getIntrusivePtr());
  const auto remember = [&inside](const torch::Tensor& tensor) {
    inside = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>(tensor.getIntrusivePtr());
  };
  const Recomputable part = [&](const std::vector<torch::Tensor>& inputs) {
    const torch::Tensor hidden = torch::linear(inputs[0], problem.w).exp();
    remember(hidden);
    return hidden.square();
  };
  const torch::Tensor plain = part({problem.x});
  EXPECT_FALSE(inside.expired()) << "autograd keeps it for the backward pass";
  const torch::Tensor output = recompute(part, {problem.x}, {problem.w});
  EXPECT_TRUE(inside.expired());
  output.sum().backward();
  EXPECT_TRUE(problem.w.grad().defined());
}

TEST(Recompute, LaterRandomNumbersAreThoseWithoutIt) {
  torch::manual_seed(5);
  Problem problem;
  torch::manual_seed(6);
  torch::Tensor output = layer(problem.x, problem.w);
  torch::rand({4});
  output.sum().backward();
  const torch::Tensor expected = torch::rand({4});
  torch::manual_seed(6);
  output = recompute(part_of(problem.w), {problem.x}, {problem.w});
  torch::rand({4});
  output.sum().backward();
  EXPECT_TRUE(torch::rand({4}).equal(expected));
}

TEST(Recompute, AutocastingIsThatOfTheFirstRun) {
  torch::manual_seed(7);
  Problem problem;
  std::vector<torch::ScalarType> seen;
  const Recomputable part = [&](const std::vector<torch::Tensor>& inputs) {
    const torch::Tensor y = torch::linear(inputs[0], problem.w);
    seen.push_back(y.scalar_type());
    return y;
  };
  at::autocast::set_autocast_dtype(at::kCPU, torch::kBFloat16);
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const torch::Tensor output = recompute(part, {problem.x}, {problem.w});
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::clear_cache();
  output.sum().backward();
  EXPECT_EQ(seen, (std::vector<torch::ScalarType>{torch::kBFloat16, torch::kBFloat16}));
  EXPECT_FALSE(at::autocast::is_autocast_enabled(at::kCPU));
  EXPECT_TRUE(problem.w.grad().defined());
}

TEST(Recompute, RunsTwiceForAGradientAndOnceWithout) {
  torch::manual_seed(8);
  Problem problem;
  int runs = 0;
  const Recomputable part = [&](const std::vector<torch::Tensor>& inputs) {
    ++runs;
    return torch::linear(inputs[0], problem.w);
  };
  recompute(part, {problem.x}, {problem.w}).sum().backward();
  EXPECT_EQ(runs, 2);
  const torch::NoGradGuard no_grad;
  EXPECT_FALSE(recompute(part, {problem.x}, {problem.w}).requires_grad());
  EXPECT_EQ(runs, 3);
}

TEST(Recompute, AnErrorInTheSecondRunLeavesTheSurroundings) {
  torch::manual_seed(9);
  Problem problem;
  bool again = false;
  const Recomputable part = [&](const std::vector<torch::Tensor>& inputs) {
    TORCH_CHECK(!std::exchange(again, true), "broken");
    return layer(inputs[0], problem.w);
  };
  const torch::Tensor output = recompute(part, {problem.x}, {problem.w}).sum();
  torch::manual_seed(10);
  EXPECT_THROW(output.backward(), c10::Error);
  const torch::Tensor found = torch::rand({4});
  torch::manual_seed(10);
  EXPECT_TRUE(found.equal(torch::rand({4})));
}

TEST(Recompute, NoInputsAreRefused) {
  EXPECT_THROW(recompute([](const auto&) { return torch::Tensor(); }, {}, {}), c10::Error);
}

Tensors gradients_of(LanguageModel& model, const Tensors& factors, const LanguageInput& input, bool checkpointing) {
  model.set_gradient_checkpointing(checkpointing);
  model.zero_grad();
  torch::manual_seed(11);
  model.forward(input).square().mean().backward();
  Tensors gradients;
  for (const auto& [name, factor] : factors) gradients[name] = factor.grad().clone();
  return gradients;
}

// How many operations autograd remembers.
size_t graph_size(const torch::Tensor& output) {
  std::set<torch::autograd::Node*> seen;
  std::vector<torch::autograd::Node*> left = {output.grad_fn().get()};
  while (!left.empty()) {
    torch::autograd::Node* node = left.back();
    left.pop_back();
    if (node == nullptr || !seen.insert(node).second) continue;
    for (const auto& edge : node->next_edges()) left.push_back(edge.function.get());
  }
  return seen.size();
}

TEST(GradientCheckpointing, NothingInsideALayerIsRemembered) {
  for (const std::string& name : model_names()) {
    const Tensors expected = expected_of(name);
    const auto model = load_model(model_golden(name));
    inject_factors(*model, expected);
    const LanguageInput input = input_of(expected);
    const size_t without = graph_size(model->forward(input));
    model->set_gradient_checkpointing(true);
    const torch::Tensor logits = model->forward(input);
    // Left are a node a layer, the factors, and norm and output behind the layers.
    EXPECT_LT(graph_size(logits), 40U) << name;
    EXPECT_GT(without, 80U) << name;
  }
}

TEST(GradientCheckpointing, GradientsOfFactorsAreTheSameBitForBit) {
  const int threads = torch::get_num_threads();
  torch::set_num_threads(1);
  for (const std::string& name : model_names()) {
    const Tensors expected = expected_of(name);
    const auto model = load_model(model_golden(name));
    const Tensors factors = inject_factors(*model, expected);
    for (const bool training : {false, true}) {  // T5 has dropout of its own
      model->train(training);
      const LanguageInput input = input_of(expected, "left");
      const Tensors without = gradients_of(*model, factors, input, false);
      for (const auto& [factor, gradient] : gradients_of(*model, factors, input, true)) {
        EXPECT_GT(gradient.abs().max().item<double>(), 0) << name << " " << factor;
        EXPECT_TRUE(gradient.equal(without.at(factor))) << name << " " << factor << (training ? " training " : " ")
                                                        << relative_distance(gradient, without.at(factor));
      }
    }
  }
  torch::set_num_threads(threads);
}

TEST(GradientCheckpointing, AdaptersDropTheSameInputsTwice) {
  for (const std::string name : {"llama", "t5"}) {
    const Tensors expected = expected_of(name);
    const auto model = load_model(model_golden(name));
    lora_rite::nn::LoraConfig config;
    config.target_modules = "all-linear";
    config.init = lora_rite::nn::LoraInit::Random;
    config.dropout = 0.3;
    lora_rite::nn::inject_lora(*model, config);
    model->train();
    Tensors factors;
    for (const auto& pair : lora_rite::nn::factor_pairs(*model)) {
      factors[pair.name + " A"] = pair.a;
      factors[pair.name + " B"] = pair.b;
    }
    const LanguageInput input = input_of(expected);
    const Tensors without = gradients_of(*model, factors, input, false);
    for (const auto& [factor, gradient] : gradients_of(*model, factors, input, true)) {
      // Sums over the places where the source is used may be added in another order.
      EXPECT_LT(relative_distance(gradient, without.at(factor)), 100 * std::numeric_limits<float>::epsilon())
          << name << " " << factor;
    }
  }
}

TEST(GradientCheckpointing, ATrainedPositionBiasGetsItsGradient) {
  const Tensors expected = expected_of("t5");
  const auto model = load_model(model_golden("t5"));
  Tensors biases;
  for (auto& item : model->named_parameters()) {
    if (item.key().find("relative_attention_bias") != std::string::npos) {
      biases[item.key()] = item.value().requires_grad_();
    }
  }
  EXPECT_EQ(biases.size(), 2U);
  const LanguageInput input = input_of(expected);
  const Tensors without = gradients_of(*model, biases, input, false);
  for (const auto& [name, gradient] : gradients_of(*model, biases, input, true)) {
    EXPECT_GT(gradient.abs().max().item<double>(), 0);
    EXPECT_LT(relative_distance(gradient, without.at(name)), 100 * std::numeric_limits<float>::epsilon()) << name;
  }
}

}  // namespace
}  // namespace finetune
