// Random configurations of everything that LoraRite lets one choose, against the naive oracle. A configuration that
// fails is made smaller as long as it still fails, so that the message shows the least that is needed.
//
// LORA_RITE_PROPERTY_CASES sets how many are tried (10000); LORA_RITE_PROPERTY_SEED the first seed (1), so that a
// failure is repeated by its seed and a count of 1.
//
// Tolerance: the bound of oracle_test.cpp, steps · u · (‖X‖ + κ · path), u being the unit round-off and path the
// length of the way that X went, with one more κ(R) for the way of an error from the partner, and 256 in place of 32,
// for among a million cases some are unlucky; plus 2^-51 κ(V) path, for the smallest eigenvalue of V is known to κ(V)
// times double's round-off; plus what the problem itself does to round-off: a second oracle has every factor and
// gradient perturbed by a share δ ≫ u, and u / δ times the distance between the two oracles, times 1024 for what one
// direction of perturbation can miss, is the error that rounding each of them causes. Where the sum exceeds a share of
// the path (1e-6 for double, 1e-3 for float), or a factor's rank is a matter of round-off, the oracle is no judge, and
// the factor is only checked to be finite. A hundredth of that share is always allowed.

#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <lora_rite/lora_rite.hpp>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <optional>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "support/duel.hpp"

namespace lora_rite::test {
namespace {

/// Something that is chosen: its values, the simplest one first, and for an option where it belongs.
struct Parameter {
  const char* name;
  std::vector<double> values;
  bool is_size;  ///< any value is as likely as another; otherwise half of the cases take the first
  void (*set)(LoraRiteOptions&, double) = nullptr;
};

/// How the factors start.
constexpr double kRandom = 0, kZeroB = 1, kDeficientA = 2;

const std::vector<Parameter>& parameters() {
  static const std::vector<double> sizes = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, flag = {0, 1};
  static const auto option = [](const char* name, std::vector<double> values, void (*set)(LoraRiteOptions&, double)) {
    return Parameter{name, std::move(values), false, set};
  };
  static const std::vector<Parameter> table = {
      {"steps", {1, 2, 3, 4, 5, 6}, true},
      {"pairs", {1, 2}, false},
      {"rank", {1, 2, 3, 4, 5, 6, 7, 8, 9}, true},
      {"out", sizes, true},
      {"in", sizes, true},
      {"float", flag, true},
      {"host", flag, true},
      {"qr", flag, true},
      {"start", {kRandom, kZeroB, kDeficientA}, false},
      {"edits", flag, false},
      {"missing_gradients", flag, false},
      {"zero_gradients", flag, false},
      {"deficient_gradients", flag, false},
      {"gradient_size", {1, 0.01, 100}, false},
      option("lr", {0.05, 0.01, 0.2}, [](LoraRiteOptions& o, double x) { o.lr(x); }),
      option("beta1", {0.9, 0, 0.5}, [](LoraRiteOptions& o, double x) { std::get<0>(o.betas()) = x; }),
      option("beta2", {0.999, 0, 0.8}, [](LoraRiteOptions& o, double x) { std::get<1>(o.betas()) = x; }),
      {"eps", {1e-8, 1e-4, 1e-2}, true, [](LoraRiteOptions& o, double x) { o.eps(x); }},
      option("eps_root", {0, 1e-4}, [](LoraRiteOptions& o, double x) { o.eps_root(x); }),
      option("preconditioner_exponent", {0.5, 0.25, 0},
             [](LoraRiteOptions& o, double x) { o.preconditioner_exponent(x); }),
      option("weight_decay", {0, 0.1, 0.5}, [](LoraRiteOptions& o, double x) { o.weight_decay(x); }),
      option("escape", {1, 0}, [](LoraRiteOptions& o, double x) { o.escape(x != 0); }),
      option("clip_unmagnified_norm", {1, 0, 0.1, 10},
             [](LoraRiteOptions& o, double x) { o.clip_unmagnified_norm(x); }),
      option("max_update_rms", {0, 0.3}, [](LoraRiteOptions& o, double x) { o.max_update_rms(x); }),
      option("max_relative_change", {0, 0.3, 0.05}, [](LoraRiteOptions& o, double x) { o.max_relative_change(x); }),
      option("row_equilibration", {0, 1}, [](LoraRiteOptions& o, double x) { o.row_equilibration(x != 0); }),
      option("lr_ratio_b", {1, 4}, [](LoraRiteOptions& o, double x) { o.lr_ratio_b(x); }),
      option("balance", {0, 1}, [](LoraRiteOptions& o, double x) { o.balance(x != 0); }),
      option("maximize", {0, 1}, [](LoraRiteOptions& o, double x) { o.maximize(x != 0); }),
  };
  return table;
}

using Random = std::mt19937_64;

/// What is drawn for one purpose depends on nothing else that is drawn, so that a smaller case stays like the larger.
Random random_of(uint64_t seed, uint64_t purpose, uint64_t step = 0, uint64_t place = 0) {
  std::seed_seq numbers = {seed, seed >> 32, purpose, step, place};
  return Random(numbers);
}

bool with_chance(Random& random, double chance) { return std::uniform_real_distribution<>(0, 1)(random) < chance; }

Matrix normal(Random& random, int64_t rows, int64_t columns) {
  std::normal_distribution<> distribution;
  Matrix result(rows, columns);
  for (double& value : result.reshaped()) value = distribution(random);
  return result;
}

/// A seed, and for every parameter the index of its value.
struct Case {
  uint64_t seed;
  std::vector<size_t> chosen;

