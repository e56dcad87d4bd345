// A step that throws leaves factors and state as they were, wherever it throws: the input is bad, the closure fails, or
// memory runs out at any of a step's allocations. The next good step is that of an optimizer that never saw the
// failure.

#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/failing_new.hpp"
#include "support/mixed_groups.hpp"
#include "support/pairs.hpp"
#include "support/soak.hpp"
#include "support/tensors.hpp"

namespace lora_rite::test {
namespace {

/// LibTorch's CPU allocator, whose n-th allocation from now on can be made to fail.
class FailingAllocator final : public c10::Allocator {
 public:
  /// Takes the place of LibTorch's; allocators live as long as the program.
  static FailingAllocator& installed() {
    static FailingAllocator* const allocator = [] {
      auto* created = new FailingAllocator(c10::GetCPUAllocator());
      c10::SetCPUAllocator(created, /*priority=*/1);
      return created;
    }();
    return *allocator;
  }

  /// Calls the function while the allocation after the next `count` fails. Returns whether that came to pass.
  template <class Function>
  bool fails_after(int64_t count, const Function& function) {
    left_ = count;
    bool failed = false;
    try {
      function();
    } catch (const std::bad_alloc&) {
      failed = true;
    } catch (...) {
      left_ = -1;
      throw;
    }
    left_ = -1;
    return failed;
  }

  c10::DataPtr allocate(size_t bytes) override {
    if (left_ >= 0 && left_-- == 0) throw std::bad_alloc();
    return plain_->allocate(bytes);
  }
  c10::DeleterFnPtr raw_deleter() const override { return plain_->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t bytes) const override { plain_->copy_data(to, from, bytes); }

 private:
  explicit FailingAllocator(c10::Allocator* plain) : plain_(plain) {}

  c10::Allocator* plain_;
  std::atomic<int64_t> left_{-1};  ///< allocations until one fails; below zero: none fails
};

/// LibTorch's number of threads while this lives.
class ThreadCount {
 public:
  explicit ThreadCount(int count) : before_(at::get_num_threads()) { at::set_num_threads(count); }
  ~ThreadCount() { at::set_num_threads(before_); }
  ThreadCount(const ThreadCount&) = delete;
  ThreadCount& operator=(const ThreadCount&) = delete;

 private:
  int before_;
};

/// Two optimizers that are stepped alike; only one of them meets failures.
template <class Basis>
struct Twins {
  MixedGroups<Basis> clean, hit;

  Twins(torch::ScalarType dtype, const LoraRiteOptions& options, int steps)
      : clean(dtype, options), hit(dtype, options) {
    step(0, steps);
  }

  void step(int first, int last) {
    for (int i = first; i < last; ++i) {
      clean.step(i);
      hit.step(i);
    }
  }

  /// `fail` makes hit's step throw: nothing may be left of it.
  template <class Function>
  void expect_no_trace(const Function& fail) {
    const std::string state = saved_bytes(*hit.optimizer);
    fail();
    expect_equal();
    EXPECT_TRUE(saved_bytes(*hit.optimizer) == state) << "the failed step changed the state";
  }

  void expect_equal() const {
    const auto expected = clean.parameters(), actual = hit.parameters();
    for (size_t i = 0; i < actual.size(); ++i)
      EXPECT_TRUE(same_bits(actual[i], expected[i])) << "parameter " << i << " of " << actual.size();
  }

