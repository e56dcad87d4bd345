// lora_config, adapter_config, peft_adapter, inject_adapter: between the layers of a model and PEFT's files.

#include <gtest/gtest.h>
#include <torch/nn/modules/container/sequential.h>

#include <cmath>
#include <functional>
#include <lora_rite/nn/nn.hpp>
#include <lora_rite/nn/peft.hpp>
#include <string>
#include <vector>

#include "nn/support.hpp"
#include "support/pairs.hpp"
#include "support/temporary_folder.hpp"
#include "support/tensors.hpp"
#include "support/torch.hpp"

namespace lora_rite::test {
namespace {

using nn::inject_adapter;
using nn::inject_lora;
using nn::LoraConfig;
using nn::LoraInit;
using nn::peft_adapter;

const std::vector<std::string> kEverything = {"embed", "conv", "0", "2", "head"};

/// What a model computes of all its indices.
torch::Tensor output_of(Small& model) {
  torch::NoGradGuard no_grad;
  return model->forward(torch::arange(9));
}

/// A model with the same base and no adapter.
Small plain_copy(const nn::NamedTensors& base) {
  Small copy;
  nn::load_base_state(*copy, base);
  return copy;
}

nn::NamedTensors copies_of(const nn::NamedTensors& tensors) {
  nn::NamedTensors copies;
  for (const auto& [name, tensor] : tensors) copies.emplace(name, tensor.detach().clone());
  return copies;
}

/// Writes an adapter and reads it again.
Adapter through_files(const Adapter& adapter) {
  const TemporaryFolder folder;
  save_adapter(folder / "adapter", adapter);
  return load_adapter(folder / "adapter");
}

/// A config with every field that a file has set to something else than its default.
LoraConfig full_config() {
  LoraConfig config;
  config.rank = 6;
  config.alpha = 2.5;
  config.dropout = 0.25;
  config.use_rslora = true;
  config.init = LoraInit::Gaussian;
  config.bias = nn::LoraBias::LoraOnly;
  config.target_modules = std::vector<std::string>{"q", "v"};
  config.exclude_modules = ".*head";
  config.rank_pattern = {{"a.*", 4}, {"b", 2}};
  config.alpha_pattern = {{"c", 0.5}};
  config.layers_to_transform = {0, 3};
  config.layers_pattern = {"layers", "h"};
  return config;
}

TEST(PeftConfig, KeepsWhatAFileCanSayBothWays) {
  const LoraConfig config = full_config();
  const AdapterConfig description = nn::adapter_config(config);
  EXPECT_EQ(description.r, 6);
  EXPECT_EQ(description.lora_alpha, 2.5);
  EXPECT_EQ(description.lora_dropout, 0.25);
  EXPECT_TRUE(description.use_rslora);
  EXPECT_EQ(description.bias, "lora_only");
  EXPECT_EQ(description.layers_pattern, ModuleNames(std::vector<std::string>{"layers", "h"}));
  const LoraConfig back = nn::lora_config(parse_adapter_config(adapter_config_text(description), ""));
  EXPECT_EQ(back.rank, config.rank);
  EXPECT_EQ(back.alpha, config.alpha);
  EXPECT_EQ(back.dropout, config.dropout);
  EXPECT_EQ(back.use_rslora, config.use_rslora);
  EXPECT_EQ(back.init, config.init);
  EXPECT_EQ(back.bias, config.bias);
  EXPECT_EQ(back.target_modules, config.target_modules);
  EXPECT_EQ(back.exclude_modules, config.exclude_modules);
  EXPECT_EQ(back.rank_pattern, config.rank_pattern);
  EXPECT_EQ(back.alpha_pattern, config.alpha_pattern);
  EXPECT_EQ(back.layers_to_transform, config.layers_to_transform);
  EXPECT_EQ(back.layers_pattern, config.layers_pattern);
}

TEST(PeftConfig, NamesEveryStartAndBiasAsPeftDoes) {
  using Field = std::variant<bool, std::string>;
  const std::vector<std::pair<LoraInit, Field>> inits = {{LoraInit::Kaiming, true},
                                                         {LoraInit::Random, false},
                                                         {LoraInit::Gaussian, std::string("gaussian")},
                                                         {LoraInit::Orthogonal, std::string("orthogonal")},
                                                         {LoraInit::Pissa, std::string("pissa")}};
  for (const auto& [init, field] : inits) {
    LoraConfig config;
    config.init = init;
    EXPECT_EQ(nn::adapter_config(config).init_lora_weights, field);
    EXPECT_EQ(nn::lora_config(nn::adapter_config(config)).init, init);
  }
  for (const auto bias : {nn::LoraBias::None, nn::LoraBias::All, nn::LoraBias::LoraOnly}) {
    LoraConfig config;
    config.bias = bias;
    EXPECT_EQ(nn::lora_config(nn::adapter_config(config)).bias, bias);
  }
  AdapterConfig description;
  description.layers_to_transform = {1};
  description.target_modules = std::vector<std::string>{"q"};
  description.layers_pattern = "h";
  EXPECT_EQ(nn::lora_config(description).layers_pattern, std::vector<std::string>{"h"});
  description.layers_pattern = "";  // to PEFT no pattern, as none
  EXPECT_EQ(nn::lora_config(description).layers_pattern, std::vector<std::string>{});
}

TEST(PeftConfig, RefusesWhatLayersCannotDoByTheFieldsName) {
  const auto refused = [](const char* words, const std::function<void(AdapterConfig&)>& change) {
    AdapterConfig description;
    change(description);
    EXPECT_TRUE(mentions(error_of([&] { nn::lora_config(description); }), words)) << words;
    Small model;
    description.target_modules = std::vector<std::string>{"head"};
    const Adapter adapter{description, {}};
    EXPECT_TRUE(mentions(error_of([&] { inject_adapter(*model, adapter); }), words)) << words;
  };
  refused("fan_in_fan_out is 'true', expected false", [](auto& config) { config.fan_in_fan_out = true; });
  refused("modules_to_save is '[\"score\"]', expected none",
          [](auto& config) { config.modules_to_save = std::vector<std::string>{"score"}; });
  for (const char* field : {"use_dora", "use_qalora", "lora_bias", "ensure_weight_tying"}) {
    refused((std::string(field) + " is 'true', expected none").c_str(),
            [&](auto& config) { config.other[field] = true; });
  }
  for (const char* field :
       {"layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens"}) {
    refused((std::string(field) + " is '[1]', expected none").c_str(),
            [&](auto& config) { config.other[field] = {1}; });
  }
  for (const char* field : {"use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "megatron_config"}) {
    refused((std::string(field) + " is '{\"k\":2}', expected none").c_str(), [&](auto& config) {
      config.other[field] = {{"k", 2}};
    });
  }
  refused("init_lora_weights is", [](auto& config) { config.init_lora_weights = "olora"; });
  refused("r is 0, expected ≥ 1", [](auto& config) { config.r = 0; });
  refused("lora_alpha is nan", [](auto& config) { config.lora_alpha = NAN; });
  refused("lora_dropout is 2", [](auto& config) { config.lora_dropout = 2; });
  refused("bias is 'some'", [](auto& config) { config.bias = "some"; });
  LoraConfig config;
  config.rank = 0;
  EXPECT_TRUE(mentions(error_of([&] { nn::adapter_config(config); }), "rank is 0"));
}

TEST(PeftConfig, TakesFieldsThatAreOffOrThatNobodyKnows) {
  AdapterConfig description;
  description.modules_to_save = std::vector<std::string>{};
  description.other = {{"use_dora", false},
                       {"lora_bias", false},
                       {"layer_replication", nullptr},
                       {"target_parameters", nlohmann::json::array()},
                       {"loftq_config", nlohmann::json::object()},
                       {"eva_config", {{"rho", 2}}},
                       {"a_field_of_tomorrow", true}};
  EXPECT_EQ(nn::lora_config(description).rank, 8);
}

TEST(PeftAdapter, CarriesEveryKindOfLayerThroughFilesToAnotherModel) {
  torch::manual_seed(1);
  Small model;
  const auto base = copies_of(nn::base_state(*model));
  auto config = lora_config(2, 3, kEverything);
  config.dropout = 0.125;
  inject_lora(*model, config, "lora_mine");  // a name that looks like a part of PEFT's names
  randomize_factors(*model);

  const Adapter adapter = through_files(peft_adapter(*model, "lora_mine"));
  EXPECT_EQ(adapter.tensors.size(), 10U);
  EXPECT_EQ(adapter.tensors.count("body.0.lora_A.weight") + adapter.tensors.count("embed.lora_embedding_B"), 2U);
  EXPECT_EQ(adapter.config.target_modules, ModuleNames(kEverything));
  EXPECT_EQ(adapter.config.lora_dropout, 0.125);
  EXPECT_EQ(adapter.config.r, 2);
  EXPECT_EQ(adapter.config.lora_alpha, 3);

  Small other = plain_copy(base);
  const auto injected = inject_adapter(*other, adapter, "yours");
  ASSERT_EQ(injected.size(), 5U);
  EXPECT_EQ(injected[0].name, "embed");
  EXPECT_EQ(injected[0].rank, 2);
  EXPECT_EQ(injected[0].alpha, 3);
  other->eval(), model->eval();
  EXPECT_FALSE(same_bits(output_of(other), plain_copy(base)->forward(torch::arange(9))));
  EXPECT_TRUE(same_bits(output_of(other), output_of(model)));
  EXPECT_EQ(other->head->adapter("yours").config.dropout, 0.125);
  EXPECT_TRUE(other->head->adapter("yours").a.requires_grad());
  EXPECT_FALSE(other->head->base_layer()->weight.requires_grad());
}

TEST(PeftAdapter, CopiesValuesSoThatTheFileAndTheOtherModelStayAsTheyAre) {
  Small model, other;
  inject_lora(*model, lora_config(2, 3, {"0"}));
  const Adapter adapter = peft_adapter(*model);
  EXPECT_TRUE(adapter.tensors.at("body.0.lora_A.weight").is_same(nn::adapter_state(*model).at("body.0.lora_A.weight")));
  inject_adapter(*other, adapter);
  const auto before = adapter.tensors.at("body.0.lora_A.weight").detach().clone();
  {
    torch::NoGradGuard no_grad;
    nn::adapter_state(*other).at("body.0.lora_A.weight").add_(1);
  }
  EXPECT_TRUE(same_bits(adapter.tensors.at("body.0.lora_A.weight"), before));
}

TEST(PeftAdapter, PutsLoraLayersOverPlainOnesInASequential) {
  torch::manual_seed(2);
  const auto make = [] { return torch::nn::Sequential(torch::nn::Linear(4, 3), torch::nn::Linear(3, 2)); };
  auto model = make(), other = make();
  nn::load_base_state(*other, copies_of(nn::base_state(*model)));
  inject_lora(*model, lora_config(2, 3, {"0", "1"}));
  randomize_factors(*model);
  const auto injected = inject_adapter(*other, through_files(peft_adapter(*model)));
  ASSERT_EQ(injected.size(), 2U);
  EXPECT_TRUE(injected[1].replaced);
  const auto input = torch::randn({5, 4});
  EXPECT_TRUE(same_bits(other->forward(input), model->forward(input)));
}

TEST(PeftAdapter, CarriesBiases) {
  for (const auto bias : {nn::LoraBias::All, nn::LoraBias::LoraOnly}) {
    torch::manual_seed(3);
    Small model;
    const auto base = copies_of(nn::base_state(*model));
    auto config = lora_config(2, 3, {"0", "embed"});
    config.bias = bias;
    inject_lora(*model, config);
    {
      torch::NoGradGuard no_grad;
      for (auto& parameter : model->named_parameters()) {
        if (parameter.value().requires_grad()) parameter.value().normal_();
      }
    }
    const Adapter adapter = through_files(peft_adapter(*model));
    EXPECT_EQ(adapter.tensors.count("body.0.base_layer.bias"), 1U);
    EXPECT_EQ(adapter.tensors.count("norm.bias"), bias == nn::LoraBias::All ? 1U : 0U);
    Small other = plain_copy(base);
    inject_adapter(*other, adapter);
    EXPECT_TRUE(same_bits(output_of(other), output_of(model)));
    EXPECT_EQ(other->norm->bias.requires_grad(), bias == nn::LoraBias::All);

    Adapter damaged = adapter;
    damaged.tensors["body.0.base_layer.bias"] = torch::zeros({7});
    Small third = plain_copy(base);
    EXPECT_TRUE(mentions(error_of([&] { inject_adapter(*third, damaged); }),
                         "inject_adapter: 'body.0.base_layer.bias' is [7], expected [6]"));
    EXPECT_TRUE(nn::adapter_names(*third).empty());
  }
}

TEST(PeftAdapter, KeepsPatternsOfRanksAndAlphasAndRsLora) {
  for (const bool use_rslora : {false, true}) {
    torch::manual_seed(4);
    Small model;
    const auto base = copies_of(nn::base_state(*model));
    auto config = lora_config(4, 3, kEverything);
    config.use_rslora = use_rslora;
    config.rank_pattern = {{"head", 2}, {"embed", 1}};
    config.alpha_pattern = {{"body.*", 5}};
    inject_lora(*model, config);
    randomize_factors(*model);
    const Adapter adapter = through_files(peft_adapter(*model));
    EXPECT_EQ(adapter.config.r, 4);
    EXPECT_EQ(adapter.config.lora_alpha, 3);
    EXPECT_EQ(adapter.config.rank_pattern, (std::map<std::string, int64_t>{{"embed", 1}, {"head", 2}}));
    EXPECT_EQ(adapter.config.alpha_pattern, (std::map<std::string, double>{{"body.*", 5}}));
    EXPECT_EQ(adapter.config.use_rslora, use_rslora);
    Small other = plain_copy(base);
    inject_adapter(*other, adapter);
    EXPECT_EQ(other->head->adapter("default").a.size(0), 2);
    EXPECT_TRUE(same_bits(output_of(other), output_of(model)));
  }
}

TEST(PeftAdapter, NamesRanksWhereSortedPatternsWouldMeanOthers) {
  torch::manual_seed(5);
  Small model;
  const auto base = copies_of(nn::base_state(*model));
  auto config = lora_config(4, 3, kEverything);
  config.rank_pattern = {{"head", 2}, {".*e.*", 1}};       // sorted, the second one comes first and takes head
  config.alpha_pattern = {{"body.2", 7}, {"[a-z].*", 3}};  // and here, too
  inject_lora(*model, config);
  randomize_factors(*model);
  const Adapter adapter = through_files(peft_adapter(*model));
  EXPECT_EQ(adapter.config.rank_pattern.count("^head") + adapter.config.rank_pattern.count("^body\\.0"), 2U);
  EXPECT_EQ(adapter.config.alpha_pattern, (std::map<std::string, double>{{"^body\\.2", 7}}));
  Small other = plain_copy(base);
  inject_adapter(*other, adapter);
  EXPECT_TRUE(same_bits(output_of(other), output_of(model)));
}

TEST(PeftAdapter, NamesModulesWhereTheConfigWouldMeanOthers) {
  torch::manual_seed(6);
  Small model;
  const auto base = copies_of(nn::base_state(*model));
  model->head->add_adapter("default", lora_config(2, 3, {"embed"}));  // not what the config says
  dynamic_cast<nn::LoraLayer&>(*model->body->ptr(0)).add_adapter("default", lora_config(3, 4));
  randomize_factors(*model);
  const Adapter adapter = through_files(peft_adapter(*model));
  EXPECT_EQ(adapter.config.target_modules, ModuleNames(std::vector<std::string>{"0", "head"}));
  Small other = plain_copy(base);
  inject_adapter(*other, adapter);
  EXPECT_TRUE(same_bits(output_of(other), output_of(model)));

  // Of two layers with one ending only one has the adapter.
  torch::nn::Module nested("nested");
  for (const char* block : {"a", "b"}) {
    nested.register_module(block, torch::nn::Sequential(nn::LoraLinear(3, 2)));
  }
  auto config = lora_config(2, 3, {"0"});
  config.exclude_modules = std::vector<std::string>{"a.0"};
  inject_lora(nested, config);
  EXPECT_EQ(peft_adapter(nested).config.target_modules, ModuleNames(std::vector<std::string>{"0"}));
  EXPECT_EQ(peft_adapter(nested).config.exclude_modules, ModuleNames(std::vector<std::string>{"a.0"}));
  nn::delete_adapter(nested, "default");
  config.exclude_modules = {};
  config.target_modules = std::vector<std::string>{"0"};
  for (const auto& [name, layer] : nn::lora_layers(nested)) {
    if (name == "b.0") layer->add_adapter("default", config);
  }
  EXPECT_EQ(peft_adapter(nested).config.target_modules, ModuleNames(std::vector<std::string>{"b.0"}));
}

TEST(PeftAdapter, NamesALayerWhoseNameIsTheEndOfAnothersByAPattern) {
  torch::manual_seed(7);
  const auto make = [] {
    auto model = std::make_shared<torch::nn::Module>("model");
    const auto block = std::make_shared<torch::nn::Module>("block");
    model->register_module("head", nn::LoraLinear(3, 2));
    model->register_module("aux", block);
    block->register_module("head", nn::LoraLinear(3, 2));
    return model;
  };
  const auto model = make();
  dynamic_cast<nn::LoraLayer&>(*model->named_children()["head"]).add_adapter("default", lora_config(2, 3));
  const Adapter adapter = through_files(peft_adapter(*model));
  EXPECT_EQ(adapter.config.target_modules, ModuleNames(std::string("head")));
  EXPECT_EQ(inject_adapter(*make(), adapter).size(), 1U);
}

TEST(PeftAdapter, NamesAsManyLayersByAPatternAsAModelHas) {
  torch::manual_seed(7);
  const auto make = [] {
    auto model = std::make_shared<torch::nn::Module>("model");
    const auto twin = model->register_module("twin", std::make_shared<torch::nn::Module>("twin"));
    for (const auto& parent : {model, twin}) {
      for (int layer = 0; layer < 300; ++layer) {
        parent->register_module("a_projection_with_quite_a_long_name_" + std::to_string(layer), nn::LoraLinear(2, 2));
      }
    }
    return model;
  };
  const auto model = make();
  for (const auto& child : model->named_children()) {
    if (auto* layer = dynamic_cast<nn::LoraLayer*>(child.value().get())) {
      layer->add_adapter("default", lora_config(1, 1));
    }
  }
  const Adapter adapter = through_files(peft_adapter(*model));
  EXPECT_GT(std::get<std::string>(adapter.config.target_modules).size(), 10000U);
  EXPECT_EQ(inject_adapter(*make(), adapter).size(), 300U);
}

TEST(InjectAdapter, TakesBaseWeightsThatPeftWroteBesideTheFactors) {
  torch::manual_seed(8);
  Small model;
  const auto base = copies_of(nn::base_state(*model));
  inject_lora(*model, lora_config(2, 4, {"embed", "head"}));
  randomize_factors(*model);
  Adapter adapter = through_files(peft_adapter(*model));
  adapter.tensors["embed.base_layer.weight"] = torch::randn({9, 4});
  Small other = plain_copy(base);
  inject_adapter(*other, adapter);
  EXPECT_TRUE(torch::equal(other->embed->base_layer()->weight, adapter.tensors["embed.base_layer.weight"]));
  EXPECT_TRUE(torch::equal(other->head->base_layer()->weight, model->head->base_layer()->weight));

  Small third = plain_copy(base);
  adapter.tensors["embed.base_layer.weight"] = torch::randn({8, 4});
  EXPECT_TRUE(mentions(error_of([&] { inject_adapter(*third, adapter); }), "embed.base_layer.weight"));
  adapter.tensors.erase("embed.base_layer.weight");
  adapter.tensors["norm.base_layer.weight"] = torch::randn({4});
  EXPECT_TRUE(mentions(error_of([&] { inject_adapter(*third, adapter); }), "unexpected: 'norm.base_layer.weight'"));
  EXPECT_TRUE(third->embed->adapter_names().empty());
}

TEST(InjectAdapter, LeavesOutWhatWasOfUseInTrainingOnly) {
  Small model, other;
  inject_lora(*model, lora_config(2, 4, {"head"}));
  randomize_factors(*model);
  Adapter adapter = through_files(peft_adapter(*model));
  adapter.config.other["velora_config"] = {{"num_groups", 2}, {"scale", 1.0}};
  adapter.tensors["head.lora_velora_embed"] = torch::ones({2});
  inject_adapter(*other, adapter);
  EXPECT_TRUE(same_bits(nn::adapter_state(*other).at("head.lora_A.weight"), adapter.tensors["head.lora_A.weight"]));
  EXPECT_EQ(peft_adapter(*other).tensors.size(), 2U);
}

/// Collects what TORCH_WARN says.
struct Warnings : c10::WarningHandler {
  void process(const c10::Warning& warning) override { text += warning.msg() + "\n"; }
  std::string text;
};

TEST(InjectAdapter, PatternsMeanWhatPeftMeansAndIdleOnesAreSaid) {
  Small model, other;
  inject_lora(*model, lora_config(2, 4, {"head", "0"}));
  Adapter adapter = peft_adapter(*model);
  // std::regex would take the A and the Z for letters.
  adapter.config.alpha_pattern = {{R"(\Ahead\Z)", 6}, {R"(body\.\060)", 7}, {"tail", 9}, {"(?<!body\\.)0", 10}};
  Warnings warnings;
  {
    const c10::WarningUtils::WarningHandlerGuard guard(&warnings);
    inject_adapter(*other, adapter);
  }
  EXPECT_EQ(other->head->adapter("default").config.alpha, 6);
  EXPECT_EQ(dynamic_cast<nn::LoraLayer&>(*other->body->ptr(0)).adapter("default").config.alpha, 7);
  EXPECT_TRUE(mentions(warnings.text, "alpha_pattern['tail'] means none of the layers"));
  EXPECT_TRUE(mentions(warnings.text, R"(alpha_pattern['(?<!body\.)0'])"));
  EXPECT_EQ(std::count(warnings.text.begin(), warnings.text.end(), '\n'), 2);
}

TEST(PeftAdapter, NamesTheLayersOfAllLinear) {
  torch::nn::Module model("model");
  for (const char* name : {"q", "v", "lm_head"}) model.register_module(name, nn::LoraLinear(3, 3));
  LoraConfig config;
  config.target_modules = "all-linear";
  inject_lora(model, config);
  EXPECT_EQ(peft_adapter(model).config.target_modules, ModuleNames(std::vector<std::string>{"q", "v"}));
}

TEST(PeftAdapter, OfPissaIsTheDifferenceToItsStartAndFitsTheOrdinaryBase) {
  for (const bool use_rslora : {false, true}) {
    torch::manual_seed(7);
    Small model;
    model->to(torch::kDouble);
    const auto base = copies_of(nn::base_state(*model));
    auto config = lora_config(2, 3, {"0", "2", "head"});
    config.use_rslora = use_rslora;
    config.init = LoraInit::Pissa;
    config.rank_pattern = {{"head", 1}};
    config.alpha_pattern = {{"0", 5}};
    inject_lora(*model, config);
    {
      torch::NoGradGuard no_grad;
      for (const auto& pair : find_factor_pairs(*model)) {
        pair.a.add_(torch::randn_like(pair.a), 0.1);
        pair.b.add_(torch::randn_like(pair.b), 0.1);
      }
    }
    const Adapter adapter = through_files(peft_adapter(*model));
    EXPECT_EQ(adapter.config.r, 4);
    EXPECT_DOUBLE_EQ(adapter.config.lora_alpha, use_rslora ? 3 * std::sqrt(2.0) : 6);
    EXPECT_EQ(adapter.config.rank_pattern, (std::map<std::string, int64_t>{{"head", 2}}));
    EXPECT_EQ(adapter.config.alpha_pattern.count("0"), 1U);
    EXPECT_EQ(adapter.config.init_lora_weights, (std::variant<bool, std::string>(true)));
    EXPECT_EQ(adapter.tensors.at("body.0.lora_A.weight").sizes(), at::IntArrayRef({4, 4}));

    Small other;
    other->to(torch::kDouble);
    nn::load_base_state(*other, base);
    const auto untrained = output_of(other);
    inject_adapter(*other, adapter);
    EXPECT_GT(largest_difference(output_of(other), untrained), 1e-2);
    // One rounding of W − ΔW₀, and sums in another order: some tens of epsilons.
    EXPECT_LT(largest_difference(output_of(other), output_of(model)), 100 * 2.2e-16);
  }
}

TEST(PeftAdapter, OfPissaIsTheSameFromAModelThatTorchLoadFilled) {
  torch::manual_seed(9);
  auto config = lora_config(2, 3, {"0", "head"});
  config.init = LoraInit::Pissa;
  Small trained, loaded;  // of different bases
  const auto base = copies_of(nn::base_state(*trained));
  inject_lora(*trained, config);
  randomize_factors(*trained);
  inject_lora(*loaded, config);
  EXPECT_FALSE(same_bits(loaded->head->adapter("default").initial_a, trained->head->adapter("default").initial_a));
  load_bytes(loaded, saved_bytes(trained));
  const Adapter expected = peft_adapter(*trained), found = peft_adapter(*loaded);
  ASSERT_EQ(found.tensors.size(), 4U);
  for (const auto& [name, tensor] : expected.tensors) EXPECT_TRUE(same_bits(found.tensors.at(name), tensor)) << name;
  const auto changed = loaded->head->base_layer()->weight.detach().clone();
  nn::delete_adapter(*loaded, "default");
  nn::delete_adapter(*trained, "default");
  EXPECT_TRUE(same_bits(loaded->head->base_layer()->weight, trained->head->base_layer()->weight));
  // As LoraLinear.PissaKeepsTheFunctionAndGivesTheBaseBack has it.
  const auto& weight = base.at("head.weight");
  EXPECT_LT(largest_difference(loaded->head->base_layer()->weight, weight), 4 * std::ldexp(1.0, -23));
  EXPECT_GT(largest_difference(changed, weight), 0.1);
}

TEST(PeftAdapter, OfPissaBesideAnotherStartDoublesTheRanksOfItsOwnLayersOnly) {
  torch::manual_seed(8);
  Small model;
  model->to(torch::kDouble);
  const auto base = copies_of(nn::base_state(*model));
  auto config = lora_config(2, 3);
  model->head->add_adapter("default", config);
  config.init = LoraInit::Pissa;
  dynamic_cast<nn::LoraLayer&>(*model->body->ptr(0)).add_adapter("default", config);
  randomize_factors(*model);
  const Adapter adapter = through_files(peft_adapter(*model));
  EXPECT_EQ(adapter.tensors.at("body.0.lora_A.weight").size(0), 4);
  EXPECT_EQ(adapter.tensors.at("head.lora_A.weight").size(0), 2);
  Small other;
  other->to(torch::kDouble);
  nn::load_base_state(*other, base);
  inject_adapter(*other, adapter);
  EXPECT_LT(largest_difference(output_of(other), output_of(model)), 100 * 2.2e-16);
}

TEST(PeftAdapter, TakesWhatLayersDoNotKnowFromTheFileItCameFrom) {
  Small model, other;
  inject_lora(*model, lora_config(2, 3, {"0"}));
  Adapter adapter = peft_adapter(*model);
  EXPECT_EQ(adapter.config.task_type, std::nullopt);
  adapter.config.task_type = "CAUSAL_LM";
  adapter.config.base_model_name_or_path = "a/base";
  adapter.config.inference_mode = false;
  adapter.config.other = {{"revision", "main"}, {"a_field_of_tomorrow", {1, 2}}};
  adapter = through_files(adapter);
  inject_adapter(*other, adapter);
  const Adapter again = peft_adapter(*other, "default", adapter.config);
  EXPECT_EQ(adapter_config_text(again.config), adapter_config_text(adapter.config));
  adapter.config.other["use_dora"] = true;
  EXPECT_TRUE(mentions(error_of([&] { peft_adapter(*other, "default", adapter.config); }), "use_dora is 'true'"));
}

TEST(PeftAdapter, IsRefusedWhereAFileHasOneValueForAllLayers) {
  const auto refused = [](const char* words, const std::function<void(LoraConfig&)>& change) {
    Small model;
    auto config = lora_config(2, 3);
    model->embed->add_adapter("default", config);
    change(config);
    model->head->add_adapter("default", config);
    EXPECT_TRUE(mentions(error_of([&] { peft_adapter(*model); }), words)) << words;
  };
  refused("dropout is 0.5 for 'head', but 0 for 'embed'", [](auto& config) { config.dropout = 0.5; });
  refused("use_rslora is 1 for 'head', but 0 for 'embed'", [](auto& config) { config.use_rslora = true; });
  refused("bias is all for 'head', but none for 'embed'", [](auto& config) { config.bias = nn::LoraBias::All; });
  Small model;
  EXPECT_TRUE(mentions(error_of([&] { peft_adapter(*model, "mine"); }), "no adapter 'mine'"));
  nn::LoraLinear alone(2, 2);
  alone->add_adapter("default", lora_config(2, 3));
  EXPECT_TRUE(mentions(error_of([&] { peft_adapter(*alone); }), "the model is itself a LoRA layer"));
}

TEST(InjectAdapter, DrawsNoRandomNumbersWhateverTheStartWas) {
  torch::manual_seed(9);
  Small model;
  inject_lora(*model, lora_config(3, 4, kEverything));  // an odd rank, which "orthogonal" would not start with
  const Adapter adapter = peft_adapter(*model);
  using Field = std::variant<bool, std::string>;
  for (const Field& init : {Field(true), Field(false), Field(std::string("gaussian")), Field(std::string("orthogonal")),
                            Field(std::string("eva")), Field(std::string("mica"))}) {
    Adapter changed = adapter;
    changed.config.init_lora_weights = init;
    Small other;
    torch::manual_seed(10);
    const auto expected = torch::randn({4});
    torch::manual_seed(10);
    inject_adapter(*other, changed);
    EXPECT_TRUE(same_bits(torch::randn({4}), expected));
    EXPECT_TRUE(
        same_bits(nn::adapter_state(*other).at("head.lora_A.weight"), adapter.tensors.at("head.lora_A.weight")));
  }
}

TEST(InjectAdapter, IsRefusedWithNothingChanged) {
  torch::manual_seed(11);
  Small source;
  inject_lora(*source, lora_config(2, 3, kEverything));
  const Adapter adapter = peft_adapter(*source);
  const auto refused = [&](const char* words, const std::function<void(Adapter&)>& change) {
    Adapter changed{adapter.config, copies_of(adapter.tensors)};
    change(changed);
    Small model;
    const auto names = parameter_names(*model);
    EXPECT_TRUE(mentions(error_of([&] { inject_adapter(*model, changed); }), words)) << words;
    EXPECT_EQ(parameter_names(*model), names) << words;
    for (const auto& parameter : model->parameters()) EXPECT_TRUE(parameter.requires_grad()) << words;
  };
  refused("inject_adapter: missing: 'embed.lora_embedding_A'; unexpected: none",
          [](auto& changed) { changed.tensors.erase("embed.lora_embedding_A"); });
  refused("missing: none; unexpected: 'norm.weight'",
          [](auto& changed) { changed.tensors["norm.weight"] = torch::ones({4}); });
  refused("inject_adapter: 'head': lora_B is [2, 3], expected [2, 2]", [](auto& changed) {
    changed.tensors["head.lora_B.weight"] = torch::ones({2, 3});
  });
  refused("'conv': lora_A is [2, 2, 2, 1], expected [2, 1, 2, 2]", [](auto& changed) {
    changed.tensors["conv.lora_A.weight"] = torch::ones({2, 2, 2, 1});
  });
  refused("'embed': lora_embedding_A is [9, 2], expected [2, 9]", [](auto& changed) {
    changed.tensors["embed.lora_embedding_A"] = torch::ones({9, 2});
  });
  refused("'head': lora_A is [], expected [2, 4]",
          [](auto& changed) { changed.tensors["head.lora_A.weight"] = torch::Tensor(); });
  refused("'head': lora_A is Long, expected a floating dtype", [](auto& changed) {
    changed.tensors["head.lora_A.weight"] = torch::ones({2, 4}, torch::kLong);
  });
  refused("inject_adapter: target_modules (less exclude_modules) names no module of the model",
          [](auto& changed) { changed.config.target_modules = std::vector<std::string>{"query"}; });
  for (const char* init : {"pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"}) {
    refused(("init_lora_weights is '" + std::string(init)).c_str(),
            [&](auto& changed) { changed.config.init_lora_weights = init; });
  }
  Small model;
  inject_adapter(*model, adapter);
  EXPECT_TRUE(mentions(error_of([&] { inject_adapter(*model, adapter); }), "there is an adapter 'default' already"));
}

TEST(InjectAdapter, CastsToTheLayersDtypes) {
  Small model, other;
  inject_lora(*model, lora_config(2, 3, {"head"}));
  Adapter adapter = peft_adapter(*model);
  for (auto& [name, tensor] : adapter.tensors) tensor = tensor.detach().to(torch::kDouble);
  other->to(torch::kBFloat16);
  inject_adapter(*other, adapter);
  EXPECT_EQ(other->head->adapter("default").a.scalar_type(), torch::kFloat);
  EXPECT_TRUE(same_bits(other->head->adapter("default").a, nn::adapter_state(*model).at("head.lora_A.weight")));
}

TEST(InjectAdapter, AddsASecondAdapterWhichIsNotActive) {
  Small model;
  inject_lora(*model, lora_config(2, 3, {"0"}));
  Adapter adapter = peft_adapter(*model);
  const auto before = output_of(model);
  adapter.tensors["body.0.lora_B.weight"] = torch::ones({6, 2});
  inject_adapter(*model, adapter, "second");
  EXPECT_TRUE(same_bits(output_of(model), before));
  nn::set_active_adapters(*model, {"second"});
  EXPECT_FALSE(same_bits(output_of(model), before));
}

}  // namespace
}  // namespace lora_rite::test