  explicit Case(uint64_t number) : seed(number) {
    Random random = random_of(seed, 0);
    for (const Parameter& parameter : parameters()) {
      const bool simplest = !parameter.is_size && with_chance(random, 0.5);
      chosen.push_back(simplest ? 0 : std::uniform_int_distribution<size_t>(0, parameter.values.size() - 1)(random));
    }
  }

  double value(const std::string& name) const {
    for (size_t i = 0; i < chosen.size(); ++i)
      if (name == parameters()[i].name) return parameters()[i].values[chosen[i]];
    throw std::logic_error("no parameter " + name);
  }
  int64_t size(const std::string& name) const { return static_cast<int64_t>(value(name)); }
  /// A rank above both sides is refused.
  int64_t rank() const { return std::min(size("rank"), std::max(size("in"), size("out"))); }
  bool is(const std::string& name) const { return value(name) != 0; }

  torch::ScalarType dtype() const { return is("float") ? torch::kFloat : torch::kDouble; }

  LoraRiteOptions options() const {
    LoraRiteOptions result;
    for (size_t i = 0; i < chosen.size(); ++i)
      if (parameters()[i].set != nullptr) parameters()[i].set(result, parameters()[i].values[chosen[i]]);
    const bool host = is("host") && is("float");
    return result.engine(host ? Engine::Host : Engine::Device);
  }

  /// Where a factor lacks rank QR's root is not unique, and after an edit the moments depend on it.
  bool uses_qr() const {
    const bool deficient = rank() > std::min(size("out"), size("in")) || value("start") != kRandom;
    return is("qr") && !(is("edits") && deficient);
  }

