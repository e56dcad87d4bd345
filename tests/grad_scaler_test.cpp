// Loss scaling: lora_rite::GradScaler follows torch.amp.GradScaler (golden/generate_grad_scaler.py says how its
// trajectories came about), and it and LoraRite understand each other.

#include <gtest/gtest.h>
#include <torch/nn/utils/clip_grad.h>
#include <lora_rite/grad_scaler.hpp>
#include <nlohmann/json.hpp>

#include <cmath>
#include <fstream>
#include <limits>
#include <string>
#include <vector>

#include "support/operators.hpp"
#include "support/pairs.hpp"
#include "support/tensors.hpp"

namespace lora_rite::test {
namespace {

using nlohmann::json;

constexpr float kInf = std::numeric_limits<float>::infinity();

/// Every optimizer state is in the saved bytes.
std::string state_of(const LoraRite<>& optimizer) { return saved_bytes(optimizer); }

class GradScalerGolden : public testing::TestWithParam<const char*> {};

TEST_P(GradScalerGolden, FollowsPyTorch) {
  std::ifstream file(std::string(LORA_RITE_TEST_DATA_DIR) + "/golden/grad_scaler.json");
  ASSERT_TRUE(file);
  const json data = json::parse(file)[GetParam()], arguments = data["arguments"];
  const auto floats = [](const json& numbers) { return torch::tensor(numbers.get<std::vector<float>>()); };
  std::vector<torch::Tensor> parameters;
  for (const auto& start : data["start"]) parameters.push_back(floats(start).requires_grad_());
  torch::optim::SGD sgd({parameters[0]}, torch::optim::SGDOptions(0.1).momentum(0.9));
  torch::optim::Adam adam({parameters[1]}, torch::optim::AdamOptions(0.01));
  GradScaler scaler(arguments["init_scale"], arguments["growth_factor"], arguments["backoff_factor"],
                    arguments["growth_interval"]);
  int64_t number = 0;
  for (const auto& step : data["steps"]) {
    SCOPED_TRACE("step " + std::to_string(number++));
    auto loss = torch::zeros({});
    for (const size_t i : {0, 1}) loss = loss + (parameters[i] * floats(step["gradients"][i])).sum();
    scaler.scale(loss).backward();
    for (const size_t i : {0, 1}) {
      torch::optim::Optimizer& optimizer = i == 0 ? static_cast<torch::optim::Optimizer&>(sgd) : adam;
      const double clip = step["clip"];
      if (clip > 0) {
        scaler.unscale_(optimizer);
        torch::nn::utils::clip_grad_norm_(parameters[i], clip);
      }
      scaler.step(optimizer);
      optimizer.zero_grad();
    }
    const double new_scale = step["new_scale"];
    new_scale > 0 ? scaler.update(new_scale) : scaler.update();
    EXPECT_EQ(scaler.get_scale(), step["scale"].get<double>());
    EXPECT_EQ(scaler.growth_tracker(), step["growth_tracker"].get<int64_t>());
    for (const size_t i : {0, 1}) {
      // Both compute in float, in some order of their own: a few units a step.
      const auto expected = floats(step["parameters"][i]);
      EXPECT_LT((parameters[i] - expected).abs().max().item<double>(),
                4 * number * 0x1p-24 * expected.abs().max().item<double>());
    }
  }
  for (const size_t i : {0, 1}) {
    EXPECT_GT((parameters[i].detach() - floats(data["start"][i])).abs().max().item<double>(), 1e-3);
  }
}

INSTANTIATE_TEST_SUITE_P(Trajectories, GradScalerGolden, testing::Values("defaults", "short_interval", "end_of_float"),
                         [](const auto& info) { return std::string(info.param); });

/// A LoRA pair in some dtype, and the loss Σ A·g_A + Σ B·g_B, whose gradients are known.
struct Problem {
  std::vector<FactorPair> pairs;
  LoraRite<> optimizer;

  explicit Problem(torch::Dtype dtype, const LoraRiteOptions& options = LoraRiteOptions(0.05))
      : pairs(start(dtype)), optimizer(pairs, options) {}

  static std::vector<FactorPair> start(torch::Dtype dtype) {
    torch::manual_seed(5);
    return {random_pair("p", 3, 9, 7, dtype), random_pair("q", 2, 6, 8, dtype)};
  }

  /// The loss of step `number`; a gradient has entries of about `size`.
  torch::Tensor loss(int64_t number, double size = 1) const {
    torch::manual_seed(static_cast<uint64_t>(100 + number));
    auto sum = torch::zeros({});
    for (const auto& pair : pairs)
      for (const auto& factor : {pair.a, pair.b})
        sum = sum + (factor.to(torch::kFloat) * (size * torch::randn(factor.sizes()))).sum();
    return sum;
  }

