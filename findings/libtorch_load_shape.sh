#!/usr/bin/env bash
# torch::load puts parameters of another shape into a C++ module.
#
# Guess: a file of a layer with other sizes is refused, as Python's load_state_dict refuses it.
# Found (LibTorch 2.13.0, g++): the parameter takes the file's shape, without a word, and the layer's options stay. Two
# LoRA factors of rank 4 take a file of rank 8 and work at once; a scale that was computed as alpha / 4 is then twice what
# the file was trained with. The parameter is the same object as before, so an optimizer goes on with it.
#
# Takes some minutes and 5 GB in a temporary folder, and needs g++. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip --disable-pip-version-check -q install torch==2.13.0 numpy
cat >check.cpp <<'CPP'
#include <torch/nn/module.h>
#include <torch/nn/modules/linear.h>
#include <torch/serialize.h>

#include <iostream>

struct Lora : torch::nn::Module {
  torch::nn::Linear a, b;
  double scale;
  explicit Lora(int rank) : a(16, rank), b(rank, 16), scale(8.0 / rank) {
    register_module("a", a);
    register_module("b", b);
  }
  torch::Tensor forward(const torch::Tensor& x) { return b(a(x)) * scale; }
};

int main() {
  auto trained = std::make_shared<Lora>(8), loaded = std::make_shared<Lora>(4);
  const auto weight = loaded->a->weight;
  torch::save(trained, "file.pt");
  torch::load(loaded, "file.pt");
  const auto x = torch::ones({1, 16});
  const auto ratio = (loaded->forward(x).norm() / trained->forward(x).norm()).item<double>();
  std::cout << "A of rank 4 is now " << loaded->a->weight.sizes() << ", its options say "
            << loaded->a->options.out_features() << ", and the output is " << ratio << " times the trained one\n";
  const bool same = weight.is_same(loaded->a->weight);
  return loaded->a->weight.size(0) == 8 && loaded->a->options.out_features() == 4 && same && ratio > 1.99 ? 0 : 1;
}
CPP
torch=$(venv/bin/python -c 'import torch; print(torch.__path__[0])')
g++ -std=c++17 -isystem "$torch/include" -isystem "$torch/include/torch/csrc/api/include" check.cpp -o check \
  -L"$torch/lib" -Wl,-rpath,"$torch/lib" -Wl,--no-as-needed -ltorch_cpu -ltorch -lc10
./check
