// Every way to write a LoraRite: a test of the compiler first of all.

#include <gtest/gtest.h>

#include "support/pairs.hpp"

namespace lora_rite::test {
namespace {

using torch::optim::OptimizerParamGroup;

std::shared_ptr<torch::nn::Module> module_with_head() {
  auto module = std::make_shared<torch::nn::Module>("m");
  module->register_parameter("lora_A", torch::randn({2, 5}));
  module->register_parameter("lora_B", torch::randn({4, 2}));
  module->register_parameter("head", torch::randn({3, 4}));
  return module;
}

double rate(const LoraRite<>& optimizer, size_t group = 0) {
  return optimizer.param_groups()[group].options().get_lr();
}

TEST(Constructors, AreChosenByWhatIsGiven) {
  const auto a = torch::randn({2, 5}).requires_grad_(), b = torch::randn({4, 2}).requires_grad_();
  const std::vector<FactorPair> pairs = {{"n", a, b}};
  const auto module = module_with_head();
  EXPECT_EQ(rate(LoraRite<>(pairs)), 1e-3);
  EXPECT_EQ(rate(LoraRite<>(pairs, {})), 1e-3);
  EXPECT_EQ(rate(LoraRite<>(pairs, LoraRiteOptions(2e-3))), 2e-3);
  EXPECT_EQ(rate(LoraRite<>(pairs, 2e-3)), 2e-3);
  EXPECT_EQ(rate(LoraRite<>({{"n", a, b}})), 1e-3);
  EXPECT_EQ(rate(LoraRite<>({{"n", a, b}}, LoraRiteOptions(2e-3))), 2e-3);
  EXPECT_EQ(rate(LoraRite<>({{"n", a, b}}, 2e-3)), 2e-3);
  EXPECT_EQ(rate(LoraRite<>({FactorPair{"n", a, b}})), 1e-3);
  EXPECT_EQ(rate(LoraRite<>({a, b})), 1e-3);
  EXPECT_EQ(rate(LoraRite<>({a, b}, 2e-3)), 2e-3);
  EXPECT_EQ(rate(LoraRite<>(std::vector<torch::Tensor>{a, b})), 1e-3);
  EXPECT_EQ(rate(LoraRite<>(std::vector<torch::Tensor>{a, b}, LoraRiteOptions(2e-3))), 2e-3);
  EXPECT_EQ(rate(LoraRite<>(std::vector<torch::Tensor>{a, b}, 2e-3)), 2e-3);
  EXPECT_EQ(rate(LoraRite<>(*module)), 1e-3);
  EXPECT_EQ(rate(LoraRite<>(*module, {})), 1e-3);
  EXPECT_EQ(rate(LoraRite<>(*module, LoraRiteOptions(2e-3)), 1), 2e-3);
  EXPECT_EQ(rate(LoraRite<>(*module, 2e-3), 1), 2e-3);
  EXPECT_EQ(rate(LoraRite<>(*module, LoraRiteOptions(2e-3), torch::optim::AdamWOptions(3e-3)), 1), 3e-3);
  EXPECT_EQ(rate(LoraRite<>(*module, 2e-3, 3e-3), 1), 3e-3);
  LoraRite<> added(pairs, 2e-3);
  added.add_pairs({random_pair("k", 2, 4, 4)}, 5e-3);
  EXPECT_EQ(rate(added, 1), 5e-3);
}

TEST(Constructors, TakeLibTorchsParamGroups) {
  const auto pair = random_pair("q", 2, 5, 4), other = random_pair("k", 2, 5, 4);
  const auto head = torch::zeros({3}).requires_grad_();
  std::vector<OptimizerParamGroup> groups;
  groups.emplace_back(std::vector<torch::Tensor>{pair.a, pair.b});
  groups.emplace_back(std::vector<torch::Tensor>{other.a, other.b},
                      std::make_unique<LoraRiteOptions>(LoraRiteOptions(3e-3).escape(false)));
  groups.emplace_back(std::vector<torch::Tensor>{head}, std::make_unique<torch::optim::AdamWOptions>(4e-3));
  LoraRite<> optimizer(groups, LoraRiteOptions(2e-3).eps(1e-5).maximize(true));
  EXPECT_EQ(rate(optimizer), 2e-3);
  EXPECT_EQ(rate(optimizer, 1), 3e-3);
  EXPECT_EQ(rate(optimizer, 2), 4e-3);
  EXPECT_EQ(static_cast<const LoraRiteOptions&>(optimizer.param_groups()[0].options()).eps(), 1e-5);
  EXPECT_FALSE(static_cast<const LoraRiteOptions&>(optimizer.param_groups()[1].options()).escape());
  EXPECT_EQ(optimizer.param_groups()[2].params().size(), 1U);
  torch::Tensor(head).mutable_grad() = torch::ones({3});
  run_steps(optimizer, {pair, other}, 0, 1);
  EXPECT_GT(head.min().item<double>(), 0) << "maximize holds for groups by AdamW, too";
  EXPECT_EQ(LoraRite<>(groups, 1e-2).param_groups().size(), 3U);
  EXPECT_EQ(LoraRite<>(groups).param_groups()[0].options().get_lr(), 1e-3);

  EXPECT_TRUE(mentions(error_of([] { LoraRite<> none(std::vector<OptimizerParamGroup>{}); }),
                       "the list of param groups is empty"));
  groups.emplace_back(std::vector<torch::Tensor>{torch::zeros({3}), torch::zeros({3})});
  EXPECT_TRUE(
      mentions(error_of([&] { LoraRite<> refused(groups); }), "for other parameters torch::optim::AdamWOptions"));
}

}  // namespace
}  // namespace lora_rite::test
