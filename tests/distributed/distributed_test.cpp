// Several processes over Gloo: data-parallel with divided pairs, and factors divided by rows.

#include "processes.hpp"

#include <csignal>

#include "support/pairs.hpp"

namespace lora_rite {
namespace {

using namespace testing;

/// Three shapes, one of them four times: more pairs than processes, of unequal cost.
std::vector<FactorPair> some_pairs(torch::Dtype dtype) {
  torch::manual_seed(5);
  std::vector<FactorPair> pairs;
  for (int i = 0; i < 4; ++i) pairs.push_back(random_pair("q" + std::to_string(i), 4, 24, 16, dtype));
  pairs.push_back(random_pair("wide", 4, 70, 31, dtype));
  pairs.push_back(random_pair("small", 2, 12, 8, dtype));
  return pairs;
}

LoraRiteOptions some_options() { return LoraRiteOptions(1e-2).weight_decay(0.01); }

void expect_same_everywhere(const Process& process, const std::vector<FactorPair>& pairs) {
  for (const auto& pair : pairs) {
    for (const auto& factor : {pair.a, pair.b}) {
      at::Tensor first = factor.detach().clone();
      detail::Collectives(process.group).broadcast(first, 0, "a test");
      EXPECT_TRUE(at::equal(first, factor)) << pair.name;
    }
  }
}

/// The gradients of step i; each process sees some of the data, and their mean is what matters.
void set_local_gradients(const Process& process, const std::vector<FactorPair>& pairs, int64_t i) {
  set_gradients(pairs, static_cast<uint64_t>(1000 + 17 * i + process.rank));
}

const Scenario average("average", [](const Process& process) {
  torch::manual_seed(3);
  std::vector<torch::Tensor> parameters = {torch::zeros({5, 3}), torch::zeros({7}), torch::zeros({2}, torch::kDouble),
                                           torch::zeros({4}), torch::zeros({1})};
  parameters[0].mutable_grad() = torch::full({5, 3}, static_cast<double>(process.rank + 1));
  parameters[1].mutable_grad() = torch::arange(7).to(torch::kFloat) * (process.rank + 1);
  parameters[2].mutable_grad() = torch::full({2}, 0.5 + process.rank, torch::kDouble);
  if (process.rank == 1) parameters[3].mutable_grad() = torch::full({4}, 8.0);
  average_gradients(parameters, process.group, /*bucket_bytes=*/32);
  const double mean = (process.size + 1) / 2.0;
  EXPECT_TRUE(at::allclose(parameters[0].grad(), torch::full({5, 3}, mean)));
  EXPECT_TRUE(at::allclose(parameters[1].grad(), torch::arange(7).to(torch::kFloat) * mean));
  EXPECT_TRUE(at::allclose(parameters[2].grad(), torch::full({2}, mean - 0.5, torch::kDouble)));
  EXPECT_TRUE(at::allclose(parameters[3].grad(), torch::full({4}, 8.0 / process.size)));
  EXPECT_FALSE(parameters[4].grad().defined());
});

TEST(AverageGradients, AreMeansAndMissingOnesCountAsZero) {
  for (const int size : {2, 4}) expect_success("average", size, fresh_folder("average"));
}

/// What `error_of(body)` says, and nothing of the gradients has changed.
void expect_refusal(const std::vector<torch::Tensor>& parameters, const std::vector<std::string>& expected,
                    const std::function<void()>& body) {
  std::vector<torch::Tensor> before;
  for (const auto& parameter : parameters)
    before.push_back(parameter.grad().defined() ? parameter.grad().clone() : torch::Tensor());
  const std::string message = error_of(body);
  for (const std::string& text : expected) EXPECT_TRUE(mentions(message, text));
  for (size_t i = 0; i < parameters.size(); ++i) {
    const at::Tensor& gradient = parameters[i].grad();
    ASSERT_EQ(gradient.defined(), before[i].defined()) << i;
    if (!gradient.defined() || gradient.is_sparse()) continue;
    EXPECT_TRUE(gradient.scalar_type() == before[i].scalar_type() && gradient.equal(before[i])) << i;
  }
}

/// Half parameters, of which GradScaler leaves float gradients.
std::vector<torch::Tensor> half_parameters() {
  return {torch::zeros({4}, torch::kHalf).requires_grad_(), torch::zeros({3, 2}, torch::kHalf).requires_grad_()};
}

const Scenario average_dtypes("average dtypes", [](const Process& process) {
  const bool last = process.rank == process.size - 1;
  auto parameters = half_parameters();
  GradientAverager averager(parameters, process.group);
  const auto averagings = {std::function<void()>([&] { average_gradients(parameters, process.group); }),
                           std::function<void()>([&] { averager.finish(); })};
  const auto full = [](at::IntArrayRef sizes, double value, torch::Dtype dtype) {
    return torch::full(sizes, value, dtype);
  };
  for (const auto& average : averagings) {
    // A value that no half has: it must travel as the float that it is.
    const double value = 1 + std::ldexp(1.0, -20);
    // One process alone has a gradient, and a float one; or all have float ones.
    for (const bool all : {false, true}) {
      parameters[0].mutable_grad() = all || last ? full({4}, value, torch::kFloat) : at::Tensor();
      parameters[1].mutable_grad() = full({3, 2}, 0.5 + process.rank, torch::kHalf);
      average();
      EXPECT_EQ(parameters[0].grad().scalar_type(), torch::kFloat);
      EXPECT_TRUE(parameters[0].grad().equal(full({4}, all ? value : value / process.size, torch::kFloat)));
      EXPECT_EQ(parameters[1].grad().scalar_type(), torch::kHalf);
      EXPECT_TRUE(parameters[1].grad().equal(full({3, 2}, process.size / 2.0, torch::kHalf)));
    }
    // Different types: one of them is scaled, perhaps, and the other is not.
    parameters[1].mutable_grad() = full({3, 2}, 1, last ? torch::kFloat : torch::kHalf);
    expect_refusal(parameters, {"parameter 1", "Float in process 1", "Half in process 0"}, average);
    // What nobody can average, in one process.
    parameters[1].mutable_grad() = last ? full({2, 3}, 1, torch::kHalf) : full({3, 2}, 1, torch::kHalf);
    expect_refusal(parameters, {"parameter 1", "[2, 3]", "[3, 2]"}, average);
    parameters[1].mutable_grad() = last ? full({3, 2}, 1, torch::kInt) : full({3, 2}, 1, torch::kHalf);
    expect_refusal(parameters, {"parameter 1", "Int"}, average);
    // Strides are nobody's business.
    const at::Tensor values = torch::arange(6).to(torch::kHalf).view({3, 2});
    parameters[1].mutable_grad() = last ? values.t().contiguous().t() : values.clone();
    average();
    EXPECT_TRUE(parameters[1].grad().equal(values));
  }
});

TEST(AverageGradients, ProcessesAgreeOnDtypesAndShapesBeforeTheySend) {
  expect_success("average dtypes", 2, fresh_folder("dtypes"), /*timeout_seconds=*/10);
}

const Scenario average_layouts("average layouts", [](const Process& process) {
  const bool last = process.rank == process.size - 1;
  const auto with_gradients = [](std::vector<torch::Tensor> parameters) {
    for (torch::Tensor& parameter : parameters) parameter.mutable_grad() = torch::ones_like(parameter);
    return parameters;
  };
  const auto both = with_gradients({torch::zeros({4}), torch::zeros({3})});
  const auto refuses = [&](const std::vector<torch::Tensor>& parameters, int64_t bucket_bytes,
                           const std::vector<std::string>& expected) {
    expect_refusal(parameters, expected, [&] { average_gradients(parameters, process.group, bucket_bytes); });
    expect_refusal(parameters, expected, [&] { GradientAverager(parameters, process.group, bucket_bytes); });
  };
  refuses(last ? std::vector<torch::Tensor>{both[0]} : both, 64, {"parameter 1", "process 1"});
  refuses(last ? std::vector<torch::Tensor>{} : both, 64, {"parameter 0", "process 1"});
  refuses(with_gradients({torch::zeros({last ? 5 : 4})}), 64, {"[5]", "[4]"});
  refuses(with_gradients({torch::zeros({4}, last ? torch::kDouble : torch::kFloat)}), 64, {"Double", "Float"});
  refuses(both, last ? 8 : 64, {"bucket"});
  // A parameter that one process's constructor refuses.
  expect_refusal(both, {last ? "the result of a computation" : "process 1: GradientAverager: parameter 1"}, [&] {
    GradientAverager({both[0], last ? both[1].detach().requires_grad_() * 2 : both[1]}, process.group);
  });
  // Two processes in different calls.
  expect_refusal(both, {"call", "average_gradients", "check_same"}, [&] {
    if (last) return check_same("a", process.group);
    average_gradients(both, process.group);
  });
  // The other collective functions.
  for (const auto& tensor : {torch::ones({last ? 3 : 2}), torch::ones({2}, last ? torch::kDouble : torch::kFloat),
                             last ? torch::Tensor() : torch::ones({2}), last ? both[0].to_sparse() : torch::ones({4})})
    error_of([&] { sum_over_processes(tensor, process.group); });
  const at::Tensor values = torch::arange(6).to(torch::kFloat).view({3, 2});
  const at::Tensor summed = last ? values.t().contiguous().t() : values.clone();
  sum_over_processes(summed, process.group);
  EXPECT_TRUE(summed.equal(values * process.size));
  average_gradients(both, process.group);
  EXPECT_TRUE(both[1].grad().equal(torch::ones({3})));
});

TEST(AverageGradients, ParametersThatDifferAreToldInsteadOfSent) {
  expect_success("average layouts", 2, fresh_folder("layouts"), /*timeout_seconds=*/10);
}

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

// --- Rows ----------------------------------------------------------------------------------------------------------

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

// --- Errors --------------------------------------------------------------------------------------------------------

void expect_mention(const std::string& message, const std::string& text) { EXPECT_TRUE(mentions(message, text)); }

void expect_error(const Process&, const std::string& expected, const std::function<void()>& body) {
  EXPECT_TRUE(mentions(error_of(body), expected));
}

const Scenario differences("differences", [](const Process& process) {
  const bool last = process.rank == process.size - 1;
  const auto pairs = some_pairs(torch::kFloat);
  expect_error(process, "weight_decay 0.5",
               [&] { ShardedLoraRite<>(process.group, pairs, some_options().weight_decay(last ? 0.5 : 0.01)); });
  expect_error(process, "small", [&] {
    std::vector<FactorPair> other = pairs;
    if (last) other.back() = random_pair("small", 2, 12, 9, torch::kFloat);
    ShardedLoraRite<>(process.group, other, some_options());
  });
  expect_error(process, "5 pairs", [&] {
    std::vector<FactorPair> other = pairs;
    if (last) other.pop_back();
    ShardedLoraRite<>(process.group, other, some_options());
  });
  expect_error(process, "divided", [&] {
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
    expect_error(process, "group 1: weight_decay 0.1", [&] { with_head.step(); });
  }
  {
    ShardedLoraRite<> with_head(process.group, pairs, some_options());
    with_head.add_parameters({torch::zeros({3})}, torch::optim::AdamWOptions(1e-3), /*maximize=*/last);
    expect_error(process, "group 1: maximize true", [&] { with_head.step(); });
  }
  {
    // Pairs of one shape that are divided differently are refused, however often it is tried.
    RowShardedLoraRite<> rows(process.group, {pairs[0]}, some_options());
    const int64_t in = last ? 20 : 28;
    rows.add_pairs({random_pair("x", 4, 24, 16), random_pair("y", 4, in, 16)}, some_options());
    for (int i = 0; i < 2; ++i)
      expect_error(process, "have the same shape and are divided differently", [&] { rows.step(); });
  }
  {
    // A part that changed its shape before the first step: its rows are not those that the others were told.
    const FactorPair pair = random_pair("x", 4, 24, 16, torch::kFloat);
    RowShardedLoraRite<> rows(process.group, {pair}, some_options());
    at::Tensor a = pair.a;
    if (last) a.set_data(a.detach().narrow(1, 0, 10).clone());
    set_gradients({pair}, 1);
    expect_error(process, "pair 'x' has factors of shapes [4, 10] and [16, 4], expected 24 and 16 rows",
                 [&] { rows.step(); });
  }
  ShardedLoraRite<> optimizer(process.group, pairs, some_options());
  const auto before = clone_pairs(pairs);
  set_gradients(pairs, 1);
  at::Tensor b = pairs[2].b;
  if (last) b.mutable_grad() = at::Tensor();
  expect_error(
      process,
      "process 1 has 'pair 'q2': factor a Float[4, 24] on cpu, factor b Float[16, 4] on cpu without a gradient",
      [&] { optimizer.step(); });
  set_gradients(pairs, 1);
  if (last) optimizer.param_groups()[0].options().set_lr(5e-3);
  expect_error(process, "process 1 has 'group 0: lr 0.005' where process 0 has 'group 0: lr 0.01'",
               [&] { optimizer.step(); });
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

// --- Averaging beside backward ---------------------------------------------------------------------------------------

/// Parameters of three sizes, and a loss of those that are `used`, on data of this process alone.
std::vector<torch::Tensor> some_parameters() {
  torch::manual_seed(2);
  std::vector<torch::Tensor> parameters;
  for (const int64_t size : {5, 40, 7, 64, 3, 30}) parameters.push_back(torch::randn({size}).requires_grad_());
  return parameters;
}

torch::Tensor some_loss(const std::vector<torch::Tensor>& parameters, int seed, const std::vector<size_t>& used) {
  torch::manual_seed(static_cast<uint64_t>(seed));
  torch::Tensor loss = torch::zeros({});
  for (size_t i = 0; i < parameters.size(); ++i) {
    const auto data = torch::randn_like(parameters[i]);
    if (std::count(used.begin(), used.end(), i) > 0) loss = loss * 0.7 + (parameters[i].sin() * data).sum();
  }
  return loss;
}

std::vector<torch::Tensor> gradients_of(const std::vector<torch::Tensor>& parameters) {
  std::vector<torch::Tensor> gradients;
  for (const auto& parameter : parameters)
    gradients.push_back(parameter.grad().defined() ? parameter.grad().clone() : torch::Tensor());
  return gradients;
}

constexpr int64_t kSmallBuckets = 150;  // bytes: three buckets of some_parameters()

/// Gradients after backward and average_gradients.
std::vector<torch::Tensor> averaged_afterwards(const Process& process, int seed, const std::vector<size_t>& used) {
  const auto parameters = some_parameters();
  some_loss(parameters, seed, used).backward();
  average_gradients(parameters, process.group, kSmallBuckets);
  return gradients_of(parameters);
}

void expect_gradients(const std::vector<torch::Tensor>& parameters, const std::vector<torch::Tensor>& expected) {
  const auto found = gradients_of(parameters);
  for (size_t i = 0; i < found.size(); ++i) {
    ASSERT_EQ(found[i].defined(), expected[i].defined()) << i;
    EXPECT_TRUE(!found[i].defined() || found[i].equal(expected[i])) << i;
  }
}

void clear_gradients(const std::vector<torch::Tensor>& parameters) {
  for (torch::Tensor parameter : parameters) parameter.mutable_grad() = torch::Tensor();
}

const std::vector<size_t> kAll = {0, 1, 2, 3, 4, 5};

const Scenario overlapped("overlapped", [](const Process& process) {
  const auto parameters = some_parameters();
  {
    GradientAverager averager(parameters, process.group, kSmallBuckets);
    for (int step = 0; step < 3; ++step) {
      const int seed = 100 * step + process.rank;
      const auto expected = averaged_afterwards(process, seed, kAll);
      clear_gradients(parameters);
      some_loss(parameters, seed, kAll).backward();
      EXPECT_EQ(averager.messages_under_way(), 3U) << "all are on their way when backward ends";
      averager.finish();
      EXPECT_EQ(averager.messages_under_way(), 0U);
      expect_gradients(parameters, expected);
      EXPECT_GT(expected[0].norm().item<double>(), 0);
    }
    // Parts of a batch, of which only the last one's backward sends.
    clear_gradients(parameters);
    {
      const GradientAverager::Pause pause(averager);
      for (int part = 0; part < 2; ++part) some_loss(parameters, 10 * part + process.rank, kAll).backward();
      EXPECT_EQ(averager.messages_under_way(), 0U);
    }
    some_loss(parameters, 20 + process.rank, kAll).backward();
    averager.finish();
    const auto parts = some_parameters();
    for (int part = 0; part < 3; ++part) some_loss(parts, 10 * part + process.rank, kAll).backward();
    average_gradients(parts, process.group, kSmallBuckets);
    expect_gradients(parameters, gradients_of(parts));
  }
  // Without the averager gradients are this process's own again.
  clear_gradients(parameters);
  some_loss(parameters, process.rank, kAll).backward();
  const auto alone = some_parameters();
  some_loss(alone, process.rank, kAll).backward();
  expect_gradients(parameters, gradients_of(alone));
});

TEST(GradientAverager, MeansAreThoseOfAverageGradientsBitForBit) {
  for (const int size : {2, 4}) expect_success("overlapped", size, fresh_folder("overlapped"));
}

const Scenario overlapped_missing("overlapped missing", [](const Process& process) {
  // Process 0 lacks parameter 4, of the last bucket, process 1 parameter 1, of the first; nobody has 2.
  const std::vector<size_t> used =
      process.rank == 0 ? std::vector<size_t>{0, 1, 3, 5} : std::vector<size_t>{0, 3, 4, 5};
  const auto parameters = some_parameters();
  GradientAverager averager(parameters, process.group, kSmallBuckets);
  const auto expected = averaged_afterwards(process, process.rank, used);
  some_loss(parameters, process.rank, used).backward();
  EXPECT_EQ(averager.messages_under_way(), process.rank == 0 ? 0U : 1U) << "the first bucket waits for its turn";
  averager.finish();
  EXPECT_FALSE(parameters[2].grad().defined());
  EXPECT_TRUE(parameters[1].grad().defined());
  // Sums of two do not depend on what else is in a message.
  expect_gradients(parameters, expected);
});

TEST(GradientAverager, MissingGradientsCountAsZero) {
  expect_success("overlapped missing", 2, fresh_folder("overlapped"));
}

const Scenario overlapped_errors("overlapped errors", [](const Process& process) {
  const auto parameters = some_parameters();
  GradientAverager averager(parameters, process.group, kSmallBuckets);
  expect_error(process, "parameter 0 has a post-accumulate hook", [&] { GradientAverager(parameters, process.group); });
  const auto fresh = some_parameters();
  expect_error(process, "parameters 0 and 1 are the same tensor", [&] {
    GradientAverager(std::vector<torch::Tensor>{fresh[0], fresh[0]}, process.group);
  });
  expect_error(process, "parameter 1 is the result of a computation", [&] {
    GradientAverager(std::vector<torch::Tensor>{fresh[0], fresh[1] * 2}, process.group);
  });

  // A second backward before finish.
  some_loss(parameters, process.rank, kAll).backward();
  expect_error(process, "has got a second gradient before finish()",
               [&] { some_loss(parameters, process.rank, kAll).backward(); });
  averager.reset();

  // A backward that breaks off in one process: the others' gradients stay their own.
  clear_gradients(parameters);
  torch::Tensor loss = some_loss(parameters, process.rank, kAll);
  if (process.rank == 1) {
    const torch::Tensor part = (parameters[0] * 2).tanh();
    part.register_hook([](const at::Tensor&) -> at::Tensor { TORCH_CHECK(false, "broken off"); });
    expect_error(process, "broken off", [&] { (loss + part.sum()).backward(); });
    averager.reset();
  } else {
    loss.backward();
    const auto own = gradients_of(parameters);
    expect_error(process, "process 1: GradientAverager: this step was given up", [&] { averager.finish(); });
    expect_gradients(parameters, own);
  }

  // A gradient that cannot be averaged, in one process: nobody waits for it.
  for (const bool overlapped : {true, false}) {
    clear_gradients(parameters);
    {
      const GradientAverager::Pause pause(averager);
      some_loss(parameters, process.rank, kAll).backward();
    }
    if (process.rank == 1) {
      at::Tensor parameter = parameters[0];
      parameter.mutable_grad() = parameter.grad().to_sparse();
    }
    const std::string expected = process.rank == 1 ? "the gradient of parameter 0 has layout Sparse"
                                 : overlapped      ? "process 1: GradientAverager: the gradient of parameter 0"
                                                   : "process 1: average_gradients: the gradient of parameter 0";
    expect_error(process, expected, [&] {
      if (overlapped) return averager.finish();
      average_gradients(parameters, process.group);
    });
  }

  // And on.
  const auto expected = averaged_afterwards(process, process.rank, kAll);
  clear_gradients(parameters);
  some_loss(parameters, process.rank, kAll).backward();
  averager.finish();
  expect_gradients(parameters, expected);
});

TEST(GradientAverager, GoesOnAfterABackwardThatFailed) {
  for (const int size : {2, 4}) expect_success("overlapped errors", size, fresh_folder("overlapped"));
}

}  // namespace
}  // namespace lora_rite

int main(int argc, char** argv) { return lora_rite::testing::run_tests_or_scenario(argc, argv); }
