#include <gtest/gtest.h>
#include <lora_rite/engine/adamw.hpp>
#include <lora_rite/engine/pair_state.hpp>

#include "support/pairs.hpp"

namespace lora_rite::test {
namespace {

/// Two groups, three shapes, one of them twice.
std::vector<FactorPair> first_group(torch::Dtype dtype) {
  torch::manual_seed(11);
  return {random_pair("q", 3, 8, 6, dtype), random_pair("k", 3, 8, 6, dtype), random_pair("v", 2, 5, 7, dtype)};
}
std::vector<FactorPair> second_group(torch::Dtype dtype) {
  torch::manual_seed(12);
  return {random_pair("o", 4, 6, 6, dtype)};
}

class Resume : public testing::TestWithParam<std::tuple<torch::Dtype, bool>> {};

TEST_P(Resume, IsBitExactOnAFreshlyBuiltOptimizer) {
  const auto [dtype, master] = GetParam();
  const auto options = LoraRiteOptions(1e-2).weight_decay(0.01).balance(true).master_weights(master);
  const auto build = [&](const std::vector<FactorPair>& g0, const std::vector<FactorPair>& g1) {
    LoraRite<> optimizer(g0, options);
    optimizer.add_pairs(g1, LoraRiteOptions(3e-3).escape(false).row_equilibration(true).max_relative_change(0.2));
    return optimizer;
  };
  const auto g0 = first_group(dtype), g1 = second_group(dtype);
  std::vector<FactorPair> all = g0;
  all.insert(all.end(), g1.begin(), g1.end());
  auto optimizer = build(g0, g1);
  run_steps(optimizer, all, 0, 3);
  optimizer.param_groups()[1].options().set_lr(7e-3);  // as a scheduler would
  const std::string saved = saved_bytes(optimizer);

  const auto resumed_g0 = clone_pairs(g0), resumed_g1 = clone_pairs(g1);
  std::vector<FactorPair> resumed_all = resumed_g0;
  resumed_all.insert(resumed_all.end(), resumed_g1.begin(), resumed_g1.end());
  auto resumed = build(resumed_g0, resumed_g1);
  load_bytes(resumed, saved);
  EXPECT_EQ(resumed.param_groups()[1].options().get_lr(), 7e-3);
  run_steps(optimizer, all, 3, 8);
  run_steps(resumed, resumed_all, 3, 8);
  EXPECT_TRUE(equal_factors(all, resumed_all));
  EXPECT_EQ(saved_bytes(optimizer), saved_bytes(resumed));
}

INSTANTIATE_TEST_SUITE_P(Dtypes, Resume,
                         testing::Values(std::make_tuple(torch::kDouble, false), std::make_tuple(torch::kFloat, false),
                                         std::make_tuple(torch::kBFloat16, false),
                                         std::make_tuple(torch::kBFloat16, true), std::make_tuple(torch::kHalf, true)));

TEST(Serialization, KeepsEveryOption) {
  const auto options = LoraRiteOptions(1.5e-2)
                           .betas({0.8, 0.95})
                           .eps(1e-5)
                           .eps_root(1e-9)
                           .preconditioner_exponent(0.25)
                           .weight_decay(0.02)
                           .escape(false)
                           .clip_unmagnified_norm(0.7)
                           .max_update_rms(3)
                           .max_relative_change(0.2)
                           .row_equilibration(true)
                           .lr_ratio_b(4)
                           .balance(true)
                           .maximize(true)
                           .master_weights(true);
  LoraRite<> saved({random_pair("q", 2, 4, 4)}, options), loaded({random_pair("q", 2, 4, 4)});
  load_bytes(loaded, saved_bytes(saved));
  const auto& found = static_cast<const LoraRiteOptions&>(loaded.param_groups()[0].options());
  EXPECT_EQ(found.lr(), 1.5e-2);
  EXPECT_EQ(found.betas(), std::make_tuple(0.8, 0.95));
  EXPECT_EQ(found.eps(), 1e-5);
  EXPECT_EQ(found.eps_root(), 1e-9);
  EXPECT_EQ(found.preconditioner_exponent(), 0.25);
  EXPECT_EQ(found.weight_decay(), 0.02);
  EXPECT_FALSE(found.escape());
  EXPECT_EQ(found.clip_unmagnified_norm(), 0.7);
  EXPECT_EQ(found.max_update_rms(), 3);
  EXPECT_EQ(found.max_relative_change(), 0.2);
  EXPECT_TRUE(found.row_equilibration());
  EXPECT_EQ(found.lr_ratio_b(), 4);
  EXPECT_TRUE(found.balance());
  EXPECT_TRUE(found.maximize());
  EXPECT_TRUE(found.master_weights());
}

TEST(Serialization, OfAModulesOtherParametersIsBitExactToo) {
  const auto build_module = [] {
    torch::manual_seed(13);
    auto module = std::make_shared<torch::nn::Module>("m");
    module->register_parameter("lora_A", torch::randn({2, 5}));
    module->register_parameter("lora_B", torch::randn({4, 2}));
    module->register_parameter("head", torch::randn({3, 4}));
    return module;
  };
  const auto give_gradients = [](torch::nn::Module& module, int seed) {
    torch::manual_seed(seed);
    for (auto& parameter : module.parameters()) parameter.mutable_grad() = torch::randn_like(parameter);
  };
  const auto module = build_module(), other = build_module();
  LoraRite<> optimizer(*module, LoraRiteOptions(1e-2)), resumed(*other, LoraRiteOptions(1e-2));
  for (int i = 0; i < 3; ++i) {
    give_gradients(*module, i);
    optimizer.step();
  }
  for (size_t i = 0; i < module->parameters().size(); ++i) {
    torch::NoGradGuard no_grad;
    other->parameters()[i].copy_(module->parameters()[i]);
  }
  load_bytes(resumed, saved_bytes(optimizer));
  for (int i = 3; i < 6; ++i) {
    give_gradients(*module, i);
    give_gradients(*other, i);
    optimizer.step();
    resumed.step();
  }
  for (size_t i = 0; i < module->parameters().size(); ++i) {
    EXPECT_TRUE(torch::equal(module->parameters()[i], other->parameters()[i])) << i;
  }
}

TEST(Serialization, CountsSkippedStepsAcrossAResume) {
  const std::vector<FactorPair> pairs = {random_pair("q", 2, 4, 4)};
  LoraRite<> optimizer(pairs);
  set_gradients(pairs, 1, std::numeric_limits<double>::quiet_NaN());
  optimizer.step();
  LoraRite<> resumed(clone_pairs(pairs));
  load_bytes(resumed, saved_bytes(optimizer));
  EXPECT_EQ(resumed.skipped_steps(), 1);
}

/// One row: an archive that does not fit the optimizer over `first_group`, and what the message must say.
struct Misfit {
  const char* name;
  std::function<std::string()> bytes;
  std::string words;
};

std::string bytes_of(std::vector<FactorPair> pairs) {
  LoraRite<> optimizer(pairs);
  run_steps(optimizer, pairs, 0, 2);
  return saved_bytes(optimizer);
}

class RefusedArchive : public testing::TestWithParam<Misfit> {};

TEST_P(RefusedArchive, IsNamedAndChangesNothing) {
  const auto pairs = first_group(torch::kFloat);
  LoraRite<> optimizer(pairs, LoraRiteOptions(1e-2));
  run_steps(optimizer, pairs, 0, 3);
  const std::string before = saved_bytes(optimizer);
  const std::string bytes = GetParam().bytes();
  EXPECT_TRUE(mentions(error_of([&] { load_bytes(optimizer, bytes); }), GetParam().words));
  EXPECT_EQ(saved_bytes(optimizer), before);
}

INSTANTIATE_TEST_SUITE_P(Table, RefusedArchive,
                         testing::Values(Misfit{"AnotherOptimizer",
                                                [] {
                                                  torch::optim::Adam adam({torch::zeros({2})});
                                                  return saved_bytes(adam);
                                                },
                                                "holds no LoraRite optimizer"},
                                         Misfit{"AnotherBasis",
                                                [] {
                                                  LoraRite<QrBasis> optimizer(first_group(torch::kFloat));
                                                  return saved_bytes(optimizer);
                                                },
                                                "basis is 'qr', expected 'polar'"},
                                         Misfit{"FewerPairs",
                                                [] {
                                                  auto pairs = first_group(torch::kFloat);
                                                  pairs.pop_back();
                                                  return bytes_of(pairs);
                                                },
                                                "group 0 has 4 parameters in the archive, expected 6"},
                                         Misfit{"AnotherName",
                                                [] {
                                                  auto pairs = first_group(torch::kFloat);
                                                  pairs[1].name = "x";
                                                  return bytes_of(pairs);
                                                },
                                                "pair 'k' is 'x' in the archive"},
                                         Misfit{"AnotherShape",
                                                [] {
                                                  auto pairs = first_group(torch::kFloat);
                                                  pairs[2] = random_pair("v", 2, 5, 8, torch::kFloat);
                                                  return bytes_of(pairs);
                                                },
                                                "pair 'v': entry 'momentum_b' has shape [1, 8, 2]"},
                                         Misfit{"AnotherRank",
                                                [] {
                                                  auto pairs = first_group(torch::kFloat);
                                                  pairs[2] = random_pair("v", 3, 5, 7, torch::kFloat);
                                                  return bytes_of(pairs);
                                                },
                                                "pair 'v': entry 'second_moment' has shape [2, 1, 3, 3]"},
                                         Misfit{"AnotherDtype", [] { return bytes_of(first_group(torch::kDouble)); },
                                                "pair 'q': entry 'momentum_a' has shape [1, 3, 8] and dtype Double"},
                                         Misfit{"AnotherNumberOfGroups",
                                                [] {
                                                  LoraRite<> optimizer(first_group(torch::kFloat));
                                                  optimizer.add_pairs(second_group(torch::kFloat), LoraRiteOptions());
                                                  return saved_bytes(optimizer);
                                                },
                                                "has 2 param groups, expected 1"},
                                         Misfit{"AnotherKindOfGroup",
                                                [] {
                                                  auto optimizer = LoraRite<>(first_group(torch::kFloat));
                                                  LoraRite<> others(second_group(torch::kFloat));
                                                  torch::serialize::OutputArchive archive, group;
                                                  archive.write("format", c10::IValue("lora_rite.LoraRite 1"));
                                                  archive.write("basis", c10::IValue("polar"));
                                                  archive.write("skipped_steps", c10::IValue(0));
                                                  archive.write("group_count", c10::IValue(1));
                                                  group.write("kind", c10::IValue("other parameters"));
                                                  archive.write("0", group);
                                                  std::stringstream stream;
                                                  archive.save_to(stream);
                                                  return stream.str();
                                                },
                                                "group 0 holds 'other parameters', expected 'factor pairs'"},
                                         Misfit{"OptionOutOfRange",
                                                [] {
                                                  LoraRite<> optimizer(first_group(torch::kFloat));
                                                  optimizer.param_groups()[0].options().set_lr(-1);
                                                  return saved_bytes(optimizer);
                                                },
                                                "load: group 0: lr is -1"}),
                         [](const auto& info) { return info.param.name; });

TEST(Serialization, OfAnArchiveThatIsRefusedChoosesNeitherEngineNorDtype) {
  const auto pairs = first_group(torch::kFloat);
  LoraRite<> optimizer(pairs);
  auto renamed = pairs;
  renamed[1].name = "x";
  const std::string bytes = bytes_of(renamed);
  EXPECT_TRUE(mentions(error_of([&] { load_bytes(optimizer, bytes); }), "pair 'k' is 'x' in the archive"));
  for (const auto& pair : pairs)
    for (torch::Tensor factor : {pair.a, pair.b}) {
      factor.mutable_grad() = torch::Tensor();
      factor.set_data(factor.data().to(torch::kDouble));
    }
  run_steps(optimizer, pairs, 0, 1);
  EXPECT_EQ(pairs[0].a.scalar_type(), torch::kDouble);
}

TEST(Serialization, KeepsReferencesToOptionsGood) {
  const auto pairs = first_group(torch::kFloat);
  LoraRite<> optimizer(pairs, LoraRiteOptions(1e-2)), other(clone_pairs(pairs), LoraRiteOptions(1e-3));
  for (auto* o : {&optimizer, &other}) {
    o->add_parameters({torch::zeros({2})}, torch::optim::AdamWOptions(o == &optimizer ? 1e-2 : 1e-3));
  }
  std::vector<const torch::optim::OptimizerOptions*> before;
  for (const auto& group : optimizer.param_groups()) before.push_back(&group.options());
  load_bytes(optimizer, saved_bytes(other));
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(&optimizer.param_groups()[i].options(), before[i]);
    EXPECT_EQ(before[i]->get_lr(), 1e-3);
  }
}

/// An archive of nothing but the texts and numbers before `last`.
std::string archive_up_to(const std::string& last) {
  const std::vector<std::pair<std::string, c10::IValue>> entries = {{"format", "lora_rite.LoraRite 1"},
                                                                    {"basis", "polar"},
                                                                    {"group_count", int64_t{1}},
                                                                    {"skipped_steps", int64_t{0}}};
  torch::serialize::OutputArchive archive, group;
  bool missing = false;
  for (const auto& [key, value] : entries) {
    missing = missing || key == last;
    if (!missing) archive.write(key, value);
  }
  if (!missing && last != "0") {
    const std::vector<std::pair<std::string, c10::IValue>> of_group = {{"kind", "factor pairs"}, {"size", int64_t{6}}};
    for (const auto& [key, value] : of_group) {
      missing = missing || key == last;
      if (!missing) group.write(key, value);
    }
    archive.write("0", group);
  }
  std::stringstream stream;
  archive.save_to(stream);
  return stream.str();
}

TEST(Serialization, SaysOfAMissingEntryThatItIsMissing) {
  LoraRite<> optimizer(first_group(torch::kFloat));
  for (const auto& [last, words] :
       {std::pair{"format", "has no entry 'format'"}, std::pair{"basis", "the archive has no entry 'basis'"},
        std::pair{"group_count", "the archive has no entry 'group_count'"},
        std::pair{"skipped_steps", "the archive has no entry 'skipped_steps'"}, std::pair{"0", "group 0 is missing"},
        std::pair{"kind", "group 0 has no entry 'kind'"}, std::pair{"size", "group 0 has no entry 'size'"},
        std::pair{"options", "group 0, entry 'options' is missing"}}) {
    EXPECT_TRUE(mentions(error_of([&, end = last] { load_bytes(optimizer, archive_up_to(end)); }), words));
  }
}

TEST(Serialization, APairThatHasSteppedHasItsMomentum) {
  for (const auto& [steps, words] :
       {std::pair{3.0, "pair 'q' has no entry 'momentum_b', expected one after the first step"},
        std::pair{-1.0, "pair 'q': factor b has -1 steps, expected 0 or more"}, std::pair{0.0, ""}}) {
    torch::serialize::OutputArchive out;
    const torch::Tensor scalars = torch::zeros({4, 2, 1, 1, 1}, torch::kDouble);
    scalars[0][1].fill_(steps);
    out.write("scalars", scalars, /*is_buffer=*/true);
    for (const char* name : {"second_moment", "inverse_root", "column_sums"})
      out.write(name, torch::zeros({2, name[0] == 'c' ? 2 : 1, name[0] == 'c' ? 1 : 2, 2}, torch::kDouble), true);
    torch::serialize::InputArchive in = reopened(out);
    const PerSide<std::vector<int64_t>> shapes = {{2, 5}, {4, 2}};
    const auto load = [&] { PairState::load(in, "pair 'q'", shapes, 2, torch::kFloat, torch::kCPU); };
    if (steps == 0)
      EXPECT_NO_THROW(load());
    else
      EXPECT_TRUE(mentions(error_of(load), words));
  }
}

TEST(Serialization, NamesAnOptionOfAnotherType) {
  for (const auto& [name, value, words] :
       {std::tuple{"lr", c10::IValue("fast"), "the saved option lr is fast, expected a double"},
        std::tuple{"escape", c10::IValue(0.5), "the saved option escape is 0.5, expected true or false"},
        std::tuple{"betas", c10::IValue("0.9"), "the saved option betas is 0.9, expected two doubles"}}) {
    torch::serialize::OutputArchive out;
    out.write(name, value);
    torch::serialize::InputArchive in = reopened(out);
    LoraRiteOptions options;
    EXPECT_TRUE(mentions(error_of([&] { options.serialize(in); }), words));
  }
}

TEST(Serialization, NumbersThatNoStepWritesAreNamed) {
  for (const std::string bad : {"second_moment", "inverse_root", "column_sums", "momentum_a", "scalars", "none"}) {
    torch::serialize::OutputArchive out;
    const std::vector<std::pair<std::string, torch::Tensor>> entries = {
        {"scalars", torch::ones({4, 2, 1, 1, 1}, torch::kDouble)},
        {"second_moment", torch::ones({2, 1, 2, 2}, torch::kDouble)},
        {"inverse_root", torch::ones({2, 1, 2, 2}, torch::kDouble)},
        {"column_sums", torch::ones({2, 2, 1, 2}, torch::kDouble)},
        {"momentum_a", torch::ones({1, 2, 5})},
        {"momentum_b", torch::ones({1, 4, 2})}};
    for (const auto& [name, tensor] : entries) {
      if (name == bad) tensor.flatten()[0] = std::numeric_limits<double>::quiet_NaN();
      out.write(name, tensor, /*is_buffer=*/true);
    }
    torch::serialize::InputArchive in = reopened(out);
    const auto load = [&] {
      PairState::load(in, "pair 'q'", {{2, 5}, {4, 2}}, 2, torch::kFloat, torch::kCPU).check_finite("pair 'q'");
    };
    if (bad == "none")
      EXPECT_NO_THROW(load());
    else
      EXPECT_TRUE(mentions(error_of(load), "pair 'q': entry '" + bad + "' has a number that is NaN or infinite"));
  }
  for (const std::string bad : {"step", "mean", "square"}) {
    torch::serialize::OutputArchive out, entry;
    for (const std::string name : {"step", "mean", "square"}) {
      const torch::Tensor tensor = name == "step" ? torch::ones({}) : torch::ones({3});
      if (name == bad) tensor.fill_(bad == "mean" ? std::numeric_limits<double>::quiet_NaN() : -1);
      entry.write(name, tensor, /*is_buffer=*/true);
    }
    out.write("0", entry);
    torch::serialize::InputArchive in = reopened(out);
    const engine::AdamWParameters adamw({torch::zeros({3})}, /*maximize=*/false);
    EXPECT_TRUE(mentions(error_of([&] { adamw.read(in, "group 1"); }),
                         "group 1, parameter 0: entry '" + bad + "' has a number that is NaN"));
  }
}

TEST(Serialization, DamagedHeadersAndOptionsAreNamed) {
  const auto load_with = [](LoraRite<>& optimizer, int64_t skipped, const char* kind, int64_t size, const char* rate) {
    torch::serialize::OutputArchive archive, group, options;
    archive.write("format", c10::IValue("lora_rite.LoraRite 1"));
    archive.write("basis", c10::IValue("polar"));
    archive.write("skipped_steps", c10::IValue(skipped));
    archive.write("group_count", c10::IValue(int64_t{1}));
    options.write("lr", c10::IValue(rate));
    group.write("options", options);
    group.write("kind", c10::IValue(kind));
    group.write("size", c10::IValue(size));
    archive.write("0", group);
    std::stringstream stream;
    archive.save_to(stream);
    return error_of([&] { load_bytes(optimizer, stream.str()); });
  };
  LoraRite<> pairs(first_group(torch::kFloat));
  EXPECT_TRUE(mentions(load_with(pairs, -5, "factor pairs", 6, "1"),
                       "entry 'skipped_steps' is -5, expected a whole number, 0 or more"));
  EXPECT_TRUE(mentions(load_with(pairs, 0, "factor pairs", 6, "fast"), "load: group 0: the saved option lr is fast"));
  std::vector<torch::optim::OptimizerParamGroup> groups;
  groups.emplace_back(std::vector<torch::Tensor>{torch::zeros({3}).requires_grad_()},
                      std::make_unique<torch::optim::AdamWOptions>(1e-3));
  LoraRite<> head(groups);
  EXPECT_TRUE(mentions(load_with(head, 0, "other parameters", 1, "fast"),
                       "load: group 0: an option of AdamW is missing or has another type"));
}

TEST(Serialization, RefusesGarbageAndTruncation) {
  const auto pairs = first_group(torch::kFloat);
  LoraRite<> optimizer(pairs);
  run_steps(optimizer, pairs, 0, 2);
  const std::string before = saved_bytes(optimizer);
  EXPECT_THROW(load_bytes(optimizer, "this is no archive"), c10::Error);
  EXPECT_THROW(load_bytes(optimizer, before.substr(0, before.size() / 2)), c10::Error);
  EXPECT_EQ(saved_bytes(optimizer), before);
}

}  // namespace
}  // namespace lora_rite::test