  /// The seed, and everything that is not the simplest.
  std::string description() const {
    std::ostringstream text;
    text << "seed " << seed << ":";
    for (size_t i = 0; i < chosen.size(); ++i)
      if (chosen[i] > 0) text << " " << parameters()[i].name << "=" << parameters()[i].values[chosen[i]];
    return text.str();
  }
};

/// How many factors were compared after a step, and how many were only checked to be finite.
struct Count {
  int64_t compared = 0, ill_conditioned = 0;
};

/// The numbers of `matrix` as the dtype holds them.
Matrix rounded(Matrix matrix, bool to_float) {
  if (to_float) matrix = matrix.cast<float>().cast<double>();
  return matrix;
}

/// A history of steps, gone through by the library, the oracle, and the perturbed oracle.
template <class Basis>
class Run {
 public:
  explicit Run(const Case& c)
      : case_(c), is_float_(c.is("float")), options_(c.options()), oracle_(kRoot<Basis>), perturbed_(kRoot<Basis>) {
    for (int64_t pair = 0; pair < c.size("pairs"); ++pair) {
      Random random = random_of(c.seed, 1, 0, static_cast<uint64_t>(pair));
      // The second pair has another shape, or the same for a batch of two.
      const int64_t more = pair > 0 && with_chance(random, 0.5) ? 1 : 0;
      Matrix a = normal(random, c.size("in") + more, c.rank());
      Matrix b = normal(random, c.size("out"), c.rank());
      if (c.value("start") == kZeroB) b.setZero();
      a = rounded(a, is_float_);
      b = rounded(b, is_float_);
      if (c.value("start") == kDeficientA && a.cols() > 1) a.col(a.cols() - 1) = 2 * a.col(0);  // exact in every dtype
      const auto empty = [&](int64_t rows, int64_t columns) { return torch::empty({rows, columns}, c.dtype()); };
      pairs_.push_back({"pair", from_tall(a, empty(a.cols(), a.rows()), 0).contiguous().requires_grad_(),
                        from_tall(b, empty(b.rows(), b.cols()), 1).contiguous().requires_grad_()});
      for (Oracle* oracle : {&oracle_, &perturbed_}) oracle->pairs.push_back({0, OracleFactor(a), OracleFactor(b)});
    }
    for (Oracle* oracle : {&oracle_, &perturbed_}) oracle->groups.push_back(oracle_options(options_));
    size_.resize(2 * pairs_.size());
    path_.resize(2 * pairs_.size());
    optimizer_ = std::make_unique<LoraRite<Basis>>(pairs_, options_);
  }

  /// What is wrong, or nothing.
  std::optional<std::string> failure(Count& count) {
    perturb();
    for (int64_t step = 1; step <= case_.size("steps"); ++step) {
      if (step > 1 && case_.is("edits")) edit(step);
      std::vector<Matrix> before;
      for (size_t place = 0; place < size_.size(); ++place) before.push_back(factor(oracle_, place).x);
      step_all(step);
      measure_conditions();
      for (size_t place = 0; place < size_.size(); ++place) {
        const OracleFactor& expected = factor(oracle_, place);
        path_[place] += (expected.x - before[place]).norm();
        size_[place] = std::max({size_[place], before[place].norm(), expected.x.norm()});
        rank_is_known_ = rank_is_known_ && has_known_rank(place);
      }
      for (size_t place = 0; place < size_.size(); ++place) {
        const std::string wrong = compare(place, step, count);
        if (!wrong.empty()) return wrong + " after step " + std::to_string(step);
      }
      perturb();
    }
    if (optimizer_->skipped_steps() != 0) return "steps were skipped";
    return std::nullopt;
  }

 private:
  static OracleFactor& factor(Oracle& oracle, size_t place) {
    return place % 2 == 0 ? oracle.pairs[place / 2].a : oracle.pairs[place / 2].b;
  }
  torch::Tensor& tensor(size_t place) { return place % 2 == 0 ? pairs_[place / 2].a : pairs_[place / 2].b; }
  Matrix value(size_t place) { return place % 2 == 0 ? tall_a(tensor(place)) : tall_b(tensor(place)); }
  double round_off() const { return is_float_ ? 0x1p-24 : 0x1p-53; }
  double perturbation() const { return is_float_ ? 0x1p-20 : 0x1p-44; }  ///< δ

