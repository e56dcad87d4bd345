// Experts whose factors share two tensors: as PEFT lays them out (make_experts_golden.py), and as LoraRite steps them,
// which must be what it does with a pair of tensors for each expert.

#include <gtest/gtest.h>
#include <torch/nn/utils/clip_grad.h>
#include <lora_rite/baselines/registry.hpp>
#include <lora_rite/checkpoint.hpp>
#include <lora_rite/grad_scaler.hpp>
#include <lora_rite/io/peft.hpp>
#include <nlohmann/json.hpp>

#include <fstream>
#include <functional>

#include "support/pairs.hpp"
#include "support/temporary_folder.hpp"
#include "support/tensors.hpp"

namespace lora_rite::test {
namespace {

using nlohmann::json;

// ------------------------------------------------------------------------------------------------------ PEFT's layout

const json& golden() {
  static const json data = json::parse(std::ifstream(std::string(LORA_RITE_TEST_DATA_DIR) + "/nn/experts_golden.json"));
  return data;
}

torch::Tensor tensor_of(const json& numbers) {
  return torch::tensor(numbers["data"].get<std::vector<double>>(), torch::kDouble)
      .reshape(numbers["shape"].get<std::vector<int64_t>>())
      .clone();
}

/// The parameters of PEFT's model; a base without values is zero.
torch::OrderedDict<std::string, torch::Tensor> parameters_of(const json& data) {
  torch::OrderedDict<std::string, torch::Tensor> parameters;
  for (const auto& [name, numbers] : data["parameters"].items()) {
    const bool is_factor = name.find("lora_") != std::string::npos;
    parameters.insert(name, numbers.contains("data") ? tensor_of(numbers).set_requires_grad(is_factor)
                                                     : torch::zeros(numbers["shape"].get<std::vector<int64_t>>()));
  }
  return parameters;
}

TEST(ExpertsOfPeft, AreFoundByNamesAndTheirParametersShapeWithEveryExpertsChange) {
  for (const auto& [label, data] : golden().items()) {
    const auto pairs = find_factor_pairs(parameters_of(data));
    size_t checked = 0;
    for (const auto& [layer, change] : data["changes"].items()) {
      const torch::Tensor expected = tensor_of(change["change"]);
      const int64_t experts = expected.size(0);
      for (int64_t e = 0; e < experts; ++e) {
        const std::string name = layer + ".default.weight" + (experts == 1 ? "" : "[" + std::to_string(e) + "]");
        const auto found =
            std::find_if(pairs.begin(), pairs.end(), [&](const auto& pair) { return pair.name == name; });
        ASSERT_NE(found, pairs.end()) << label << ": " << name;
        const torch::Tensor ours = change["scale"].get<double>() * torch::matmul(found->b, found->a);
        ASSERT_EQ(ours.sizes(), expected[e].sizes()) << name;
        EXPECT_LE(frobenius(ours - expected[e]), 1e-6 * frobenius(expected[e])) << name;  // PEFT's is float
        ++checked;
      }
    }
    const size_t expected = label == "plain" ? 7 : label == "transposed" ? 6 : label == "one" ? 3 : 11;
    EXPECT_EQ(pairs.size(), expected) << label;
    EXPECT_EQ(checked, label == "plain" ? 6u : label == "mixtral" ? 7u : expected) << label;
  }
}

TEST(ExpertsOfPeft, ComputeWhatPeftComputes) {
  for (const char* label : {"plain", "transposed", "one"}) {
    const json& data = golden()[label];
    const auto parameters = parameters_of(data);
    const bool is_transposed = std::string(label) == "transposed";
    std::map<std::string, double> scales;  // by the pair's layer
    for (const auto& [layer, change] : data["changes"].items()) scales[layer] = change["scale"];
    const auto pairs = find_factor_pairs(parameters);
    const auto weight = [&](const std::string& name, const std::string& layer, int64_t expert) {
      for (const auto& item : parameters) {
        const std::string& key = item.key();
        if (!detail::ends_with(key, "." + name)) continue;
        torch::Tensor result = is_transposed ? item.value()[expert].t() : item.value()[expert];
        for (const auto& pair : pairs)
          if (pair.name == layer + ".default.weight[" + std::to_string(expert) + "]")
            result = result + scales.at(layer) * torch::matmul(pair.b, pair.a);
        return result;
      }
      ADD_FAILURE() << name;
      return torch::Tensor();
    };
    const auto* base = parameters.find("gate.weight");
    torch::Tensor gate = base != nullptr ? *base : parameters["gate.base_layer.weight"];
    for (const auto& pair : pairs)
      if (pair.name == "gate.default.weight") gate = gate + 1.5 * torch::matmul(pair.b, pair.a);
    torch::Tensor x = torch::matmul(tensor_of(data["input"]), gate.t());
    for (int64_t e = 0; e < 3; ++e) {
      x = torch::tanh(torch::matmul(x, weight("up", "experts.base_layer", e).t()));
      x = torch::matmul(x, weight("down", "experts", e).t());
    }
    const torch::Tensor expected = tensor_of(data["output"]);
    EXPECT_LE(frobenius(x - expected), 1e-5 * frobenius(expected)) << label;
  }
}

TEST(ExpertsOfPeft, HaveTheNamesOfPeftsFiles) {
  for (const auto& [label, data] : golden().items()) {
    std::map<std::string, std::vector<int64_t>> ours;
    for (const auto& [name, tensor] : adapter_tensors(parameters_of(data))) ours[name] = tensor.sizes().vec();
    EXPECT_EQ(json(ours), data["file"]) << label;
  }
}

TEST(ExpertsOfPeft, GoThroughFilesWithEveryExpertsChange) {
  for (const auto& [label, data] : golden().items()) {
    const TemporaryFolder folder;
    Adapter adapter{parse_adapter_config(data["config"].dump(), ""), {}};
    // As a model has them whose pairs are parts of its leaves.
    const auto parameters = parameters_of(data);
    adapter.tensors = adapter_tensors(parameters);
    if (label == "mixtral") {  // golden without: a list in any order
      adapter.config.target_modules = std::vector<std::string>{"q_proj", "k_proj", "v_proj", "o_proj"};
    }
    save_adapter(folder / "adapter", adapter);
    const Adapter read = load_adapter(folder / "adapter");
    EXPECT_EQ(read.config.other.at("target_parameters"), data["config"]["target_parameters"]);
    const auto pairs = expert_pairs(read);
    EXPECT_EQ(pairs.size(), find_factor_pairs(parameters).size()) << label;
    for (const auto& [layer, change] : data["changes"].items()) {
      const torch::Tensor expected = tensor_of(change["change"]);
      EXPECT_EQ(expert_count(read, layer), expected.size(0)) << label << ": " << layer;
      for (int64_t e = 0; e < expected.size(0); ++e) {
        const std::string name = layer + ".weight" + (expected.size(0) == 1 ? "" : "[" + std::to_string(e) + "]");
        const auto found =
            std::find_if(pairs.begin(), pairs.end(), [&](const auto& pair) { return pair.name == name; });
        ASSERT_NE(found, pairs.end()) << label << ": " << name;
        EXPECT_LE(frobenius(change["scale"].get<double>() * torch::matmul(found->b, found->a) - expected[e]),
                  1e-6 * frobenius(expected[e]));
      }
    }
    // And from pairs with tensors of their own.
    if (label != "plain") continue;
    const FactorPair whole = join_experts("", {pairs[3], pairs[4], pairs[5]});
    EXPECT_TRUE(same_bits(whole.a, adapter.tensors.at("experts.lora_A.weight")));
    EXPECT_TRUE(same_bits(whole.b, adapter.tensors.at("experts.lora_B.weight")));
  }
}

TEST(ExpertCount, IsAskedOfTheCallerWhereTheFileLeavesItOpen) {
  Adapter adapter;
  adapter.config.r = 2;
  adapter.config.rank_pattern = {{"up", 4}};
  adapter.config.other["target_parameters"] = {"experts.up", "experts.down"};
  adapter.tensors = {{"experts.lora_A.weight", torch::zeros({8, 4})}, {"experts.lora_B.weight", torch::zeros({5, 8})}};
  const std::string message = error_of([&] { expert_pairs(adapter); });
  EXPECT_TRUE(mentions(message, "'experts.lora_A.weight' is [8, 4]"));
  EXPECT_TRUE(mentions(message, "leave 2 numbers of experts possible"));
  // The other factors of the same module tell: 8 or 4 experts there, so 4.
  adapter.tensors["experts.base_layer.lora_A.weight"] = torch::zeros({16, 5});
  adapter.tensors["experts.base_layer.lora_B.weight"] = torch::zeros({4, 16});
  EXPECT_EQ(expert_count(adapter, "experts"), 4);
  EXPECT_EQ(expert_count(adapter, "experts.base_layer"), 4);
  EXPECT_EQ(expert_pairs(adapter).size(), 8u);
  EXPECT_TRUE(mentions(error_of([&] { expert_count(adapter, "other"); }), "no tensor 'other.lora_A.weight'"));
  adapter.config.target_modules = std::vector<std::string>{"experts"};
  EXPECT_EQ(expert_count(adapter, "experts"), 1);
}

torch::OrderedDict<std::string, torch::Tensor> zeros_of(
    const std::vector<std::pair<std::string, std::vector<int64_t>>>& shapes) {
  torch::OrderedDict<std::string, torch::Tensor> parameters;
  for (const auto& [name, shape] : shapes) parameters.insert(name, torch::zeros(shape));
  return parameters;
}

TEST(ExpertsOfPeft, AreOnePairWhereNothingTellsThem) {
  EXPECT_EQ(find_factor_pairs(zeros_of({{"x.lora_A.weight", {6, 4}}, {"x.lora_B.weight", {5, 6}}})).size(), 1u);
  // Not its in and out, a rank that does not divide, another layer's parameter, one expert.
  for (const std::vector<int64_t>& shape : {std::vector<int64_t>{3, 4, 7}, {4, 5, 4}, {1, 5, 4}}) {
    EXPECT_EQ(find_factor_pairs(zeros_of({{"x.base_layer.up", shape},
                                          {"xy.up", {3, 5, 4}},
                                          {"x.y.up", {3, 5, 4}},
                                          {"x.lora_A.weight", {6, 4}},
                                          {"x.lora_B.weight", {5, 6}}}))
                  .size(),
              1u);
  }
}

TEST(ExpertsOfPeft, OfWhichTheNumberIsNotClearAreRefused) {
  const std::string message = error_of([] {
    find_factor_pairs(zeros_of({{"x.base_layer.up", {3, 5, 4}},
                                {"x.base_layer.gate", {2, 4, 5}},
                                {"x.lora_A.weight", {6, 4}},
                                {"x.lora_B.weight", {5, 6}}}));
  });
  for (const char* words :
       {"'x.weight'", "the 3 experts of 'x.base_layer.up'", "the 2 of 'x.base_layer.gate'", "expert_pairs"})
    EXPECT_TRUE(mentions(message, words));
}

TEST(ExpertsOfPeft, AreNotBlocksOfOneMatrix) {
  const auto shapes = [](int64_t in) {
    return zeros_of({{"x.base_layer.weight", {5, 4}}, {"x.lora_A.weight", {2, in}}, {"x.lora_B.weight", {5, 2}}});
  };
  EXPECT_TRUE(mentions(error_of([&] { find_factor_pairs(shapes(2)); }), "BD-LoRA"));
  EXPECT_EQ(find_factor_pairs(shapes(4)).size(), 1u);
}

// ------------------------------------------------------------------------------------------------------- expert_pairs

constexpr int64_t kExperts = 3, kRank = 2, kIn = 7, kOut = 5;

/// Two leaves with the factors of all experts, and the same experts with tensors of their own.
struct Experts {
  torch::Tensor a, b;
  std::vector<FactorPair> pairs, separate;

