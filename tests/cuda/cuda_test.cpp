// What only a GPU can show: the optimizer there against the same on a CPU, and a step in a CUDA graph. Without a GPU
// all of it is skipped; the graph needs a LibTorch for CUDA and the header cuda_runtime_api.h when it is compiled.

#include <gtest/gtest.h>
#include <torch/cuda.h>

#include <functional>
#include <lora_rite/baselines/registry.hpp>
#include <lora_rite/checkpoint.hpp>
#include <lora_rite/grad_scaler.hpp>
#include <sstream>

#include "cuda/support.hpp"
#include "support/pairs.hpp"
#include "support/temporary_folder.hpp"

#ifdef LORA_RITE_HAS_CUDA_GRAPHS
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#endif

namespace lora_rite::test {
namespace {

torch::Tensor product(const FactorPair& pair) {
  return torch::matmul(pair.b.detach().cpu().to(torch::kDouble), pair.a.detach().cpu().to(torch::kDouble));
}

/// Largest ‖ΔW − ΔW'‖ over the way that ΔW' has come from `start`.
double distance(const Pairs& left, const Pairs& right, const Pairs& start) {
  double worst = 0;
  for (size_t i = 0; i < right.size(); ++i) {
    const double moved = (product(right[i]) - product(start[i])).norm().item<double>();
    const double apart = (product(left[i]) - product(right[i])).norm().item<double>();
    worst = std::max(worst, std::isfinite(apart) && moved > 0 ? apart / moved : INFINITY);
  }
  return worst;
}

class Cuda : public testing::Test {
 protected:
  void SetUp() override {
    if (!torch::cuda::is_available()) GTEST_SKIP() << "LibTorch finds no GPU";
  }
};

/// Three pairs, two of one shape.
Pairs three_pairs(int64_t rank, torch::Dtype dtype) {
  torch::manual_seed(81);
  return {random_pair("q", rank, 96, 80, dtype), random_pair("k", rank, 96, 80, dtype),
          random_pair("v", rank, 70, 120, dtype)};
}

LoraRiteOptions all_options() {
  return LoraRiteOptions(1e-2)
      .balance(true)
      .max_update_rms(1)
      .weight_decay(0.1)
      .preconditioner_exponent(0.25)
      .max_relative_change(0.3)
      .row_equilibration(true);
}

template <class Basis>
void expect_steps_as_on_a_cpu(const LoraRiteOptions& options, Engine engine, const std::string& what) {
  for (const auto dtype : {torch::kDouble, torch::kFloat}) {
    for (const int64_t rank : {1, 4, 16, 33, 64}) {
      const Pairs start = three_pairs(rank, dtype), cpu = clone_pairs(start), gpu = on(torch::kCUDA, start);
      LoraRite<Basis> expected(cpu, LoraRiteOptions(options).engine(engine)), found(gpu, options);
      train(expected, cpu, 0, 10);
      train(found, gpu, 0, 10);
      // Rounding times the condition of what noise gradients make of V in ten steps.
      EXPECT_LT(distance(gpu, cpu, start), dtype == torch::kDouble ? 1e-9 : 1e-4)
          << what << ", rank " << rank << ", " << dtype;
    }
  }
}

TEST_F(Cuda, StepsAsOnACpu) {
  for (const Engine engine : {Engine::Automatic, Engine::Device}) {
    expect_steps_as_on_a_cpu<PolarBasis>(LoraRiteOptions(1e-2), engine, "defaults");
    expect_steps_as_on_a_cpu<PolarBasis>(all_options(), engine, "all options");
    expect_steps_as_on_a_cpu<QrBasis>(LoraRiteOptions(1e-2), engine, "QrBasis");
  }
  expect_steps_as_on_a_cpu<PolarBasis>(LoraRiteOptions(1e-2).escape(false).capturable(true), Engine::Device,
                                       "capturable");
}

TEST_F(Cuda, IsInvariant) {
  for (const bool capturable : {false, true}) {
    for (const auto dtype : {torch::kDouble, torch::kFloat}) {
      torch::manual_seed(82);
      const Pairs start = on(torch::kCPU, {random_pair("pair", 16, 128, 96)});
      const auto orthonormal = [] { return std::get<0>(torch::linalg_qr(torch::randn({16, 16}, torch::kDouble))); };
      const torch::Tensor scales = torch::logspace(-1, 1, 16, 10.0, torch::kDouble);
      const torch::Tensor t = torch::matmul(orthonormal() * scales, orthonormal());  // κ = 100
      const auto typed = [&](const torch::Tensor& a, const torch::Tensor& b) {
        return on(torch::kCUDA, {{"pair", a.to(dtype), b.to(dtype)}});
      };
      const Pairs first = typed(start[0].a, start[0].b);
      const Pairs second = typed(torch::matmul(t, start[0].a), torch::matmul(start[0].b, torch::linalg_inv(t)));
      const auto options = LoraRiteOptions(1e-2).capturable(capturable);
      LoraRite<> one(first, options), two(second, options);
      for (int step = 0; step < 20; ++step) {
        const torch::Tensor gradient = torch::randn({96, 128}, torch::kDouble).to(dtype).to(torch::kCUDA);  // of ΔW
        for (const auto* pairs : {&first, &second}) {
          const auto& [name, a, b] = (*pairs)[0];
          torch::Tensor(a).mutable_grad() = torch::matmul(b.detach().mT(), gradient);
          torch::Tensor(b).mutable_grad() = torch::matmul(gradient, a.detach().mT());
        }
        one.step();
        two.step();
      }
      EXPECT_LT(distance(second, first, start), dtype == torch::kDouble ? 1e-9 : 1e-3) << dtype << capturable;
    }
  }
}

TEST_F(Cuda, HalfTypesStepAsOnACpu) {
  for (const auto dtype : {torch::kBFloat16, torch::kHalf}) {
    for (const bool master : {false, true}) {
      const Pairs start = three_pairs(8, dtype), cpu = clone_pairs(start), gpu = on(torch::kCUDA, start);
      const auto options = LoraRiteOptions(1e-2).master_weights(master);
      LoraRite<> expected(cpu, options), found(gpu, options);
      train(expected, cpu, 0, 20);
      train(found, gpu, 0, 20);
      // Where a factor falls on the other side of a rounding border it differs by a unit of its type.
      EXPECT_LT(distance(gpu, cpu, start), dtype == torch::kHalf ? 5e-3 : 4e-2) << dtype << master;
    }
  }
}

/// Together on two devices as together on one: the clip takes the norm over all of them.
TEST_F(Cuda, OneOptimizerStepsPairsOfBothDevices) {
  const Pairs start = three_pairs(4, torch::kDouble), cpu = clone_pairs(start);
  Pairs mixed = clone_pairs(start);
  mixed[1] = on(torch::kCUDA, start)[1];
  const auto options = LoraRiteOptions(1e-2).clip_unmagnified_norm(0.5);
  LoraRite<> expected(cpu, options), found(mixed, options);
  train(expected, cpu, 0, 10);
  train(found, mixed, 0, 10);
  EXPECT_LT(distance(mixed, cpu, start), 1e-9);

  // A bad gradient on one device stops the step on both.
  for (const size_t bad : {0, 1}) {
    const Pairs before = clone_pairs(mixed);
    give_gradients(mixed, 20);
    torch::Tensor(mixed[bad].a).mutable_grad().view(-1)[3] = std::nan("");
    found.step();
    EXPECT_TRUE(equal_factors(mixed, before)) << bad;
  }
  EXPECT_EQ(found.diagnostics()[0].skipped_steps, 2);
  give_gradients(mixed, 21);
  give_gradients(cpu, 21);
  found.step();
  expected.step();
  EXPECT_LT(distance(mixed, cpu, start), 1e-9);
}

TEST_F(Cuda, DiagnosticsAreThoseOfACpu) {
  const Pairs start = three_pairs(6, torch::kDouble), cpu = clone_pairs(start), gpu = on(torch::kCUDA, start);
  LoraRite<> expected(cpu, LoraRiteOptions(1e-2)), found(gpu, LoraRiteOptions(1e-2));
  train(expected, cpu, 0, 5);
  train(found, gpu, 0, 5);
  const auto wanted = expected.diagnostics(), read = found.diagnostics();
  for (size_t i = 0; i < wanted.size(); ++i) {
    const auto& [w, f] = std::pair{wanted[i].a, read[i].a};
    EXPECT_NEAR(f.condition_number / w.condition_number, 1, 1e-8);
    EXPECT_NEAR(f.unmagnified_gradient_norm / w.unmagnified_gradient_norm, 1, 1e-8);
    EXPECT_NEAR(f.escaped_mass, w.escaped_mass, 1e-8);
    EXPECT_NEAR(f.effective_rank / w.effective_rank, 1, 1e-8);
    EXPECT_NEAR(f.update_rms / w.update_rms, 1, 1e-8);
    EXPECT_NEAR(read[i].clip_factor / wanted[i].clip_factor, 1, 1e-8);
  }
}

/// A parameter on the GPU that AdamW steps, beside the pairs.
TEST_F(Cuda, ParametersOfAdamWGroupsStepAsOnACpu) {
  const Pairs start = three_pairs(4, torch::kDouble), cpu = clone_pairs(start), gpu = on(torch::kCUDA, start);
  const torch::Tensor head = torch::randn({5, 7}, torch::kDouble).requires_grad_();
  const torch::Tensor moved = head.detach().clone().cuda().requires_grad_();
  const auto run = [](const Pairs& pairs, torch::Tensor parameter) {
    LoraRite<> optimizer(pairs, LoraRiteOptions(1e-2));
    optimizer.add_parameters({parameter}, torch::optim::AdamWOptions(1e-2));
    for (int64_t number = 0; number < 5; ++number) {
      give_gradients(pairs, number);
      parameter.mutable_grad() = torch::randn(parameter.sizes(), torch::kDouble).to(parameter.device());
      optimizer.step();
    }
  };
  run(cpu, head);
  run(gpu, moved);
  EXPECT_LT((moved.cpu() - head).abs().max().item<double>(), 1e-8);  // the GPU's fused AdamW corrects its bias in float
  EXPECT_LT(distance(gpu, cpu, start), 1e-9);
}

TEST_F(Cuda, ACheckpointGoesOnBitForBitAndOnACpuToo) {
  const TemporaryFolder folder;
  const Pairs start = three_pairs(4, torch::kDouble);
  struct Run {
    Pairs pairs;
    LoraRite<> optimizer;
    TrainingState state;
    explicit Run(Pairs begin) : pairs(std::move(begin)), optimizer(pairs, all_options()) {
      state.tensors = trained_tensors(pairs);
      state.optimizers = {&optimizer};
    }
  };
  Run run(on(torch::kCUDA, start)), resumed(on(torch::kCUDA, start)), elsewhere(clone_pairs(start));
  train(run.optimizer, run.pairs, 0, 6);
  torch::cuda::manual_seed(5);
  torch::rand({3}, torch::kCUDA);  // so that the generator stands in the middle of its sequence
  save_checkpoint(folder / "run.ckpt", run.state);
  const torch::Tensor drawn = torch::rand({8}, torch::kCUDA);

  torch::cuda::manual_seed(99);
  load_checkpoint(folder / "run.ckpt", resumed.state);
  EXPECT_TRUE(torch::equal(torch::rand({8}, torch::kCUDA), drawn));
  load_checkpoint(folder / "run.ckpt", elsewhere.state, torch::kCPU);
  for (Run* each : {&run, &resumed, &elsewhere}) train(each->optimizer, each->pairs, 6, 12);
  EXPECT_TRUE(equal_factors(resumed.pairs, run.pairs));
  EXPECT_LT(distance(elsewhere.pairs, run.pairs, start), 1e-9);
}

TEST_F(Cuda, GradScalerSkipsAndBacksOff) {
  const Pairs gpu = on(torch::kCUDA, {three_pairs(4, torch::kFloat)[0]});
  LoraRite<> optimizer(gpu, LoraRiteOptions(1e-2));
  GradScaler scaler(1024);
  const auto step = [&](double factor) {
    optimizer.zero_grad();
    scaler.scale(factor * (gpu[0].a.sum() + gpu[0].b.square().sum())).backward();
    scaler.unscale_(optimizer);
    scaler.step(optimizer);
    scaler.update();
  };
  const Pairs before = clone_pairs(gpu);
  step(1e38);
  EXPECT_TRUE(equal_factors(gpu, before));
  EXPECT_EQ(scaler.get_scale(), 512);
  step(1);
  EXPECT_FALSE(equal_factors(gpu, before));
  EXPECT_EQ(scaler.get_scale(), 512);
}

TEST_F(Cuda, BaselinesStepAsOnACpu) {
  for (const std::string& name : optimizer_names()) {
    const Pairs start = three_pairs(4, torch::kDouble), cpu = clone_pairs(start), gpu = on(torch::kCUDA, start);
    const auto expected = make_optimizer(name, cpu, 1e-2), found = make_optimizer(name, gpu, 1e-2);
    train(*expected, cpu, 0, 6);
    train(*found, gpu, 0, 6);
    // Shampoo takes fourth roots of matrices that six gradients leave singular, and SOAP an eigenbasis of such, of
    // which each eigensolver chooses its own.
    const double tolerance = name == "shampoo" ? 1e-2 : name == "soap" ? 2 : 1e-8;
    EXPECT_LT(distance(gpu, cpu, start), tolerance) << name;
  }
}

#ifdef LORA_RITE_HAS_CUDA_GRAPHS

/// On a stream of its own, on which a graph can be recorded.
class CudaGraph : public Cuda {
 protected:
  void SetUp() override {
    Cuda::SetUp();
    if (torch::cuda::is_available()) guard_.emplace(c10::cuda::getStreamFromPool());
  }

