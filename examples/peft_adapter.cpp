// An adapter goes out and comes back as PEFT's files: save_adapter writes what PeftModel.from_pretrained reads,
// inject_adapter puts such a folder into a model without adapters.
#include <torch/torch.h>
#include <lora_rite/io/peft.hpp>
#include <lora_rite/nn/nn.hpp>
#include <lora_rite/nn/peft.hpp>

#include <unistd.h>

#include <filesystem>
#include <iostream>

struct Network : torch::nn::Module {
  lora_rite::nn::LoraLinear query{register_module("query", lora_rite::nn::LoraLinear(32, 32))};
  lora_rite::nn::LoraLinear value{register_module("value", lora_rite::nn::LoraLinear(32, 10))};
  torch::Tensor forward(const torch::Tensor& x) { return value->forward(torch::relu(query->forward(x))); }
};

int main() {
  torch::manual_seed(0);
  const torch::NoGradGuard no_grad;
  Network model, fresh;
  lora_rite::nn::load_base_state(fresh, lora_rite::nn::base_state(model));  // the same base
  const auto inputs = torch::randn({5, 32});

  lora_rite::nn::LoraConfig config;
  config.rank = 4;
  config.alpha = 8;
  config.target_modules = std::vector<std::string>{"query", "value"};
  config.init = lora_rite::nn::LoraInit::Random;  // as if it were trained: B is not zero
  lora_rite::nn::inject_lora(model, config);

  const auto folder = std::filesystem::temp_directory_path() / ("lora_rite_example_" + std::to_string(getpid()));
  std::filesystem::create_directory(folder);
  lora_rite::save_adapter(folder, lora_rite::nn::peft_adapter(model));
  for (const char* name : {"adapter_config.json", "adapter_model.safetensors"}) {
    std::cout << "wrote " << name << ", " << std::filesystem::file_size(folder / name) << " bytes\n";
  }
  const auto before = fresh.forward(inputs);
  lora_rite::nn::inject_adapter(fresh, lora_rite::load_adapter(folder));
  std::filesystem::remove_all(folder);

  const auto expected = model.forward(inputs), found = fresh.forward(inputs);
  std::cout << "logits differ by " << (expected - before).abs().max().item<float>() << " before, by "
            << (expected - found).abs().max().item<float>() << " after reading the adapter\n";
  return torch::equal(expected, found) && !torch::equal(expected, before) ? 0 : 1;
}