  explicit Experts(torch::Dtype dtype, uint64_t seed = 1) {
    torch::manual_seed(seed);
    a = torch::randn({kExperts * kRank, kIn}, torch::kDouble).to(dtype).requires_grad_();
    b = torch::randn({kOut, kRank * kExperts}, torch::kDouble).to(dtype).requires_grad_();
    pairs = expert_pairs({"moe", a, b}, kExperts);
    for (const auto& pair : pairs)
      separate.push_back(
          {pair.name, pair.a.detach().clone().requires_grad_(), pair.b.detach().clone().requires_grad_()});
  }

  /// Both get one gradient, drawn with `seed`.
  void set_gradients(uint64_t seed, bool of_a = true, bool of_b = true) {
    torch::manual_seed(seed);
    const auto gradient = [](const torch::Tensor& leaf) {
      return torch::randn(leaf.sizes(), torch::kDouble).to(leaf.scalar_type());
    };
    a.mutable_grad() = of_a ? gradient(a) : torch::Tensor();
    b.mutable_grad() = of_b ? gradient(b) : torch::Tensor();
    give_gradients();
  }
  void give_gradients() {
    const at::NoGradGuard no_grad;
    for (int64_t e = 0; e < kExperts; ++e) {
      separate[e].a.mutable_grad() =
          a.grad().defined() ? a.grad().view({kExperts, kRank, kIn})[e].clone() : torch::Tensor();
      separate[e].b.mutable_grad() =
          b.grad().defined() ? b.grad().reshape({kOut, kRank, kExperts}).select(2, e).contiguous() : torch::Tensor();
    }
  }

