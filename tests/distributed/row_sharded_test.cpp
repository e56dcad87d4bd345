// RowShardedLoraRite over Gloo: factors divided by rows.

#include "distributed/support.hpp"

namespace lora_rite::test {
namespace {

/// The part of process `rank` of a factor's long dimension: unequal parts.
at::Tensor part_of(const at::Tensor& factor, size_t side, int rank, int size) {
  const int64_t dimension = side == 0 ? 1 : 0, rows = factor.size(dimension);
  const auto bound = [&](int r) { return r == 0 ? 0 : r == size ? rows : rows * r / size + 1; };
  return factor.narrow(dimension, bound(rank), bound(rank + 1) - bound(rank)).clone(at::MemoryFormat::Contiguous);
}

std::vector<FactorPair> parts_of(const std::vector<FactorPair>& pairs, int rank, int size,
                                 const std::function<RowSharding(const FactorPair&)>& sharding) {
  std::vector<FactorPair> parts;
  for (const auto& pair : pairs) {
    const RowSharding divided = sharding(pair);
    parts.push_back({pair.name,
                     (divided.a ? part_of(pair.a.detach(), 0, rank, size) : pair.a.detach().clone()).requires_grad_(),
                     (divided.b ? part_of(pair.b.detach(), 1, rank, size) : pair.b.detach().clone()).requires_grad_()});
  }
  return parts;
}

/// Both factors divided, or only one of them, as in tensor parallel layers.
RowSharding mixed(const FactorPair& pair) {
  if (pair.name == "q1") return {false, true};
  if (pair.name == "wide") return {true, false};
  return {};
}

double distance(const std::vector<FactorPair>& parts, const std::vector<FactorPair>& whole, const Process& process) {
  double largest = 0;
  const auto expected = parts_of(whole, process.rank, process.size, mixed);
  for (size_t p = 0; p < parts.size(); ++p)
    for (const auto& [found, wanted] : {std::pair(parts[p].a, expected[p].a), std::pair(parts[p].b, expected[p].b)})
      largest = std::max(largest, (found - wanted).norm().item<double>() / wanted.norm().item<double>());
  return largest;
}

void step_both(torch::optim::Optimizer& rows, const std::vector<FactorPair>& parts, torch::optim::Optimizer& whole,
               const std::vector<FactorPair>& whole_pairs, const Process& process, int64_t i) {
  set_gradients(whole_pairs, static_cast<uint64_t>(1000 + i));
  for (size_t p = 0; p < parts.size(); ++p) {
    const RowSharding divided = mixed(parts[p]);
    at::Tensor a = parts[p].a, b = parts[p].b;
    const at::Tensor ga = whole_pairs[p].a.grad(), gb = whole_pairs[p].b.grad();
    a.mutable_grad() = divided.a ? part_of(ga, 0, process.rank, process.size) : ga.clone();
    b.mutable_grad() = divided.b ? part_of(gb, 1, process.rank, process.size) : gb.clone();
  }
  rows.step();
  whole.step();
}

void rows_run(const Process& process, torch::Dtype dtype, const LoraRiteOptions& options, double tolerance) {
  const auto whole_pairs = some_pairs(dtype);
  const auto parts = parts_of(whole_pairs, process.rank, process.size, mixed);
  RowShardedLoraRite<> rows(process.group, parts, options, mixed);
  LoraRite<> whole(whole_pairs, LoraRiteOptions(options).engine(Engine::Device));
  for (int64_t i = 0; i < 20; ++i) {
    step_both(rows, parts, whole, whole_pairs, process, i);
    EXPECT_LT(distance(parts, whole_pairs, process), tolerance) << "step " << i;
  }
  // The state of the whole factors, as one process has it, and back.
  const std::string bytes = saved_bytes(rows);
  const auto alone_pairs = clone_pairs(whole_pairs);
  LoraRite<> alone(alone_pairs, options);
  load_bytes(alone, bytes);
  RowShardedLoraRite<> again(process.group, parts_of(whole_pairs, process.rank, process.size, mixed), options, mixed);
  load_bytes(again, saved_bytes(alone));
  EXPECT_EQ(saved_bytes(again), bytes);
  set_gradients(alone_pairs, 1020);
  alone.step();
  step_both(rows, parts, whole, whole_pairs, process, 20);
  EXPECT_LT(distance(parts, alone_pairs, process), tolerance);
}

const Scenario rows_double("rows double", [](const Process& process) {
  rows_run(process, torch::kDouble, some_options(), 1e-12);
  rows_run(process, torch::kDouble,
           some_options().balance(true).max_update_rms(0.5).max_relative_change(0.3).row_equilibration(true), 1e-12);
});
const Scenario rows_float("rows float",
                          [](const Process& process) { rows_run(process, torch::kFloat, some_options(), 1e-6); });

TEST(RowShardedLoraRite, StepsAreThoseOfTheWholeFactors) {
  for (const int size : {2, 4}) {
    expect_success("rows double", size, fresh_folder("rows"));
    expect_success("rows float", size, fresh_folder("rows"));
  }
}

const Scenario short_parts("short parts", [](const Process& process) {
  torch::manual_seed(8);
  const std::vector<FactorPair> whole_pairs = {random_pair("short", 4, 6, 6), random_pair("long", 4, 30, 20)};
  const auto parts = parts_of(whole_pairs, process.rank, process.size, mixed);
  const auto started = clone_pairs(parts);
  RowShardedLoraRite<> rows(process.group, parts, some_options());
  LoraRite<> whole(whole_pairs, some_options().engine(Engine::Device));
  for (int64_t i = 0; i < 3; ++i) {
    step_both(rows, parts, whole, whole_pairs, process, i);
    EXPECT_LT(distance(parts, whole_pairs, process), 1e-12);
  }
  EXPECT_FALSE(equal_factors(parts, started));
  // What one process knows of a pair it tells, forgets and takes over as it would alone.
  EXPECT_TRUE(rows.state_of("short"));
  EXPECT_TRUE(mentions(error_of([&] { rows.remove_pair("short"); }), "several processes share the work"));
  const std::string bytes = saved_bytes(whole);
  auto renamed = clone_pairs(parts);
  renamed[0].name = "other";
  RowShardedLoraRite<> resumed(process.group, renamed, some_options());
  resumed.add_pairs({random_pair("new", 4, 6, 6)}, some_options());
  std::stringstream stream(bytes);
  torch::serialize::InputArchive archive;
  archive.load_from(stream);
  EXPECT_EQ(resumed.load_matching(archive).loaded, std::vector<std::string>{"long"});
  EXPECT_TRUE(at::equal(resumed.state_of("long")->a.momentum,
                        part_of(whole.state_of("long")->a.momentum, 0, process.rank, process.size)));
  rows.reset_state("short");
  whole.reset_state("short");
  step_both(rows, parts, whole, whole_pairs, process, 3);
  EXPECT_LT(distance(parts, whole_pairs, process), 1e-12);
  // The rank is above both sides of the whole pair.
  RowShardedLoraRite<> refused(process.group, {random_pair("swapped", 40, 2, 3)}, some_options());
  EXPECT_TRUE(mentions(error_of([&] { refused.step(); }), "pair 'swapped': the rank 40 is above both sides, in = "));
});

TEST(RowShardedLoraRite, TakesPartsThatAreShorterThanTheRank) {
  expect_success("short parts", 2, fresh_folder("short"));
}

const Scenario rows_bytes("rows bytes", [](const Process& process) {
  std::map<int64_t, int64_t> bytes;  // of ten steps, by the factors' width
  for (const int64_t width : {32, 64, 512}) {
    torch::manual_seed(1);
    const std::vector<FactorPair> pairs = {random_pair("p", 4, width, width, torch::kFloat)};
    RowShardedLoraRite<> optimizer(process.group, pairs);
    const int64_t before = optimizer.bytes_sent();
    run_steps(optimizer, pairs, 0, 10);
    bytes[width] = optimizer.bytes_sent() - before;
  }
  EXPECT_EQ(bytes[32], bytes[64]);
  EXPECT_EQ(bytes[32], bytes[512]);
  // Four r×r matrices a factor at most and a few vectors, in double.
  EXPECT_LT(bytes[32], 10 * (2 * (4 * 16 + 8 * 4) + 16) * 8);
});

TEST(RowShardedLoraRite, MessagesDoNotGrowWithTheFactors) { expect_success("rows bytes", 2, fresh_folder("bytes")); }

}  // namespace
}  // namespace lora_rite::test
