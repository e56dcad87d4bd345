#include <gtest/gtest.h>
#include <torch/nn/modules/container/sequential.h>

#include "support/pairs.hpp"

namespace lora_rite::test {
namespace {

torch::OrderedDict<std::string, torch::Tensor> named(std::initializer_list<const char*> names) {
  torch::OrderedDict<std::string, torch::Tensor> parameters;
  for (const char* name : names) parameters.insert(name, torch::zeros({2, 2}));
  return parameters;
}

TEST(FindFactorPairs, KnowsPeftEmbeddingKohyaAndDiffusersNames) {
  const auto parameters =
      named({"q.lora_A.weight", "q.lora_B.weight", "k.lora_A.default.weight", "k.lora_B.default.weight",
             "e.lora_embedding_A.default", "e.lora_embedding_B.default", "lora_unet_x.lora_down.weight",
             "lora_unet_x.lora_up.weight", "to_q_lora.down.weight", "to_q_lora.up.weight", "lora_A", "lora_B"});
  const auto pairs = find_factor_pairs(parameters);
  ASSERT_EQ(pairs.size(), 6u);
  const std::vector<std::pair<std::string, std::string>> expected = {
      {"q.lora_A.weight", "q.lora_B.weight"},
      {"k.lora_A.default.weight", "k.lora_B.default.weight"},
      {"e.lora_embedding_A.default", "e.lora_embedding_B.default"},
      {"lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight"},
      {"to_q_lora.down.weight", "to_q_lora.up.weight"},
      {"lora_A", "lora_B"}};
  for (size_t i = 0; i < pairs.size(); ++i) {
    EXPECT_TRUE(pairs[i].a.is_same(parameters[expected[i].first])) << expected[i].first;
    EXPECT_TRUE(pairs[i].b.is_same(parameters[expected[i].second])) << expected[i].second;
  }
  EXPECT_EQ(pairs[0].name, "q.weight");
  EXPECT_EQ(pairs[1].name, "k.default.weight");
}

TEST(FindFactorPairs, LeavesOtherParametersAndBiasesAlone) {
  EXPECT_EQ(find_factor_pairs(named({"a.weight", "q.lora_A.weight", "q.lora_B.weight", "q.lora_B.bias",
                                     "alora_Abc.weight", "floral.weight"}))
                .size(),
            1u);
  EXPECT_TRUE(find_factor_pairs(named({"a.weight"})).empty());
}

TEST(FindFactorPairs, KeepsAdaptersApartWhateverTheyAreCalled) {
  const auto parameters =
      named({"q.lora_A.one.weight", "q.lora_A.lora_A.weight", "q.lora_A.my_lora_up.weight", "q.lora_B.one.weight",
             "q.lora_B.lora_A.weight", "q.lora_B.my_lora_up.weight", "q.lora_B.one.bias", "e.lora_embedding_A.bias",
             "e.lora_embedding_A.lora_embedding_B", "e.lora_embedding_B.bias", "e.lora_embedding_B.lora_embedding_B"});
  const auto pairs = find_factor_pairs(parameters);
  std::vector<std::string> names;
  for (const auto& pair : pairs) names.push_back(pair.name);
  EXPECT_EQ(names, (std::vector<std::string>{"q.one.weight", "q.lora_A.weight", "q.my_lora_up.weight", "e.bias",
                                             "e.lora_embedding_B"}));
  EXPECT_TRUE(pairs[1].b.is_same(parameters["q.lora_B.lora_A.weight"]));
  EXPECT_TRUE(pairs[4].b.is_same(parameters["e.lora_embedding_B.lora_embedding_B"]));
}

TEST(FindFactorPairs, FindsTheFactorsOfAModule) {
  torch::nn::Module outer("outer");
  const auto layer = std::make_shared<torch::nn::Module>("layer");
  outer.register_module("layer", layer);
  layer->register_module("lora_A", torch::nn::Linear(torch::nn::LinearOptions(8, 2).bias(false)));
  layer->register_module("lora_B", torch::nn::Linear(torch::nn::LinearOptions(2, 6).bias(false)));
  const auto pairs = find_factor_pairs(outer);
  ASSERT_EQ(pairs.size(), 1u);
  EXPECT_EQ(pairs[0].a.sizes(), (std::vector<int64_t>{2, 8}));
  EXPECT_EQ(pairs[0].b.sizes(), (std::vector<int64_t>{6, 2}));
}

TEST(FindFactorPairs, NamesTheFactorWhosePartnerIsMissing) {
  EXPECT_TRUE(mentions(error_of([] {
                         find_factor_pairs(named({"q.lora_A.weight", "k.lora_B.weight"}));
                       }),
                       "'q.lora_A.weight' has no partner, expected a parameter 'q.lora_B.weight'"));
  EXPECT_TRUE(mentions(error_of([] { find_factor_pairs(named({"q.lora_up.weight"})); }), "'q.lora_up.weight'"));
}

/// One row: what is wrong, the pairs, and what the message must say.
struct BadPairs {
  const char* name;
  std::function<std::vector<FactorPair>()> make;
  std::vector<std::string> words;
};

class RefusedPairs : public testing::TestWithParam<BadPairs> {};

TEST_P(RefusedPairs, AreNamedInTheError) {
  const std::string message = error_of([] { LoraRite<> optimizer(GetParam().make()); });
  for (const auto& word : GetParam().words) EXPECT_TRUE(mentions(message, word));
}

torch::Tensor leaf(std::vector<int64_t> sizes, torch::Dtype dtype = torch::kFloat) {
  return torch::zeros(sizes, dtype);
}

INSTANTIATE_TEST_SUITE_P(
    Constructor, RefusedPairs,
    testing::Values(
        BadPairs{"RankMismatch",
                 [] {
                   return std::vector<FactorPair>{{"q", leaf({2, 8}), leaf({8, 3})}};
                 },
                 {"pair 'q'", "ranks differ", "[2, 8]", "[8, 3]"}},
        BadPairs{"Undefined",
                 [] {
                   return std::vector<FactorPair>{{"q", leaf({2, 8}), {}}};
                 },
                 {"pair 'q'", "factor b is undefined"}},
        BadPairs{"IntegerDtype",
                 [] {
                   return std::vector<FactorPair>{{"q", leaf({2, 8}, torch::kInt), leaf({8, 2})}};
                 },
                 {"pair 'q'", "factor a has dtype Int"}},
        BadPairs{"OneDimensional",
                 [] {
                   return std::vector<FactorPair>{{"q", leaf({2}), leaf({8, 2})}};
                 },
                 {"factor a has shape [2]", "at least two dimensions"}},
        BadPairs{"EmptyDimension",
                 [] {
                   return std::vector<FactorPair>{{"q", leaf({2, 0}), leaf({8, 2})}};
                 },
                 {"factor a", "empty"}},
        BadPairs{"TwoDtypes",
                 [] {
                   return std::vector<FactorPair>{{"q", leaf({2, 8}), leaf({8, 2}, torch::kDouble)}};
                 },
                 {"dtypes differ", "Float", "Double"}},
        BadPairs{"TwoDevices",
                 [] {
                   return std::vector<FactorPair>{{"q", leaf({2, 8}), torch::zeros({8, 2}, torch::kMeta)}};
                 },
                 {"devices differ", "cpu", "meta"}},
        BadPairs{"Sparse",
                 [] {
                   return std::vector<FactorPair>{{"q", leaf({2, 8}).to_sparse(), leaf({8, 2})}};
                 },
                 {"factor a has layout Sparse"}},
        BadPairs{"NotALeaf",
                 [] {
                   return std::vector<FactorPair>{{"q", leaf({2, 8}).requires_grad_() * 2, leaf({8, 2})}};
                 },
                 {"factor a", "leaf"}},
        BadPairs{"SharedTensor",
                 [] {
                   const auto shared = leaf({2, 8});
                   return std::vector<FactorPair>{{"q", shared, leaf({8, 2})}, {"k", shared, leaf({8, 2})}};
                 },
                 {"pair 'k'", "used twice", "pair 'q'"}},
        BadPairs{"SwappedFactorsOfASquareLayer",
                 [] {
                   return std::vector<FactorPair>{{"q", leaf({64, 2}), leaf({2, 64})}};
                 },
                 {"pair 'q': the rank 64 is above both sides, in = 2 and out = 2", "[64, 2]", "are a and b swapped?"}},
        BadPairs{"SwappedFactorsOfAConvolution",
                 [] {
                   return std::vector<FactorPair>{{"q", leaf({64, 2, 1, 1}), leaf({2, 64, 3, 3})}};
                 },
                 {"the rank 64 is above both sides, in = 2 and out = 18"}},
        BadPairs{"Expanded",
                 [] {
                   return std::vector<FactorPair>{{"q", leaf({1, 8}).expand({2, 8}), leaf({8, 2})}};
                 },
                 {"pair 'q': factor a", "strides [0, 1]", "do not overlap"}},
        BadPairs{"Overlapping",
                 [] {
                   return std::vector<FactorPair>{{"q", leaf({2, 8}), leaf({10}).unfold(0, 3, 1)}, {"k", {}, {}}};
                 },
                 {"pair 'q'", "[8, 3]"}},
        BadPairs{"SquareTensorAsBothFactors",
                 [] {
                   const auto shared = leaf({2, 2});
                   return std::vector<FactorPair>{{"q", shared, shared}};
                 },
                 {"pair 'q'", "used twice"}},
        BadPairs{"NamelessPair",
                 [] {
                   return std::vector<FactorPair>{{"", leaf({2}), leaf({8, 2})}};
                 },
                 {"pair 0 of group 0"}},
        BadPairs{"EmptyList", [] { return std::vector<FactorPair>{}; }, {"empty", "at least one pair"}}),
    [](const auto& info) { return info.param.name; });

TEST(FactorPair, MayHaveOneSideBelowItsRank) {
  for (const auto& [in, out] : {std::pair{3, 8}, std::pair{8, 3}, std::pair{4, 4}}) {
    const std::vector<FactorPair> pairs = {random_pair("q", 4, in, out)};
    LoraRite<> optimizer(pairs);
    run_steps(optimizer, pairs, 0, 1);
    EXPECT_TRUE(torch::isfinite(pairs[0].a).all().item<bool>());
  }
}

TEST(FactorPair, IsRefusedByTheFirstStepWhereItsDataChangedSinceItWasAdded) {
  auto pair = random_pair("q", 2, 8, 6);
  LoraRite<> optimizer(std::vector<FactorPair>{pair});
  pair.a.set_data(torch::zeros({1, 8}, torch::kDouble).expand({2, 8}));
  EXPECT_TRUE(mentions(error_of([&] { optimizer.step(); }), "pair 'q': factor a has shape [2, 8] and strides [0, 1]"));
}

TEST(AlternatingFactors, SayThatTheyAreReadAsPairs) {
  torch::nn::Sequential model(torch::nn::Linear(8, 8), torch::nn::Linear(8, 4));
  const std::string hint = "for all parameters of a model give the model itself";
  EXPECT_TRUE(mentions(error_of([&] { LoraRite<> optimizer(model->parameters()); }), hint));
  EXPECT_TRUE(mentions(error_of([&] {
                         LoraRite<> optimizer(std::vector<torch::Tensor>{leaf({8, 2}), leaf({2, 8})});
                       }),
                       "pair 0 of group 0: the rank 8 is above both sides"));
}

TEST(AlternatingFactors, RefuseAnOddNumber) {
  EXPECT_TRUE(mentions(error_of([] {
                         LoraRite<> optimizer(std::vector<torch::Tensor>{leaf({2, 8})});
                       }),
                       "has 1 tensors, expected an even number"));
}

TEST(ModuleConstructor, RefusesAModuleWithoutFactors) {
  torch::nn::Linear linear(2, 2);
  EXPECT_TRUE(mentions(error_of([&] { LoraRite<> optimizer(*linear); }), "no parameters named like LoRA factors"));
}

}  // namespace
}  // namespace lora_rite::test
