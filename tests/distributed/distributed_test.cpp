// Both distributed optimizers over Gloo: processes that differ, refuse, or are killed; an optimizer that is moved.

#include "distributed/support.hpp"

#include <csignal>

namespace lora_rite::test {
namespace {

/// Steps, moves the optimizer twice, and steps on, beside one that stays where it is.
template <class Optimizer>
void moved_run(const Process& process) {
  const auto pairs = some_pairs(torch::kFloat), other_pairs = clone_pairs(pairs);
  auto first = std::make_unique<Optimizer>(process.group, pairs, some_options());
  Optimizer stays(process.group, other_pairs, some_options());
  run_steps(*first, pairs, 0, 3);
  Optimizer second(std::move(*first));
  first.reset();
  run_steps(second, pairs, 3, 6);
  Optimizer third(process.group, clone_pairs(pairs), some_options());
  third = std::move(second);
  run_steps(third, pairs, 6, 9);
  run_steps(stays, other_pairs, 0, 9);
  EXPECT_TRUE(equal_factors(pairs, other_pairs));
  EXPECT_EQ(saved_bytes(third), saved_bytes(stays));
}

const Scenario moved("moved", [](const Process& process) {
  moved_run<ShardedLoraRite<>>(process);
  moved_run<RowShardedLoraRite<>>(process);
});

TEST(Distributed, AnOptimizerThatWasMovedStepsOn) {
  expect_success("moved", 2, fresh_folder("moved"), /*timeout_seconds=*/20);
}

void expect_mention(const std::string& message, const std::string& text) { EXPECT_TRUE(mentions(message, text)); }

const Scenario differences("differences", [](const Process& process) {
  const bool last = process.rank == process.size - 1;
  const auto pairs = some_pairs(torch::kFloat);
  expect_error("weight_decay 0.5",
               [&] { ShardedLoraRite<>(process.group, pairs, some_options().weight_decay(last ? 0.5 : 0.01)); });
  expect_error("small", [&] {
    std::vector<FactorPair> other = pairs;
    if (last) other.back() = random_pair("small", 2, 12, 9, torch::kFloat);
    ShardedLoraRite<>(process.group, other, some_options());
  });
  expect_error("5 pairs", [&] {
    std::vector<FactorPair> other = pairs;
    if (last) other.pop_back();
    ShardedLoraRite<>(process.group, other, some_options());
  });
  expect_error("divided", [&] {
    RowShardedLoraRite<>(process.group, pairs, some_options(), [&](const FactorPair&) {
      return RowSharding{!last, true};
    });
  });
  {
    // Heads are stepped by every process: their options must agree as well.
    ShardedLoraRite<> with_head(process.group, pairs, some_options());
    const torch::Tensor head = torch::zeros({3}).requires_grad_();
    with_head.add_parameters({head}, torch::optim::AdamWOptions(1e-3).weight_decay(last ? 0.1 : 0));
    set_gradients(pairs, 1);
    expect_error("group 1: weight_decay 0.1", [&] { with_head.step(); });
  }
  {
    ShardedLoraRite<> with_head(process.group, pairs, some_options());
    with_head.add_parameters({torch::zeros({3})}, torch::optim::AdamWOptions(1e-3), /*maximize=*/last);
    expect_error("group 1: maximize true", [&] { with_head.step(); });
  }
  {
    // Pairs of one shape that are divided differently are refused, however often it is tried.
    RowShardedLoraRite<> rows(process.group, {pairs[0]}, some_options());
    const int64_t in = last ? 20 : 28;
    rows.add_pairs({random_pair("x", 4, 24, 16), random_pair("y", 4, in, 16)}, some_options());
    for (int i = 0; i < 2; ++i) expect_error("have the same shape and are divided differently", [&] { rows.step(); });
  }
  {
    // A part that changed its shape before the first step: its rows are not those that the others were told.
    const FactorPair pair = random_pair("x", 4, 24, 16, torch::kFloat);
    RowShardedLoraRite<> rows(process.group, {pair}, some_options());
    at::Tensor a = pair.a;
    if (last) a.set_data(a.detach().narrow(1, 0, 10).clone());
    set_gradients({pair}, 1);
    expect_error("pair 'x' has factors of shapes [4, 10] and [16, 4], expected 24 and 16 rows", [&] { rows.step(); });
  }
  ShardedLoraRite<> optimizer(process.group, pairs, some_options());
  const auto before = clone_pairs(pairs);
  set_gradients(pairs, 1);
  at::Tensor b = pairs[2].b;
  if (last) b.mutable_grad() = at::Tensor();
  expect_error(
      "process 1 has 'pair 'q2': factor a Float[4, 24] on cpu, factor b Float[16, 4] on cpu without a gradient",
      [&] { optimizer.step(); });
  set_gradients(pairs, 1);
  if (last) optimizer.param_groups()[0].options().set_lr(5e-3);
  expect_error("process 1 has 'group 0: lr 0.005' where process 0 has 'group 0: lr 0.01'", [&] { optimizer.step(); });
  EXPECT_TRUE(equal_factors(pairs, before));
});

TEST(Distributed, ProcessesThatDifferAreTold) { expect_success("differences", 2, fresh_folder("differences")); }

/// Something is wrong in the last process only: all throw at once, and nothing is changed in any of them.
template <class Optimizer>
void one_refuses(const Process& process) {
  const bool last = process.rank == process.size - 1;
  const auto pairs = some_pairs(torch::kFloat);
  const torch::Tensor head = torch::ones({3}).requires_grad_();
  Optimizer optimizer(process.group, pairs, some_options());
  optimizer.add_parameters({head}, torch::optim::AdamWOptions(1e-3));
  const auto step = [&] {
    set_gradients(pairs, 7);
    torch::Tensor parameter = head;
    parameter.mutable_grad() = torch::ones({3});
    optimizer.step();
  };

  // `spoil` is undone by `mend`; before the first step, and after it.
  const auto refuses = [&](const std::vector<std::string>& expected, const std::function<void()>& spoil,
                           const std::function<void()>& mend) {
    const auto before = clone_pairs(pairs);
    const std::string state = saved_bytes(optimizer);
    const at::Tensor head_before = head.detach().clone();
    set_gradients(pairs, 3);
    torch::Tensor parameter = head;
    parameter.mutable_grad() = torch::ones({3});
    if (last) spoil();
    const std::string message = error_of([&] { optimizer.step(); });
    for (const std::string& text : expected) EXPECT_TRUE(mentions(message, text));
    if (last)
      mend();
    else
      expect_mention(message, c10::str("process ", process.size - 1));
    EXPECT_TRUE(equal_factors(pairs, before)) << expected[0];
    EXPECT_TRUE(head.equal(head_before)) << expected[0];
    EXPECT_EQ(saved_bytes(optimizer), state) << expected[0];
  };
  LoraRiteOptions& options = static_cast<LoraRiteOptions&>(optimizer.param_groups()[0].options());
  const LoraRiteOptions right = options;
  const auto restore_options = [&] { options = right; };
  const auto nothing = [] {};
  at::Tensor a = pairs[1].a, b = pairs[4].b, other_head = head;
  const auto all_refusals = [&] {
    refuses(
        {"'q1'", "factor a", "[2, 3]"},
        [&] {
          a.mutable_grad() = torch::zeros({2, 3});
        },
        nothing);
    refuses(
        {"'wide'", "factor b", "Sparse"}, [&] { b.mutable_grad() = b.grad().to_sparse(); }, nothing);
    refuses(
        {"group 1", "parameter 0", "[2]"}, [&] { other_head.mutable_grad() = torch::zeros({2}); }, nothing);
    refuses(
        {"lr", "-1"}, [&] { options.lr(-1); }, restore_options);
    refuses(
        {"betas"},
        [&] {
          options.betas({0.5, 2.0});
        },
        restore_options);
    // In their range, but not those of the others; also where the sixth digit is the same.
    refuses(
        {"betas", "0.5"},
        [&] {
          options.betas({0.5, 0.999});
        },
        restore_options);
    refuses(
        {"clip_unmagnified_norm", "2"}, [&] { options.clip_unmagnified_norm(2); }, restore_options);
    refuses(
        {"weight_decay"}, [&] { options.weight_decay(0.01 * (1 + 1e-12)); }, restore_options);
    refuses(
        {"capturable"}, [&] { options.capturable(true); }, restore_options);
    auto& adamw = static_cast<torch::optim::AdamWOptions&>(optimizer.param_groups()[1].options());
    refuses(
        {"group 1", "weight_decay", "0.3"}, [&] { adamw.weight_decay(0.3); }, [&] { adamw.weight_decay(1e-2); });
    refuses(
        {"group 1", "eps"}, [&] { adamw.eps(1e-8 * (1 + 1e-9)); }, [&] { adamw.eps(1e-8); });
    refuses(
        {"param groups"},
        [&] {
          optimizer.torch::optim::Optimizer::add_param_group(torch::optim::OptimizerParamGroup({torch::zeros({2})}));
        },
        [&] { optimizer.param_groups().pop_back(); });
  };
  all_refusals();
  step();
  all_refusals();
  // Another dtype: the group is divided by now.
  refuses(
      {"'q1'", "Double"},
      [&] {
        a.set_data(a.detach().to(torch::kDouble));
        a.mutable_grad() = torch::zeros_like(a);
      },
      [&] {
        a.mutable_grad() = torch::Tensor();
        a.set_data(a.detach().to(torch::kFloat));
      });

  // A closure.
  const auto before = clone_pairs(pairs);
  set_gradients(pairs, 3);
  EXPECT_TRUE(mentions(error_of([&] {
                         optimizer.step([&]() -> torch::Tensor {
                           TORCH_CHECK(!last, "the batch is empty");
                           return torch::zeros({});
                         });
                       }),
                       last ? "the batch is empty" : "process 1: the batch is empty"));
  // One that averages, and never comes to it in one process.
  EXPECT_TRUE(mentions(error_of([&] {
                         optimizer.step([&]() -> torch::Tensor {
                           TORCH_CHECK(!last, "the batch is empty");
                           average_gradients(optimizer, process.group);
                           return torch::zeros({});
                         });
                       }),
                       last ? "the batch is empty" : "process 1: the batch is empty"));
  // One in which the averaging refuses.
  EXPECT_TRUE(mentions(error_of([&] {
                         optimizer.step([&]() -> torch::Tensor {
                           if (last) a.mutable_grad() = a.grad().to_sparse();
                           average_gradients(optimizer, process.group);
                           return torch::zeros({});
                         });
                       }),
                       last ? "average_gradients" : "process 1: average_gradients"));
  // One whose backward breaks off beside an averager, which is told before the optimizer is.
  {
    GradientAverager averager(optimizer, process.group);
    EXPECT_TRUE(mentions(error_of([&] {
                           optimizer.step([&]() -> torch::Tensor {
                             try {
                               TORCH_CHECK(!last, "broken off");
                             } catch (...) {
                               averager.reset();
                               throw;
                             }
                             averager.finish();
                             return torch::zeros({});
                           });
                         }),
                         last ? "broken off" : "given up by reset()"));
  }
  // Different calls.
  EXPECT_TRUE(mentions(error_of([&] {
                         if (last) return void(saved_bytes(optimizer));
                         optimizer.step();
                       }),
                       "'call: save'"));
  // An archive that one process refuses.
  const std::string state = saved_bytes(optimizer);
  Optimizer other(process.group, clone_pairs(pairs), some_options().weight_decay(0.02));
  const std::string other_state = saved_bytes(other);
  EXPECT_TRUE(mentions(error_of([&] { load_bytes(other, last ? state : other_state); }), "param groups"));
  EXPECT_TRUE(mentions(error_of([&] { load_bytes(optimizer, last ? other_state : state); }), "param groups"));
  // One that is another file in one process, is damaged there, or has nothing for it.
  const auto load_some = [&](const std::string& bytes, const LoadOptions& options) {
    std::stringstream stream(bytes);
    torch::serialize::InputArchive archive;
    archive.load_from(stream);
    optimizer.load_matching(archive, options);
  };
  LoadOptions without_one, without_any;
  without_one.rename = [](const std::string& name) { return name == "q1" ? "" : name; };
  without_any.rename = [](const std::string&) { return ""; };
  without_any.other_parameters = false;
  EXPECT_TRUE(mentions(error_of([&] { load_some(state, last ? without_one : LoadOptions()); }), "q1"));
  EXPECT_TRUE(
      mentions(error_of([&] { load_some(state, last ? without_any : LoadOptions()); }), "nothing of the archive"));
  EXPECT_EQ(saved_bytes(optimizer), state);
  EXPECT_TRUE(equal_factors(pairs, before));

  // A constructor, and a group that only one process adds.
  std::vector<FactorPair> unfit = clone_pairs(pairs);
  if (last) unfit[2].b = torch::zeros({16, 5});
  EXPECT_TRUE(mentions(error_of([&] { Optimizer(process.group, unfit, some_options()); }), "'q2'"));
  EXPECT_TRUE(mentions(error_of([&] { Optimizer(process.group, pairs, some_options().eps(last ? -1 : 1)); }), "eps"));
  std::vector<FactorPair> views = clone_pairs(pairs);
  if (last) views[0].a = torch::zeros({8, 24}).requires_grad_().slice(0, 0, 4);
  EXPECT_TRUE(mentions(error_of([&] { Optimizer(process.group, views, some_options()); }), "view of a leaf"));
  EXPECT_TRUE(
      mentions(error_of([&] { Optimizer(process.group, last ? std::vector<FactorPair>() : pairs, some_options()); }),
               "list of pairs is empty"));
  // And on.
  step();
  EXPECT_FALSE(equal_factors(pairs, before));
  if (std::is_same_v<Optimizer, ShardedLoraRite<>>) expect_same_everywhere(process, pairs);
  // An archive of another step in one process.
  const std::string now = saved_bytes(optimizer);
  EXPECT_TRUE(mentions(error_of([&] { load_bytes(optimizer, last ? state : now); }), "archive: 0 skipped steps"));
  // What is remembered, forgotten by one.
  EXPECT_TRUE(mentions(error_of([&] {
                         if (last) return optimizer.reset_state();
                         optimizer.step();
                       }),
                       "'call: reset_state"));
  EXPECT_TRUE(mentions(error_of([&] { optimizer.reset_state(last ? "q1" : "q2"); }), "reset_state: "));
  EXPECT_TRUE(mentions(error_of([&] { optimizer.reset_state(last ? "nobody" : "q1"); }), "has no pair 'nobody'"));
  EXPECT_TRUE(mentions(error_of([&] { optimizer.reset_state(last ? 9 : 0, 0); }), "has no group 9"));
  EXPECT_EQ(saved_bytes(optimizer), now);
  if (last) optimizer.add_pairs({random_pair("new", 4, 24, 16, torch::kFloat)}, some_options());
  EXPECT_TRUE(mentions(error_of([&] { optimizer.step(); }), "3 groups"));
  if constexpr (std::is_same_v<Optimizer, ShardedLoraRite<>>) {
    EXPECT_TRUE(mentions(error_of([&] { optimizer.owner(2, 0); }), "group 2 is kept by no process"));
  }
}

const Scenario one_refuses_pairs("one refuses pairs", &one_refuses<ShardedLoraRite<>>);
const Scenario one_refuses_rows("one refuses rows", &one_refuses<RowShardedLoraRite<>>);

TEST(Distributed, WhatOneProcessRefusesAllRefuseAtOnce) {
  for (const char* scenario : {"one refuses pairs", "one refuses rows"})
    expect_success(scenario, 2, fresh_folder("refuses"), /*timeout_seconds=*/10);
}

/// What only the process that keeps a pair, or only one that does not, can see.
const Scenario owner_refuses("owner refuses", [](const Process& process) {
  const int last = process.size - 1;
  const auto pairs = some_pairs(torch::kFloat);
  ShardedLoraRite<> optimizer(process.group, pairs, some_options());
  run_steps(optimizer, pairs, 0, 1);
  const auto kept_by = [&](int rank) {
    size_t p = 0;
    while (optimizer.owner(0, p) != rank) ++p;
    return pairs[p].b;
  };
  const auto refuses = [&](at::Tensor factor, const at::Tensor& spoiled, const std::string& words) {
    const at::Tensor right = factor.detach();
    if (process.rank == last) factor.set_data(spoiled);
    set_gradients(pairs, 3);
    expect_error(words, [&] { optimizer.step(); });
    if (process.rank == last) factor.set_data(right);
  };
  const auto before = clone_pairs(pairs);
  const at::Tensor own = kept_by(last), other = kept_by(0);
  refuses(own, own.detach().t().contiguous().t(), "expected a contiguous one as in the first step");
  refuses(other, other.detach().slice(0, 0, 1).expand(other.sizes()), "expected elements that do not overlap");
  EXPECT_TRUE(equal_factors(pairs, before));
  run_steps(optimizer, pairs, 1, 2);
  EXPECT_FALSE(equal_factors(pairs, before));
  expect_same_everywhere(process, pairs);

  // All but one process keep nothing.
  const std::vector<FactorPair> only = {pairs[0]};
  ShardedLoraRite<> small(process.group, only, some_options());
  run_steps(small, only, 0, 1);
  static_cast<LoraRiteOptions&>(small.param_groups()[0].options()).capturable(true);
  set_gradients(only, 4);
  expect_error("capturable was switched on after the engine was chosen", [&] { small.step(); });
});

TEST(Distributed, WhatOnlyTheOwnerOfAPairSeesAllRefuseAtOnce) {
  expect_success("owner refuses", 2, fresh_folder("owner"), /*timeout_seconds=*/10);
}

const Scenario killed("killed", [](const Process& process) {
  const auto pairs = some_pairs(torch::kFloat);
  ShardedLoraRite<> optimizer(process.group, pairs, some_options());
  run_steps(optimizer, pairs, 0, 3);
  set_gradients(pairs, 9);
  if (process.rank == 1)  // in the middle of a step: the closure has run, the other processes are in the step already
    optimizer.step([]() -> torch::Tensor {
      usleep(300000);
      raise(SIGKILL);
      return {};
    });
  optimizer.step();
});

TEST(Distributed, AKilledProcessMakesTheOthersFailWithAClearError) {
  const Outcome outcome = run_processes("killed", 3, fresh_folder("killed"), /*timeout_seconds=*/10);
  EXPECT_EQ(outcome.status[1], 128 + SIGKILL);
  for (const size_t rank : {0, 2}) {
    EXPECT_EQ(outcome.status[rank], 1);
    EXPECT_TRUE(mentions(outcome.output[rank], "another process has left or did not answer in time"));
    EXPECT_TRUE(mentions(outcome.output[rank], "go on from the last checkpoint"));
  }
  EXPECT_LT(outcome.seconds, 40);
}

}  // namespace
}  // namespace lora_rite::test
