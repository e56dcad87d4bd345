// The library follows the trajectories of the existing PyTorch implementation
// (golden/generate.py says what they are and writes them).

#include "support/tensors.hpp"

#include <gtest/gtest.h>
#include <lora_rite/lora_rite.hpp>
#include <nlohmann/json.hpp>

#include <fstream>
#include <string>
#include <vector>

namespace lora_rite::test {
namespace {

using nlohmann::json;

torch::Tensor tensor_of(const json& numbers, const std::vector<int64_t>& shape) {
  return torch::tensor(numbers.get<std::vector<double>>(), torch::kDouble).reshape(shape);
}

/// A pair with the loss ½‖weight ∘ (X_B X_Aᵀ − target)‖².
struct GoldenPair {
  torch::Tensor a, b;            ///< in PEFT's layout
  torch::Tensor weight, target;  ///< [out, in], flattened

  explicit GoldenPair(const json& data)
      : a(tensor_of(data["a"], data["a_shape"])), b(tensor_of(data["b"], data["b_shape"])) {
    const std::vector<int64_t> shape = {tall(b, 1).size(0), tall(a, 0).size(0)};
    weight = tensor_of(data["weight"], shape);
    target = tensor_of(data["target"], shape);
    a.requires_grad_();
    b.requires_grad_();
  }

  /// The closed form, so that no autograd stands between the two implementations.
  void set_gradients() {
    torch::NoGradGuard no_grad;
    const auto error = weight.square() * (product(a, b) - target);
    const auto gradient_a = error.t().matmul(tall(b, 1));
    const auto gradient_b = error.matmul(tall(a, 0));
    a.mutable_grad() = gradient_a.reshape(a.movedim(0, -1).sizes()).movedim(-1, 0).contiguous();
    b.mutable_grad() = gradient_b.reshape(b.movedim(1, -1).sizes()).movedim(-1, 1).contiguous();
  }
};

LoraRiteOptions options_of(const json& data) {
  auto options = LoraRiteOptions::reference(data["lr"]);
  options.betas({data["betas"][0], data["betas"][1]})
      .escape(data["escape"])
      .clip_unmagnified_norm(data["clip_unmagnified_norm"])
      .weight_decay(data["weight_decay"])
      .max_update_rms(data["max_update_rms"])
      .maximize(data["maximize"]);
  const double eps = data["eps"];
  if (eps != 1e-6) options.eps(eps).eps_root(eps * eps);  // 1e-6 is what `reference` itself sets
  return options;
}

template <class Basis>
void expect_follows(const std::string& name) {
  std::ifstream file(std::string(LORA_RITE_TEST_DATA_DIR) + "/golden/" + name + ".json");
  ASSERT_TRUE(file) << name;
  const json data = json::parse(file);

  std::vector<GoldenPair> pairs;
  std::vector<FactorPair> factors;
  for (const auto& pair : data["pairs"]) {
    pairs.emplace_back(pair);
    factors.push_back({"pair" + std::to_string(pairs.size()), pairs.back().a, pairs.back().b});
  }
  LoraRite<Basis> optimizer(factors, options_of(data["options"]));

  int64_t step = 0;
  for (const auto& checkpoint : data["checkpoints"]) {
    for (; step < checkpoint["step"].get<int64_t>(); ++step) {
      for (auto& pair : pairs) pair.set_gradients();
      optimizer.step();
    }
    for (size_t i = 0; i < pairs.size(); ++i) {
      for (const char* which : {"a", "b"}) {
        const auto& factor = which[0] == 'a' ? pairs[i].a : pairs[i].b;
        const auto start = tensor_of(data["pairs"][i][which], factor.sizes().vec());
        const auto expected = tensor_of(checkpoint["pairs"][i][which], factor.sizes().vec());
        const double movement = frobenius(expected - start);
        // From B = 0 the first step leaves A where it is: there the scale is A itself.
        const double scale = movement > 0 ? movement : frobenius(start);
        EXPECT_LT(relative_difference(factor, expected, scale), 1e-9)
            << "factor " << which << " of pair " << i << " after step " << step;
      }
    }
  }
  for (size_t i = 0; i < pairs.size(); ++i) {
    const auto start_a = tensor_of(data["pairs"][i]["a"], pairs[i].a.sizes().vec());
    const auto start_b = tensor_of(data["pairs"][i]["b"], pairs[i].b.sizes().vec());
    EXPECT_GT(frobenius(pairs[i].a - start_a), 0.1 * frobenius(start_a)) << "pair " << i << " stood still";
    EXPECT_GT(frobenius(pairs[i].b - start_b), 0.05 * frobenius(start_b)) << "pair " << i << " stood still";
  }
}

class Golden : public testing::TestWithParam<const char*> {};

TEST_P(Golden, PolarBasisFollowsTheExistingImplementation) { expect_follows<PolarBasis>(GetParam()); }

TEST_P(Golden, QrBasisFollowsTheExistingImplementation) { expect_follows<QrBasis>(GetParam()); }

INSTANTIATE_TEST_SUITE_P(Trajectories, Golden,
                         testing::Values("default", "escape", "clip_off", "clip_off_escape", "weight_decay",
                                         "from_zero", "two_shapes", "convolution", "update_capping", "maximize",
                                         "everything"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace lora_rite::test