  /// One iteration; with `overflow` a gradient is infinite. Returns whether the optimizer stepped.
  bool iterate(GradScaler& scaler, int64_t number, bool overflow = false, double size = 1) {
    optimizer.zero_grad();
    scaler.scale(loss(number, size)).backward();
    if (overflow) pairs[1].a.mutable_grad()[0][0] = kInf;
    const bool stepped = scaler.step(optimizer);
    scaler.update();
    return stepped;
  }

  std::vector<torch::Tensor> values() const {
    std::vector<torch::Tensor> result;
    for (const auto& pair : clone_pairs(pairs)) result.insert(result.end(), {pair.a, pair.b});
    return result;
  }
};

/// The options with which half factors are tried: with and without a master copy.
std::vector<LoraRiteOptions> master_or_not() {
  return {LoraRiteOptions(0.05), LoraRiteOptions(0.05).master_weights(true)};
}

TEST(GradScaler, OverflowAtTheFirstStepLeavesFactorsAndStateAndBacksOff) {
  for (const auto dtype : {torch::kFloat, torch::kHalf, torch::kBFloat16, torch::kDouble}) {
    for (const auto& options : master_or_not()) {
      Problem problem(dtype, options);
      GradScaler scaler(8);
      const auto factors = clone_pairs(problem.pairs);
      const std::string state = state_of(problem.optimizer);
      EXPECT_FALSE(problem.iterate(scaler, 0, /*overflow=*/true));
      EXPECT_TRUE(equal_factors(problem.pairs, factors));
      EXPECT_EQ(state_of(problem.optimizer), state);
      EXPECT_EQ(problem.optimizer.skipped_steps(), 0) << "the scaler left it out, not the optimizer";
      EXPECT_EQ(scaler.get_scale(), 4);
      EXPECT_TRUE(problem.iterate(scaler, 1));
      EXPECT_FALSE(equal_factors(problem.pairs, factors));
    }
  }
}

TEST(GradScaler, OverflowInTheMiddleLeavesNoTrace) {
  for (const auto dtype : {torch::kFloat, torch::kHalf}) {
    for (const auto& options : master_or_not()) {
      Problem clean(dtype, options), hit(dtype, options);
      // A power of two as the scale and a float gradient of a half factor: scaling is exact, whatever the scale is.
      GradScaler clean_scaler(8), hit_scaler(8);
      for (int64_t step = 0; step < 6; ++step) {
        if (step == 3) {
          const std::string state = state_of(hit.optimizer);
          EXPECT_FALSE(hit.iterate(hit_scaler, 77, /*overflow=*/true));
          EXPECT_EQ(state_of(hit.optimizer), state);
        }
        EXPECT_TRUE(clean.iterate(clean_scaler, step));
        EXPECT_TRUE(hit.iterate(hit_scaler, step));
      }
      EXPECT_TRUE(equal_factors(clean.pairs, hit.pairs));
      EXPECT_EQ(hit.optimizer.skipped_steps(), 0);
      EXPECT_FALSE(equal_factors(clean.pairs, Problem(dtype).pairs));
    }
  }
}

TEST(GradScaler, OverflowOfTheScaledLossBacksOffUntilItFits) {
  // half ends at 65504: a scale of 2^20 times gradients of about one does not fit, 2^14 does.
  for (const auto& options : master_or_not()) {
    Problem problem(torch::kHalf, options);
    const auto factors = clone_pairs(problem.pairs);
    GradScaler scaler(0x1p20);
    int64_t left_out = 0;
    while (!problem.iterate(scaler, left_out)) {
      EXPECT_TRUE(equal_factors(problem.pairs, factors));
      ASSERT_LT(++left_out, 10);
    }
    EXPECT_GE(left_out, 4);
    EXPECT_EQ(scaler.get_scale(), std::ldexp(1.0, 20 - static_cast<int>(left_out)));
    EXPECT_EQ(problem.optimizer.skipped_steps(), 0);
  }
}

TEST(GradScaler, ScaledHalfGradientsSurviveWhereUnscaledOnesVanish) {
  // Gradients of 1e-9 are below half's smallest number, 6e-8; scaled by 2^24 they have all its digits.
  for (const auto& options : master_or_not()) {
    auto without_eps = options;
    without_eps.eps(0);
    Problem scaled(torch::kHalf, without_eps), unscaled(torch::kHalf, without_eps), wide(torch::kFloat, without_eps);
    {
      torch::NoGradGuard no_grad;
      for (size_t i = 0; i < wide.pairs.size(); ++i) {
        wide.pairs[i].a.copy_(scaled.pairs[i].a);
        wide.pairs[i].b.copy_(scaled.pairs[i].b);
      }
    }
    const auto start = scaled.values();
    GradScaler scaler(0x1p24), unit(1), also_unit(1);
    EXPECT_TRUE(scaled.iterate(scaler, 0, false, 1e-9));
    EXPECT_TRUE(unscaled.iterate(unit, 0, false, 1e-9));
    EXPECT_TRUE(wide.iterate(also_unit, 0, false, 1e-9));
    EXPECT_TRUE(equal_factors(unscaled.pairs, Problem::start(torch::kHalf)));
    const auto actual = scaled.values(), expected = wide.values();
    for (size_t i = 0; i < actual.size(); ++i) {
      const double moved = lora_rite::test::relative_difference(actual[i], start[i], 1);
      EXPECT_GT(moved, 1e-2);
      // The gradient was rounded to 11 bits, which an inverse root of condition 1e1 to 1e2 amplifies; the factor,
      // too.
      EXPECT_LT(lora_rite::test::relative_difference(actual[i], expected[i], 1),
                0x1p-11 * (1e2 * moved + lora_rite::test::frobenius(expected[i])));
    }
  }
}

TEST(GradScaler, GrowsAfterTheIntervalAndGrowthDoesNotChangeTheSteps) {
  Problem scaled(torch::kFloat), plain(torch::kFloat);
  GradScaler scaler(4, 2, 0.5, /*growth_interval=*/2);
  GradScaler disabled(4, 2, 0.5, 2, /*enabled=*/false);
  for (int64_t step = 0; step < 7; ++step) {
    EXPECT_TRUE(scaled.iterate(scaler, step));
    EXPECT_TRUE(plain.iterate(disabled, step));
  }
  EXPECT_EQ(scaler.get_scale(), 4 * 2 * 2 * 2);
  EXPECT_EQ(scaler.growth_tracker(), 1);
  EXPECT_EQ(disabled.get_scale(), 1);
  EXPECT_TRUE(equal_factors(scaled.pairs, plain.pairs));  // powers of two lose nothing
  EXPECT_FALSE(equal_factors(scaled.pairs, Problem(torch::kFloat).pairs));
}

TEST(GradScaler, UnscaledGradientsCanBeClipped) {
  Problem scaled(torch::kFloat), plain(torch::kFloat);
  GradScaler scaler;
  const auto clip = [](const Problem& problem) {
    std::vector<torch::Tensor> factors;
    for (const auto& pair : problem.pairs) factors.insert(factors.end(), {pair.a, pair.b});
    return torch::nn::utils::clip_grad_norm_(factors, 0.5);
  };
  for (int64_t step = 0; step < 4; ++step) {
    scaled.optimizer.zero_grad();
    scaler.scale(scaled.loss(step)).backward();
    scaler.unscale_(scaled.optimizer);
    const double norm = clip(scaled);
    EXPECT_TRUE(scaler.step(scaled.optimizer));
    scaler.update();
    plain.optimizer.zero_grad();
    plain.loss(step).backward();
    EXPECT_EQ(norm, clip(plain));
    EXPECT_GT(norm, 0.5);
    plain.optimizer.step();
  }
  EXPECT_TRUE(equal_factors(scaled.pairs, plain.pairs));
  EXPECT_FALSE(equal_factors(scaled.pairs, Problem(torch::kFloat).pairs));
}

TEST(GradScaler, ClippingAfterAnOverflowDoesNotHideIt) {
  // The clip turns the infinity into NaN and everything else into 0; what counts was seen before it.
  Problem problem(torch::kFloat);
  GradScaler scaler(8);
  scaler.scale(problem.loss(0)).backward();
  problem.pairs[0].b.mutable_grad()[0][0] = -kInf;
  scaler.unscale_(problem.optimizer);
  for (const auto& pair : problem.pairs) pair.b.mutable_grad().nan_to_num_(0, 0, 0);
  EXPECT_FALSE(scaler.step(problem.optimizer));
  scaler.update();
  EXPECT_EQ(scaler.get_scale(), 4);
  EXPECT_TRUE(equal_factors(problem.pairs, Problem(torch::kFloat).pairs));
}

TEST(GradScaler, ParametersOfAdamWInTheSameOptimizerAreScaledToo) {
  for (const auto dtype : {torch::kFloat, torch::kHalf, torch::kBFloat16}) {
    Problem problem(torch::kFloat);
    auto head = torch::ones({4}).to(dtype).requires_grad_();
    problem.optimizer.add_parameters({head}, torch::optim::AdamWOptions(0.1));
    GradScaler scaler(16);
    const auto iterate = [&](float value) {
      problem.optimizer.zero_grad();
      scaler.scale(problem.loss(0) + (head.to(torch::kFloat) * torch::tensor({1.F, 2.F, 3.F, value})).sum()).backward();
      const bool stepped = scaler.step(problem.optimizer);
      scaler.update();
      return stepped;
    };
    EXPECT_FALSE(iterate(kInf));
    EXPECT_TRUE(equal_factors(problem.pairs, Problem(torch::kFloat).pairs));
    EXPECT_TRUE(torch::equal(head.detach(), torch::ones({4}).to(dtype)));
    EXPECT_TRUE(iterate(4));
    EXPECT_FALSE(equal_factors(problem.pairs, Problem(torch::kFloat).pairs));
    EXPECT_TRUE((head.detach() < 1).all().item<bool>());
  }
}

TEST(GradScaler, SparseGradientsAreUnscaled) {
  for (const auto dtype : {torch::kFloat, torch::kHalf}) {
    auto table = torch::ones({4, 2}).to(dtype).requires_grad_();
    torch::optim::SGD optimizer({table}, 1.0);
    GradScaler scaler(1);
    scaler.scale(torch::zeros({}));
    // Row 1 twice: the values of duplicates are unscaled one by one.
    table.mutable_grad() =
        torch::sparse_coo_tensor(torch::tensor({{1, 3, 1}}), torch::full({3, 2}, 0.25).to(dtype), {4, 2});
    scaler.update(0.5);
    scaler.unscale_(optimizer);
    const auto expected = torch::tensor({{0., 0.}, {1., 1.}, {0., 0.}, {0.5, 0.5}});
    EXPECT_TRUE(torch::equal(table.grad().to_dense().to(torch::kDouble), expected.to(torch::kDouble)));
  }
}

TEST(GradScaler, ReadsFromTheDeviceOnceAStep) {
  // Two optimizers, gradients of two dtypes.
  auto x = torch::ones({3}).requires_grad_(), y = torch::ones({3}, torch::kDouble).requires_grad_();
  auto z = torch::ones({3}).requires_grad_();
  torch::optim::SGD first({x, y}, 0.1), second({z}, 0.1);
  GradScaler scaler(4);
  const auto calls = operators_of([&] {
    scaler.scale((x + y + z).sum()).backward();
    scaler.unscale_(first);
    scaler.step(first);
    scaler.step(second);
    scaler.update();
  });
  EXPECT_EQ(calls.at("aten::item"), 2);
  EXPECT_EQ(scaler.growth_tracker(), 1);
  EXPECT_LT(x[0].item<double>(), 1);
}

TEST(GradScaler, CallsOutOfOrderAreRefused) {
  Problem problem(torch::kFloat);
  GradScaler scaler(8);
  EXPECT_TRUE(mentions(error_of([&] { scaler.unscale_(problem.optimizer); }), "unscale_ was called before scale"));
  EXPECT_TRUE(mentions(error_of([&] { scaler.step(problem.optimizer); }), "step was called before scale"));
  EXPECT_TRUE(mentions(error_of([&] { scaler.update(); }), "update was called before scale"));
  EXPECT_TRUE(mentions(error_of([&] { scaler.update(2); }), "update was called before scale"));
  scaler.scale(problem.loss(0));
  EXPECT_TRUE(
      mentions(error_of([&] { scaler.step(problem.optimizer); }), "no parameter of the optimizer has a gradient"));
  EXPECT_TRUE(mentions(error_of([&] { scaler.update(); }), "without unscale_ or step"));
  scaler.update(8);  // begins anew
  scaler.scale(problem.loss(0)).backward();
  scaler.unscale_(problem.optimizer);
  EXPECT_TRUE(
      mentions(error_of([&] { scaler.unscale_(problem.optimizer); }), "unscale_ was called for this optimizer"));
  const auto gradient = problem.pairs[0].a.grad().clone();
  EXPECT_TRUE(mentions(error_of([&] { scaler.step(problem.optimizer, [] { return torch::Tensor(); }); }), "closure"));
  EXPECT_TRUE(scaler.step(problem.optimizer));
  EXPECT_TRUE(mentions(error_of([&] { scaler.step(problem.optimizer); }), "step was called for this optimizer"));
  EXPECT_TRUE(mentions(error_of([&] { scaler.unscale_(problem.optimizer); }), "after step"));
  EXPECT_TRUE(torch::equal(problem.pairs[0].a.grad(), gradient)) << "a refused call divided again";
  scaler.update();
  EXPECT_TRUE(problem.iterate(scaler, 1));
}

TEST(GradScaler, NumbersOutOfRangeAreRefused) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const double bad : {0.0, -1.0, 1e39, 1e-50, nan})
    EXPECT_TRUE(mentions(error_of([&] { GradScaler scaler(bad); }), "the scale"));
  for (const double bad : {1.0, 0.5, double(kInf), nan})
    EXPECT_TRUE(mentions(error_of([&] { GradScaler scaler(8, bad); }), "growth_factor"));
  for (const double bad : {0.0, 1.0, -0.5, nan})
    EXPECT_TRUE(mentions(error_of([&] { GradScaler scaler(8, 2, bad); }), "backoff_factor"));
  for (const int64_t bad : {int64_t(0), int64_t(-3), int64_t(1) << 40})
    EXPECT_TRUE(mentions(error_of([&] { GradScaler scaler(8, 2, 0.5, bad); }), "growth_interval"));
  GradScaler scaler(8);
  scaler.scale(torch::ones({}));
  for (const double bad : {0.0, -1.0, 1e39, nan})
    EXPECT_TRUE(mentions(error_of([&] { scaler.update(bad); }), "the new scale"));
  EXPECT_EQ(scaler.get_scale(), 8);
}