  bool agree() const { return equal_factors(pairs, separate); }
};

TEST(ExpertPairs, AreViewsOfTheRowsAndColumnsThatPeftGivesAnExpert) {
  Experts experts(torch::kDouble);
  ASSERT_EQ(experts.pairs.size(), static_cast<size_t>(kExperts));
  for (int64_t e = 0; e < kExperts; ++e) {
    const auto& [name, a, b] = experts.pairs[e];
    EXPECT_EQ(name, "moe[" + std::to_string(e) + "]");
    ASSERT_EQ(a.sizes(), (std::vector<int64_t>{kRank, kIn}));
    ASSERT_EQ(b.sizes(), (std::vector<int64_t>{kOut, kRank}));
    for (int64_t k = 0; k < kRank; ++k) {
      EXPECT_TRUE(torch::equal(a[k], experts.a[e * kRank + k]));
      EXPECT_TRUE(torch::equal(b.select(1, k), experts.b.select(1, k * kExperts + e)));
    }
    EXPECT_TRUE(a.is_alias_of(experts.a));
    EXPECT_TRUE(b.is_alias_of(experts.b));
  }
}

TEST(ExpertPairs, RefuseWhatIsNoSuchPair) {
  const auto refused = [](const char* words, const torch::Tensor& a, const torch::Tensor& b, int64_t experts) {
    const std::string message = error_of([&] { expert_pairs({"moe", a, b}, experts); });
    EXPECT_TRUE(mentions(message, "pair 'moe'"));
    EXPECT_TRUE(mentions(message, words));
  };
  const torch::Tensor a = torch::zeros({6, 4}), b = torch::zeros({5, 6});
  refused("the number of experts is 0, expected ≥ 1", a, b, 0);
  refused("the rank dimension is 6, expected a multiple of the 4 experts", a, b, 4);
  refused("factor a is undefined", {}, b, 3);
  refused("factor b has shape [5, 6, 1, 1], expected two dimensions", a, torch::zeros({5, 6, 1, 1}), 3);
  refused("the ranks differ", a, torch::zeros({5, 4}), 2);
  refused("factor a is the result of an operation", torch::zeros({6, 4}).requires_grad_() * 2, b, 3);
  refused("factor b is a view", a, torch::zeros({6, 5}).t(), 3);
}

TEST(JoinExperts, IsTheInverse) {
  const Experts experts(torch::kFloat);
  for (const auto& pairs : {experts.pairs, experts.separate}) {
    const FactorPair whole = join_experts("moe", pairs);
    EXPECT_EQ(whole.name, "moe");
    EXPECT_TRUE(same_bits(whole.a, experts.a));
    EXPECT_TRUE(same_bits(whole.b, experts.b));
  }
  EXPECT_TRUE(mentions(error_of([] { join_experts("moe", {}); }), "expected at least one pair"));
  std::vector<FactorPair> uneven = experts.separate;
  uneven[1].b = torch::zeros({kOut + 1, kRank});
  EXPECT_TRUE(mentions(error_of([&] { join_experts("moe", uneven); }), "factor b of pair 'moe[1]' is [6, 2]"));
}

// ---------------------------------------------------------------------------------------------------------- LoraRite

struct How {
  const char* name;
  torch::Dtype dtype;
  Engine engine;
};

class SteppedExperts : public testing::TestWithParam<How> {
 protected:
  LoraRiteOptions options() const { return LoraRiteOptions(1e-2).engine(GetParam().engine); }
  torch::Dtype dtype() const { return GetParam().dtype; }
};

INSTANTIATE_TEST_SUITE_P(Engines, SteppedExperts,
                         testing::Values(How{"DeviceDouble", torch::kDouble, Engine::Device},
                                         How{"DeviceFloat", torch::kFloat, Engine::Device},
                                         How{"DeviceHalf", torch::kHalf, Engine::Device},
                                         How{"HostFloat", torch::kFloat, Engine::Automatic}),
                         [](const auto& info) { return info.param.name; });

TEST_P(SteppedExperts, MoveAsPairsWithTensorsOfTheirOwn) {
  for (const auto& change : std::vector<std::function<void(LoraRiteOptions&)>>{
           [](auto&) {}, [](auto& o) { o.weight_decay(0.1).clip_unmagnified_norm(0.5); },
           [](auto& o) { o.balance(true).max_update_rms(0.05); },
           [](auto& o) { o.row_equilibration(true).max_relative_change(0.3); }, [](auto& o) { o.master_weights(true); },
           [](auto& o) { o.maximize(true).lr_ratio_b(4); }}) {
    Experts experts(dtype());
    LoraRiteOptions wanted = options();
    change(wanted);
    LoraRite<> together(experts.pairs, wanted), apart(experts.separate, wanted);
    for (uint64_t step = 0; step < 6; ++step) {
      // A gradient that is missing, too.
      experts.set_gradients(10 + step, /*of_a=*/step != 2, /*of_b=*/step != 4);
      together.step();
      apart.step();
      ASSERT_TRUE(experts.agree()) << step;
    }
    EXPECT_EQ(together.skipped_steps(), 0);
    for (size_t e = 0; e < static_cast<size_t>(kExperts); ++e) {
      EXPECT_EQ(together.diagnostics()[e].a.unmagnified_gradient_norm,
                apart.diagnostics()[e].a.unmagnified_gradient_norm);
    }
  }
}

TEST_P(SteppedExperts, HaveTheLeavesAsTheOptimizersParametersOnceEach) {
  Experts experts(dtype()), others(dtype(), 2);
  std::vector<FactorPair> pairs = experts.pairs;
  pairs.push_back(others.separate[0]);
  LoraRite<> optimizer(pairs, options());
  const auto& parameters = optimizer.param_groups()[0].params();
  ASSERT_EQ(parameters.size(), 4u);
  EXPECT_TRUE(parameters[0].is_same(experts.a));
  EXPECT_TRUE(parameters[1].is_same(experts.b));
  EXPECT_TRUE(parameters[2].is_same(others.separate[0].a));

  (torch::matmul(experts.b, experts.a).sum() * 2).backward();
  const torch::Tensor gradient = experts.a.grad().clone();
  torch::nn::utils::clip_grad_norm_(parameters, 1e-3);
  EXPECT_LT(frobenius(experts.a.grad()), frobenius(gradient));
  optimizer.step();
  optimizer.zero_grad();
  EXPECT_FALSE(experts.a.grad().defined());
  optimizer.step();  // nothing to do
  EXPECT_EQ(optimizer.skipped_steps(), 0);
}

TEST_P(SteppedExperts, ReadTheGradientsThatAGradScalerLeaves) {
  Experts experts(dtype());
  LoraRite<> together(experts.pairs, options()), apart(experts.separate, options());
  GradScaler scaler(8);
  scaler.scale(torch::zeros({}));
  experts.set_gradients(3);
  scaler.unscale_(together);
  scaler.unscale_(apart);
  EXPECT_TRUE(scaler.step(together));
  EXPECT_TRUE(scaler.step(apart));
  EXPECT_TRUE(experts.agree());
}

TEST_P(SteppedExperts, ReadGradientsThatLieOtherwiseInMemory) {
  Experts experts(dtype());
  LoraRite<> together(experts.pairs, options()), apart(experts.separate, options());
  for (uint64_t step = 0; step < 3; ++step) {
    experts.set_gradients(20 + step);
    for (torch::Tensor leaf : {experts.a, experts.b}) leaf.mutable_grad() = leaf.grad().t().contiguous().t();
    together.step();
    apart.step();
    EXPECT_TRUE(experts.agree());
  }
}

TEST_P(SteppedExperts, RestWhereOneGradientIsNotFinite) {
  Experts experts(dtype());
  LoraRite<> optimizer(experts.pairs, options()), apart(experts.separate, options());
  experts.set_gradients(1);
  optimizer.step();
  apart.step();
  const torch::Tensor a = experts.a.detach().clone(), b = experts.b.detach().clone();
  experts.set_gradients(2);
  experts.b.mutable_grad()[1][4] = NAN;  // of one expert
  optimizer.step();
  EXPECT_EQ(optimizer.skipped_steps(), 1);
  EXPECT_TRUE(same_bits(experts.a, a));
  EXPECT_TRUE(same_bits(experts.b, b));
  experts.set_gradients(3);
  optimizer.step();
  apart.step();
  EXPECT_TRUE(experts.agree());
}

TEST_P(SteppedExperts, NoticeThatSomeoneElseChangedTheLeaf) {
  Experts experts(dtype());
  LoraRite<> together(experts.pairs, options()), apart(experts.separate, options());
  for (uint64_t step = 0; step < 8; ++step) {
    experts.set_gradients(30 + step);
    together.step();
    apart.step();
    ASSERT_TRUE(experts.agree()) << step;
    const at::NoGradGuard no_grad;
    if (step == 2) {  // through the leaf
      experts.b.mul_(3);
      for (const auto& pair : experts.separate) pair.b.mul_(3);
    } else if (step == 4) {  // through a view
      experts.pairs[1].b.mul_(0.5);
      experts.pairs[1].a.mul_(2);
      experts.separate[1].b.mul_(0.5);
      experts.separate[1].a.mul_(2);
    } else if (step == 5) {  // past autograd
      experts.b.detach().t()[4].mul_(2);
      experts.separate[1].b.detach().t()[1].mul_(2);
    }
  }
}

TEST_P(SteppedExperts, ResumeBitForBit) {
  Experts experts(dtype()), resumed(dtype());
  LoraRite<> optimizer(experts.pairs, options());
  for (uint64_t step = 0; step < 3; ++step) {
    experts.set_gradients(40 + step);
    optimizer.step();
  }
  {
    const at::NoGradGuard no_grad;
    resumed.a.copy_(experts.a);
    resumed.b.copy_(experts.b);
  }
  LoraRite<> other(resumed.pairs, options());
  load_bytes(other, saved_bytes(optimizer));
  for (uint64_t step = 3; step < 6; ++step) {
    experts.set_gradients(40 + step);
    resumed.set_gradients(40 + step);
    optimizer.step();
    other.step();
  }
  EXPECT_TRUE(same_bits(experts.a, resumed.a));
  EXPECT_TRUE(same_bits(experts.b, resumed.b));
}

TEST_P(SteppedExperts, AreRefusedOnceTheirLeafHasOtherMemory) {
  for (const bool of_a : {true, false}) {
    for (const bool before_the_first_step : {true, false}) {
      Experts experts(dtype());
      LoraRite<> optimizer(experts.pairs, options());
      experts.set_gradients(1);
      if (!before_the_first_step) optimizer.step();
      torch::Tensor& leaf = of_a ? experts.a : experts.b;
      leaf.set_data(leaf.detach().clone());
      const torch::Tensor a = experts.a.detach().clone(), b = experts.b.detach().clone();
      const std::string message = error_of([&] { optimizer.step(); });
      EXPECT_TRUE(mentions(message, "pair 'moe[0]'"));
      EXPECT_TRUE(mentions(message, std::string("factor ") + (of_a ? "a" : "b")));
      EXPECT_TRUE(mentions(message, "make the pairs anew"));
      EXPECT_TRUE(same_bits(experts.a, a));
      EXPECT_TRUE(same_bits(experts.b, b));
    }
  }
}

TEST_P(SteppedExperts, BelongToNobodyElse) {
  const auto refused = [&](const char* words, const std::function<std::vector<FactorPair>(const Experts&)>& pairs) {
    const Experts experts(dtype());
    const std::string message = error_of([&] { LoraRite<> optimizer(pairs(experts), options()); });
    EXPECT_TRUE(mentions(message, "used twice, the other time in"));
    EXPECT_TRUE(mentions(message, words));
  };
  refused("pair 'moe[1]'", [](const Experts& e) {  // twice the same
    return std::vector<FactorPair>{e.pairs[0], e.pairs[1], e.pairs[2], e.pairs[1]};
  });
  refused("pair 'moe[0]'", [](const Experts& e) {  // a view and the whole
    return std::vector<FactorPair>{e.pairs[0], {"whole", e.a, e.b}};
  });
  refused("pair 'whole'", [](const Experts& e) { return std::vector<FactorPair>{{"whole", e.a, e.b}, e.pairs[0]}; });
  refused("pair 'moe[1]'", [](const Experts& e) {  // other parts, which overlap
    return std::vector<FactorPair>{e.pairs[1], expert_pairs({"two", e.a, e.b}, 2)[0]};
  });
  const Experts experts(dtype());
  LoraRite<> optimizer({experts.pairs[0], experts.pairs[2]}, options());  // some of them
  EXPECT_NE(error_of([&] { optimizer.add_pairs({experts.pairs[2]}, options()); }), "");
  EXPECT_NE(error_of([&] { optimizer.add_parameters({experts.a}, {}); }), "");
  optimizer.add_pairs({experts.pairs[1]}, options());
}

TEST_P(SteppedExperts, TakeTwoGroupsWithOptionsOfTheirOwn) {
  Experts experts(dtype());
  LoraRite<> together({experts.pairs[0], experts.pairs[2]}, options()),
      apart({experts.separate[0], experts.separate[2]}, options());
  together.add_pairs({experts.pairs[1]}, options().lr(3e-2));
  apart.add_pairs({experts.separate[1]}, options().lr(3e-2));
  // Each leaf once in all groups: a GradScaler unscales what it finds there.
  EXPECT_EQ(together.param_groups()[0].params().size(), 2U);
  EXPECT_EQ(together.param_groups()[1].params().size(), 0U);
  for (uint64_t step = 0; step < 4; ++step) {
    experts.set_gradients(50 + step);
    together.step();
    apart.step();
    ASSERT_TRUE(experts.agree()) << step;
  }
  together.remove_pair(experts.pairs[0].name);
  EXPECT_EQ(together.param_groups()[0].params().size(), 2U);
  together.remove_pair(experts.pairs[2].name);
  EXPECT_EQ(together.param_groups()[0].params().size(), 0U);
  ASSERT_EQ(together.param_groups()[1].params().size(), 2U);
  EXPECT_TRUE(together.param_groups()[1].params()[0].is_same(experts.a));
  experts.set_gradients(60);
  together.step();
}

TEST_P(SteppedExperts, ArePartsAlsoWhileTheirLeafIsFrozen) {
  Experts experts(dtype());
  experts.a.requires_grad_(false);
  const std::vector<FactorPair> pairs = expert_pairs({"moe", experts.a, experts.b}, kExperts);
  LoraRite<> optimizer(pairs, options());
  ASSERT_EQ(optimizer.param_groups()[0].params().size(), 2U);
  EXPECT_TRUE(optimizer.param_groups()[0].params()[0].is_same(experts.a));
  const auto train = [&] {
    optimizer.zero_grad();
    EXPECT_FALSE(experts.a.grad().defined());
    torch::matmul(experts.b, experts.a).square().sum().backward();
    optimizer.step();
  };
  const torch::Tensor frozen = experts.a.clone(), before = experts.b.detach().clone();
  train();
  EXPECT_TRUE(torch::equal(experts.a, frozen));
  EXPECT_FALSE(torch::equal(experts.b, before));
  EXPECT_EQ(trained_tensors(pairs).size(), 2U);
  experts.a.requires_grad_(true);
  train();
  EXPECT_FALSE(torch::equal(experts.a, frozen));
  experts.a.requires_grad_(false);
  train();
  EXPECT_EQ(trained_tensors(pairs).size(), 2U);
}

/// Steps of all experts towards random ΔW, the factors of expert 1 given as T A and B T⁻¹; the ΔW of all of them.
torch::Tensor changes_after_training(torch::Dtype dtype, const LoraRiteOptions& options, bool rescale) {
  Experts experts(dtype);
  const torch::Tensor targets = torch::randn({kExperts, kOut, kIn}, torch::kDouble);
  {
    const at::NoGradGuard no_grad;
    const torch::Tensor t = torch::tensor({{8.0, 3.0}, {0.5, 0.25}}, torch::kDouble).to(dtype);
    const torch::Tensor inverse = torch::linalg_inv(t.to(torch::kDouble)).to(dtype);
    if (rescale) {
      experts.pairs[1].a.copy_(torch::matmul(t, experts.pairs[1].a));
      experts.pairs[1].b.copy_(torch::matmul(experts.pairs[1].b, inverse));
    }
  }
  LoraRite<> optimizer(experts.pairs, options);
  std::vector<torch::Tensor> changes;
  for (int step = 0; step < 20; ++step) {
    optimizer.zero_grad();
    const torch::Tensor a = experts.a.view({kExperts, kRank, kIn}).to(torch::kDouble);
    const torch::Tensor b = experts.b.view({kOut, kRank, kExperts}).permute({2, 0, 1}).to(torch::kDouble);
    (torch::matmul(b, a) - targets).square().sum().backward();
    optimizer.step();
  }
  for (const auto& pair : experts.pairs) changes.push_back(product(pair.a, pair.b));
  return torch::stack(changes);
}

TEST_P(SteppedExperts, GoTheSameWayInEveryFactorisationOfAnExpert) {
  if (dtype() == torch::kHalf) GTEST_SKIP() << "the rescaled factors are rounded to half";
  const torch::Tensor plain = changes_after_training(dtype(), options(), false);
  const torch::Tensor rescaled = changes_after_training(dtype(), options(), true);
  const Experts start(dtype());
  const double epsilon = dtype() == torch::kDouble ? 2.2e-16 : 1.2e-7;
  for (int64_t e = 0; e < kExperts; ++e) {
    const double way = frobenius(plain[e] - product(start.pairs[e].a, start.pairs[e].b));
    // 20 steps, κ(T)² = 7e4 in the factor that is ill-conditioned then.
    EXPECT_LE(frobenius(plain[e] - rescaled[e]), 20 * 500 * epsilon * way) << e;
    EXPECT_GT(way, 0.1);
  }
}

// ------------------------------------------------------------------------------------------------ modules and others

/// A layer of experts as PEFT wraps it.
struct MoeImpl : torch::nn::Module {
  MoeImpl() : Module("moe") {
    const auto options = torch::TensorOptions();
    base = std::make_shared<torch::nn::Module>("experts");
    up = base->register_parameter("up", torch::randn({kExperts, kOut, kIn}, options), /*requires_grad=*/false);
    register_module("base_layer", base);
    lora_a = torch::nn::Linear(torch::nn::LinearOptions(kIn, kExperts * kRank).bias(false));
    lora_b = torch::nn::Linear(torch::nn::LinearOptions(kExperts * kRank, kOut).bias(false));
    norm = register_parameter("norm", torch::ones({kOut}));
    register_module("lora_A", lora_a);
    register_module("lora_B", lora_b);
  }
  std::shared_ptr<torch::nn::Module> base;
  torch::Tensor up, norm;
  torch::nn::Linear lora_a{nullptr}, lora_b{nullptr};
};

TEST(ExpertsOfAModule, AreSteppedAsPairsAndTheRestByAdamW) {
  torch::manual_seed(1);
  MoeImpl model;
  LoraRite<> optimizer(model, LoraRiteOptions(1e-2));
  ASSERT_EQ(optimizer.param_groups().size(), 2u);
  ASSERT_EQ(optimizer.param_groups()[0].params().size(), 2u);
  EXPECT_TRUE(optimizer.param_groups()[0].params()[0].is_same(model.lora_a->weight));
  ASSERT_EQ(optimizer.param_groups()[1].params().size(), 1u);
  EXPECT_TRUE(optimizer.param_groups()[1].params()[0].is_same(model.norm));
  EXPECT_EQ(optimizer.diagnostics().size(), static_cast<size_t>(kExperts));
  EXPECT_EQ(optimizer.diagnostics()[2].name, "weight[2]");

  const auto separate = [&] {
    std::vector<FactorPair> pairs;
    for (const auto& pair : find_factor_pairs(model))
      pairs.push_back({pair.name, pair.a.detach().clone(), pair.b.detach().clone()});
    return pairs;
  }();
  LoraRite<> apart(separate, LoraRiteOptions(1e-2));
  torch::manual_seed(2);
  model.lora_a->weight.mutable_grad() = torch::randn_like(model.lora_a->weight);
  model.lora_b->weight.mutable_grad() = torch::randn_like(model.lora_b->weight);
  for (int64_t e = 0; e < kExperts; ++e) {
    torch::Tensor a = separate[e].a, b = separate[e].b;
    a.mutable_grad() = model.lora_a->weight.grad().narrow(0, e * kRank, kRank).clone();
    b.mutable_grad() = model.lora_b->weight.grad().view({kOut, kRank, kExperts}).select(2, e).contiguous();
  }
  optimizer.step();
  apart.step();
  EXPECT_TRUE(equal_factors(find_factor_pairs(model), separate));
}

TEST(ExpertsOfAModule, MayBeConvertedBeforeThePairsAreMadeButNotAfter) {
  MoeImpl model;
  LoraRite<> optimizer(model, LoraRiteOptions(1e-2));
  model.to(torch::kDouble);
  for (const auto& parameter : model.parameters()) parameter.mutable_grad() = torch::ones_like(parameter);
  EXPECT_TRUE(mentions(error_of([&] { optimizer.step(); }), "pair 'weight[0]': factor a is a view of"));
  LoraRite<> anew(model, LoraRiteOptions(1e-2));
  anew.step();
}

TEST(Experts, AreWholeInACheckpoint) {
  const TemporaryFolder folder;
  Experts experts(torch::kFloat), resumed(torch::kFloat, 2);
  LoraRite<> optimizer(experts.pairs), other(resumed.pairs);
  experts.set_gradients(1);
  optimizer.step();
  const auto tensors = trained_tensors(experts.pairs);
  ASSERT_EQ(tensors.size(), 2u);
  EXPECT_TRUE(tensors.at("moe[0].a").is_same(experts.a));
  save_checkpoint(folder / "run.ckpt", {tensors, {&optimizer}, {}, 1, {}});
  TrainingState state{trained_tensors(resumed.pairs), {&other}, {}, 0, {}};
  load_checkpoint(folder / "run.ckpt", state);
  EXPECT_TRUE(same_bits(experts.a, resumed.a));
  EXPECT_TRUE(same_bits(experts.b, resumed.b));
}

TEST(Experts, AreRefusedByOptimizersThatKnowLeavesOnly) {
  const Experts experts(torch::kFloat);
  for (const std::string& name : optimizer_names()) {
    if (name.rfind("rite", 0) == 0) {
      EXPECT_NE(make_optimizer(name, experts.pairs, 1e-2), nullptr);
    } else {
      EXPECT_TRUE(mentions(error_of([&] { make_optimizer(name, experts.pairs, 1e-2); }),
                           "pair 'moe[0]' is a view of a leaf, as experts are"))
          << name;
    }
  }
}

TEST(Experts, AreNotTakenForPartsWhereAViewIsALeafItself) {
  // A parameter in a flat buffer has a gradient of its own.
  const torch::Tensor flat = torch::randn({kRank * (kIn + kOut)});
  torch::Tensor a = flat.narrow(0, 0, kRank * kIn).view({kRank, kIn}).requires_grad_();
  torch::Tensor b = flat.narrow(0, kRank * kIn, kOut * kRank).view({kOut, kRank}).requires_grad_();
  LoraRite<> optimizer({{"q", a, b}});
  EXPECT_TRUE(optimizer.param_groups()[0].params()[0].is_same(a));
  const torch::Tensor before = flat.detach().clone();
  torch::matmul(b, a).sum().backward();
  optimizer.step();
  EXPECT_FALSE(torch::equal(before, flat.detach()));
}

/// B is contiguous at first, so there is no room for a packed copy of it.
TEST(Experts, APartThatLiesOtherwiseThanAtFirstIsRefused) {
  for (const Side side : kSides) {
    const torch::Tensor leaf = torch::randn({2, 4, 4}).requires_grad_();
    const torch::Tensor part = leaf[0], other = torch::randn({4, 4}).requires_grad_();
    const FactorPair pair = side == Side::A ? FactorPair{"q", part, other} : FactorPair{"q", other, part};
    LoraRite<> optimizer({pair}, LoraRiteOptions(1e-2).engine(Engine::Host));
    leaf.mutable_grad() = torch::randn_like(leaf);
    optimizer.step();
    {
      const torch::NoGradGuard no_grad;
      torch::Tensor(part).t_();
    }
    const torch::Tensor before = leaf.detach().clone();
    EXPECT_TRUE(mentions(error_of([&] { optimizer.step(); }), "now has strides"));
    EXPECT_TRUE(same_bits(leaf, before));
  }
}

/// A frozen view of a matrix is taken for an expert's part of it. Once it has a gradient of its own it is none.
TEST(Experts, AViewThatBecomesALeafIsRefused) {
  torch::manual_seed(7);
  const torch::Tensor matrix = torch::randn({12, 10});
  const FactorPair pair = {"layer", matrix.narrow(0, 0, 4), torch::randn({6, 4}).requires_grad_()};
  LoraRite<> optimizer({pair}, LoraRiteOptions(1e-2));
  torch::Tensor(pair.b).mutable_grad() = torch::randn_like(pair.b);
  optimizer.step();
  pair.a.requires_grad_();
  torch::Tensor(pair.a).mutable_grad() = torch::randn_like(pair.a);
  const torch::Tensor a = pair.a.detach().clone(), b = pair.b.detach().clone();
  const std::string error = error_of([&] { optimizer.step(); });
  EXPECT_TRUE(mentions(error,
                       "pair 'layer': factor a is a view of a tensor of shape [12, 10], whose gradient it had a "
                       "part of when it was added, and now does not"))
      << error;
  EXPECT_TRUE(torch::equal(pair.a, a) && torch::equal(pair.b, b));
}

}  // namespace
}  // namespace lora_rite::test
