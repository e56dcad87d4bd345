// inject_lora: which modules are meant (PEFT is the judge), what is replaced, what is frozen, and that nothing happens
// on an error; training, merging and counting over a whole model.

#include <gtest/gtest.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/normalization.h>
#include <torch/nn/modules/transformerlayer.h>

#include <functional>
#include <lora_rite/checkpoint.hpp>
#include <lora_rite/lora_rite.hpp>
#include <lora_rite/nn/nn.hpp>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "nn/support.hpp"
#include "support/pairs.hpp"
#include "support/temporary_folder.hpp"
#include "support/tensors.hpp"
#include "support/torch.hpp"

namespace lora_rite::test {
namespace {

using nlohmann::json;
using nn::inject_lora;
using nn::LoraBias;
using nn::LoraConfig;
using nn::LoraLinear;

nn::ModuleNames names_of(const json& names) {
  if (names.is_string()) return names.get<std::string>();
  return names.get<std::vector<std::string>>();
}

/// The configuration of a case of the golden file.
LoraConfig config_of(const json& data) {
  LoraConfig config = lora_config(data.value("r", 2), data.value("lora_alpha", 4));
  config.target_modules = names_of(data["target_modules"]);
  if (data.contains("exclude_modules")) config.exclude_modules = names_of(data["exclude_modules"]);
  if (data.contains("rank_pattern")) data["rank_pattern"].get_to(config.rank_pattern);
  if (data.contains("alpha_pattern")) data["alpha_pattern"].get_to(config.alpha_pattern);
  if (data.contains("layers_to_transform")) data["layers_to_transform"].get_to(config.layers_to_transform);
  if (data.contains("layers_pattern")) data["layers_pattern"].get_to(config.layers_pattern);
  const std::string bias = data.value("bias", "none");
  config.bias = bias == "all" ? LoraBias::All : bias == "lora_only" ? LoraBias::LoraOnly : LoraBias::None;
  return config;
}

/// Modules of the given names and kinds, as [["model.layers.0.self_attn.q_proj", "linear"], …], parents first.
std::shared_ptr<torch::nn::Module> tree_of(const json& modules) {
  std::map<std::string, std::shared_ptr<torch::nn::Module>> by_name = {
      {"", std::make_shared<torch::nn::Module>("root")}};
  for (const auto& module : modules) {
    const std::string name = module[0], kind = module[1];
    const size_t dot = name.rfind('.');
    auto& parent = *by_name.at(dot == std::string::npos ? "" : name.substr(0, dot));
    const std::string key = dot == std::string::npos ? name : name.substr(dot + 1);
    if (kind == "linear") {
      parent.register_module(key, LoraLinear(2, 2));
    } else if (kind == "embedding") {
      parent.register_module(key, nn::LoraEmbedding(2, 2));
    } else {
      by_name[name] = parent.register_module(key, std::make_shared<torch::nn::Module>(key));
    }
  }
  return by_name.at("");
}

TEST(InjectNames, AreThoseOfPeftWithItsRanksAndAlphas) {
  const json& golden = peft_golden()["names"];
  for (const auto& data : golden["cases"]) {
    SCOPED_TRACE(data.dump().substr(0, 200));
    const auto model = tree_of(golden["trees"][data["tree"].get<std::string>()]);
    const auto config = config_of(data);
    if (data["targets"].empty()) {
      EXPECT_TRUE(mentions(error_of([&] { inject_lora(*model, config); }), "names no module"));
      continue;
    }
    std::vector<std::string> injected, expected;
    const auto line = [](const std::string& name, int64_t rank, double alpha) {
      return name + " r=" + std::to_string(rank) + " alpha=" + std::to_string(alpha);
    };
    for (const auto& layer : inject_lora(*model, config)) {
      injected.push_back(line(layer.name, layer.rank, layer.alpha));
      EXPECT_FALSE(layer.replaced);
    }
    for (const auto& target : data["targets"]) expected.push_back(line(target[0], target[1], target[2]));
    EXPECT_EQ(injected, expected);
    for (const auto& [name, layer] : nn::lora_layers(*model)) {
      for (const auto& adapter : layer->adapter_names()) {
        const auto& found = layer->adapter(adapter);
        EXPECT_EQ(found.a.size(0), found.config.rank) << name;
      }
    }
  }
}

std::map<std::string, bool> trained_parameters(const torch::nn::Module& model) {
  std::map<std::string, bool> trained;
  for (const auto& item : model.named_parameters()) trained[item.key()] = item.value().requires_grad();
  return trained;
}

TEST(InjectModel, NamesFreezesSavesAndCountsAsPeft) {
  for (const auto& data : peft_golden()["model"]) {
    SCOPED_TRACE(data.dump().substr(0, 120));
    Small model;
    inject_lora(*model, config_of(data));
    EXPECT_EQ(trained_parameters(*model), data["parameters"].get<decltype(trained_parameters(*model))>());
    EXPECT_EQ(nn::trainable_parameters(*model).text(), data["text"].get<std::string>());
    std::map<std::string, std::vector<int64_t>> file;
    for (const auto& [name, tensor] : nn::adapter_state(*model)) file[name] = tensor.sizes().vec();
    EXPECT_EQ(file, data["file"].get<decltype(file)>());
  }
}

TEST(InjectModel, ASecondAdapterIsThereAndTrainedOnceItIsActive) {
  const json& golden = peft_golden()["two_adapters"];
  Small model;
  inject_lora(*model, lora_config(2, 8, {"0", "embed"}));
  inject_lora(*model, lora_config(3, 8, {"0", "head"}), "second one");
  EXPECT_EQ(nn::adapter_names(*model), (std::vector<std::string>{"default", "second one"}));
  EXPECT_EQ(trained_parameters(*model), golden["default"].get<decltype(trained_parameters(*model))>());
  nn::set_active_adapters(*model, {"second one"});
  EXPECT_EQ(trained_parameters(*model), golden["second one"].get<decltype(trained_parameters(*model))>());
}

TEST(InjectModel, ASecondAdapterChangesNoParameterThatWasThere) {
  Small model;
  inject_lora(*model, lora_config(2, 8, {"0"}));
  model->head->base_layer()->weight.set_requires_grad(true);  // a head that is trained whole
  inject_lora(*model, lora_config(2, 8, {"2"}), "other");
  EXPECT_TRUE(model->head->base_layer()->weight.requires_grad());
  auto config = lora_config(2, 8, {"head"});
  config.bias = LoraBias::All;
  EXPECT_TRUE(mentions(error_of([&] { inject_lora(*model, config, "third"); }), "must be LoraBias::None"));
}

// --- What is replaced, and what cannot be.

TEST(InjectPlainLayers, InASequentialAreReplacedAndCalled) {
  torch::manual_seed(1);
  torch::nn::Sequential model(torch::nn::Embedding(9, 16), torch::nn::Unflatten(1, std::vector<int64_t>{1, 4, 4}),
                              torch::nn::Conv2d(1, 3, 2), torch::nn::ReLU(), torch::nn::Flatten(),
                              torch::nn::Linear(27, 5));
  model->eval();
  const auto indices = torch::tensor({1, 2, 5});
  const auto before = model->forward(indices);
  const auto weights = copies_of(model->parameters());
  const auto injected = inject_lora(*model, lora_config(2, 3, {"0", "2", "5"}));
  ASSERT_EQ(injected.size(), 3u);
  for (const auto& layer : injected) EXPECT_TRUE(layer.replaced) << layer.name;
  EXPECT_EQ(parameter_names(*model),
            (std::vector<std::string>{"0.base_layer.weight", "0.lora_embedding_A.default", "0.lora_embedding_B.default",
                                      "2.base_layer.weight", "2.base_layer.bias", "2.lora_A.default.weight",
                                      "2.lora_B.default.weight", "5.base_layer.weight", "5.base_layer.bias",
                                      "5.lora_A.default.weight", "5.lora_B.default.weight"}));
  EXPECT_TRUE(torch::equal(model->forward(indices), before));
  for (const auto& pair : find_factor_pairs(*model)) {
    // Each is called: the output depends on it.
    torch::NoGradGuard no_grad;
    const auto last = model->forward(indices);
    torch::Tensor(pair.a).normal_();
    torch::Tensor(pair.b).normal_();
    EXPECT_GT(largest_difference(model->forward(indices), last), 1e-3) << pair.name;
  }
  // Clones of a Sequential go through the elements it calls.
  const auto copy = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(model->clone());
  EXPECT_TRUE(same_bits(copy->forward(indices), model->forward(indices)));
  EXPECT_EQ(parameter_names(*copy), parameter_names(*model));
  EXPECT_FALSE(model->children()[5]->is_training());
}

TEST(InjectPlainLayers, OneThatIsThereTwiceIsReplacedInBothPlaces) {
  torch::nn::Sequential model;
  {
    torch::nn::Linear shared(4, 4);
    model->push_back(shared);
    model->push_back(torch::nn::ReLU());
    model->push_back(shared);
  }
  const auto injected = inject_lora(*model, lora_config(2, 3, {"0"}));
  EXPECT_EQ(injected.size(), 1u);
  EXPECT_EQ(model->ptr(0), model->ptr(2));
  EXPECT_NE(dynamic_cast<nn::LoraLinearImpl*>(model->ptr(0).get()), nullptr);
  EXPECT_EQ(model->children()[0], model->children()[2]);
}

/// Calls a plain layer through a member of its own.
struct TypedOwnerImpl : torch::nn::Module {
  TypedOwnerImpl()
      : body(register_module("body", torch::nn::Sequential(LoraLinear(4, 4), torch::nn::Linear(4, 4)))),
        fc(register_module("fc", torch::nn::Linear(4, 4))) {}
  torch::nn::Sequential body;
  torch::nn::Linear fc;
};
TORCH_MODULE(TypedOwner);

/// What an error must not have changed.
struct Snapshot {
  explicit Snapshot(const torch::nn::Module& model)
      : modules(modules_of(model)),
        trained(trained_parameters(model)),
        parameters(model.parameters()),
        values(copies_of(parameters)) {}

