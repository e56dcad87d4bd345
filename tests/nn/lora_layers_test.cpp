// LoraLinear, LoraEmbedding and LoraConv2d, each by itself. The judge is PEFT (make_peft_golden.py), and where it has
// no answer the naive formula y = base layer with W + Σ scale · B A.

#include <gtest/gtest.h>
#include <torch/cuda.h>

#include <cmath>
#include <functional>
#include <lora_rite/lora_rite.hpp>
#include <lora_rite/nn/nn.hpp>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "nn/support.hpp"
#include "support/pairs.hpp"
#include "support/tensors.hpp"
#include "support/torch.hpp"

namespace lora_rite::test {
namespace {

using nlohmann::json;
using nn::LoraConfig;
using nn::LoraConv2d;
using nn::LoraEmbedding;
using nn::LoraInit;
using nn::LoraLayer;
using nn::LoraLinear;

/// Dot products of at most 64 terms, and intermediate results up to four times the largest of the result.
double tolerance(torch::Dtype dtype) {
  return 256 * (dtype == torch::kDouble ? std::numeric_limits<double>::epsilon()
                                        : double(std::numeric_limits<float>::epsilon()));
}

/// A layer by any of the three types, called through one function.
struct AnyLayer {
  std::shared_ptr<torch::nn::Module> module;
  std::function<torch::Tensor(const torch::Tensor&)> forward;
  LoraLayer& layer() const { return dynamic_cast<LoraLayer&>(*module); }
  torch::Tensor base_weight() const { return *layer().base_module().named_parameters().find("weight"); }
};

template <class Holder>
AnyLayer any_layer(Holder holder) {
  return {holder.ptr(), [holder](const torch::Tensor& x) mutable { return holder->forward(x); }};
}

AnyLayer any_clone(const AnyLayer& layer, const std::optional<torch::Device>& device = std::nullopt) {
  const auto copy = layer.module->clone(device);
  if (copy->as<LoraLinear>()) return any_layer(LoraLinear(std::dynamic_pointer_cast<nn::LoraLinearImpl>(copy)));
  if (copy->as<LoraConv2d>()) return any_layer(LoraConv2d(std::dynamic_pointer_cast<nn::LoraConv2dImpl>(copy)));
  return any_layer(LoraEmbedding(std::dynamic_pointer_cast<nn::LoraEmbeddingImpl>(copy)));
}

/// One layer of each type with an input, in `dtype`; the convolution dilated and circular, which PEFT has not.
struct Case {
  const char* name;
  AnyLayer (*make)();
  torch::Tensor (*input)();
};

const Case kCases[] = {
    {"Linear", [] { return any_layer(LoraLinear(6, 5)); },
     [] {
       return torch::randn({2, 3, 6}, torch::kDouble);
     }},
    {"Embedding", [] { return any_layer(LoraEmbedding(9, 4)); },
     [] {
       return torch::tensor({{1, 4, 0}, {2, 1, 8}});
     }},
    {"Conv2d",
     [] {
       return any_layer(LoraConv2d(torch::nn::Conv2dOptions(3, 4, {3, 2})
                                       .stride({2, 1})
                                       .padding({2, 1})
                                       .dilation({2, 1})
                                       .padding_mode(torch::kCircular)));
     },
     [] {
       return torch::randn({2, 3, 7, 6}, torch::kDouble);
     }},
};

class EveryLayer : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    torch::manual_seed(7);
    layer_ = GetParam().make();
    layer_.module->to(torch::kDouble);
    input_ = GetParam().input();
  }

  LoraLayer& layer() { return layer_.layer(); }
  torch::Tensor forward() { return layer_.forward(input_); }

  /// The base layer's output with another weight.
  torch::Tensor forward_with_weight(const torch::Tensor& weight) {
    torch::NoGradGuard no_grad;
    auto plain = GetParam().make();
    plain.module->to(weight.scalar_type());
    auto to = plain.module->named_parameters(), from = layer().base_module().named_parameters();
    for (auto& item : to) item.value().copy_(item.key() == "weight" ? weight : from[item.key()]);
    return plain.forward(input_.is_floating_point() ? input_.to(weight.scalar_type()) : input_);
  }

  /// W + Σ scale · B A, elementwise loops over the rank, in double.
  torch::Tensor naive_weight(const std::vector<std::string>& adapters) {
    torch::Tensor weight = layer_.base_weight().detach().to(torch::kDouble).clone();
    for (const auto& name : adapters) {
      const auto& adapter = layer().adapter(name);
      const auto a = adapter.a.detach().to(torch::kDouble), b = adapter.b.detach().to(torch::kDouble);
      const double scale =
          adapter.config.alpha / (adapter.config.use_rslora ? std::sqrt(double(a.size(0))) : a.size(0));
      for (int64_t k = 0; k < a.size(0); ++k) {
        if (layer().factor_tokens().first == std::string("lora_embedding_A")) {
          weight += scale * torch::outer(a[k], b.select(1, k));  // [num_embeddings, dim]
        } else {
          for (int64_t out = 0; out < b.size(0); ++out) weight[out] += scale * b[out][k].sum() * a[k];
        }
      }
    }
    return weight;
  }

