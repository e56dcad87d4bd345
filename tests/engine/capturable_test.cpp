// A step that a CUDA graph can record: how close it comes to the usual one, and that nothing in it waits for the
// device.

#include <gtest/gtest.h>
#include <lora_rite/engine/device/product_roots.hpp>

#include "support/batches.hpp"
#include "support/operators.hpp"
#include "support/pairs.hpp"

namespace lora_rite::test {
namespace {

double product_distance(const std::vector<FactorPair>& left, const std::vector<FactorPair>& right,
                        const std::vector<FactorPair>& start) {
  double worst = 0;
  for (size_t i = 0; i < left.size(); ++i) {
    const auto product = [&](const std::vector<FactorPair>& pairs) {
      return torch::matmul(pairs[i].b.to(torch::kDouble), pairs[i].a.to(torch::kDouble));
    };
    const torch::Tensor moved = product(right) - product(start);
    worst = std::max(worst, ((product(left) - product(right)).norm() / moved.norm()).item<double>());
  }
  return worst;
}

/// Symmetric with eigenvalues from 1 to 1/κ [8, r, r].
torch::Tensor graded(int64_t rank, double condition) {
  const torch::Tensor q = std::get<0>(torch::linalg_qr(torch::randn({8, rank, rank}, torch::kDouble)));
  const torch::Tensor values = torch::logspace(0, -std::log10(condition), rank, 10.0, torch::kDouble);
  return symmetrized(torch::matmul(q * values, q.mT()));
}

TEST(Capturable, PreconditionerDiffersByAShareOfTheConditionNumber) {
  torch::manual_seed(71);
  const torch::Tensor nothing = torch::zeros({8, 1, 1}, torch::kDouble);
  for (const int64_t rank : {2, 5, 16, 64}) {
    for (const double condition : {1.0, 1e4, 1e8, 1e11}) {
      const torch::Tensor v = graded(rank, condition);
      for (const double scale : {1e-30, 1.0, 1e30}) {
        for (const double exponent : {0.5, 0.25}) {
          const auto numbers = hyperparameters(LoraRiteOptions().eps(0).preconditioner_exponent(exponent));
          const auto exact = rule::Eigenvalues::preconditioner<at::Tensor>(v * scale, nothing, nullptr, numbers);
          const auto found = device::ProductRoots::preconditioner(v * scale, nothing, nullptr, numbers);
          const torch::Tensor error = torch::matmul(found, torch::linalg_inv(exact)) - identity_like(v);
          // Half the floor r ε tr(V) over the smallest eigenvalue, tr(V) ≤ r; and what the solvers leave.
          const double r = static_cast<double>(rank), epsilon = 2.3e-16;
          EXPECT_LT(error.abs().max().item<double>(), r * r * epsilon * condition + 1e-13 * r)
              << "rank " << rank << ", κ " << condition << ", scale " << scale << ", exponent " << exponent;
        }
      }
    }
  }
}

TEST(Capturable, RootsMakeOrthonormalBases) {
  torch::manual_seed(72);
  for (const int64_t rank : {1, 2, 5, 16, 64}) {
    for (const double condition : {1.0, 1e3, 1e6}) {
      const torch::Tensor s = 1e-5 * graded(rank, condition);
      const double cutoff = rule::relative_cutoff(1.2e-7, rank);
      const torch::Tensor root = device::PivotedCholesky::inverse_root(s, cutoff);
      const torch::Tensor gram = torch::matmul(root.mT(), torch::matmul(s, root));
      // Round-off of s itself, seen in the root.
      EXPECT_LT((gram - identity_like(s)).abs().max().item<double>(), 1e-14 * static_cast<double>(rank) * condition)
          << "rank " << rank << ", κ " << condition;
    }
  }
}

/// R⁺ of a Gram matrix of lower rank is the pseudo-inverse of a root: what S has not, it drops, all else it keeps.
TEST(Capturable, RootsDropTheDirectionsThatAreMissing) {
  torch::manual_seed(76);
  for (const int64_t rank : {2, 5, 16, 64}) {
    for (const int64_t rows : {int64_t{1}, rank / 2, rank - 1}) {
      const torch::Tensor y = torch::randn({8, rows, rank}, torch::kDouble);
      const torch::Tensor s = torch::matmul(y.mT(), y);
      const double cutoff = rule::relative_cutoff(1.2e-7, rank);
      const torch::Tensor root = device::PivotedCholesky::inverse_root(s, cutoff);
      const torch::Tensor projector = torch::matmul(root.mT(), torch::matmul(s, root));
      const torch::Tensor inverse = torch::matmul(root, root.mT());
      EXPECT_LT((torch::matmul(projector, projector) - projector).abs().max().item<double>(), 1e-9);
      EXPECT_NEAR(projector.diagonal(0, -2, -1).sum(-1).max().item<double>(), static_cast<double>(rows), 1e-9);
      const torch::Tensor expected = torch::linalg_pinv(s, 1e-10);
      EXPECT_LT(((inverse - expected).norm() / expected.norm()).item<double>(), 1e-7) << rows << " of " << rank;
    }
  }
}

/// A head of few classes: the rank exceeds a side, and one factor always has null directions.
TEST(Capturable, FollowsTheUsualStepWhereTheRankExceedsASide) {
  for (const auto dtype : {torch::kDouble, torch::kFloat}) {
    for (const int64_t rank : {4, 16, 64}) {
      for (const auto& [in, out] :
           std::vector<std::pair<int64_t, int64_t>>{{300, 1}, {300, 2}, {300, 15}, {300, 40}, {1, 300}, {15, 300}}) {
        for (const bool from_zero : {false, true}) {
          torch::manual_seed(77);
          const std::vector<FactorPair> usual = {random_pair("head", rank, in, out, dtype)};
          if (from_zero) {
            torch::NoGradGuard no_grad;
            torch::Tensor(usual[0].b).zero_();
          }
          const auto start = clone_pairs(usual), recorded = clone_pairs(usual);
          const auto options = LoraRiteOptions(1e-2).escape(false).engine(Engine::Device);
          LoraRite<> exact(usual, options), capturable(recorded, LoraRiteOptions(options).capturable(true));
          for (uint64_t step = 0; step < 10; ++step) {  // gradients of one loss, so that A's is zero where B is
            torch::manual_seed(1000 + step);
            const torch::Tensor direction = torch::randn({out, in}, torch::kDouble).to(dtype);
            for (const auto& [pairs, optimizer] : {std::pair(&usual, &exact), std::pair(&recorded, &capturable)}) {
              optimizer->zero_grad();
              torch::matmul((*pairs)[0].b, (*pairs)[0].a).mul(direction).sum().backward();
              optimizer->step();
            }
          }
          // V is singular here, and products know its root to (r ε κ)^{1/2} with κ = 1 / (r ε) at the most.
          EXPECT_LT(product_distance(recorded, usual, start), 2e-2)
              << dtype << ", rank " << rank << ", in " << in << ", out " << out << (from_zero ? " from B = 0" : "");
        }
      }
    }
  }
}

TEST(Capturable, NothingToScaleGivesZeroAndNoNaN) {
  const torch::Tensor zero = torch::zeros({2, 4, 4}, torch::kDouble), none = torch::zeros({2, 1, 1}, torch::kDouble);
  const rule::RoundOff<at::Tensor> round_off = {zero, zero, none, none, 0};
  EXPECT_TRUE(torch::equal(device::PivotedCholesky::inverse_root(zero, 1e-13), zero));
  for (const double exponent : {0.5, 0.25}) {
    const auto numbers = hyperparameters(LoraRiteOptions().eps(0).preconditioner_exponent(exponent));
    EXPECT_TRUE(torch::equal(device::ProductRoots::preconditioner(zero, none, nullptr, numbers), zero)) << exponent;
    EXPECT_TRUE(torch::equal(device::ProductRoots::preconditioner(zero, none, &round_off, numbers), zero)) << exponent;
  }
  for (const double exponent : {0.5, 0.25, 0.0}) {
    const auto numbers = hyperparameters(LoraRiteOptions().eps(0).preconditioner_exponent(exponent));
    EXPECT_TRUE(torch::equal(rule::Eigenvalues::preconditioner<at::Tensor>(zero, none, nullptr, numbers), zero))
        << exponent;
    EXPECT_TRUE(torch::equal(rule::Eigenvalues::preconditioner(zero, none, &round_off, numbers), zero)) << exponent;
  }
}

/// Rank 1 of 6, from B = 0 or not, escape on or off.
TEST(Capturable, FollowsTheUsualStep) {
  for (const auto dtype : {torch::kDouble, torch::kFloat}) {
    for (const bool from_zero : {false, true}) {
      torch::manual_seed(73);
      std::vector<FactorPair> usual;
      for (int i = 0; i < 3; ++i) usual.push_back(random_pair("pair" + std::to_string(i), 6, 40, 30, dtype));
      if (from_zero) {
        torch::NoGradGuard no_grad;
        for (auto& pair : usual) pair.b.zero_();
      }
      const auto start = clone_pairs(usual), recorded = clone_pairs(usual);
      const auto options = LoraRiteOptions(1e-2).escape(false).engine(Engine::Device);
      LoraRite<> exact(usual, options), capturable(recorded, LoraRiteOptions(options).capturable(true));
      for (int64_t step = 0; step < 20; ++step) {
        run_steps(exact, usual, step, step + 1);
        run_steps(capturable, recorded, step, step + 1);
      }
      EXPECT_LT(product_distance(recorded, usual, start), dtype == torch::kDouble ? 1e-9 : 1e-5)
          << dtype << (from_zero ? " from B = 0" : "");
    }
  }
}

/// The bound on the escaped mass shortens steps, and not by much. Gradients here are noise, so directions escape.
TEST(Capturable, EscapedMassIsBoundedFromAbove) {
  torch::manual_seed(74);
  std::vector<FactorPair> usual = {random_pair("pair", 6, 40, 30)};
  const auto start = clone_pairs(usual), recorded = clone_pairs(usual);
  const auto options = LoraRiteOptions(1e-2).engine(Engine::Device);
  LoraRite<> exact(usual, options), capturable(recorded, LoraRiteOptions(options).capturable(true));
  run_steps(exact, usual, 0, 20);
  run_steps(capturable, recorded, 0, 20);
  const double mass = exact.diagnostics()[0].a.escaped_mass, bound = capturable.diagnostics()[0].a.escaped_mass;
  EXPECT_GE(bound, mass);
  EXPECT_GT(mass, 0);
  EXPECT_LT(product_distance(recorded, usual, start), 1e-3);
}

TEST(Capturable, IsInvariant) {
  torch::manual_seed(75);
  std::vector<FactorPair> first = {random_pair("pair", 5, 40, 30)};
  const auto start = clone_pairs(first);
  std::vector<FactorPair> second = clone_pairs(first);
  const torch::Tensor t = torch::randn({5, 5}, torch::kDouble);
  {
    torch::NoGradGuard no_grad;
    second[0].a.copy_(torch::matmul(t, second[0].a));
    second[0].b.copy_(torch::matmul(second[0].b, torch::linalg_inv(t)));
  }
  const auto options = LoraRiteOptions(1e-2).capturable(true).preconditioner_exponent(0.25);
  LoraRite<> one(first, options), other(second, options);
  torch::manual_seed(76);
  for (int step = 0; step < 10; ++step) {
    const torch::Tensor gradient = torch::randn({30, 40}, torch::kDouble);  // of ΔW
    for (const auto* pairs : {&first, &second}) {
      const auto& [name, a, b] = (*pairs)[0];
      torch::Tensor(a).mutable_grad() = torch::matmul(b.detach().mT(), gradient);
      torch::Tensor(b).mutable_grad() = torch::matmul(gradient, a.detach().mT());
    }
    one.step();
    other.step();
  }
  EXPECT_LT(product_distance(second, first, start), 1e-9);
}

/// Nothing in the step reads from the device, loops over matrices or waits: what runs is counted and named. On a CPU,
/// for solve_triangular has no meta kernel.
TEST(Capturable, CallsNothingThatWaits) {
  const auto calls_of_a_step = [&](int64_t count) {
    std::vector<FactorPair> pairs;
    for (int64_t i = 0; i < count; ++i) {
      FactorPair pair = random_pair("", 16, 64, 32, torch::kFloat);
      pair.a.mutable_grad() = torch::ones_like(pair.a);
      if (i > 0) pair.b.mutable_grad() = torch::ones_like(pair.b);  // one factor rests
      pairs.push_back(pair);
    }
    LoraRite<> optimizer(pairs, LoraRiteOptions(1e-2).capturable(true).max_update_rms(1).balance(true));
    optimizer.step();  // allocates, uploads
    return operators_of([&] { optimizer.step(); });
  };
  const int threads = at::get_num_threads();
  at::set_num_threads(1);  // calls are counted on one thread
  auto few = calls_of_a_step(2), more = calls_of_a_step(32);
  at::set_num_threads(threads);
  EXPECT_GT(few.count("aten::linalg_cholesky_ex"), 0U) << "the record is empty";
  for (const char* waiting : {"aten::linalg_eigh", "aten::_linalg_eigh", "aten::linalg_eigvalsh", "aten::linalg_qr",
                              "aten::linalg_svd", "aten::linalg_cholesky", "aten::linalg_inv", "aten::item",
                              "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::lift_fresh"}) {
    EXPECT_EQ(few.count(waiting), 0U) << waiting;
  }
  for (auto* record : {&few, &more}) record->erase("aten::as_strided");  // a view, no work for a device
  EXPECT_EQ(more, few);
}

/// A recorded step reads and writes what is remembered where it lay when it was recorded.
TEST(Capturable, WhatIsRememberedStaysWhereItIs) {
  torch::manual_seed(78);
  const FactorPair pair = random_pair("pair", 3, 12, 10, torch::kBFloat16);
  const auto options = LoraRiteOptions(1e-2).capturable(true).master_weights(true).row_equilibration(true);
  engine::Batches batches = place({pair}, Engine::Device);
  const engine::Batch& batch = *batches.all[0].batch;
  const auto step = [&](int64_t number) {
    set_gradients({pair}, static_cast<uint64_t>(number));
    act(batches, options);
  };
  const auto places = [&] {
    const PairState& state = batch.state();
    std::vector<const void*> result;
    PairState::for_each_field(state, [&](const torch::Tensor& tensor, int64_t) {
      EXPECT_TRUE(tensor.defined());
      result.push_back(tensor.defined() ? tensor.const_data_ptr() : nullptr);
    });
    return result;
  };
  step(0);
  const auto before = places();
  const torch::Tensor master = batch.state().master.a.clone();
  for (int64_t number = 1; number < 4; ++number) step(number);
  EXPECT_EQ(places(), before);
  EXPECT_FALSE(torch::equal(batch.state().master.a, master));
}

/// A replay of a recorded step reads the rates from the device: here the tensor is looked at through what a step does.
TEST(Capturable, RatesAreTakenOverEachStep) {
  torch::manual_seed(77);
  std::vector<FactorPair> changed = {random_pair("pair", 3, 12, 10)};
  const auto fixed = clone_pairs(changed);
  LoraRite<> scheduled(changed, LoraRiteOptions(1e-2).capturable(true));
  LoraRite<> constant(fixed, LoraRiteOptions(1e-3).capturable(true));
  scheduled.param_groups()[0].options().set_lr(1e-3);
  scheduled.upload_rates();
  run_steps(scheduled, changed, 0, 2);
  run_steps(constant, fixed, 0, 2);
  EXPECT_TRUE(equal_factors(changed, fixed));
}

TEST(Capturable, TheHostEngineIsRefused) {
  const std::vector<FactorPair> pairs = {random_pair("pair", 2, 4, 4, torch::kFloat)};
  EXPECT_TRUE(mentions(error_of([&] { LoraRite<>(pairs, LoraRiteOptions().capturable(true).engine(Engine::Host)); }),
                       "capturable"));
}

}  // namespace
}  // namespace lora_rite::test