  bool is_still(const torch::nn::Module& model) const {
    if (modules_of(model) != modules || trained_parameters(model) != trained) return false;
    const auto now = model.parameters();
    for (size_t i = 0; i < now.size(); ++i) {
      if (!now[i].is_same(parameters[i]) || !same_bits(now[i], values[i])) return false;
    }
    return true;
  }

  /// Not as shared pointers: a plain layer that somebody holds is not replaced.
  static std::vector<const torch::nn::Module*> modules_of(const torch::nn::Module& model) {
    std::vector<const torch::nn::Module*> result;
    for (const auto& module : model.modules(/*include_self=*/false)) result.push_back(module.get());
    return result;
  }

  std::vector<const torch::nn::Module*> modules;
  std::map<std::string, bool> trained;
  std::vector<torch::Tensor> parameters, values;
};

TEST(InjectPlainLayers, BehindAMemberAreAnErrorThatSaysWhatToDeclare) {
  TypedOwner model;
  const Snapshot before(*model);
  for (const auto& config : {lora_config(2, 3, {"0", "1", "fc"}), lora_config(2, 3, {"fc"})}) {
    const auto message = error_of([&] { inject_lora(*model, config); });
    EXPECT_TRUE(mentions(message, "'fc' is a torch::nn::Linear"));
    EXPECT_TRUE(mentions(message, "TypedOwnerImpl"));
    EXPECT_TRUE(mentions(message, "Declare the member as lora_rite::nn::LoraLinear"));
  }
  torch::nn::ModuleList list(torch::nn::Linear(4, 4));
  EXPECT_TRUE(mentions(error_of([&] { inject_lora(*list, lora_config(2, 3, {"0"})); }), "'0' is a torch::nn::Linear"));
  EXPECT_TRUE(before.is_still(*model)) << "nor were those changed that could have been";
}

TEST(InjectPlainLayers, HeldElsewhereAreAnError) {
  torch::nn::Linear held(4, 4);
  torch::nn::Sequential model(held);
  const auto message = error_of([&] { inject_lora(*model, lora_config(2, 3, {"0"})); });
  EXPECT_TRUE(mentions(message, "1 more holders"));
  held = nullptr;
  EXPECT_EQ(inject_lora(*model, lora_config(2, 3, {"0"})).size(), 1u);
}

TEST(InjectPlainLayers, OfTheTransformerAreAnError) {
  torch::nn::TransformerEncoderLayer layer(torch::nn::TransformerEncoderLayerOptions(8, 2).dim_feedforward(8));
  EXPECT_TRUE(mentions(error_of([&] { inject_lora(*layer, lora_config(2, 3, {"linear1"})); }), "'linear1'"));
}

/// One row: what is wrong, and what the message must say.
struct BadInjection {
  const char* name;
  LoraConfig (*config)();
  std::vector<std::string> words;
  const char* adapter = "default";
};

template <class Change>
LoraConfig changed(Change change) {
  auto config = lora_config(2, 3, {"0", "head"});
  change(config);
  return config;
}

const BadInjection kBadInjections[] = {
    {"NothingNamed", [] { return lora_config(2, 3, {"query"}); }, {"names no module", "'embed', 'conv', 'body.0'"}},
    {"NoTargets", [] { return LoraConfig{}; }, {"names no module"}},
    {"AllExcluded", [] { return changed([](auto& config) { config.exclude_modules = ".*"; }); }, {"names no module"}},
    {"NotALayer",
     [] {
       return lora_config(2, 3, {"0", "norm"});
     },
     {"'norm' is a torch::nn::LayerNorm"}},
    {"ARegexThatNamesAContainer",
     [] { return changed([](auto& config) { config.target_modules = ".*"; }); },
     {"'body'"}},
    {"NoRegex",
     [] { return changed([](auto& config) { config.target_modules = R"((h)\1ead)"; }); },
     {R"(target_modules is '(h)\1ead')", "regular expression", "a back-reference"}},
    {"NoRegexInExclude",
     [] { return changed([](auto& config) { config.exclude_modules = "["; }); },
     {"exclude_modules is '['"}},
    {"NoRegexInRankPattern",
     [] { return changed([](auto& config) {
            config.rank_pattern = {{"(", 2}};
          }); },
     {"rank_pattern is '('"}},
    {"TwoLayersPatternsInOne",
     [] {
       return changed([](auto& config) {
         config.target_modules = std::vector<std::string>{"0"};
         config.layers_to_transform = {1};
         config.layers_pattern = {"h|layers"};
       });
     },
     {"layers_pattern is 'h|layers', expected one without '|'"}},
    {"RankPattern",
     [] { return changed([](auto& config) {
            config.rank_pattern = {{"0", 0}};
          }); },
     {"rank_pattern['0'] is 0"}},
    {"Rank", [] { return lora_config(0, 3, {"0"}); }, {"rank is 0"}},
    {"Layer", [] { return changed([](auto& config) { config.layers_to_transform = {-1}; }); }, {"-1"}},
    {"LayersWithARegex",
     [] {
       return changed([](auto& config) {
         config.target_modules = "head";
         config.layers_to_transform = {1};
       });
     },
     {"layers_to_transform needs target_modules to be a list"}},
    {"LayersPatternAlone",
     [] { return changed([](auto& config) { config.layers_pattern = {"h"}; }); },
     {"layers_pattern needs"}},
    {"ANameWithADot", [] { return lora_config(2, 3, {"0"}); }, {"'a.b'", "without a dot"}, "a.b"},
    {"ANameThatIsTaken",
     [] {
       return lora_config(2, 3, {"0", "head"});
     },
     {"'head'", "already"},
     "taken"},
    {"TheLastLayerCannotHaveIt",
     [] {
       return changed([](auto& config) {
         config.target_modules = std::vector<std::string>{"0", "2", "head", "embed"};
         config.init = nn::LoraInit::Pissa;
       });
     },
     {"'embed'", "an embedding cannot start"}},
};

class RefusedInjection : public testing::TestWithParam<BadInjection> {};

TEST_P(RefusedInjection, NamesTheReasonAndChangesNothing) {
  Small model;
  if (GetParam().adapter == std::string("taken")) model->head->add_adapter("taken", lora_config(2, 3));
  const Snapshot before(*model);
  const auto message = error_of([&] { inject_lora(*model, GetParam().config(), GetParam().adapter); });
  for (const auto& word : GetParam().words) EXPECT_TRUE(mentions(message, word));
  EXPECT_TRUE(before.is_still(*model));
}

INSTANTIATE_TEST_SUITE_P(Rows, RefusedInjection, testing::ValuesIn(kBadInjections),
                         [](const auto& info) { return std::string(info.param.name); });

// --- A whole model.

TEST(InjectedModel, IsTrainedByLoraRiteAndItsBaseStaysAsItIs) {
  torch::manual_seed(8);
  Small model;
  auto config = lora_config(2, 4, {"embed", "conv", "0", "2", "head"});
  inject_lora(*model, config);
  inject_lora(*model, config, "idle");
  const auto base = copies_of([&] {
    std::vector<torch::Tensor> tensors;
    for (const auto& [name, tensor] : nn::base_state(*model)) tensors.push_back(tensor);
    return tensors;
  }());
  const auto idle = copies_of({nn::factor_pairs(*model, "idle")[0].a, nn::factor_pairs(*model, "idle")[0].b});
  const auto indices = torch::arange(9);
  const auto target = torch::stack({torch::sin(indices.to(torch::kFloat)), torch::cos(indices.to(torch::kFloat))}, 1);
  LoraRite<> optimizer(*model, LoraRiteOptions(2e-2));
  const auto loss = [&] { return (model->forward(indices) - target).square().mean(); };
  const double first = loss().item<double>();
  for (int step = 0; step < 60; ++step) {
    optimizer.zero_grad();
    loss().backward();
    optimizer.step();
  }
  EXPECT_LT(loss().item<double>(), first / 2);
  size_t i = 0;
  for (const auto& [name, tensor] : nn::base_state(*model)) {
    EXPECT_TRUE(same_bits(tensor, base[i++])) << name;
    EXPECT_FALSE(tensor.grad().defined()) << name;
  }
  EXPECT_EQ(nn::factor_pairs(*model).size(), 5u);
  for (const auto& pair : nn::factor_pairs(*model)) {
    EXPECT_GT(pair.b.grad().norm().item<double>(), 0) << pair.name;
  }
  const auto idle_pair = nn::factor_pairs(*model, "idle")[0];
  EXPECT_TRUE(same_bits(idle_pair.a, idle[0]) && same_bits(idle_pair.b, idle[1]));
}

TEST(InjectedModel, AdaptersAreInACheckpointWhicheverIsActive) {
  const TemporaryFolder folder;
  struct Run {
    Run() {
      inject_lora(*model, lora_config(2, 4, {"0", "2", "head"}));
      inject_lora(*model, lora_config(3, 4, {"embed", "head"}), "other");
      optimizer.emplace(*model, LoraRiteOptions(1e-2));
    }
    void step() {
      optimizer->zero_grad();
      model->forward(torch::arange(9)).square().mean().backward();
      optimizer->step();
    }
    TrainingState state() { return {trained_tensors(*model), {&*optimizer}, {}, 0, {}}; }

    Small model;
    std::optional<LoraRite<>> optimizer;
  };
  torch::manual_seed(10);
  Run run;
  randomize_factors(*run.model);
  run.step();  // of the first adapter
  nn::set_active_adapters(*run.model, {"other"});
  run.step();
  save_checkpoint(folder / "c", run.state());

  Run resumed;  // in which the first adapter is the active one
  auto state = resumed.state();
  for (const auto& item : run.model->named_parameters()) {
    // The base is the same by whatever else loads it.
    if (state.tensors.count(item.key()) == 0) {
      const torch::NoGradGuard no_grad;
      torch::Tensor(resumed.model->named_parameters()[item.key()]).copy_(item.value());
    }
  }
  load_checkpoint(folder / "c", state);
  nn::set_active_adapters(*resumed.model, {"other"});
  const auto before = copies_of(run.model->parameters());
  for (Run* each : {&run, &resumed}) {
    each->step();
    nn::set_active_adapters(*each->model, {"default"});
    each->step();
  }
  size_t moved = 0, i = 0;
  for (const auto& item : run.model->named_parameters()) {
    EXPECT_TRUE(same_bits(item.value(), resumed.model->named_parameters()[item.key()])) << item.key();
    moved += same_bits(item.value(), before[i++]) ? 0 : 1;
  }
  EXPECT_EQ(moved, 10u);  // both factors of three and of two layers
}

TEST(InjectedModel, MergedAndUnloadedComputesTheSame) {
  torch::manual_seed(9);
  Small model;
  const auto names = parameter_names(*model);
  inject_lora(*model, lora_config(2, 4, {"embed", "conv", "0", "2", "head"}));
  randomize_factors(*model);
  model->eval();
  const auto indices = torch::arange(9);
  const auto expected = model->forward(indices);
  // Six layers in float, a normalisation in between that may divide by a small deviation.
  const double bound = 1e-4;
  nn::merge_adapters(*model);
  EXPECT_TRUE(model->head->merged() && model->embed->merged());
  EXPECT_LT(largest_difference(model->forward(indices), expected), bound);
  nn::unmerge_adapters(*model);
  EXPECT_TRUE(same_bits(model->forward(indices), expected));
  nn::enable_adapters(*model, false);
  EXPECT_GT(largest_difference(model->forward(indices), expected), 100 * bound);
  nn::enable_adapters(*model, true);
  nn::merge_and_unload(*model);
  EXPECT_LT(largest_difference(model->forward(indices), expected), bound);
  EXPECT_EQ(parameter_names(*model), names);
  EXPECT_TRUE(find_factor_pairs(*model).empty());
}

TEST(InjectedModel, AClonesOfItsOwnerKeepsTheAdapters) {
  Small model;
  inject_lora(*model, lora_config(2, 4, {"embed", "conv", "0", "2", "head"}));
  randomize_factors(*model);
  const auto copy = std::dynamic_pointer_cast<SmallImpl>(model->clone());
  ASSERT_NE(copy, nullptr);
  EXPECT_EQ(parameter_names(*copy), parameter_names(*model));
  EXPECT_TRUE(same_bits(copy->forward(torch::arange(9)), model->forward(torch::arange(9))));
  // The owner's typed members are what is registered.
  EXPECT_TRUE(copy->named_parameters()["head.lora_A.default.weight"].is_same(copy->head->adapter("default").a));
  randomize_factors(*copy);
  EXPECT_FALSE(same_bits(copy->forward(torch::arange(9)), model->forward(torch::arange(9))));
}

TEST(InjectedModel, TrainAndEvalReachEveryLayer) {
  Small model;
  inject_lora(*model, lora_config(2, 4, {"0", "head"}));
  model->eval();
  EXPECT_FALSE(model->head->is_training());
  model->train();
  EXPECT_TRUE(model->head->is_training());
}

TEST(InjectedModel, DeletesAnAdapterEverywhereAndNamesTheOnesThereAre) {
  Small model;
  inject_lora(*model, lora_config(2, 4, {"0", "head"}));
  inject_lora(*model, lora_config(2, 4, {"head"}), "other");
  for (const auto& action : std::vector<std::function<void()>>{[&] { nn::delete_adapter(*model, "x"); },
                                                               [&] {
                                                                 nn::set_active_adapters(*model, {"other", "x"});
                                                               },
                                                               [&] { nn::factor_pairs(*model, "x"); },
                                                               [&] { nn::adapter_state(*model, "x"); }}) {
    EXPECT_TRUE(mentions(error_of(action), "the model has no adapter 'x', expected one of 'default', 'other'"));
  }
  EXPECT_EQ(model->head->active(), std::vector<std::string>{"default"});
  nn::delete_adapter(*model, "default");
  EXPECT_EQ(nn::adapter_names(*model), std::vector<std::string>{"other"});
  EXPECT_TRUE(model->head->active().empty());
}

TEST(InjectedModel, DeletesAnAdapterByANameThatIsItsOwn) {
  Small model;
  const std::string one = "an adapter whose name is not short", two = "two";
  inject_lora(*model, lora_config(2, 4, {"0", "head"}), one);
  inject_lora(*model, lora_config(2, 4, {"0", "head"}), two);
  nn::set_active_adapters(*model, {one, two});
  nn::delete_adapter(*model, model->head->active()[0]);
  EXPECT_EQ(nn::adapter_names(*model), std::vector<std::string>{two});
  model->head->delete_adapter(model->head->active()[0]);
  EXPECT_TRUE(model->head->adapter_names().empty());
}

TEST(InjectedModel, AnAdapterThatIsActiveElsewhereIsActiveOnFurtherLayersToo) {
  Small model;
  inject_lora(*model, lora_config(2, 4, {"head"}), "x");
  inject_lora(*model, lora_config(2, 4, {"0"}), "y");
  inject_lora(*model, lora_config(2, 4, {"0"}), "x");
  const auto& layer = dynamic_cast<nn::LoraLayer&>(*model->body->ptr(0));
  EXPECT_EQ(layer.active(), std::vector<std::string>{"x"});
  EXPECT_TRUE(layer.adapter("x").a.requires_grad());
  EXPECT_FALSE(layer.adapter("y").a.requires_grad());
}

TEST(InjectedModel, TrainedWhileMergedIsAnErrorWhicheverFactorIsTrained) {
  for (const bool only_b : {true, false}) {
    Small model;
    inject_lora(*model, lora_config(2, 4, {"head"}));
    torch::Tensor frozen = only_b ? model->head->adapter("default").a : model->head->adapter("default").b;
    frozen.set_requires_grad(false);
    model->head->merge();
    model->train();
    EXPECT_TRUE(mentions(error_of([&] { model->forward(torch::tensor({1, 2})); }), "in training mode while merged"));
  }
}

/// The patterns of a file from anywhere: neither the stack nor the time runs out.
TEST(InjectNames, PatternsOfAHostileFileAreRefusedOrMatchedSoon) {
  Small model;
  LoraConfig config = lora_config(2, 4);
  config.target_modules = std::string(100000, '(');
  EXPECT_TRUE(mentions(error_of([&] { inject_lora(*model, config); }), "target_modules is a pattern of 100000"));
  config.target_modules = std::string(4000, '(') + std::string(4000, ')');
  EXPECT_TRUE(mentions(error_of([&] { inject_lora(*model, config); }), "4000 opening brackets"));
  torch::nn::Module nested("nested");
  nested.register_module(std::string(60, 'a'), nn::LoraLinear(3, 2));
  config.target_modules = "(([a-z]*)*)*!";  // backtracking would take 2^60 steps
  EXPECT_TRUE(mentions(error_of([&] { inject_lora(nested, config); }), "names no module"));
}

TEST(Inject, ALaterAdapterThawsNoFactorThatSomebodyFroze) {
  Small model;
  inject_lora(*model, lora_config(2, 4, {"0", "head"}), "one");
  inject_lora(*model, lora_config(2, 4, {"2"}), "two");
  nn::set_active_adapters(*model, {"one", "two"});
  for (const auto& pair : nn::factor_pairs(*model, "one")) pair.a.set_requires_grad(false);
  inject_lora(*model, lora_config(2, 4, {"0"}), "two");  // as an active one: it is active elsewhere
  inject_lora(*model, lora_config(2, 4, {"0"}), "three");
  for (const auto& pair : nn::factor_pairs(*model, "one")) {
    EXPECT_FALSE(pair.a.requires_grad()) << pair.name;
    EXPECT_TRUE(pair.b.requires_grad()) << pair.name;
  }
  for (const auto& pair : nn::factor_pairs(*model, "two")) EXPECT_TRUE(pair.a.requires_grad()) << pair.name;
  for (const auto& pair : nn::factor_pairs(*model, "three")) EXPECT_FALSE(pair.a.requires_grad()) << pair.name;
}

/// The base is not in a checkpoint either, and an injection makes both of it.
TEST(Inject, ACheckpointHasNotTheStartOfPissa) {
  Small model, other;
  LoraConfig config = lora_config(2, 4, {"0", "head"});
  inject_lora(*other, config);
  config.init = nn::LoraInit::Pissa;
  inject_lora(*model, config);
  EXPECT_EQ(model->named_buffers().size(), 4U);
  const auto found = trained_tensors(*model), expected = trained_tensors(*other);
  EXPECT_EQ(found.size(), expected.size());
  for (const auto& [name, tensor] : expected) EXPECT_EQ(found.count(name), 1U) << name;
}

TEST(TrainableParameters, PrintsAsPeftDoes) {
  EXPECT_EQ((nn::TrainableParameters{294912, 109777152}.text()),
            "trainable params: 294,912 || all params: 109,777,152 || trainable%: 0.2686");
  EXPECT_EQ((nn::TrainableParameters{7, 999}.text()), "trainable params: 7 || all params: 999 || trainable%: 0.7007");
  EXPECT_EQ((nn::TrainableParameters{1000, 1000}.text()),
            "trainable params: 1,000 || all params: 1,000 || trainable%: 100.0000");
  EXPECT_EQ((nn::TrainableParameters{}.percent()), 0);
}

TEST(TrainableParameters, CountsATiedWeightOnce) {
  torch::nn::Module model("model");
  torch::nn::Linear one(4, 4);
  model.register_module("one", one);
  model.register_module("two", one);
  EXPECT_EQ(nn::trainable_parameters(model).all, 20);
  EXPECT_EQ(nn::trainable_parameters(model).trainable, 20);
}

}  // namespace
}  // namespace lora_rite::test
