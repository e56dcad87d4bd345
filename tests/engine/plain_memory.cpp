// The rule and the host engine on plain memory: this file is compiled and run with no LibTorch on the include path.
// One pair learns a matrix in two factorisations (A, B) and (TA, BT⁻¹): both ways must be the same.

#include <lora_rite/engine/host/decide.hpp>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <utility>
#include <vector>

namespace {

using namespace lora_rite;

constexpr int64_t kIn = 40, kOut = 30, kRank = 4;

struct Run {
  std::vector<float> a, b;  // [r, in] and [out, r]
  std::vector<double> second_moment, inverse_root, escaped_mass, step, column_sums, previous_scale, previous_rate;
  std::vector<float> momentum_a, momentum_b;
  host::Pairs pairs{1, {{kIn, kRank, true}, {kOut, kRank, false}}};

  Run()
      : second_moment(2 * kRank * kRank),
        inverse_root(second_moment),
        escaped_mass(2),
        step(2),
        column_sums(4 * kRank),
        previous_scale{1, 1},
        previous_rate(2),
        momentum_a(kRank * kIn),
        momentum_b(kOut * kRank) {}

  host::StateView state() {
    return {second_moment.data(),
            inverse_root.data(),
            escaped_mass.data(),
            step.data(),
            column_sums.data(),
            previous_scale.data(),
            previous_rate.data(),
            {momentum_a.data(), momentum_b.data()},
            {}};
  }

  // ΔW = BA, row by row.
  std::vector<double> product() const {
    std::vector<double> w(kOut * kIn);
    for (int64_t o = 0; o < kOut; ++o)
      for (int64_t i = 0; i < kIn; ++i)
        for (int64_t k = 0; k < kRank; ++k)
          w[o * kIn + i] += static_cast<double>(b[o * kRank + k]) * static_cast<double>(a[k * kIn + i]);
    return w;
  }

  // One step of least squares towards `target`. Returns the loss before it.
  double train(const std::vector<double>& target, host::Threads& threads) {
    std::vector<double> rest = product();
    double loss = 0;
    for (size_t e = 0; e < rest.size(); ++e) {
      rest[e] -= target[e];
      loss += rest[e] * rest[e];
    }
    std::vector<float> gradient_a(a.size()), gradient_b(b.size());
    for (int64_t k = 0; k < kRank; ++k) {
      for (int64_t i = 0; i < kIn; ++i) {
        double sum = 0;
        for (int64_t o = 0; o < kOut; ++o) sum += static_cast<double>(b[o * kRank + k]) * rest[o * kIn + i];
        gradient_a[k * kIn + i] = static_cast<float>(sum);
      }
      for (int64_t o = 0; o < kOut; ++o) {
        double sum = 0;
        for (int64_t i = 0; i < kIn; ++i) sum += static_cast<double>(a[k * kIn + i]) * rest[o * kIn + i];
        gradient_b[o * kRank + k] = static_cast<float>(sum);
      }
    }
    rule::Hyperparameters numbers;
    numbers.lr = 0.1;
    host::Observation observation = pairs.observe(
        {{{a.data(), gradient_a.data(), false}}, {{b.data(), gradient_b.data(), false}}}, state(), numbers, threads);
    if (!observation.finite()) return -1;
    host::unmagnify<PolarBasis>(pairs, observation, state(), threads);
    pairs.commit(host::plan(pairs, std::move(observation), state(), numbers, 1.0, threads), state(), numbers, threads);
    return loss;
  }
};

/// Trains from two factorisations of one start; does ΔW move alike?
bool trains_alike() {
  std::mt19937 generator(3);
  std::normal_distribution<double> normal;
  const auto draw = [&](size_t size) {
    std::vector<double> numbers(size);
    for (double& number : numbers) number = normal(generator);
    return numbers;
  };
  const std::vector<double> target = draw(kOut * kIn), a = draw(kRank * kIn), b = draw(kOut * kRank);
  const std::array<double, kRank> scales = {100, 3, 0.5, 0.01};  // T, a diagonal one
  Run plain, rescaled;
  for (int64_t k = 0; k < kRank; ++k) {
    for (int64_t i = 0; i < kIn; ++i) {
      plain.a.push_back(static_cast<float>(a[k * kIn + i]));
      rescaled.a.push_back(static_cast<float>(scales[static_cast<size_t>(k)] * a[k * kIn + i]));
    }
  }
  for (int64_t o = 0; o < kOut; ++o) {
    for (int64_t k = 0; k < kRank; ++k) {
      plain.b.push_back(static_cast<float>(b[o * kRank + k]));
      rescaled.b.push_back(static_cast<float>(b[o * kRank + k] / scales[static_cast<size_t>(k)]));
    }
  }
  host::OneThread threads;
  const std::vector<double> start = plain.product();
  double first = 0, last = 0;
  for (int step = 0; step < 50; ++step) {
    last = plain.train(target, threads);
    if (step == 0) first = last;
    rescaled.train(target, threads);
  }
  const std::vector<double> one = plain.product(), other = rescaled.product();
  double way = 0, apart = 0;
  for (size_t e = 0; e < one.size(); ++e) {
    way += (one[e] - start[e]) * (one[e] - start[e]);
    apart += (one[e] - other[e]) * (one[e] - other[e]);
  }
  const double difference = std::sqrt(apart / way);
  std::printf("loss %.1f -> %.1f; two factorisations differ by %.1e of their way\n", first, last, difference);
  return last < 0.9 * first && difference < 1e-4;
}

}  // namespace

/// plain_memory [KERNELS]: also fails unless these are the kernels that run.
int main(int argc, char** argv) try {
  const host::kernels::Table* kernels = host::kernels::chosen();
  if (kernels == nullptr) {
    std::printf("no kernels on this processor\n");
    return argc > 1;
  }
  std::printf("kernels: %s\n", kernels->name);
  return trains_alike() && (argc < 2 || kernels->name == std::string(argv[1])) ? 0 : 1;
} catch (const std::exception& error) {
  std::printf("%s\n", error.what());
  return 2;
}
