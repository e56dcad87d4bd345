#include <c10/core/InferenceMode.h>
#include <gtest/gtest.h>

#include "support/pairs.hpp"

namespace lora_rite::test {
namespace {

double distance(const torch::Tensor& left, const torch::Tensor& right) {
  return (left.to(torch::kDouble) - right.to(torch::kDouble)).norm().item<double>();
}

TEST(LoraRite, LowersARealLoss) {
  torch::manual_seed(0);
  const auto target = torch::matmul(torch::randn({20, 2}), torch::randn({2, 30}));
  auto a = torch::randn({4, 30}).requires_grad_();
  auto b = torch::zeros({20, 4}).requires_grad_();
  LoraRite<> optimizer(std::vector<FactorPair>{{"q", a, b}}, LoraRiteOptions(1e-2));
  double first = 0, last = 0;
  for (int i = 0; i < 300; ++i) {
    const auto loss = optimizer.step([&] {
      optimizer.zero_grad();
      auto value = (torch::matmul(b, a) - target).square().mean();
      value.backward();
      return value;
    });
    (i == 0 ? first : last) = loss.item<double>();
  }
  EXPECT_LT(last, 0.05 * first);
}

TEST(LoraRite, ThreeConstructorsStepAlike) {
  torch::manual_seed(1);
  const auto start = random_pair("layer.weight", 3, 7, 5);
  torch::nn::Module module("m");
  const auto layer = std::make_shared<torch::nn::Module>("layer");
  module.register_module("layer", layer);
  const auto in_module = clone_pairs({start});
  layer->register_module("lora_A", torch::nn::Linear(torch::nn::LinearOptions(7, 3).bias(false)));
  layer->register_module("lora_B", torch::nn::Linear(torch::nn::LinearOptions(3, 5).bias(false)));
  module.to(torch::kDouble);
  const auto found = find_factor_pairs(module);
  {
    torch::NoGradGuard no_grad;
    found[0].a.data().copy_(start.a);
    found[0].b.data().copy_(start.b);
  }
  const auto by_pair = clone_pairs({start}), by_list = clone_pairs({start});
  LoraRite<> first(by_pair, LoraRiteOptions(1e-2));
  LoraRite<> second(std::vector<torch::Tensor>{by_list[0].a, by_list[0].b}, LoraRiteOptions(1e-2));
  LoraRite<> third(module, LoraRiteOptions(1e-2));
  run_steps(first, by_pair, 0, 5);
  run_steps(second, by_list, 0, 5);
  run_steps(third, found, 0, 5);
  EXPECT_TRUE(equal_factors(by_pair, by_list));
  EXPECT_TRUE(equal_factors(by_pair, found));
  EXPECT_GT(distance(by_pair[0].a, start.a), 1e-3);
}

TEST(LoraRite, StepWithoutAnyGradientChangesNothing) {
  const std::vector<FactorPair> pairs = {random_pair("q", 2, 4, 4)};
  const auto before = clone_pairs(pairs);
  LoraRite<> optimizer(pairs);
  EXPECT_FALSE(optimizer.step().defined());
  EXPECT_TRUE(equal_factors(pairs, before));
}

TEST(LoraRite, ClosureRunsWithGradientsEvenUnderNoGrad) {
  const std::vector<FactorPair> pairs = {random_pair("q", 2, 4, 4)};
  const auto before = clone_pairs(pairs);
  LoraRite<> optimizer(pairs);
  torch::NoGradGuard no_grad;
  const auto loss = optimizer.step([&] {
    auto value = torch::matmul(pairs[0].b, pairs[0].a).square().sum();
    value.backward();
    return value;
  });
  EXPECT_TRUE(loss.defined());
  EXPECT_FALSE(equal_factors(pairs, before));
}

TEST(LoraRite, ZeroGradClearsTheGradients) {
  const std::vector<FactorPair> pairs = {random_pair("q", 2, 4, 4)};
  LoraRite<> optimizer(pairs);
  set_gradients(pairs, 1);
  optimizer.zero_grad();
  EXPECT_FALSE(pairs[0].a.grad().defined());
}

TEST(LoraRite, AFrozenFactorStaysAndItsPartnerMoves) {
  torch::manual_seed(2);
  for (const bool freeze_a : {true, false}) {
    const std::vector<FactorPair> pairs = {random_pair("q", 3, 6, 5)};
    auto frozen = freeze_a ? pairs[0].a : pairs[0].b;
    const auto moving = freeze_a ? pairs[0].b : pairs[0].a;
    frozen.set_requires_grad(false);
    const auto before = clone_pairs(pairs);
    const auto frozen_version = frozen._version();
    LoraRite<> optimizer(pairs, LoraRiteOptions(1e-2).weight_decay(0.1).balance(true));
    for (int i = 0; i < 5; ++i) {
      optimizer.zero_grad();
      torch::matmul(pairs[0].b, pairs[0].a).square().sum().backward();
      optimizer.step();
    }
    EXPECT_TRUE(torch::equal(frozen, freeze_a ? before[0].a : before[0].b));
    EXPECT_EQ(frozen._version(), frozen_version);
    EXPECT_GT(distance(moving, freeze_a ? before[0].b : before[0].a), 1e-3);
  }
}

TEST(LoraRite, PairsOfOneShapeStepAsIfAlone) {
  torch::manual_seed(3);
  std::vector<FactorPair> together;
  for (int i = 0; i < 5; ++i) together.push_back(random_pair(std::to_string(i), 3, 9, 6));
  const auto alone = clone_pairs({together[3]});
  const auto options = LoraRiteOptions(1e-2).clip_unmagnified_norm(0);  // the clip would couple them
  LoraRite<> all(together, options), one(alone, options);
  for (int step = 0; step < 4; ++step) {
    set_gradients(together, 100 + step);
    for (const auto& [copy, original] : {std::pair{alone[0].a, together[3].a}, std::pair{alone[0].b, together[3].b}}) {
      torch::Tensor(copy).mutable_grad() = original.grad().clone();
    }
    if (step == 2) {  // a missing gradient of another pair is nobody else's business
      torch::Tensor(together[1].a).mutable_grad() = torch::Tensor();
      torch::Tensor(together[2].b).mutable_grad() = torch::Tensor();
    }
    all.step();
    one.step();
  }
  EXPECT_LT(distance(alone[0].a, together[3].a), 1e-13);
  EXPECT_LT(distance(alone[0].b, together[3].b), 1e-13);
}

TEST(LoraRite, GroupsHaveOptionsOfTheirOwn) {
  torch::manual_seed(4);
  const std::vector<FactorPair> start = {random_pair("q", 2, 5, 4)};
  const auto slow = clone_pairs(start), fast = clone_pairs(start);
  LoraRite<> optimizer(slow, LoraRiteOptions(1e-3).clip_unmagnified_norm(0));
  optimizer.add_pairs(fast, LoraRiteOptions(1e-2).clip_unmagnified_norm(0));
  set_gradients(slow, 7);
  set_gradients(fast, 7);
  optimizer.step();
  EXPECT_NEAR(distance(fast[0].a, start[0].a) / distance(slow[0].a, start[0].a), 10, 1e-9);
}

TEST(LoraRite, AGroupAddedThroughLibTorchsInterfaceKeepsItsOptions) {
  const auto first = random_pair("q", 2, 5, 4), second = random_pair("k", 2, 5, 4);
  LoraRite<> optimizer({first}, LoraRiteOptions(1e-2).eps(1e-5));
  optimizer.add_param_group(torch::optim::OptimizerParamGroup(
      {second.a, second.b}, std::make_unique<LoraRiteOptions>(LoraRiteOptions(3e-3).escape(false))));
  const auto& options = static_cast<const LoraRiteOptions&>(optimizer.param_groups()[1].options());
  EXPECT_EQ(options.lr(), 3e-3);
  EXPECT_FALSE(options.escape());
  const auto third = random_pair("v", 2, 5, 4);
  optimizer.add_param_group(torch::optim::OptimizerParamGroup({third.a, third.b}));
  EXPECT_EQ(static_cast<const LoraRiteOptions&>(optimizer.param_groups()[2].options()).eps(), 1e-5);
  const auto bias = torch::zeros({3});
  optimizer.add_param_group(
      torch::optim::OptimizerParamGroup({bias}, std::make_unique<torch::optim::AdamWOptions>(1e-4)));
  EXPECT_TRUE(mentions(error_of([&] {
                         optimizer.add_param_group(torch::optim::OptimizerParamGroup(
                             {torch::zeros({3})}, std::make_unique<torch::optim::SGDOptions>(1e-4)));
                       }),
                       "options of another optimizer"));
  EXPECT_EQ(optimizer.param_groups().size(), 4u);
}

TEST(LoraRite, BalanceEqualisesTheNormsAndKeepsTheTrajectoryOfTheProduct) {
  torch::manual_seed(5);
  const std::vector<FactorPair> start = {random_pair("q", 3, 8, 6)};
  const auto plain = clone_pairs(start), balanced = clone_pairs(start);
  LoraRite<> first(plain, LoraRiteOptions(1e-2)), second(balanced, LoraRiteOptions(1e-2).balance(true));
  const auto target = torch::randn({6, 8}, torch::kDouble);
  for (int i = 0; i < 10; ++i) {
    for (auto [optimizer, pairs] : {std::pair{&first, &plain}, std::pair{&second, &balanced}}) {
      optimizer->zero_grad();
      (torch::matmul((*pairs)[0].b, (*pairs)[0].a) - target).square().mean().backward();
      optimizer->step();
    }
    EXPECT_NEAR(balanced[0].a.norm().item<double>(), balanced[0].b.norm().item<double>(), 1e-12);
  }
  const auto product = [](const FactorPair& pair) { return torch::matmul(pair.b, pair.a); };
  EXPECT_LT(distance(product(plain[0]), product(balanced[0])), 1e-12);
  EXPECT_GT(distance(product(plain[0]), product(start[0])), 1e-2);
  EXPECT_GT(std::abs(plain[0].a.norm().item<double>() - plain[0].b.norm().item<double>()), 1e-1);
}

TEST(LoraRite, MaximizeIsDescentOnTheNegatedGradient) {
  torch::manual_seed(6);
  const std::vector<FactorPair> up = {random_pair("q", 3, 8, 6)};
  const auto down = clone_pairs(up);
  LoraRite<> ascent(up, LoraRiteOptions(1e-2).maximize(true)), descent(down, LoraRiteOptions(1e-2));
  run_steps(ascent, up, 0, 4, 1.0);
  run_steps(descent, down, 0, 4, -1.0);
  EXPECT_TRUE(equal_factors(up, down));
}

TEST(LoraRite, RefusesAGradientOnAnotherDeviceAndChangesNothing) {
  for (const Engine engine : {Engine::Host, Engine::Device}) {
    const std::vector<FactorPair> pairs = {random_pair("q", 2, 4, 4, torch::kFloat)};
    LoraRite<> optimizer(pairs, LoraRiteOptions(1e-2).engine(engine));
    run_steps(optimizer, pairs, 0, 1);
    const auto before = clone_pairs(pairs);
    torch::Tensor(pairs[0].a).mutable_grad() = torch::ones({2, 4}, torch::kMeta);
    EXPECT_TRUE(mentions(error_of([&] { optimizer.step(); }),
                         "pair 'q': the gradient of factor a has shape [2, 4] on meta, expected [2, 4] on cpu"));
    EXPECT_TRUE(equal_factors(pairs, before));
  }
}

TEST(LoraRite, RefusesASparseGradientAndChangesNothing) {
  const std::vector<FactorPair> pairs = {random_pair("q", 2, 4, 4)};
  LoraRite<> optimizer(pairs);
  run_steps(optimizer, pairs, 0, 1);
  const auto before = clone_pairs(pairs);
  torch::Tensor(pairs[0].a).mutable_grad() = torch::ones({2, 4}, torch::kDouble).to_sparse();
  EXPECT_TRUE(mentions(error_of([&] { optimizer.step(); }), "the gradient of factor a has layout Sparse"));
  EXPECT_TRUE(equal_factors(pairs, before));
}

TEST(LoraRite, ReadsAGradientOfWhichMemoryHoldsTheNegative) {
  for (const Engine engine : {Engine::Host, Engine::Device}) {
    const auto moved = [&](bool negated) {
      torch::manual_seed(1);
      const FactorPair pair = {"q", torch::randn({2, 4}).requires_grad_(), torch::randn({4, 2}).requires_grad_()};
      LoraRite<> optimizer({pair}, LoraRiteOptions(1e-2).engine(engine));
      for (const Side side : kSides) {
        const auto gradient = torch::randn_like(pair.factor(side));
        torch::Tensor(pair.factor(side)).mutable_grad() = negated ? at::_neg_view(-gradient) : gradient;
      }
      optimizer.step();
      return clone_pairs({pair});
    };
    EXPECT_TRUE(equal_factors(moved(true), moved(false)));
  }
}

TEST(LoraRite, AStepInInferenceModeServesThoseOutside) {
  for (const Engine engine : {Engine::Host, Engine::Device}) {
    const auto moved = [&](bool first_in_the_mode) {
      torch::manual_seed(1);
      const FactorPair pair = {"q", torch::randn({2, 4}).requires_grad_(), torch::randn({4, 2}).requires_grad_()};
      const auto head = torch::randn({3}).requires_grad_();
      LoraRite<> optimizer({pair}, LoraRiteOptions(1e-2).engine(engine));
      optimizer.add_parameters({head}, torch::optim::AdamWOptions(1e-2));
      for (int step = 0; step < 3; ++step) {
        for (torch::Tensor each : {pair.a, pair.b, head}) each.mutable_grad() = torch::randn_like(each);
        const c10::InferenceMode mode(first_in_the_mode && step == 0);
        optimizer.step();
      }
      return std::vector<torch::Tensor>{pair.a.detach(), pair.b.detach(), head.detach()};
    };
    const auto expected = moved(false), found = moved(true);
    for (size_t i = 0; i < 3; ++i) EXPECT_TRUE(torch::equal(found[i], expected[i])) << i;
  }
}

TEST(LoraRite, RefusesWhatItCannotWrite) {
  torch::Tensor a;
  {
    const c10::InferenceMode mode;
    a = torch::randn({2, 4});
  }
  const auto b = torch::zeros({4, 2}).requires_grad_();
  const FactorPair negated = {"q", at::_neg_view(torch::randn({2, 4})).requires_grad_(), b};
  EXPECT_TRUE(mentions(error_of([&] { LoraRite<> optimizer({negated}); }), "pair 'q': factor a is a negated view"));
  LoraRite<> other({random_pair("q", 2, 4, 4)});
  other.add_parameters({a}, torch::optim::AdamWOptions(1e-2));
  a.mutable_grad() = torch::ones({2, 4});
  EXPECT_TRUE(mentions(error_of([&] { other.step(); }), "group 1: parameter 0 was made in inference mode"));
  a.mutable_grad() = torch::Tensor();
  EXPECT_TRUE(mentions(error_of([&] {
                         LoraRite<> optimizer(std::vector<FactorPair>{{"q", a, b}});
                       }),
                       "pair 'q': factor a was made in inference mode"));
}

TEST(LoraRite, NamesAGroupThatWasTamperedWith) {
  LoraRite<> optimizer({random_pair("q", 2, 4, 4)});
  const std::string saved = saved_bytes(optimizer);
  optimizer.param_groups()[0].params().push_back(torch::zeros({2}));
  EXPECT_TRUE(mentions(error_of([&] { optimizer.step(); }), "group 0: the list of parameters has 3 tensors"));
  optimizer.param_groups()[0].params().pop_back();
  optimizer.param_groups()[0].set_options(std::make_unique<torch::optim::AdamOptions>(1e-3));
  EXPECT_TRUE(mentions(error_of([&] { optimizer.step(); }), "expected LoraRiteOptions"));
  EXPECT_TRUE(mentions(error_of([&] { load_bytes(optimizer, saved); }), "expected LoraRiteOptions"));
}

TEST(LoraRite, NoticesATensorThatWasPutInTheOthersPlace) {
  const std::vector<FactorPair> pairs = {random_pair("q", 2, 4, 4), random_pair("k", 2, 4, 4)};
  LoraRite<> optimizer(pairs, LoraRiteOptions(1e-2));
  const std::vector<FactorPair> second = {random_pair("v", 2, 4, 4), random_pair("o", 2, 4, 4)};
  optimizer.add_pairs(second, LoraRiteOptions(1e-3));
  const auto head = torch::zeros({3}).requires_grad_();
  optimizer.add_parameters({head, torch::zeros({2})}, torch::optim::AdamWOptions());
  set_gradients(pairs, 1);
  const auto before = clone_pairs(pairs);
  auto& groups = optimizer.param_groups();
  const auto expect_error = [&](const std::string& words) {
    EXPECT_TRUE(mentions(error_of([&] { optimizer.step(); }), words));
    EXPECT_TRUE(mentions(error_of([&] { saved_bytes(optimizer); }), words));
    EXPECT_TRUE(mentions(error_of([&] { optimizer.upload_rates(); }), words));
    EXPECT_TRUE(equal_factors(pairs, before));
  };
  // Groups can be copied, but not assigned before LibTorch 2.7.
  const auto exchange = [](std::vector<torch::optim::OptimizerParamGroup>& of) {
    std::vector<torch::optim::OptimizerParamGroup> exchanged = {of[1], of[0], of[2]};
    of.swap(exchanged);
  };
  groups[0].params()[1] = torch::zeros({4, 2}, torch::kDouble);
  expect_error("group 0: tensor 1 of its list (pair 'q', factor b) is now a tensor that was never added, expected the");
  groups[0].params()[1] = pairs[0].b;
  std::swap(groups[0].params()[0], groups[0].params()[2]);
  expect_error("group 0: tensor 0 of its list (pair 'q', factor a) is now a tensor of pair 'k'");
  std::swap(groups[0].params()[0], groups[0].params()[2]);
  exchange(groups);
  expect_error("group 0: tensor 0 of its list (pair 'q', factor a) is now a tensor of pair 'v'");
  exchange(groups);
  groups[2].params()[0] = torch::Tensor();
  expect_error("group 2: tensor 0 of its list (parameter 0) is now a tensor that was never added");
  groups[2].params()[0] = head;
  optimizer.step();
  EXPECT_FALSE(equal_factors(pairs, before));
}

TEST(LoraRite, TakesAnotherOptionsObject) {
  const std::vector<FactorPair> pairs = {random_pair("q", 2, 4, 4)}, others = clone_pairs(pairs);
  LoraRite<> optimizer(pairs, LoraRiteOptions(1e-2)), expected(others, LoraRiteOptions(3e-3));
  optimizer.param_groups()[0].set_options(std::make_unique<LoraRiteOptions>(3e-3));
  run_steps(optimizer, pairs, 0, 2);
  run_steps(expected, others, 0, 2);
  EXPECT_TRUE(equal_factors(pairs, others));
}

TEST(LoraRite, NamesAGroupThatWasAddedPastIt) {
  LoraRite<> optimizer({random_pair("q", 2, 4, 4)});
  torch::optim::Optimizer& base = optimizer;
  base.add_param_group(torch::optim::OptimizerParamGroup({torch::zeros({2}).requires_grad_()}));
  EXPECT_TRUE(mentions(error_of([&] { optimizer.step(); }), "has 2 param groups, expected 1"));
  EXPECT_TRUE(mentions(error_of([&] { saved_bytes(optimizer); }), "add_param_group is not virtual"));
  optimizer.param_groups().clear();
  EXPECT_TRUE(mentions(error_of([&] { optimizer.step(); }), "has 0 param groups, expected 1: one was taken out"));
}

TEST(LoraRite, NamesAFactorThatChangedItsDtypeAfterTheFirstStep) {
  const std::vector<FactorPair> pairs = {random_pair("q", 2, 4, 4)};
  LoraRite<> optimizer(pairs);
  run_steps(optimizer, pairs, 0, 1);
  optimizer.zero_grad();
  torch::Tensor(pairs[0].a).set_data(pairs[0].a.data().to(torch::kFloat));
  EXPECT_TRUE(mentions(error_of([&] { optimizer.step(); }), "pair 'q': factor a is now Float"));
}

TEST(LoraRite, NonContiguousFactorsStepLikeContiguousOnes) {
  torch::manual_seed(7);
  const std::vector<FactorPair> plain = {random_pair("q", 3, 8, 6)};
  // Every second column of a wider tensor, and a transposed one.
  auto wide = torch::zeros({3, 16}, torch::kDouble);
  auto a = wide.slice(1, 0, 16, 2);
  auto b = torch::zeros({3, 6}, torch::kDouble).t();
  a.copy_(plain[0].a.detach());
  b.copy_(plain[0].b.detach());
  const std::vector<FactorPair> strided = {{"q", a.detach().requires_grad_(), b.detach().requires_grad_()}};
  LoraRite<> first(plain), second(strided);
  run_steps(first, plain, 0, 4);
  run_steps(second, strided, 0, 4);
  EXPECT_TRUE(equal_factors(plain, strided));
  EXPECT_FALSE(strided[0].a.is_contiguous());
  EXPECT_TRUE(torch::equal(wide.slice(1, 0, 16, 2), strided[0].a)) << "the tensor behind the view is what moves";
}

TEST(LoraRite, ConvolutionAndEmbeddingFactorsStepLikeTheirMatrices) {
  torch::manual_seed(8);
  const auto a = torch::randn({3, 4, 2, 2}, torch::kDouble), b = torch::randn({5, 3, 1, 2}, torch::kDouble);
  const std::vector<FactorPair> convolution = {{"c", a.clone().requires_grad_(), b.clone().requires_grad_()}};
  const std::vector<FactorPair> matrix = {
      {"c", a.flatten(1).clone().requires_grad_(), b.movedim(1, -1).reshape({10, 3}).clone().requires_grad_()}};
  LoraRite<> first(convolution, LoraRiteOptions(1e-2)), second(matrix, LoraRiteOptions(1e-2));
  for (int step = 0; step < 4; ++step) {
    set_gradients(convolution, 50 + step);
    torch::Tensor(matrix[0].a).mutable_grad() = convolution[0].a.grad().flatten(1).clone();
    torch::Tensor(matrix[0].b).mutable_grad() = convolution[0].b.grad().movedim(1, -1).reshape({10, 3}).clone();
    first.step();
    second.step();
  }
  EXPECT_LT(distance(convolution[0].a.flatten(1), matrix[0].a), 1e-13);
  EXPECT_LT(distance(convolution[0].b.movedim(1, -1).reshape({10, 3}), matrix[0].b), 1e-13);
  EXPECT_GT(distance(convolution[0].b, b), 1e-3);
}

TEST(LoraRite, AutogradNoticesThatAStepChangedAFactor) {
  torch::manual_seed(21);
  for (const Engine engine : {Engine::Host, Engine::Device}) {
    const std::vector<FactorPair> pairs = {random_pair("q", 3, 7, 5, torch::kFloat)};
    LoraRite<> optimizer(pairs, LoraRiteOptions().engine(engine));
    const auto product = pairs[0].b.matmul(pairs[0].a).sum();
    set_gradients(pairs, 1);
    optimizer.step();
    EXPECT_THROW(product.backward(), c10::Error);
  }
}

TEST(LoraRite, StateIsAboutHalfOfAdams) {
  const std::vector<FactorPair> pairs = {random_pair("q", 16, 1024, 1024, torch::kFloat)};
  const auto adam_pairs = clone_pairs(pairs);
  LoraRite<> rite(pairs);
  torch::optim::Adam adam({adam_pairs[0].a, adam_pairs[0].b});
  run_steps(rite, pairs, 0, 1);
  run_steps(adam, adam_pairs, 0, 1);
  const double ratio = static_cast<double>(saved_bytes(rite).size()) / static_cast<double>(saved_bytes(adam).size());
  EXPECT_LE(ratio, 0.55);
  EXPECT_GE(ratio, 0.5) << "the momentum alone is half: something is missing in the archive";
}

}  // namespace
}  // namespace lora_rite::test
