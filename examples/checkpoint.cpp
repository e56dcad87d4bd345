// A run that is stopped and resumed: save_checkpoint and load_checkpoint bring everything back, so that it ends with
// the same factors, bit for bit, as a run that was never stopped.
#include <torch/torch.h>
#include <lora_rite/checkpoint.hpp>
#include <lora_rite/lora_rite.hpp>

#include <unistd.h>

#include <filesystem>
#include <iostream>

struct Run {
  torch::Tensor a = torch::randn({8, 48}).div_(7).requires_grad_();  // lora_A [r, in]
  torch::Tensor b = torch::zeros({64, 8}).requires_grad_();          // lora_B [out, r]
  lora_rite::LoraRite<> optimizer{{lora_rite::FactorPair{"layer", a, b}}, lora_rite::LoraRiteOptions(1e-2)};
  lora_rite::WarmupCosine scheduler{optimizer, /*warmup_steps=*/20, /*total_steps=*/100};
  lora_rite::TrainingState state;

  Run() {
    state.tensors = {{"layer.a", a}, {"layer.b", b}};
    state.optimizers = {&optimizer};
    state.others = {&scheduler};
  }

  void train(int64_t until, const torch::Tensor& change) {
    for (; state.step < until; ++state.step) {
      const auto inputs = torch::randn({16, 48});  // drawn anew: the state has the generator, too
      optimizer.zero_grad();
      torch::matmul(inputs, (torch::matmul(b, a) - change).t()).square().mean().backward();
      optimizer.step();
      scheduler.step();
    }
  }
};

int main() {
  torch::manual_seed(0);
  const auto change = torch::matmul(torch::randn({64, 4}), torch::randn({4, 48}));
  const auto path =
      std::filesystem::temp_directory_path() / ("lora_rite_example_" + std::to_string(getpid()) + ".ckpt");

  Run whole;
  whole.train(60, change);
  lora_rite::save_checkpoint(path, whole.state);
  whole.train(100, change);

  torch::manual_seed(1);  // another process would begin with other numbers
  Run resumed;
  lora_rite::load_checkpoint(path, resumed.state);
  std::cout << "resumed after step " << resumed.state.step << '\n';
  std::filesystem::remove(path);
  resumed.train(100, change);

  const bool same = torch::equal(whole.a, resumed.a) && torch::equal(whole.b, resumed.b);
  std::cout << "after step 100 the factors are " << (same ? "the same, bit for bit" : "DIFFERENT") << '\n';
  return same ? 0 : 1;
}
