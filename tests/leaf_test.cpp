#include "lora_rite/leaf.hpp"

#include <gtest/gtest.h>

#include <vector>

#include "support/pairs.hpp"

namespace lora_rite::test {
namespace {

torch::Tensor leaf(at::IntArrayRef shape) { return torch::randn(shape).requires_grad_(); }

torch::Tensor leaf_in(const torch::Tensor& memory) { return memory.detach().requires_grad_(); }

/// Adds two pairs and returns what is said.
std::string refusal(const FactorPair& first, const FactorPair& second) {
  return error_of([&] { LoraRite<> optimizer({first, second}); });
}

// As PEFT ties the adapters of an embedding and of the head: each factor is the transpose of the other one's partner.
TEST(SharedMemory, OfTiedAdaptersIsRefusedByTheNamesOfBoth) {
  const auto a = torch::randn({2, 8}), b = torch::randn({6, 2});
  const FactorPair embedding = {"embedding", leaf_in(a), leaf_in(b)};
  const FactorPair head = {"head", leaf_in(b.t()), leaf_in(a.t())};
  const std::string message = refusal(embedding, head);
  EXPECT_TRUE(mentions(message, "pair 'head': a tensor of shape [2, 6] lies in the memory of another one"));
  EXPECT_TRUE(mentions(message, "of pair 'embedding'"));
  EXPECT_TRUE(mentions(message, "expected memory of its own"));
}

// LoRA-FA's A, which nobody steps.
TEST(SharedMemory, OfFrozenFactorsIsNobodysHarm) {
  const auto a = torch::randn({2, 8});
  const std::vector<FactorPair> pairs = {{"q", a.detach(), leaf({6, 2})}, {"k", a.detach(), leaf({6, 2})}};
  LoraRite<> optimizer(pairs);
  optimizer.add_parameters({leaf_in(a)}, {});
  EXPECT_TRUE(mentions(error_of([&] { optimizer.add_parameters({leaf_in(a)}, {}); }), "of parameter 0 of group 1"));
}

TEST(SharedMemory, OfAPairAndAnotherParameterIsRefusedAndNothingIsAdded) {
  const auto memory = torch::randn({2, 8});
  LoraRite<> optimizer(std::vector<FactorPair>{{"q", leaf_in(memory), leaf({6, 2})}});
  const auto bias = leaf_in(memory.view({-1}).slice(0, 0, 2));
  EXPECT_TRUE(mentions(error_of([&] { optimizer.add_parameters({bias}, {}); }), "of pair 'q'"));
  EXPECT_EQ(optimizer.param_groups().size(), 1u);
}

TEST(SharedMemory, IsNoneWhereLeavesOfOneBufferLieBesideEachOther) {
  const auto flat = torch::randn({40});
  const auto columns = torch::randn({2, 16}), rows = torch::randn({6, 4});
  const std::vector<FactorPair> pairs = {
      {"second", leaf_in(flat.slice(0, 16, 32).view({2, 8})), leaf({4, 2})},
      {"first", leaf_in(flat.slice(0, 0, 16).view({2, 8})), leaf_in(flat.slice(0, 32, 40).view({4, 2}))},
      {"left", leaf_in(columns.slice(1, 0, 8)), leaf_in(rows.slice(1, 0, 2))},
      {"right", leaf_in(columns.slice(1, 8, 16)), leaf_in(rows.slice(1, 2, 4))}};
  LoraRite<> optimizer(pairs);
  run_steps(optimizer, pairs, 0, 1);
  for (const auto& pair : pairs) EXPECT_TRUE(torch::isfinite(pair.a).all().item<bool>()) << pair.name;
}

TEST(SharedMemory, IsNoneWithALeafThatHasLeft) {
  const auto memory = torch::randn({2, 8});
  auto first = leaf_in(memory);
  LoraRite<> optimizer(std::vector<FactorPair>{{"q", first, leaf({6, 2})}});
  first.set_data(torch::randn({2, 8}));
  optimizer.add_pairs({{"k", leaf_in(memory), leaf({6, 2})}}, LoraRiteOptions(1e-3));
  EXPECT_EQ(optimizer.param_groups().size(), 2u);
}

// What became of the others' memory since is for the next step to say.
TEST(SharedMemory, ThatCameLaterKeepsNoThirdPairFromBeingTakenOut) {
  std::vector<FactorPair> pairs;
  for (const char* name : {"q", "k", "v"}) pairs.push_back({name, leaf({2, 8}), leaf({6, 2})});
  LoraRite<> optimizer(pairs);
  pairs[1].a.set_data(pairs[0].a.detach());
  optimizer.remove_pair("v");
  EXPECT_EQ(optimizer.param_groups()[0].params().size(), 4u);
}

TEST(Parts, OfALeafThatBecameSmallerCanBeTakenOut) {
  for (const bool elsewhere : {false, true}) {
    const FactorPair whole = {"moe", leaf({8, 8}), leaf({6, 8})};
    LoraRite<> optimizer(expert_pairs(whole, 4));
    whole.a.set_data(elsewhere ? torch::randn({1000 + 64}).slice(0, 1000).view({8, 8}) : torch::randn({1, 1}));
    optimizer.remove_pair("moe[0]");
    EXPECT_TRUE(mentions(error_of([&] { optimizer.step(); }), "pair 'moe[1]'")) << elsewhere;
  }
}

}  // namespace
}  // namespace lora_rite::test
