// A teacher–student regression that a LoRA pair has to learn: one linear layer, a low-rank target with a wide spectrum,
// correlated inputs, label noise. Prints one JSON line a run; `study.py` sets optimizers and rates against each other.

#include <torch/torch.h>
#include <lora_rite/baselines/registry.hpp>
#include <lora_rite/lora_rite.hpp>
#include <lora_rite/schedulers.hpp>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cmath>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "../without_decay.hpp"

namespace {

struct Task {
  int64_t in = 160, out = 96;
  int64_t target_rank = 8;
  double condition = 100;  ///< of the target: its singular values lie evenly on a log scale
  double correlation = 1;  ///< c: the inputs' covariance has the eigenvalues i^{-c}
  double noise = 0.05;     ///< of the labels, relative to their root mean square
  int64_t batch = 64;
};

struct Run {
  std::string optimizer = "rite";
  int64_t rank = 16;
  double init_scale = 1;  ///< A is multiplied by it at the start; B = 0
  int64_t steps = 600;
  int64_t warmup = 0;
};

torch::Tensor random_rotation(int64_t size) {
  return std::get<0>(torch::linalg_qr(torch::randn({size, size}, torch::kDouble)));
}

/// y = W x + noise, x ~ N(0, C).
struct Teacher {
  torch::Tensor target;        ///< W [out, in]
  torch::Tensor input_root;    ///< C^{1/2} [in, in], of trace(C) = in
  double noise_deviation = 0;  ///< of each label

  explicit Teacher(const Task& task) {
    const auto row = [](const torch::Tensor& x) { return x.unsqueeze(0); };
    const torch::Tensor variances = torch::arange(1, task.in + 1, torch::kDouble).pow(-task.correlation);
    const torch::Tensor directions = random_rotation(task.in);
    input_root = (directions * row((variances * (static_cast<double>(task.in) / variances.sum())).sqrt()))
                     .matmul(directions.t());
    const torch::Tensor spectrum =
        torch::logspace(0, -std::log10(task.condition), task.target_rank, 10.0, torch::kDouble);
    target = (random_rotation(task.out).slice(1, 0, task.target_rank) * row(spectrum))
                 .matmul(random_rotation(task.in).slice(1, 0, task.target_rank).t());
    noise_deviation = task.noise * target.matmul(input_root).norm().item<double>() / std::sqrt(task.out);
    target = target.to(torch::kFloat);
    input_root = input_root.to(torch::kFloat);
  }

  /// E‖(W' − W) x‖² / E‖W x‖².
  double relative_error(const torch::Tensor& student) const {
    const double error = (student - target).matmul(input_root).norm().item<double>();
    const double size = target.matmul(input_root).norm().item<double>();
    return error * error / (size * size);
  }
};

/// Trains a pair and returns the relative error after each twentieth of the steps.
std::vector<double> train(const Task& task, const Run& run, torch::optim::Optimizer& optimizer,
                          const lora_rite::FactorPair& pair, const Teacher& teacher) {
  torch::NoGradGuard no_grad;
  torch::Tensor a = pair.a, b = pair.b;
  lora_rite::WarmupLinear scheduler(optimizer, run.warmup, run.steps);
  std::vector<double> errors;
  for (int64_t step = 1; step <= run.steps; ++step) {
    const torch::Tensor x = torch::randn({task.batch, task.in}).matmul(teacher.input_root);  // [batch, in]
    const torch::Tensor noise = torch::randn({task.batch, task.out}) * teacher.noise_deviation;
    const torch::Tensor down = x.matmul(a.t());  // [batch, rank]
    // of half the squared error, summed over outputs and averaged over the batch
    const torch::Tensor residual =
        (down.matmul(b.t()) - x.matmul(teacher.target.t()) - noise) / static_cast<double>(task.batch);
    b.mutable_grad() = residual.t().matmul(down);
    a.mutable_grad() = residual.matmul(b).t().matmul(x);
    optimizer.step();
    scheduler.step();
    if (step % std::max<int64_t>(1, run.steps / 20) == 0) errors.push_back(teacher.relative_error(b.matmul(a)));
  }
  return errors;
}

}  // namespace