  AnyLayer layer_;
  torch::Tensor input_;
};

INSTANTIATE_TEST_SUITE_P(Types, EveryLayer, testing::ValuesIn(kCases),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(EveryLayer, IsThePlainLayerWithoutAnAdapter) {
  EXPECT_EQ(parameter_names(*layer_.module), parameter_names(layer().base_module()));
  EXPECT_EQ(parameter_names(*layer_.module)[0], "weight");
  EXPECT_TRUE(layer_.module->parameters()[0].is_same(layer_.base_weight()));
  EXPECT_TRUE(same_bits(forward(), forward_with_weight(layer_.base_weight())));
}

TEST_P(EveryLayer, ANewAdapterChangesNoBitOfTheOutput) {
  const auto before = forward();
  layer().add_adapter("default", lora_config(2, 3));
  EXPECT_TRUE(torch::equal(forward(), before));  // −0 + 0 = 0
}

TEST_P(EveryLayer, ComputesTheBaseWithEveryActiveProductAdded) {
  layer().add_adapter("one", lora_config(2, 3));
  auto rslora = lora_config(4, 5);
  rslora.use_rslora = true;
  layer().add_adapter("two", rslora);
  randomize_factors(*layer_.module);
  for (const auto& active : std::vector<std::vector<std::string>>{{"one"}, {"two"}, {"one", "two"}, {}}) {
    layer().set_active(active);
    const auto expected = naive_weight(active);
    if (!active.empty()) {
      EXPECT_GT(largest_difference(layer_.base_weight(), expected), 0.1);
    }
    EXPECT_LT(largest_difference(layer().effective_weight(), expected), tolerance(torch::kDouble));
    EXPECT_LT(largest_difference(forward(), forward_with_weight(expected)), tolerance(torch::kDouble));
  }
}

TEST_P(EveryLayer, TrainsTheActiveAdaptersAndNoOther) {
  layer().add_adapter("one", lora_config(2, 3));
  layer().add_adapter("two", lora_config(3, 3));
  EXPECT_EQ(layer().active(), std::vector<std::string>{"one"});
  randomize_factors(*layer_.module);
  layer().set_active({"two"});
  forward().square().sum().backward();
  EXPECT_FALSE(layer().adapter("one").a.requires_grad() || layer().adapter("one").b.requires_grad());
  EXPECT_FALSE(layer().adapter("one").a.grad().defined());
  EXPECT_GT(layer().adapter("two").a.grad().norm().item<double>(), 0);
  EXPECT_GT(layer().adapter("two").b.grad().norm().item<double>(), 0);
}

TEST_P(EveryLayer, ANewAdapterThawsNoFactorThatSomebodyFroze) {
  layer().add_adapter("one", lora_config(2, 3));
  layer().adapter("one").a.set_requires_grad(false);  // LoRA-FA, say
  layer().add_adapter("two", lora_config(3, 3));
  EXPECT_FALSE(layer().adapter("one").a.requires_grad());
  EXPECT_TRUE(layer().adapter("one").b.requires_grad());
  EXPECT_FALSE(layer().adapter("two").a.requires_grad() || layer().adapter("two").b.requires_grad());
  layer().add_active("two");
  EXPECT_EQ(layer().active(), (std::vector<std::string>{"one", "two"}));
  EXPECT_FALSE(layer().adapter("one").a.requires_grad());
  EXPECT_TRUE(layer().adapter("two").a.requires_grad() && layer().adapter("two").b.requires_grad());
}

TEST_P(EveryLayer, DisabledAdaptersTakeNoPart) {
  const auto base = forward();
  layer().add_adapter("default", lora_config(2, 3));
  randomize_factors(*layer_.module);
  const auto adapted = forward();
  layer().enable_adapters(false);
  EXPECT_TRUE(same_bits(forward(), base));
  EXPECT_FALSE(layer().adapter("default").a.requires_grad());
  layer().merge();
  EXPECT_TRUE(same_bits(forward(), base));
  layer().unmerge();
  layer().enable_adapters(true);
  EXPECT_TRUE(layer().adapter("default").a.requires_grad());
  EXPECT_TRUE(same_bits(forward(), adapted));
  EXPECT_FALSE(same_bits(adapted, base));
}

TEST_P(EveryLayer, MergedComputesTheSameAndUnmergeRestoresEveryBit) {
  for (const auto dtype : {torch::kDouble, torch::kFloat, torch::kBFloat16}) {
    layer_ = GetParam().make();
    layer_.module->to(dtype);
    input_ = input_.is_floating_point() ? input_.to(dtype) : input_;
    layer_.module->eval();
    auto config = lora_config(2, 3);
    config.factor_dtype = dtype;
    layer().add_adapter("default", config);
    randomize_factors(*layer_.module);
    const auto weight = layer_.base_weight().detach().clone();
    const auto before = forward();
    layer().merge();
    EXPECT_TRUE(layer().merged());
    EXPECT_TRUE(same_bits(layer_.base_weight(), weight)) << "the base is not touched";
    const auto expected = forward_with_weight(naive_weight({"default"}));
    // Rounding the merged weight to bfloat16 (2⁻⁹ of each element, at most 18 terms of a mean size) is all that
    // differs.
    const double bound = dtype == torch::kBFloat16 ? 18 * std::ldexp(1.0, -8) : tolerance(dtype);
    EXPECT_LT(largest_difference(forward(), expected), bound);
    layer().unmerge();
    EXPECT_TRUE(same_bits(forward(), before));
    EXPECT_TRUE(same_bits(layer_.base_weight(), weight));
  }
}

TEST_P(EveryLayer, MergedFollowsWhateverItWasMergedFrom) {
  layer_.module->eval();
  layer().add_adapter("one", lora_config(2, 3));
  layer().add_adapter("two", lora_config(3, 3));
  randomize_factors(*layer_.module);
  layer().merge();
  torch::Tensor last = forward();
  const auto expect_followed = [&](const char* what) {
    SCOPED_TRACE(what);
    const auto now = forward();
    EXPECT_LT(largest_difference(now, forward_with_weight(naive_weight(layer().active()))), tolerance(torch::kFloat));
    EXPECT_GT(largest_difference(now, last), 1e-3) << "nothing has changed, so nothing was tested";
    last = now;
  };
  {
    torch::NoGradGuard no_grad;
    torch::Tensor(layer().adapter("one").a).add_(1);
    expect_followed("a factor");
    layer_.base_weight().mul_(2);
    expect_followed("the base weight");
  }
  layer().set_active({"one", "two"});
  expect_followed("the active adapters");
  layer().delete_adapter("one");
  expect_followed("an adapter deleted");
  torch::Tensor(layer().adapter("two").b).set_data(torch::randn_like(layer().adapter("two").b));
  expect_followed("another memory");
  layer_.module->to(torch::kFloat);
  if (input_.is_floating_point()) input_ = input_.to(torch::kFloat);
  EXPECT_LT(largest_difference(forward(), last), tolerance(torch::kFloat)) << "another dtype";
}

TEST_P(EveryLayer, RefusesATrainingPassWhileMerged) {
  layer().add_adapter("default", lora_config(2, 3));
  layer().merge();
  EXPECT_TRUE(mentions(error_of([&] { forward(); }), "call unmerge()"));
  {
    torch::NoGradGuard no_grad;
    forward();
  }
  layer_.module->eval();
  forward();
}

TEST_P(EveryLayer, MergedInInferenceModeServesAutogradLater) {
  layer().add_adapter("default", lora_config(2, 3));
  randomize_factors(*layer_.module);
  layer_.module->eval();
  {
    c10::InferenceMode inference;
    layer().merge();
    forward();
  }
  const auto input = input_.is_floating_point() ? input_.clone().requires_grad_() : input_;
  const auto output = layer_.forward(input);
  EXPECT_NO_THROW((output * torch::ones({1}, torch::kDouble).requires_grad_()).sum().backward());
}

TEST_P(EveryLayer, UnloadedItIsAPlainLayerWithTheMergedWeight) {
  layer().add_adapter("default", lora_config(2, 3));
  randomize_factors(*layer_.module);
  const auto expected = naive_weight({"default"});
  const auto tied = layer_.base_weight();
  const auto tied_before = tied.detach().clone();
  layer().merge_and_unload();
  EXPECT_LT(largest_difference(layer_.base_weight(), expected), tolerance(torch::kDouble));
  EXPECT_TRUE(layer_.module->parameters()[0].is_same(layer_.base_weight()));
  EXPECT_TRUE(same_bits(tied, tied_before)) << "who shared the weight keeps it";
  EXPECT_EQ(parameter_names(*layer_.module), parameter_names(layer().base_module()));
  EXPECT_TRUE(same_bits(forward(), forward_with_weight(layer_.base_weight())));
}

TEST_P(EveryLayer, IsPlainAgainWithoutItsLastAdapter) {
  const auto names = parameter_names(*layer_.module);
  const auto before = forward();
  layer().add_adapter("one", lora_config(2, 3));
  layer().add_adapter("two", lora_config(2, 3));
  randomize_factors(*layer_.module);
  layer().delete_adapter("one");
  EXPECT_TRUE(layer().active().empty());
  EXPECT_TRUE(same_bits(forward(), before));
  layer().delete_adapter("two");
  EXPECT_EQ(parameter_names(*layer_.module), names);
  EXPECT_TRUE(layer_.module->children().empty());
  EXPECT_TRUE(same_bits(forward(), before));
  layer().add_adapter("one", lora_config(2, 3));
  EXPECT_EQ(layer().active(), std::vector<std::string>{"one"});
}

TEST_P(EveryLayer, GivesEveryAdapterAPairOfItsOwn) {
  const std::vector<std::string> names = {"default", "lora_A", "my_lora_up", "bias", "weight", "a b/ü"};
  for (const auto& name : names) layer().add_adapter(name, lora_config(2, 3));
  const auto pairs = find_factor_pairs(*layer_.module);
  ASSERT_EQ(pairs.size(), names.size());
  for (size_t i = 0; i < names.size(); ++i) {
    EXPECT_TRUE(pairs[i].a.is_same(layer().adapter(names[i]).a)) << names[i];
    EXPECT_TRUE(pairs[i].b.is_same(layer().adapter(names[i]).b)) << names[i];
    const auto own = nn::factor_pairs(*layer_.module, names[i]);
    EXPECT_TRUE(own.size() == 1 && own[0].name == pairs[i].name && own[0].a.is_same(pairs[i].a)) << names[i];
  }
}

TEST_P(EveryLayer, AClonesParametersAreItsOwn) {
  layer().add_adapter("one", lora_config(2, 3));
  layer().add_adapter("two", lora_config(3, 5));
  layer_.base_weight().set_requires_grad(false);
  randomize_factors(*layer_.module);
  layer().set_active({"two"});
  const auto before = forward();
  const auto state = at::globalContext().defaultGenerator(torch::kCPU).get_state();
  auto copy = any_clone(layer_);
  EXPECT_TRUE(torch::equal(at::globalContext().defaultGenerator(torch::kCPU).get_state(), state)) << "nothing is drawn";
  EXPECT_TRUE(same_bits(copy.forward(input_), before));
  EXPECT_EQ(copy.layer().active(), layer().active());
  const auto own = layer_.module->named_parameters(), copied = copy.module->named_parameters();
  ASSERT_EQ(own.keys(), copied.keys());
  for (const auto& item : own) {
    const auto& other = copied[item.key()];
    EXPECT_EQ(item.value().requires_grad(), other.requires_grad()) << item.key();
    EXPECT_NE(item.value().data_ptr(), other.data_ptr()) << item.key();
  }
  randomize_factors(*copy.module);
  copy.layer().delete_adapter("one");
  EXPECT_TRUE(same_bits(forward(), before));
  EXPECT_FALSE(same_bits(copy.forward(input_), before));
}

TEST_P(EveryLayer, MovesToAnotherDtypeWithItsAdapters) {
  layer().add_adapter("default", lora_config(2, 3));
  randomize_factors(*layer_.module);
  const auto before = forward();
  layer_.module->to(torch::kFloat);
  EXPECT_EQ(layer().adapter("default").a.scalar_type(), torch::kFloat);
  EXPECT_EQ(layer_.base_weight().scalar_type(), torch::kFloat);
  if (input_.is_floating_point()) input_ = input_.to(torch::kFloat);
  const auto after = forward();
  EXPECT_EQ(after.scalar_type(), torch::kFloat);
  EXPECT_LT(largest_difference(after, before), tolerance(torch::kFloat));
}

TEST_P(EveryLayer, IsClonedToAnotherDeviceWithItsAdapters) {
  // Module::to does not reach the meta device: it exchanges the data of tensors, whose type must be the same.
  layer().add_adapter("default", lora_config(2, 3));
  std::vector<torch::Device> devices = {torch::kMeta};
  if (torch::cuda::is_available()) devices.push_back(torch::kCUDA);
  for (const auto device : devices) {
    auto copy = any_clone(layer_, device);
    copy.layer().add_adapter("born there", lora_config(2, 3));
    for (const auto& item : copy.module->named_parameters()) {
      EXPECT_EQ(item.value().device().type(), device.type()) << item.key();
    }
    if (device == torch::kMeta) continue;  // embeddings and convolutions do not run there
    EXPECT_EQ(copy.forward(input_.to(device)).device().type(), device.type());
  }
  for (const auto& parameter : layer_.module->parameters()) EXPECT_EQ(parameter.device().type(), torch::kCPU);
}

TEST_P(EveryLayer, MovesToAGpuMerged) {
  if (!torch::cuda::is_available()) GTEST_SKIP() << "no GPU";
  layer().add_adapter("default", lora_config(2, 3));
  randomize_factors(*layer_.module);
  layer_.module->eval();
  layer().merge();
  const auto before = forward();
  layer_.module->to(torch::kCUDA);
  EXPECT_LT(largest_difference(layer_.forward(input_.to(torch::kCUDA)).cpu(), before), tolerance(torch::kDouble));
  layer().unmerge();
  EXPECT_LT(largest_difference(layer_.forward(input_.to(torch::kCUDA)).cpu(), before), tolerance(torch::kDouble));
}

TEST_P(EveryLayer, IsPrintedWithItsAdapters) {
  layer().add_adapter("default", lora_config(2, 3));
  layer().add_adapter("other", lora_config(4, 4));
  std::stringstream text;
  layer_.module->pretty_print(text);
  EXPECT_TRUE(
      mentions(text.str(), std::string("lora_rite::nn::Lora") + GetParam().name + "(torch::nn::" + GetParam().name));
  EXPECT_TRUE(mentions(text.str(), ", default: r=2, scale=1.5, other: r=4, scale=1, not active)"));
}

TEST_P(EveryLayer, ResetItIsAFreshPlainLayer) {
  const auto weight = layer_.base_weight().detach().clone();
  layer().add_adapter("default", lora_config(2, 3));
  if (auto* linear = layer_.module->as<LoraLinear>()) linear->reset();
  if (auto* embedding = layer_.module->as<LoraEmbedding>()) embedding->reset();
  if (auto* conv = layer_.module->as<LoraConv2d>()) conv->reset();
  EXPECT_TRUE(layer().adapter_names().empty());
  EXPECT_EQ(layer_.base_weight().scalar_type(), torch::kDouble);
  EXPECT_EQ(layer_.base_weight().sizes(), weight.sizes());
  EXPECT_FALSE(same_bits(layer_.base_weight(), weight));
  EXPECT_TRUE(layer_.module->parameters()[0].is_same(layer_.base_weight()));
}

TEST_P(EveryLayer, ATorchSaveComesBackWithEveryAdapter) {
  for (const auto* name : {"default", "second one"}) layer().add_adapter(name, lora_config(2, 3));
  randomize_factors(*layer_.module);
  layer().set_active({"second one"});
  const auto expected = forward();
  layer_.module->eval();
  layer().merge();  // says nothing about what a file holds
  const auto bytes = saved_bytes(layer_.module);
  torch::manual_seed(99);
  layer_ = GetParam().make();
  layer_.module->to(torch::kDouble);
  for (const auto* name : {"default", "second one"}) layer().add_adapter(name, lora_config(2, 3));
  layer().set_active({"second one"});
  EXPECT_FALSE(same_bits(forward(), expected));
  load_bytes(layer_.module, bytes);
  EXPECT_TRUE(same_bits(forward(), expected));
}

TEST_P(EveryLayer, AFileOfAnotherRankIsRefusedAndChangesNothing) {
  layer().add_adapter("default", lora_config(2, 3));
  const auto bytes = saved_bytes(layer_.module);
  layer_ = GetParam().make();
  layer_.module->to(torch::kDouble);
  layer().add_adapter("default", lora_config(1, 3));
  randomize_factors(*layer_.module);
  const auto expected = forward();
  // Whichever of the factors is read first.
  const auto error = error_of([&] { load_bytes(layer_.module, bytes); });
  EXPECT_TRUE(mentions(error, layer().type_name())) << error;
  EXPECT_TRUE(mentions(error, "default") && mentions(error, "in the file, expected [")) << error;
  EXPECT_TRUE(same_bits(forward(), expected));
}

TEST_P(EveryLayer, ABfloat16BaseTakesFloatFactorsAndGivesBfloat16) {
  layer_.module->to(torch::kBFloat16);
  if (input_.is_floating_point()) input_ = input_.to(torch::kBFloat16);
  layer().add_adapter("default", lora_config(2, 3));
  EXPECT_EQ(layer().adapter("default").a.scalar_type(), torch::kFloat);
  randomize_factors(*layer_.module);
  const auto output = forward();
  EXPECT_EQ(output.scalar_type(), torch::kBFloat16);
  output.sum().backward();
  EXPECT_EQ(layer().adapter("default").b.grad().scalar_type(), torch::kFloat);
  // The base's output is rounded (2⁻⁹), and so is the sum; terms up to four times the largest result.
  const auto expected = forward_with_weight(naive_weight({"default"}).to(torch::kDouble));
  EXPECT_LT(largest_difference(output, expected), 8 * std::ldexp(1.0, -9));
}

TEST_P(EveryLayer, RefusesWhatItCannotHaveAndStaysAsItWas) {
  layer().add_adapter("default", lora_config(2, 3));
  const auto names = parameter_names(*layer_.module);
  const auto refused = [&](const char* words, const std::function<void()>& action) {
    EXPECT_TRUE(mentions(error_of(action), words)) << words;
    EXPECT_EQ(parameter_names(*layer_.module), names) << words;
    EXPECT_EQ(layer().active(), std::vector<std::string>{"default"}) << words;
  };
  const auto add = [&](const std::string& name, const std::function<void(LoraConfig&)>& change) {
    return [&layer = layer(), name, change] {
      LoraConfig config;
      change(config);
      layer.add_adapter(name, config);
    };
  };
  const auto unchanged = [](LoraConfig&) {};
  refused("already", add("default", unchanged));
  refused("is empty", add("", unchanged));
  refused("without a dot", add("a.b", unchanged));
  refused("rank is 0, expected ≥ 1", add("x", [](LoraConfig& config) { config.rank = 0; }));
  refused("alpha is", add("x", [](LoraConfig& config) { config.alpha = NAN; }));
  refused("dropout is 1.5", add("x", [](LoraConfig& config) { config.dropout = 1.5; }));
  refused("factor_dtype is Int", add("x", [](LoraConfig& config) { config.factor_dtype = torch::kInt; }));
  refused("LoraInit::Pissa", add("x", [](LoraConfig& config) { config.init = LoraInit::Pissa; }));
  refused("there is no adapter 'x', expected one of 'default'", [&] { layer().set_active({"x"}); });
  refused("there is no adapter 'x'", [&] { layer().add_active("x"); });
  refused("twice", [&] { layer().set_active({"default", "default"}); });
  refused("there is no adapter 'x'", [&] { layer().delete_adapter("x"); });
  refused("there is no adapter 'x'", [&] { layer().delta_weight("x"); });
}

// --- What PEFT computes.

class PeftLayer : public testing::TestWithParam<const char*> {};

INSTANTIATE_TEST_SUITE_P(Golden, PeftLayer,
                         testing::Values("linear", "linear_no_bias_3d", "linear_rslora", "linear_two_active",
                                         "linear_one_of_two", "linear_bfloat16_base", "embedding", "embedding_padding",
                                         "conv", "conv_stride_padding", "conv_1x1_rslora"));

AnyLayer golden_layer(const std::string& name, const json& base) {
  const auto weight = tensor_of(base["weight"]);
  const bool has_bias = base.contains("bias");
  if (name.find("linear") == 0) {
    return any_layer(LoraLinear(torch::nn::LinearOptions(weight.size(1), weight.size(0)).bias(has_bias)));
  }
  if (name.find("embedding") == 0) {
    auto options = torch::nn::EmbeddingOptions(weight.size(0), weight.size(1));
    if (name == "embedding_padding") options.padding_idx(1);
    return any_layer(LoraEmbedding(options));
  }
  auto options = torch::nn::Conv2dOptions(weight.size(1), weight.size(0), {weight.size(2), weight.size(3)});
  options.bias(has_bias);
  if (name == "conv_stride_padding") options.stride({2, 1}).padding({1, 2});
  return any_layer(LoraConv2d(options));
}

TEST_P(PeftLayer, OutputGradientsAndMergedWeightAreTheSame) {
  const std::string name = GetParam();
  const json& golden = peft_golden()["layers"][name];
  const bool bfloat16 = name == "linear_bfloat16_base";
  const auto dtype = bfloat16 ? torch::kBFloat16 : torch::kDouble;
  // bfloat16: the same operators in the same order, so at most the last bit of some element (2⁻⁸).
  const double bound = bfloat16 ? std::ldexp(1.0, -7) : tolerance(torch::kDouble);
  auto layer = golden_layer(name, golden["base"]);
  layer.module->to(dtype);
  {
    torch::NoGradGuard no_grad;
    for (auto& item : layer.module->named_parameters()) item.value().copy_(tensor_of(golden["base"][item.key()]));
    for (const auto& [adapter, data] : golden["adapters"].items()) {
      auto config = lora_config(data["rank"], data["alpha"]);
      config.use_rslora = data["rslora"];
      layer.layer().add_adapter(adapter, config);
      const auto& added = layer.layer().adapter(adapter);
      EXPECT_EQ(added.config.scale(), data["scale"].get<double>());
      EXPECT_EQ("torch." + std::string(added.a.scalar_type() == torch::kFloat ? "float32" : "float64"),
                data["dtype"].get<std::string>());
      torch::Tensor(added.a).copy_(tensor_of(data["a"]));
      torch::Tensor(added.b).copy_(tensor_of(data["b"]));
    }
  }
  layer.layer().set_active(golden["active"].get<std::vector<std::string>>());
  auto x = tensor_of(golden["x"]);
  x = name.find("embedding") == 0 ? x.to(torch::kLong) : x.to(dtype);

  const auto y = layer.forward(x);
  EXPECT_LT(largest_difference(y, tensor_of(golden["y"])), bound);
  (y.to(torch::kDouble) * tensor_of(golden["loss_weights"])).sum().backward();
  for (const auto& [adapter, data] : golden["adapters"].items()) {
    const auto& own = layer.layer().adapter(adapter);
    for (const auto& [key, factor] : {std::pair{"grad_a", own.a}, std::pair{"grad_b", own.b}}) {
      ASSERT_EQ(factor.grad().defined(), data.contains(key)) << adapter << ' ' << key;
      if (data.contains(key)) {
        EXPECT_LT(largest_difference(factor.grad(), tensor_of(data[key])), bound) << key;
      }
    }
  }
  layer.module->eval();
  layer.layer().merge();
  EXPECT_LT(largest_difference(layer.layer().effective_weight(), tensor_of(golden["merged"])), bound);
  EXPECT_LT(largest_difference(layer.forward(x), tensor_of(golden["merged_y"])), bound);
}

// --- Linear layers.

TEST(LoraLinear, SharesTheParametersOfTheLayerItIsPutOver) {
  torch::nn::Linear base(6, 5);
  base->eval();
  base->weight.set_requires_grad(false);
  LoraLinear layer(base);
  EXPECT_FALSE(layer->is_training());
  EXPECT_FALSE(layer->parameters()[0].requires_grad());
  EXPECT_TRUE(layer->base_layer()->weight.is_same(base->weight));
  layer->add_adapter("default", lora_config(2, 3));
  EXPECT_EQ(parameter_names(*layer), (std::vector<std::string>{"base_layer.weight", "base_layer.bias",
                                                               "lora_A.default.weight", "lora_B.default.weight"}));
  EXPECT_TRUE(layer->named_parameters()["base_layer.weight"].is_same(base->weight));
  EXPECT_TRUE(layer->named_parameters()["base_layer.bias"].is_same(base->bias));
}

TEST(LoraLinear, DropsTheAdaptersInputInTrainingOnly) {
  torch::manual_seed(3);
  LoraLinear layer(200, 3);
  layer->to(torch::kDouble);
  auto config = lora_config(2, 3);
  config.dropout = 0.25;
  layer->add_adapter("default", config);
  randomize_factors(*layer);
  const auto x = torch::randn({50, 200}, torch::kDouble);
  const auto& adapter = layer->adapter("default");
  const auto output = [&](const torch::Tensor& adapter_input) {
    return torch::linear(x, layer->base_layer()->weight, layer->base_layer()->bias) +
           1.5 * torch::linear(torch::linear(adapter_input, adapter.a), adapter.b);
  };
  torch::manual_seed(11);
  const auto trained = layer->forward(x);
  torch::manual_seed(11);
  EXPECT_LT(largest_difference(trained, output(torch::dropout(x, 0.25, true))), tolerance(torch::kDouble) * 8);
  EXPECT_GT(largest_difference(trained, output(x)), 0.01);
  layer->eval();
  EXPECT_LT(largest_difference(layer->forward(x), output(x)), tolerance(torch::kDouble) * 8);
}

TEST(LoraLinear, StartsByTheNamedDistributions) {
  torch::manual_seed(5);
  constexpr int64_t kIn = 900, kOut = 300, kRank = 20;
  LoraLinear layer(kIn, kOut);
  const auto start = [&](LoraInit init) {
    auto config = lora_config(kRank, 1);
    config.init = init;
    layer->add_adapter("x", config);
    const auto adapter = layer->adapter("x");
    layer->delete_adapter("x");
    return adapter;
  };
  const auto kaiming = start(LoraInit::Kaiming);
  // Uniform within √(6 / ((1 + 5) in)) = 1/30; of 18,000 numbers the largest is within 1 % of it but for e⁻¹⁸⁰.
  EXPECT_LE(kaiming.a.abs().max().item<double>(), 1 / 30.0 * (1 + 1e-6));
  EXPECT_GE(kaiming.a.abs().max().item<double>(), 0.99 / 30.0);
  EXPECT_EQ(kaiming.b.abs().max().item<double>(), 0);
  const auto gaussian = start(LoraInit::Gaussian);
  // The standard deviation of 18,000 normal numbers is known to 0.5 %; five times that.
  EXPECT_NEAR(gaussian.a.std().item<double>() * kRank, 1, 0.027);
  EXPECT_GT(gaussian.a.abs().max().item<double>() * kRank, 3) << "uniform numbers end at √3";
  EXPECT_EQ(gaussian.b.abs().max().item<double>(), 0);
  const auto orthogonal = start(LoraInit::Orthogonal);
  EXPECT_LT(torch::matmul(orthogonal.b, orthogonal.a).norm().item<double>(),
            1e-5 * orthogonal.b.norm().item<double>() * orthogonal.a.norm().item<double>());
  // A's columns are normal numbers on r/2 orthonormal rows, a tenth: the mean square is 1 / (100 · 2); 9,000 numbers.
  EXPECT_NEAR(orthogonal.a.square().mean().item<double>() * 200, 1, 0.08);
  EXPECT_NEAR(orthogonal.b.square().mean().item<double>() * 200, 1, 0.13);
  const auto random = start(LoraInit::Random);
  EXPECT_GT(random.b.abs().min().item<double>() + random.b.abs().max().item<double>(), 0.1);
}

TEST(LoraConv2d, StartsWithNormalNumbersIfAsked) {
  torch::manual_seed(3);
  LoraConv2d layer(torch::nn::Conv2dOptions(100, 4, 3));
  auto config = lora_config(10, 1);
  config.init = LoraInit::Gaussian;
  layer->add_adapter("x", config);
  const auto adapter = layer->adapter("x");
  // As above, of 9,000 numbers.
  EXPECT_NEAR(adapter.a.std().item<double>() * 10, 1, 0.038);
  EXPECT_GT(adapter.a.abs().max().item<double>() * 10, 3);
  EXPECT_EQ(adapter.b.abs().max().item<double>(), 0);
}

TEST(LoraLinear, TwoAdaptersDoNotStartAlike) {
  LoraLinear layer(6, 5);
  layer->add_adapter("one", lora_config(2, 3));
  layer->add_adapter("two", lora_config(2, 3));
  EXPECT_FALSE(torch::equal(layer->adapter("one").a, layer->adapter("two").a));
}

TEST(LoraLinear, PissaIsThatOfPeft) {
  const json& golden = peft_golden()["pissa"];
  LoraLinear layer(7, 5);
  {
    torch::NoGradGuard no_grad;
    layer->base_layer()->weight.copy_(tensor_of(golden["weight"]));
  }
  auto config = lora_config(golden["rank"], golden["alpha"]);
  config.init = LoraInit::Pissa;
  layer->add_adapter("default", config);
  const auto& [own, a, b, initial_a, initial_b] = layer->adapter("default");
  // Singular vectors have no sign, products have; an SVD in float is exact to some 10 ε.
  const double bound = tolerance(torch::kFloat);
  EXPECT_LT(largest_difference(torch::matmul(b, a), tensor_of(golden["product"])), bound);
  EXPECT_LT(largest_difference(torch::matmul(a, a.t()).diag(), tensor_of(golden["gram_a"]).diag()), bound);
  EXPECT_LT(largest_difference(torch::matmul(b.t(), b).diag(), tensor_of(golden["gram_b"]).diag()), bound);
  EXPECT_LT(largest_difference(layer->base_layer()->weight, tensor_of(golden["residual"])), bound);
}

TEST(LoraLinear, PissaKeepsTheFunctionAndGivesTheBaseBack) {
  for (const auto dtype : {torch::kDouble, torch::kFloat, torch::kBFloat16}) {
    torch::manual_seed(4);
    LoraLinear layer(12, 10);
    layer->to(dtype);
    const auto weight = layer->base_layer()->weight.detach().clone();
    auto config = lora_config(3, 5);
    config.init = LoraInit::Pissa;
    layer->add_adapter("default", config);
    const double epsilon =
        dtype == torch::kDouble ? std::ldexp(1.0, -52) : std::ldexp(1.0, dtype == torch::kFloat ? -23 : -8);
    EXPECT_GT(largest_difference(layer->base_layer()->weight, weight), 0.1);
    // The residual and the sum are rounded once each, to ε/2 of numbers no larger than twice the largest weight.
    EXPECT_LT(largest_difference(layer->effective_weight(), weight), 4 * epsilon);
    EXPECT_TRUE(layer->named_parameters()["base_layer.weight"].is_same(layer->base_layer()->weight));
    randomize_factors(*layer);  // training does not change what the base gets back
    EXPECT_TRUE(mentions(error_of([&] { layer->add_adapter("other", lora_config(2, 2)); }), "LoraInit::Pissa"));
    layer->delete_adapter("default");
    EXPECT_LT(largest_difference(layer->base_layer()->weight, weight), 4 * epsilon);
  }
}

TEST(LoraLinear, PissasStartIsABufferBesideTheFactorAndGoesWithTheLayer) {
  LoraLinear layer(6, 5);
  auto config = lora_config(2, 3);
  config.init = LoraInit::Pissa;
  layer->add_adapter("x", config);
  const auto names = parameter_names(*layer);
  EXPECT_EQ(names,
            (std::vector<std::string>{"base_layer.weight", "base_layer.bias", "lora_A.x.weight", "lora_B.x.weight"}));
  EXPECT_EQ(layer->named_buffers().keys(), (std::vector<std::string>{"lora_A.x.initial", "lora_B.x.initial"}));
  EXPECT_EQ(find_factor_pairs(*layer).size(), 1U);
  const auto copy = std::dynamic_pointer_cast<nn::LoraLinearImpl>(layer->clone());
  EXPECT_TRUE(copy->named_buffers()["lora_A.x.initial"].is_same(copy->adapter("x").initial_a));
  EXPECT_FALSE(copy->adapter("x").initial_a.is_alias_of(layer->adapter("x").initial_a));
  EXPECT_TRUE(same_bits(copy->adapter("x").initial_a, layer->adapter("x").initial_a));
  layer->to(torch::kDouble);
  EXPECT_EQ(layer->adapter("x").initial_a.scalar_type(), torch::kDouble);
  layer->delete_adapter("x");
  EXPECT_EQ(layer->named_buffers().size(), 0U);
}

TEST(LoraLinear, RefusesARankThatTheInitialisationCannotHave) {
  LoraLinear layer(4, 3);
  const auto add = [&](LoraInit init, int64_t rank, double alpha) {
    auto config = lora_config(rank, alpha);
    config.init = init;
    layer->add_adapter("x", config);
  };
  EXPECT_TRUE(mentions(error_of([&] { add(LoraInit::Orthogonal, 3, 1); }), "rank is 3, expected an even one"));
  EXPECT_TRUE(mentions(error_of([&] { add(LoraInit::Pissa, 4, 1); }), "rank is 4, expected at most 3"));
  EXPECT_TRUE(mentions(error_of([&] { add(LoraInit::Pissa, 2, -1); }), "alpha is -1"));
  EXPECT_FALSE(layer->has_adapter("x"));
}

// --- Embeddings and convolutions.

TEST(LoraEmbedding, StartsAsInPeftWithAZeroAndBNormal) {
  torch::manual_seed(6);
  LoraEmbedding layer(30, 1000);
  layer->add_adapter("default", lora_config(16, 3));
  EXPECT_EQ(layer->adapter("default").a.abs().max().item<double>(), 0);
  EXPECT_NEAR(layer->adapter("default").b.std().item<double>(), 1, 0.03);  // 16,000 numbers: 0.6 %, five times that
}

TEST(LoraEmbedding, GivesDenseGradientsOverASparseBase) {
  LoraEmbedding layer(torch::nn::EmbeddingOptions(9, 4).sparse(true));
  layer->add_adapter("default", lora_config(2, 3));
  layer->forward(torch::tensor({1, 2})).sum().backward();
  EXPECT_EQ(layer->adapter("default").a.grad().layout(), torch::kStrided);
}

TEST(LoraEmbedding, RefusesMaxNorm) {
  LoraEmbedding layer(torch::nn::EmbeddingOptions(9, 4).max_norm(1.0));
  EXPECT_TRUE(mentions(error_of([&] { layer->add_adapter("x", lora_config(2, 3)); }), "max_norm"));
}

TEST(LoraConv2d, RefusesGroups) {
  LoraConv2d layer(torch::nn::Conv2dOptions(4, 4, 3).groups(2));
  EXPECT_TRUE(mentions(error_of([&] { layer->add_adapter("x", lora_config(2, 3)); }), "2 groups, expected 1"));
}

}  // namespace
}  // namespace lora_rite::test
