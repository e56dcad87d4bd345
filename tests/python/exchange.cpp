// Steps of the optimizer in C++, from and to files, for python/tests/test_files.py.
//
//     lora_rite_exchange FOLDER STEPS FIRST
//
// FOLDER/factors are the values of all parameters, FOLDER/optimizer.pt is the optimizer, if it is there; both are
// written anew. The gradients of step `number` are cos((1 + number) · parameter).

#include <torch/torch.h>
#include <lora_rite/lora_rite.hpp>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const std::filesystem::path folder = argv[1];
  const int steps = std::stoi(argv[2]), first = std::stoi(argv[3]);

  std::vector<lora_rite::FactorPair> pairs;
  std::vector<torch::Tensor> all;
  for (const auto& [name, in, out, rank] : {std::tuple{"x", 8, 6, 2}, {"y", 8, 4, 3}, {"z", 8, 6, 2}}) {
    pairs.push_back({name, torch::zeros({rank, in}).requires_grad_(), torch::zeros({out, rank}).requires_grad_()});
    all.insert(all.end(), {pairs.back().a, pairs.back().b});
  }
  all.push_back(torch::zeros({5}).requires_grad_());

  std::ifstream in(folder / "factors", std::ios::binary);
  for (const torch::Tensor& tensor : all)
    in.read(static_cast<char*>(tensor.data_ptr()), static_cast<std::streamsize>(tensor.nbytes()));
  if (!in) return 3;

  lora_rite::LoraRite<> optimizer(pairs, lora_rite::LoraRiteOptions(1e-2).weight_decay(0.1));
  optimizer.add_parameters({all.back()}, torch::optim::AdamWOptions(1e-2).weight_decay(0.1));
  const std::string path = folder / "optimizer.pt";
  if (std::filesystem::exists(path)) torch::load(optimizer, path);

  for (int number = first; number < first + steps; ++number) {
    for (torch::Tensor& tensor : all) tensor.mutable_grad() = (tensor.detach() * (1 + number)).cos();
    optimizer.step();
  }

  torch::save(optimizer, path);
  std::ofstream out(folder / "factors", std::ios::binary);
  for (const torch::Tensor& tensor : all)
    out.write(static_cast<const char*>(tensor.data_ptr()), static_cast<std::streamsize>(tensor.nbytes()));
  return out ? 0 : 3;
}
