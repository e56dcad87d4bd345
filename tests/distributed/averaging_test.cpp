// average_gradients, and GradientAverager beside backward, over Gloo.

#include "distributed/support.hpp"

namespace lora_rite::test {
namespace {

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
    parameters[1].mutable_grad() = last ? full({1, 2}, 1, torch::kHalf).expand({3, 2}) : full({3, 2}, 1, torch::kHalf);
    expect_refusal(parameters, {"parameter 1", "elements that do not overlap"}, average);
    // Other strides are nobody's business.
    const at::Tensor values = torch::arange(6).to(torch::kHalf).view({3, 2});
    parameters[1].mutable_grad() = last ? values.t().contiguous().t() : values.clone();
    average();
    EXPECT_TRUE(parameters[1].grad().equal(values));
  }
});

TEST(AverageGradients, ProcessesAgreeOnDtypesAndShapesBeforeTheySend) {
  expect_success("average dtypes", 2, fresh_folder("dtypes"), /*timeout_seconds=*/10);
}

const Scenario average_large_halves("average large halves", [](const Process& process) {
  const auto parameters = half_parameters();
  GradientAverager averager(parameters, process.group);
  for (const bool overlapped : {false, true}) {
    // Their sum is beyond 65504, the largest half; quarters of them are exact.
    const double large = 40000, own = process.rank == 0 ? 1.0 : -3.0;
    if (overlapped) {
      for (torch::Tensor parameter : parameters) parameter.mutable_grad() = torch::Tensor();
      (parameters[0] * large).sum().backward();
      (parameters[1] * own).sum().backward();
      EXPECT_EQ(averager.messages_under_way(), 1U);
      averager.finish();
    } else {
      torch::Tensor(parameters[0]).mutable_grad() = torch::full({4}, large, torch::kHalf);
      torch::Tensor(parameters[1]).mutable_grad() = torch::full({3, 2}, own, torch::kHalf);
      average_gradients(parameters, process.group);
    }
    EXPECT_TRUE(parameters[0].grad().equal(torch::full({4}, large, torch::kHalf)));
    const double mean = (1.0 - 3.0 * (process.size - 1)) / process.size;
    EXPECT_TRUE(parameters[1].grad().equal(torch::full({3, 2}, mean, torch::kHalf)));
  }
});

TEST(AverageGradients, OfHalvesAreFiniteWhereTheirSumIsNot) {
  for (const int size : {2, 4}) expect_success("average large halves", size, fresh_folder("halves"));
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
  expect_error("parameter 0 has a post-accumulate hook", [&] { GradientAverager(parameters, process.group); });
  const auto fresh = some_parameters();
  expect_error("parameters 0 and 1 are the same tensor", [&] {
    GradientAverager(std::vector<torch::Tensor>{fresh[0], fresh[0]}, process.group);
  });
  expect_error("parameter 1 is the result of a computation", [&] {
    GradientAverager(std::vector<torch::Tensor>{fresh[0], fresh[1] * 2}, process.group);
  });

  // A second backward before finish.
  some_loss(parameters, process.rank, kAll).backward();
  expect_error("has got a second gradient before finish()",
               [&] { some_loss(parameters, process.rank, kAll).backward(); });
  averager.reset();

  // A backward that breaks off in one process: the others' gradients stay their own.
  clear_gradients(parameters);
  torch::Tensor loss = some_loss(parameters, process.rank, kAll);
  if (process.rank == 1) {
    const torch::Tensor part = (parameters[0] * 2).tanh();
    part.register_hook([](const at::Tensor&) -> at::Tensor { TORCH_CHECK(false, "broken off"); });
    expect_error("broken off", [&] { (loss + part.sum()).backward(); });
    averager.reset();
  } else {
    loss.backward();
    const auto own = gradients_of(parameters);
    expect_error("process 1: GradientAverager: this step was given up", [&] { averager.finish(); });
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
    expect_error(expected, [&] {
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
}  // namespace lora_rite::test
