// The rule over matrices that a block shares, beside the rule over tensors, in double.

#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "engine/cuda/host_team.hpp"
#include "lora_rite/engine/cuda/block_algebra.hpp"
#include "lora_rite/engine/device/tensor_algebra.hpp"
#include "lora_rite/rule/decide.hpp"
#include "support/torch.hpp"

namespace lora_rite::test {
using namespace cuda;
namespace {

using Matrices = std::vector<std::pair<std::string, torch::Tensor>>;

/// What a factor, its partner and its gradient may be: n rows each, of full rank.
struct Inputs {
  torch::Tensor gram, cross, gradient_gram, second_moment, inverse_root;

  explicit Inputs(int64_t rank) {
    torch::manual_seed(70 + static_cast<uint64_t>(rank));
    const auto tall = [&] { return torch::randn({4 * rank + 3, rank}, torch::kDouble); };
    const torch::Tensor y = tall(), old = y + 0.05 * tall(), g = tall(), earlier = tall();
    gram = torch::matmul(y.mT(), y);
    cross = torch::matmul(y.mT(), old);
    gradient_gram = torch::matmul(g.mT(), g);
    second_moment = torch::matmul(earlier.mT(), earlier) / 100;
    inverse_root = PolarBasis::inverse_root(torch::matmul(old.mT(), old), 1e-14);
  }
};

struct Setting {
  double exponent, max_relative_change, gradient_epsilon;
  bool edited, has_gradient;
};

/// add(name, matrix) of what act 2 gives, and add_number(ρ). `matrix`, `number` and `flag` make its inputs; `lay_down`
/// moves a matrix from the pool to other memory, as happens between the two halves.
template <class Basis, class Matrix, class MakeMatrix, class Number, class Flag, class Lay, class Add, class AddNumber>
void act_two(const Inputs& inputs, const Setting& setting, const MakeMatrix& matrix, const Number& number,
             const Flag& flag, const Lay& lay_down, const Add& add, const AddNumber& add_number) {
  constexpr double kFloat = std::numeric_limits<float>::epsilon();
  rule::Hyperparameters numbers;
  numbers.preconditioner_exponent = setting.exponent;
  numbers.max_relative_change = setting.max_relative_change;
  rule::Statistics<Matrix> statistics;
  statistics.gram = matrix(inputs.gram);
  statistics.cross = matrix(inputs.cross);
  statistics.gradient_gram = matrix(inputs.gradient_gram);
  statistics.steps = number(12);
  rule::Unmagnified<Matrix> now = rule::unmagnify<Basis>(std::move(statistics), kFloat);
  rule::Unmagnified<Matrix>::for_each_field(now, [&](Matrix& field) {
    if (field.defined()) field = lay_down(field);
  });
  if (setting.max_relative_change > 0) {
    now.damping = rule::relative_change_damping(now.inverse_root, matrix(inputs.inverse_root), number(1e-2), number(50),
                                                setting.max_relative_change);
  }
  const rule::Moments<Matrix> old = {matrix(inputs.second_moment), number(0.01), matrix(inputs.inverse_root),
                                     number(7)};
  const rule::Decision<Matrix> decision =
      rule::decide<rule::Eigenvalues>(old, now, number(50), number(0.7), flag(setting.has_gradient),
                                      flag(setting.edited), setting.gradient_epsilon, numbers);
  add("R⁺", now.inverse_root), add("ḠᵀḠ", now.gradient_gram), add("V", decision.moments.second_moment);
  add_number(decision.moments.escaped_mass);
  add("N's map", decision.momentum_map), add("G's map", decision.gradient_map);
}

template <class PoolType>
torch::Tensor read(const Matrix<PoolType>& x) {
  const int rank = x.pool().rank();
  torch::Tensor result = torch::empty({rank, rank}, torch::kDouble);
  for (int i = 0; i < rank; ++i)
    for (int j = 0; j < rank; ++j) result.data_ptr<double>()[i * rank + j] = x.at(i, j);
  return result;
}

template <class Basis, int R>
void check(int64_t rank, const Setting& setting) {
  const Inputs inputs(rank);
  Matrices expected;
  double escaped_mass = 0;
  act_two<Basis, at::Tensor>(
      inputs, setting, [](const torch::Tensor& x) { return x; },
      [](double x) {
        return torch::full({1, 1}, x, torch::kDouble);
      },
      [](bool x) {
        return torch::full({1, 1}, x, torch::kBool);
      },
      [](const at::Tensor& x) { return x; },
      [&](const char* name, const at::Tensor& x) { expected.emplace_back(name, x); },
      [&](const at::Tensor& x) { escaped_mass = x.item<double>(); });

  using PoolType = Pool<emulated::HostTeam, R>;
  emulated::HostTeam team(5);
  std::vector<double> shared(PoolType::shared_size(PoolType::kMatrices), std::numeric_limits<double>::quiet_NaN());
  team.share(shared.data());
  PoolType pool(team, static_cast<int>(rank), PoolType::kMatrices, nullptr);
  std::vector<torch::Tensor> kept;
  size_t next = 0;
  act_two<Basis, Matrix<PoolType>>(
      inputs, setting,
      [&](const torch::Tensor& x) {
        kept.push_back(x.contiguous());
        return Matrix<PoolType>(pool, kept.back().const_data_ptr<double>());
      },
      [](double x) { return cuda::Number(x); }, [](bool x) { return cuda::Number(x ? 1.0 : 0.0); },
      [&](const Matrix<PoolType>& x) {
        kept.push_back(read(x));
        return Matrix<PoolType>(pool, kept.back().const_data_ptr<double>());
      },
      [&](const char* name, const Matrix<PoolType>& x) {
        const torch::Tensor found = read(x);
        const torch::Tensor wanted = expected[next++].second;
        EXPECT_LE((found - wanted).norm().item<double>(), 1e-12 * wanted.norm().item<double>())
            << name << ", rank " << rank << ", exponent " << setting.exponent << ", edited " << setting.edited;
      },
      [&](const cuda::Number& x) {
        // A difference of eigenvalues, each of which is exact to a share of the largest.
        EXPECT_NEAR(x.value, escaped_mass, 1e-11 * escaped_mass) << "ρ, rank " << rank;
      });
}

template <class Basis>
void check_ranks(const Setting& setting) {
  check<Basis, 4>(4, setting), check<Basis, 8>(7, setting), check<Basis, 8>(8, setting);
  check<Basis, 16>(13, setting), check<Basis, 16>(16, setting), check<Basis, 32>(32, setting);
  check<Basis, 64>(64, setting);
}

TEST(CudaRule, IsThatOfTheTensorsInDouble) {
  constexpr double kFloat = std::numeric_limits<float>::epsilon();
  for (const Setting& setting : {Setting{0.5, 0, kFloat, false, true}, Setting{0.25, 0.1, 0x1p-7, false, true},
                                 Setting{0.5, 0.1, kFloat, true, true}, Setting{0.5, 0, kFloat, false, false}}) {
    check_ranks<PolarBasis>(setting);
    check_ranks<QrBasis>(setting);
  }
}

}  // namespace
}  // namespace lora_rite::test