  Matrix perturbed(const Matrix& matrix) {
    return matrix.array() * (1 + perturbation() * normal(perturbations_, matrix.rows(), matrix.cols()).array());
  }
  void perturb() {
    for (size_t place = 0; place < size_.size(); ++place)
      factor(perturbed_, place).x = perturbed(factor(perturbed_, place).x);
  }

  /// Now and then someone else writes to a factor.
  void edit(int64_t step) {
    for (size_t place = 0; place < size_.size(); ++place) {
      Random random = random_of(case_.seed, 2, static_cast<uint64_t>(step), place);
      if (!with_chance(random, 0.3)) continue;
      const Matrix old = value(place);
      const bool anew = with_chance(random, 0.5);
      const Matrix fresh = rounded(anew ? normal(random, old.rows(), old.cols()) : Matrix(-2 * old), is_float_);
      torch::NoGradGuard no_grad;
      tensor(place).copy_(from_tall(fresh, tensor(place), place % 2 == 0 ? 0 : 1));
      if (fresh == old) continue;  // zeros
      factor(oracle_, place).edit(fresh);
      factor(perturbed_, place).edit(perturbed(fresh));
    }
  }

  TallGradient gradient(int64_t step, size_t place, int64_t rows, int64_t columns) const {
    Random random = random_of(case_.seed, 3, static_cast<uint64_t>(step), place);
    // A pair without any gradient is carried along or left out, as the others of its batch want it. That makes a
    // difference only if an edit follows before the next step: then B always has one.
    const bool may_miss = case_.is("missing_gradients") && !(case_.is("edits") && place % 2 == 1);
    if (may_miss && with_chance(random, 0.3)) return std::nullopt;
    Matrix result = case_.value("gradient_size") * normal(random, rows, columns);
    if (case_.is("zero_gradients") && with_chance(random, 0.3)) result.setZero();
    if (case_.is("deficient_gradients") && with_chance(random, 0.6)) {
      // Not orthogonal to a deficient A's rows: such a product is nothing but round-off.
      for (Eigen::Index j = 1; j < columns; ++j) result.col(j) = (j % 2 == 0 ? 2 : 0.5) * result.col(0);
    }
    return rounded(result, is_float_);
  }

  void step_all(int64_t step) {
    std::vector<std::pair<TallGradient, TallGradient>> gradients, perturbed_gradients;
    for (size_t place = 0; place < size_.size(); ++place) {
      const Matrix& x = factor(oracle_, place).x;
      const TallGradient exact = gradient(step, place, x.rows(), x.cols());
      const TallGradient near = exact ? TallGradient(perturbed(*exact)) : std::nullopt;
      tensor(place).mutable_grad() =
          exact ? from_tall(*exact, tensor(place), place % 2 == 0 ? 0 : 1).contiguous() : torch::Tensor();
      if (place % 2 == 0) {
        gradients.emplace_back(exact, std::nullopt);
        perturbed_gradients.emplace_back(near, std::nullopt);
      } else {
        gradients.back().second = exact;
        perturbed_gradients.back().second = near;
      }
    }
    optimizer_->step();
    oracle_.step(gradients);
    perturbed_.step(perturbed_gradients);
  }

  void measure_conditions() {
    for (const OraclePair& pair : oracle_.pairs) {
      for (const OracleFactor* x : {&pair.a, &pair.b}) {
        amplification_ = std::max(amplification_, x->amplification);
        root_condition_ = std::max(root_condition_, condition(x->basis.r));
        gram_condition_ = std::max(gram_condition_, x->gram_condition);
      }
    }
  }

  /// Where a factor that has moved lacks rank in the oracle, or came back to zero, round-off fills the gap in the
  /// library, and each takes the inverse of what it sees.
  bool has_known_rank(size_t place) {
    const double noise = 64 * round_off() * amplification_;
    const Vector values = Eigen::JacobiSVD<Matrix>(factor(oracle_, place).x).singularValues();
    return path_[place] == 0 || values[values.size() - 1] > noise * size_[place];
  }