TEST(GradScaler, ListOfOutputsIsScaledInItsOrder) {
  GradScaler scaler(8);
  const auto scaled = scaler.scale(std::vector<torch::Tensor>{torch::ones({2}), 3 * torch::ones({})});
  EXPECT_TRUE(torch::equal(scaled[0], torch::full({2}, 8.F)));
  EXPECT_EQ(scaled[1].item<double>(), 24);
}

/// What `save` writes, ready to be read.
void transfer(const GradScaler& from, GradScaler& to) {
  torch::serialize::OutputArchive out;
  from.save(out);
  torch::serialize::InputArchive in = reopened(out);
  to.load(in);
}

TEST(GradScaler, SavedScalerResumesBeforeAndAfterItsFirstUse) {
  Problem problem(torch::kFloat);
  GradScaler original(4, 3, 0.25, 3);
  for (int64_t step = 0; step < 5; ++step) problem.iterate(original, step, step == 1);
  EXPECT_EQ(original.get_scale(), 3);  // 4 · ¼ · 3
  for (const bool used : {false, true}) {
    GradScaler resumed;
    Problem other(torch::kFloat);
    if (used) other.iterate(resumed, 0);
    transfer(original, resumed);
    EXPECT_EQ(resumed.get_scale(), 3);
    EXPECT_EQ(resumed.growth_tracker(), original.growth_tracker());
    EXPECT_EQ(resumed.growth_factor(), 3);
    EXPECT_EQ(resumed.backoff_factor(), 0.25);
    EXPECT_EQ(resumed.growth_interval(), 3);
    for (int64_t step = 0; step < 3; ++step) other.iterate(resumed, step);
    EXPECT_EQ(resumed.get_scale(), 9);
  }
}

TEST(GradScaler, ForeignArchiveIsRefusedAndChangesNothing) {
  const GradScaler disabled(4, 2, 0.5, 2, /*enabled=*/false);
  GradScaler scaler(4);
  EXPECT_TRUE(mentions(error_of([&] { transfer(disabled, scaler); }), "no GradScaler"));
  EXPECT_EQ(scaler.get_scale(), 4);
}

TEST(GradScaler, DisabledScalerIsTransparent) {
  Problem scaled(torch::kFloat), plain(torch::kFloat);
  GradScaler disabled(4, 2, 0.5, 2, /*enabled=*/false);
  EXPECT_FALSE(disabled.is_enabled());
  const auto loss = scaled.loss(0);
  EXPECT_TRUE(disabled.scale(loss).is_same(loss));
  loss.backward();
  disabled.unscale_(scaled.optimizer);
  EXPECT_TRUE(disabled.step(scaled.optimizer));
  disabled.update();
  plain.loss(0).backward();
  plain.optimizer.step();
  EXPECT_TRUE(equal_factors(scaled.pairs, plain.pairs));
  EXPECT_FALSE(equal_factors(scaled.pairs, Problem(torch::kFloat).pairs));
}

}  // namespace
}  // namespace lora_rite::test
