// ShardedLoraRite over Gloo: pairs divided among processes.

#include "distributed/support.hpp"

namespace lora_rite::test {
namespace {

/// 200 steps divided, beside the same steps undivided in every process; leaves a checkpoint of step 100.
template <class Compare>
void divided_run(const Process& process, torch::Dtype dtype, const Compare& compare) {
  const auto pairs = some_pairs(dtype), whole_pairs = clone_pairs(pairs), started = clone_pairs(pairs);
  ShardedLoraRite<> divided(process.group, pairs, some_options());
  LoraRite<> whole(whole_pairs, some_options());
  for (int64_t i = 0; i < 200; ++i) {
    set_local_gradients(process, pairs, i);
    // A gradient that is not finite, in one process: all skip the step.
    if (i == 50 && process.rank == 1) pairs[1].a.grad()[0][0] = std::numeric_limits<double>::infinity();
    average_gradients(divided, process.group);
    for (size_t p = 0; p < pairs.size(); ++p) {
      at::Tensor a = whole_pairs[p].a, b = whole_pairs[p].b;
      a.mutable_grad() = pairs[p].a.grad().clone();
      b.mutable_grad() = pairs[p].b.grad().clone();
    }
    divided.step();
    whole.step();
    if (i % 50 == 49) compare(pairs, whole_pairs);
    if (i == 99) {
      const std::string bytes = saved_bytes(divided);  // all processes take part
      if (process.rank == 0) {
        std::ofstream(process.folder / "optimizer") << bytes;
        std::vector<torch::Tensor> factors;
        for (const auto& pair : pairs) factors.insert(factors.end(), {pair.a.detach(), pair.b.detach()});
        torch::save(factors, (process.folder / "factors").string());
      }
    }
  }
  EXPECT_EQ(divided.skipped_steps(), 1);
  EXPECT_FALSE(equal_factors(pairs, started));
  expect_same_everywhere(process, pairs);
  if (process.rank == 0) {
    std::vector<torch::Tensor> factors;
    for (const auto& pair : pairs) factors.insert(factors.end(), {pair.a.detach(), pair.b.detach()});
    torch::save(factors, (process.folder / "end").string());
  }
  // The work and the state are divided: nobody has more than its share and one pair.
  int64_t own = 0, all = 0, largest = 0;
  for (size_t p = 0; p < pairs.size(); ++p) {
    const int64_t size = pairs[p].a.numel() + pairs[p].b.numel();
    all += size;
    largest = std::max(largest, size);
    if (divided.owner(0, p) == process.rank) own += size;
  }
  EXPECT_GT(own, 0);
  EXPECT_LE(own, all / process.size + largest);
}

const Scenario pairs_float("pairs float", [](const Process& process) {
  divided_run(process, torch::kFloat,
              [](const auto& divided, const auto& whole) { EXPECT_TRUE(equal_factors(divided, whole)); });
});
const Scenario pairs_double("pairs double", [](const Process& process) {
  divided_run(process, torch::kDouble, [](const auto& divided, const auto& whole) {
    for (size_t p = 0; p < divided.size(); ++p)
      EXPECT_LT(
          (at::matmul(divided[p].b, divided[p].a) - at::matmul(whole[p].b, whole[p].a)).norm().template item<double>(),
          1e-12 * at::matmul(whole[p].b, whole[p].a).norm().template item<double>());
  });
});

/// Goes on from the checkpoint of "pairs float", with any number of processes.
void go_on(torch::optim::Optimizer& optimizer, const std::vector<FactorPair>& pairs,
           const std::filesystem::path& folder, int processes) {
  std::vector<torch::Tensor> factors, end;
  torch::load(factors, (folder / "factors").string());
  torch::load(end, (folder / "end").string());
  for (size_t p = 0; p < pairs.size(); ++p) {
    pairs[p].a.detach().copy_(factors[2 * p]);
    pairs[p].b.detach().copy_(factors[2 * p + 1]);
  }
  std::ostringstream bytes;
  bytes << std::ifstream(folder / "optimizer").rdbuf();
  load_bytes(optimizer, bytes.str());
  for (int64_t i = 100; i < 200; ++i) {
    // The mean over those who wrote the checkpoint, formed as they did.
    std::vector<std::vector<at::Tensor>> gradients;
    for (int rank = 0; rank < processes; ++rank) {
      set_local_gradients({rank, processes, folder, nullptr}, pairs, i);
      gradients.emplace_back();
      for (const auto& pair : pairs)
        gradients.back().insert(gradients.back().end(), {pair.a.grad().clone(), pair.b.grad().clone()});
    }
    for (size_t p = 0; p < pairs.size(); ++p)
      for (const size_t side : {0, 1}) {
        at::Tensor factor = side == 0 ? pairs[p].a : pairs[p].b, sum = gradients[0][2 * p + side];
        for (int rank = 1; rank < processes; ++rank) sum = sum + gradients[static_cast<size_t>(rank)][2 * p + side];
        factor.mutable_grad() = sum / processes;
      }
    optimizer.step();
  }
  for (size_t p = 0; p < pairs.size(); ++p) {
    EXPECT_TRUE(at::equal(pairs[p].a, end[2 * p])) << pairs[p].name;
    EXPECT_TRUE(at::equal(pairs[p].b, end[2 * p + 1])) << pairs[p].name;
  }
}

const Scenario pairs_resume("pairs resume", [](const Process& process) {
  const auto pairs = some_pairs(torch::kFloat);
  ShardedLoraRite<> optimizer(process.group, pairs, some_options());
  go_on(optimizer, pairs, process.folder, 2);
});

TEST(ShardedLoraRite, StepsAreThoseOfOneProcessBitForBit) {
  for (const int size : {2, 4}) {
    expect_success("pairs float", size, fresh_folder("pairs"));
    expect_success("pairs double", size, fresh_folder("pairs"));
  }
}

TEST(ShardedLoraRite, ACheckpointOfTwoProcessesResumesInThreeAndInOne) {
  const auto folder = fresh_folder("resume");
  expect_success("pairs float", 2, folder);
  expect_success("pairs resume", 3, folder);
  const auto pairs = some_pairs(torch::kFloat);
  LoraRite<> alone(pairs, some_options());
  go_on(alone, pairs, folder, 2);
}

const Scenario step_bytes("step bytes", [](const Process& process) {
  std::map<int, int64_t> bytes;
  for (const int count : {1, 20}) {
    std::vector<FactorPair> pairs;
    for (int i = 0; i < count; ++i) pairs.push_back(random_pair("p" + std::to_string(i), 2, 4, 4, torch::kFloat));
    ShardedLoraRite<> optimizer(process.group, pairs);
    run_steps(optimizer, pairs, 0, 1);
    const int64_t before = optimizer.bytes_sent();
    run_steps(optimizer, pairs, 1, 2);
    bytes[count] = optimizer.bytes_sent() - before - count * 2 * 8 * 4 - count * 8;  // moved factors, norms
  }
  EXPECT_EQ(bytes[1], bytes[20]);
  EXPECT_LE(bytes[1], 64);
});

TEST(ShardedLoraRite, WhatIsComparedInAStepIsAFewBytes) { expect_success("step bytes", 2, fresh_folder("bytes")); }

}  // namespace
}  // namespace lora_rite::test
