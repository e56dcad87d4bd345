// A module with LoRA layers: inject_lora adds the adapters and freezes the rest; LoraRite(module) trains the factors,
// and the head by AdamW.
#include <torch/torch.h>
#include <lora_rite/lora_rite.hpp>
#include <lora_rite/nn/nn.hpp>

#include <iostream>

struct Network : torch::nn::Module {
  lora_rite::nn::LoraLinear hidden{register_module("hidden", lora_rite::nn::LoraLinear(16, 64))};
  torch::nn::Linear head{register_module("head", torch::nn::Linear(64, 1))};
  torch::Tensor forward(const torch::Tensor& x) { return head->forward(torch::relu(hidden->forward(x))); }
};

int main() {
  torch::manual_seed(0);
  Network model;
  const auto inputs = torch::randn({256, 16});
  torch::Tensor targets;  // what the model would say with another hidden weight and another head
  {
    const torch::NoGradGuard no_grad;
    const auto weight = model.hidden->base_layer()->weight;
    const auto changed = weight + 0.2 * torch::matmul(torch::randn({64, 2}), torch::randn({2, 16}));
    targets = 1.5 * torch::matmul(torch::relu(torch::matmul(inputs, changed.t())), model.head->weight.t());
  }

  lora_rite::nn::LoraConfig config;
  config.rank = 4;
  config.target_modules = std::vector<std::string>{"hidden"};
  lora_rite::nn::inject_lora(model, config);
  for (auto& parameter : model.head->parameters()) parameter.requires_grad_();  // the head is trained whole
  std::cout << lora_rite::nn::trainable_parameters(model).text() << '\n';
  const auto frozen = model.hidden->base_layer()->weight.clone();

  lora_rite::LoraRite<> optimizer(model, lora_rite::LoraRiteOptions(2e-2), torch::optim::AdamWOptions(5e-3));
  lora_rite::WarmupCosine scheduler(optimizer, /*warmup_steps=*/20, /*total_steps=*/300);
  float first = 0, loss = 0;
  for (int step = 0; step <= 300; ++step) {
    optimizer.zero_grad();
    const auto error = (model.forward(inputs) - targets).square().mean();
    error.backward();
    loss = error.item<float>();
    if (step == 0) first = loss;
    if (step % 100 == 0) std::cout << "step " << step << "  loss " << loss << '\n';
    optimizer.step();
    scheduler.step();
  }
  const bool is_frozen = torch::equal(model.hidden->base_layer()->weight, frozen);
  std::cout << "the hidden layer's own weight " << (is_frozen ? "did not move" : "MOVED") << '\n';
  return is_frozen && loss < first / 100 ? 0 : 1;
}