int main(int argc, char** argv) try {
  Task task;
  Run run;
  lora_rite::LoraRiteOptions rite;
  double beta2 = 0.999, clip = 1, lr_ratio_b = 1, max_relative_change = 0, exponent = 0.5;
  bool escape = true, row_equilibration = false;
  std::vector<double> rates = {1e-2};
  std::vector<uint64_t> seeds = {0};
  CLI::App app("Trains a LoRA pair on a teacher–student regression; one JSON line a run", "regression");
  const auto add = [&](const char* name, auto& value, const char* help) {
    app.add_option(name, value, help)->capture_default_str();
  };
  add("--optimizer", run.optimizer, "A name of the registry");
  add("--lr", rates, "Peak learning rates, one run each");
  add("--seed", seeds, "Seeds of teacher, start and inputs, one run each");
  add("--rank", run.rank, "Rank of the pair");
  add("--init-scale", run.init_scale, "Multiplies A at the start, where B = 0");
  add("--steps", run.steps, "Steps; the rate falls linearly to 0");
  add("--warmup", run.warmup, "Steps over which the rate rises");
  add("--in", task.in, "Width of the inputs");
  add("--out", task.out, "Width of the outputs");
  add("--condition", task.condition, "Condition number of the target");
  add("--correlation", task.correlation, "Exponent of the inputs' spectrum");
  add("--noise", task.noise, "Label noise, relative");
  add("--batch", task.batch, "Examples a step");
  add("--beta2", beta2, "rite: decay rate of the second moment");
  add("--clip", clip, "rite: bound on the norm of the unmagnified gradient, 0 = off");
  add("--escape", escape, "rite: keep the escaped mass");
  add("--preconditioner-exponent", exponent,
      "rite: 0.5 divides each direction by its second moment's root, 0 all alike");
  add("--max-relative-change", max_relative_change, "rite: bound on a factor's relative change a step, 0 = off");
  add("--row-equilibration", row_equilibration, "rite: adapt from row to row as well");
  add("--lr-ratio-b", lr_ratio_b, "rite: rate of B divided by the rate of A");
  CLI11_PARSE(app, argc, argv);
  at::set_num_threads(1);

  for (const double lr : rates) {
    for (const uint64_t seed : seeds) {
      torch::manual_seed(seed);
      const Teacher teacher(task);
      const double bound = 1 / std::sqrt(static_cast<double>(task.in));  // PEFT's initialisation
      lora_rite::FactorPair pair{
          "", (torch::rand({run.rank, task.in}) * 2 - 1).mul_(bound * run.init_scale).requires_grad_(),
          torch::zeros({task.out, run.rank}).requires_grad_()};
      std::unique_ptr<torch::optim::Optimizer> optimizer;
      if (run.optimizer == "rite") {
        optimizer =
            std::make_unique<lora_rite::LoraRite<>>(std::vector{pair}, rite.lr(lr)
                                                                           .betas({0.9, beta2})
                                                                           .clip_unmagnified_norm(clip)
                                                                           .escape(escape)
                                                                           .lr_ratio_b(lr_ratio_b)
                                                                           .preconditioner_exponent(exponent)
                                                                           .max_relative_change(max_relative_change)
                                                                           .row_equilibration(row_equilibration));
      } else {
        optimizer = lora_rite::make_optimizer(run.optimizer, {pair}, lr);
        bench::without_decay(*optimizer);
      }
      const auto start = std::chrono::steady_clock::now();
      std::vector<double> errors = {std::nan("")};
      try {
        errors = train(task, run, *optimizer, pair, teacher);
      } catch (const c10::LinAlgError&) {  // an eigensolver met NaN: the run diverged
      }
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
      // A number that is not finite becomes null.
      std::cout << nlohmann::json{{"lr", lr},
                                  {"seed", seed},
                                  {"test_loss", errors.back()},
                                  {"curve", errors},
                                  {"ms_per_step", 1e3 * seconds.count() / static_cast<double>(run.steps)}}
                       .dump()
                << std::endl;
    }
  }
  return 0;
} catch (const c10::Error& error) {
  std::cerr << "regression: " << error.what_without_backtrace() << '\n';
  return 1;
}