  /// After a failure in step `next`: good steps, the same for both.
  void expect_equal_future(int next) {
    const auto before = hit.parameters()[0].detach().clone();
    step(next, next + 3);
    expect_equal();
    EXPECT_TRUE(saved_bytes(*hit.optimizer) == saved_bytes(*clean.optimizer));
    EXPECT_FALSE(torch::equal(hit.parameters()[0], before));
  }
};

struct Configuration {
  const char* name;
  torch::ScalarType dtype;
  LoraRiteOptions options;
};

/// Each engine and dtype with the defaults, and with every option that changes what a step does.
std::vector<Configuration> configurations() {
  const LoraRiteOptions plain(0.02);
  const LoraRiteOptions all = LoraRiteOptions(0.02).weight_decay(0.1).max_update_rms(0.5).max_relative_change(0.3);
  const auto with = [](LoraRiteOptions options, Engine engine) { return options.engine(engine); };
  const auto balanced = [](LoraRiteOptions options) { return options.balance(true).lr_ratio_b(2); };
  const auto master = [](LoraRiteOptions options) { return options.master_weights(true); };
  const auto rows = [](LoraRiteOptions options) { return options.row_equilibration(true); };
  return {{"host", torch::kFloat, with(plain, Engine::Host)},
          {"host_with_options", torch::kFloat, balanced(with(all, Engine::Host))},
          {"host_with_rows", torch::kFloat, rows(with(all, Engine::Host))},
          {"device", torch::kFloat, with(plain, Engine::Device)},
          {"device_with_options", torch::kFloat, balanced(with(all, Engine::Device))},
          {"double_with_rows", torch::kDouble, rows(all)},
          {"half_with_master", torch::kHalf, master(all)},
          {"bfloat16", torch::kBFloat16, plain}};
}

/// What fails after the allocation `count` did: each of the first fifty, then one in a fiftieth of those before it, for
/// a step makes thousands. Every one where LORA_RITE_SOAK is set, which takes ten minutes.
int64_t next_to_fail(int64_t count) { return count + 1 + (is_soak() ? 0 : count / 50); }

class StrongGuarantee : public testing::TestWithParam<Configuration> {
 protected:
  using Basis = PolarBasis;