  /// What is wrong with a factor, or "".
  std::string compare(size_t place, int64_t step, Count& count) {
    const Matrix actual = value(place);
    const std::string name = std::string(place % 2 == 0 ? "A" : "B") + " of pair " + std::to_string(place / 2);
    if (!actual.allFinite()) return name + " is not finite";
    const Matrix& expected = factor(oracle_, place).x;
    const double distance = (factor(perturbed_, place).x - expected).norm();
    const double judged = (is_float_ ? 1e-3 : 1e-6) * std::max(path_[place], 0.1 * size_[place]);
    const double bound = 0.01 * judged +
                         256 * static_cast<double>(step) * round_off() *
                             (size_[place] + amplification_ * root_condition_ * path_[place]) +
                         0x1p-51 * gram_condition_ * path_[place] + 1024 * round_off() / perturbation() * distance;
    if (!rank_is_known_ || !(bound <= judged)) {
      ++count.ill_conditioned;
      return "";
    }
    ++count.compared;
    const double error = (actual - expected).norm();
    if (error <= bound) return "";
    std::ostringstream text;
    text << name << " is off by " << error << ", the bound is " << bound << ", the path " << path_[place];
    return text.str();
  }

  const Case& case_;
  bool is_float_;
  LoraRiteOptions options_;
  std::vector<FactorPair> pairs_;
  std::unique_ptr<LoraRite<Basis>> optimizer_;
  Oracle oracle_, perturbed_;
  Random perturbations_;
  bool rank_is_known_ = true;
  std::vector<double> size_, path_;  ///< of a factor: largest norm so far, way of its steps
  /// The largest so far of all pairs, which the clip joins.
  double amplification_ = 1, root_condition_ = 1, gram_condition_ = 1;
};

std::optional<std::string> failure(const Case& c, Count& count) {
  return c.uses_qr() ? Run<QrBasis>(c).failure(count) : Run<PolarBasis>(c).failure(count);
}

/// The smallest case near `failing` that still fails: every parameter as simple as it gets, one at a time, until none
/// gets simpler.
Case shrunk(Case failing) {
  Count ignored;
  for (bool smaller = true; smaller;) {
    smaller = false;
    for (size_t i = 0; i < failing.chosen.size(); ++i) {
      for (size_t index = 0; index < failing.chosen[i]; ++index) {
        Case simpler = failing;
        simpler.chosen[i] = index;
        if (!failure(simpler, ignored)) continue;
        failing = simpler;
        smaller = true;
      }
    }
  }
  return failing;
}

uint64_t number_from(const char* variable, uint64_t otherwise) {
  const char* text = std::getenv(variable);
  return text != nullptr ? std::strtoull(text, nullptr, 10) : otherwise;
}

TEST(Property, EveryConfigurationAgreesWithTheOracle) {
  const uint64_t first = number_from("LORA_RITE_PROPERTY_SEED", 1);
  const uint64_t cases = number_from("LORA_RITE_PROPERTY_CASES", 10000);
  const int threads = at::get_num_threads();
  at::set_num_threads(1);  // the cases are tiny
  Count count;
  for (uint64_t seed = first; seed < first + cases; ++seed) {
    const Case c(seed);
    if (!failure(c, count)) continue;
    const Case smallest = shrunk(c);
    Count ignored;
    ADD_FAILURE() << failure(smallest, ignored).value() << "\n  smallest  " << smallest.description()
                  << "\n  found as  " << c.description();
    break;
  }
  at::set_num_threads(threads);
  std::cout << cases << " cases: " << count.compared << " factors compared, " << count.ill_conditioned
            << " only checked to be finite\n";
  // Otherwise this would be a test that nothing fails.
  EXPECT_GT(count.compared, static_cast<int64_t>(2 * cases));
}

}  // namespace
}  // namespace lora_rite::test
