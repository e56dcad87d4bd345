// Two processes train together over Gloo: each takes half of every batch, average_gradients averages their gradients,
// and ShardedLoraRite divides the optimizer's state and work. Both end where one process alone ends.
#include <torch/torch.h>
#include <lora_rite/distributed.hpp>
#include <lora_rite/lora_rite.hpp>

#include <sys/wait.h>
#include <unistd.h>
#include <torch/csrc/distributed/c10d/FileStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include <chrono>
#include <filesystem>
#include <iostream>

std::vector<lora_rite::FactorPair> start() {
  torch::manual_seed(0);  // the same start and the same batches everywhere
  return {{"query", torch::randn({8, 48}).div_(7).requires_grad_(), torch::zeros({64, 8}).requires_grad_()},
          {"value", torch::randn({8, 48}).div_(7).requires_grad_(), torch::zeros({64, 8}).requires_grad_()}};
}

torch::Tensor train(torch::optim::Optimizer& optimizer, const std::vector<lora_rite::FactorPair>& pairs,
                    const lora_rite::ProcessGroup& group, int rank) {
  const auto change = torch::randn({64, 48});
  for (int step = 0; step < 100; ++step) {
    const auto batch = torch::randn({32, 48});
    const auto own = group ? batch.chunk(2)[rank] : batch;
    optimizer.zero_grad();
    for (const auto& pair : pairs) {
      torch::matmul(own, (torch::matmul(pair.b, pair.a) - change).t()).square().mean().backward();
    }
    if (group) lora_rite::average_gradients(optimizer, group);
    optimizer.step();
  }
  return torch::cat({pairs[0].a.flatten(), pairs[0].b.flatten(), pairs[1].a.flatten(), pairs[1].b.flatten()});
}

int main() {
  const auto store = std::filesystem::temp_directory_path() / ("lora_rite_example_" + std::to_string(getpid()));
  const int rank = fork() == 0 ? 1 : 0;  // before LibTorch has started a thread
  auto options = c10d::ProcessGroupGloo::Options::create(std::chrono::seconds(60));
  options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname("127.0.0.1"));
  const lora_rite::ProcessGroup group = c10::make_intrusive<c10d::ProcessGroupGloo>(
      c10::make_intrusive<c10d::FileStore>(store.string(), 2), rank, 2, options);

  const auto pairs = start();
  lora_rite::ShardedLoraRite<> optimizer(group, pairs, lora_rite::LoraRiteOptions(1e-2));
  const auto factors = train(optimizer, pairs, group, rank).detach();
  lora_rite::check_same({static_cast<const char*>(factors.data_ptr()), factors.nbytes()}, group);  // else throws
  if (rank == 1) return 0;
  int status = 0;
  wait(&status);
  std::filesystem::remove(store);
  const auto alone = start();
  lora_rite::LoraRite<> usual(alone, lora_rite::LoraRiteOptions(1e-2));
  const float apart = ((train(usual, alone, nullptr, 0) - factors).norm() / factors.norm()).item<float>();
  std::cout << "both have the same factors, bit for bit; one process alone has them up to " << apart << '\n';
  return status == 0 && apart < 1e-4 ? 0 : 1;
}