  /// With a first step that fails, and a later one.
  static void for_each_time(const std::function<void(Twins<Basis>&, int)>& body) {
    for (const int steps : {0, 2}) {
      SCOPED_TRACE("after " + std::to_string(steps) + " steps");
      Twins<Basis> twins(GetParam().dtype, GetParam().options, steps);
      body(twins, steps);
      twins.expect_equal_future(steps + 1);
    }
  }
};

TEST_P(StrongGuarantee, HoldsWhereverMemoryRunsOut) {
  FailingAllocator& allocator = FailingAllocator::installed();
  const ThreadCount three(3);  // fewer than most acts of a batch have tasks, and more than some
  for_each_time([&](Twins<Basis>& twins, int step) {
    int64_t allocations = 0;
    const std::string state = saved_bytes(*twins.hit.optimizer);
    twins.hit.set_gradients(step);
    while (allocator.fails_after(allocations, [&] { twins.hit.optimizer->step(); })) {
      SCOPED_TRACE("allocation " + std::to_string(allocations));
      allocations = next_to_fail(allocations);
      twins.expect_equal();
      EXPECT_TRUE(saved_bytes(*twins.hit.optimizer) == state) << "the failed step changed the state";
      ASSERT_TRUE(!HasFailure() && allocations < 10000);  // what follows would only repeat it
    }
    EXPECT_GT(allocations, 20);
    twins.clean.step(step);
    twins.expect_equal();
  });
}

TEST(StrongGuarantee, KeepsTheMasterCopiesThatAFailedStepWouldDrop) {
  FailingAllocator& allocator = FailingAllocator::installed();
  Twins<PolarBasis> twins(torch::kHalf, LoraRiteOptions(0.02).master_weights(true), 2);
  auto& options = static_cast<LoraRiteOptions&>(twins.hit.optimizer->param_groups()[0].options());
  twins.expect_no_trace([&] {
    options.master_weights(false);
    twins.hit.set_gradients(2);
    int64_t failures = 0;
    for (int64_t count = 0; count < 200; count += 20)
      failures += allocator.fails_after(count, [&] { twins.hit.optimizer->step(); }) ? 1 : 0;
    EXPECT_EQ(failures, 10);
    options.master_weights(true);
  });
  twins.expect_equal_future(2);
}

#ifdef LORA_RITE_FAILING_NEW
/// Of all memory, not only of tensors'. The pairs alone: the fused kernel of AdamW asks for some of its own.
TEST_P(StrongGuarantee, OfPairsHoldsWhereverOperatorNewFails) {
  const ThreadCount three(3);
  const auto pairs_of = [] {
    torch::manual_seed(69);
    std::vector<FactorPair> pairs;
    for (const int64_t rank : {3, 3, 4}) {
      pairs.push_back({"pair " + std::to_string(pairs.size()), torch::randn({rank, 6}).to(GetParam().dtype),
                       torch::randn({8, rank}).to(GetParam().dtype)});
      // The engine for contiguous factors takes no others.
      if (GetParam().options.engine() != Engine::Host && rank == 4) pairs.back().b = pairs.back().b.t().clone().t();
      pairs.back().a.requires_grad_();
      pairs.back().b.requires_grad_();
    }
    const auto experts = expert_pairs({"experts", torch::randn({6, 5}).to(GetParam().dtype).requires_grad_(),
                                       torch::randn({7, 6}).to(GetParam().dtype).requires_grad_()},
                                      2);
    pairs.insert(pairs.end(), experts.begin(), experts.end());
    return pairs;
  };
  for (const int steps : {0, 2}) {
    const auto clean = pairs_of();
    LoraRite<> undisturbed(clean, GetParam().options);
    lora_rite::test::run_steps(undisturbed, clean, 0, steps);
    const std::string state = saved_bytes(undisturbed);
    int64_t failures = 0;
    bool came_to_pass = true;
    for (int64_t count = 0; came_to_pass; count = next_to_fail(count)) {
      const auto hit = pairs_of();
      LoraRite<> optimizer(hit, GetParam().options);
      lora_rite::test::run_steps(optimizer, hit, 0, steps);
      lora_rite::test::set_gradients(hit, static_cast<uint64_t>(1000 + steps));
      bool failed = false;
      news_left() = count;
      try {
        optimizer.step();
      } catch (const std::exception&) {  // LibTorch may tell of it in words of its own
        failed = true;
      }
      came_to_pass = news_left() < 0;
      news_left() = -1;
      if (!failed) continue;  // done, or somebody inside LibTorch did without
      ++failures;
      ASSERT_TRUE(lora_rite::test::equal_factors(clean, hit)) << "call " << count << " of operator new";
      ASSERT_TRUE(saved_bytes(optimizer) == state) << "call " << count << " of operator new changed the state";
      if (count % 16 != 0) continue;
      const auto other = pairs_of();
      LoraRite<> never_hit(other, GetParam().options);
      lora_rite::test::run_steps(never_hit, other, 0, steps + 2);
      lora_rite::test::run_steps(optimizer, hit, steps, steps + 2);
      ASSERT_TRUE(lora_rite::test::equal_factors(other, hit)) << "after call " << count << " of operator new";
    }
    EXPECT_GT(failures, 20);
  }
}
#endif

/// What a failed step had made ready of factors A does not come in with a step that has no gradients for them.
TEST_P(StrongGuarantee, HoldsForAStepWithOtherGradientsThanTheFailedOne) {
  FailingAllocator& allocator = FailingAllocator::installed();
  for (int64_t allocations = 0;; allocations = 7 * next_to_fail(allocations / 7)) {
    Twins<Basis> twins(GetParam().dtype, GetParam().options, 2);
    twins.hit.set_gradients(2);
    if (!allocator.fails_after(allocations, [&] { twins.hit.optimizer->step(); })) break;
    for (MixedGroups<Basis>* groups : {&twins.clean, &twins.hit}) {
      groups->set_gradients(3);
      for (const size_t place : {0, 2, 4, 6, 8}) groups->parameters()[place].mutable_grad() = torch::Tensor();
      groups->optimizer->step();
    }
    SCOPED_TRACE("allocation " + std::to_string(allocations));
    twins.expect_equal();
    ASSERT_FALSE(HasFailure());
  }
}

TEST_P(StrongGuarantee, HoldsForGradientsThatCannotBeUsed) {
  for_each_time([](Twins<Basis>& twins, int step) {
    for (const size_t place : {0, 5, 9, 10}) {
      twins.expect_no_trace([&] {
        twins.hit.set_gradients(step);
        torch::Tensor parameter = twins.hit.parameters()[place];
        parameter.mutable_grad() = torch::ones({2, 2}).to(parameter.scalar_type());
        EXPECT_TRUE(mentions(error_of([&] { twins.hit.optimizer->step(); }), "has shape [2, 2]"));
      });
    }
    twins.step(step, step + 1);
  });
}

TEST_P(StrongGuarantee, HoldsForAClosureThatThrows) {
  for_each_time([](Twins<Basis>& twins, int step) {
    twins.expect_no_trace([&] {
      EXPECT_THROW(twins.hit.optimizer->step([&]() -> torch::Tensor {
        twins.hit.set_gradients(step + 50);
        throw std::runtime_error("out of data");
      }),
                   std::runtime_error);
    });
    twins.step(step, step + 1);
  });
}

INSTANTIATE_TEST_SUITE_P(Configurations, StrongGuarantee, testing::ValuesIn(configurations()),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace lora_rite::test