 private:
  std::optional<c10::cuda::CUDAStreamGuard> guard_;
};

TEST_F(CudaGraph, NothingInTheStepWaitsForTheDevice) {
  const Pairs gpu = on(torch::kCUDA, three_pairs(16, torch::kFloat));
  LoraRite<> optimizer(gpu, LoraRiteOptions(all_options()).capturable(true));
  train(optimizer, gpu, 0, 3);
  give_gradients(gpu, 3);
  auto& warnings = c10::cuda::warning_state();
  warnings.set_sync_debug_mode(c10::cuda::SyncDebugMode::L_ERROR);
  EXPECT_ANY_THROW(gpu[0].a.sum().item<float>()) << "waiting is not noticed";
  EXPECT_NO_THROW(optimizer.step());
  warnings.set_sync_debug_mode(c10::cuda::SyncDebugMode::L_DISABLED);
}

TEST_F(CudaGraph, AReplayIsAStep) {
  for (const auto dtype : {torch::kDouble, torch::kFloat, torch::kBFloat16}) {
    for (const int64_t rank : {4, 16, 64}) {
      const Pairs start = three_pairs(rank, dtype), eager = on(torch::kCUDA, start), recorded = on(torch::kCUDA, start);
      const auto options = LoraRiteOptions(all_options()).capturable(true).master_weights(dtype == torch::kBFloat16);
      LoraRite<> expected(eager, options), found(recorded, options);
      WarmupCosine schedule(expected, 3, 30), schedule_too(found, 3, 30);
      const auto step = [](LoraRite<>& optimizer, const Pairs& pairs, int64_t number, WarmupCosine& scheduler) {
        give_gradients(pairs, number);
        optimizer.step();
        scheduler.step();
      };
      for (int64_t number = 0; number < 3; ++number) {
        step(expected, eager, number, schedule);
        step(found, recorded, number, schedule_too);
      }
      torch::cuda::synchronize();
      at::cuda::CUDAGraph graph;
      graph.capture_begin();
      found.step();
      graph.capture_end();
      for (int64_t number = 3; number < 12; ++number) {
        step(expected, eager, number, schedule);
        give_gradients(recorded, number);
        found.upload_rates();
        graph.replay();
        schedule_too.step();
      }
      torch::cuda::synchronize();
      EXPECT_LT(distance(recorded, eager, start), dtype == torch::kDouble ? 1e-12 : 1e-5) << dtype << ", rank " << rank;
    }
  }
}

#endif

}  // namespace
}  // namespace lora_rite::test
