#!/usr/bin/env bash
# A clone of a LibTorch module trains what was frozen in the module.
#
# Guess: torch::nn::Module::clone() keeps requires_grad of each parameter, as Python's copy.deepcopy(model) does.
# Found (LibTorch 2.13.0, g++): it makes the parameters anew by reset() and takes only their data over. A frozen base comes
# back trainable, and a LoRA model's clone hands an optimizer all its weights.
#
# Takes some minutes and 5 GB in a temporary folder, and needs g++. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip --disable-pip-version-check -q install torch==2.13.0 numpy
cat >check.cpp <<'CPP'
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/linear.h>

#include <iostream>

struct Model : torch::nn::Cloneable<Model> {
  torch::nn::Linear base{nullptr}, head{nullptr};
  Model() { reset(); }
  void reset() override {
    base = register_module("base", torch::nn::Linear(4, 3));
    head = register_module("head", torch::nn::Linear(3, 2));
  }
};

int trained(torch::nn::Module& module) {
  int count = 0;
  for (const auto& parameter : module.parameters()) count += parameter.requires_grad();
  return count;
}

int main() {
  Model model;
  for (auto& parameter : model.base->parameters()) parameter.requires_grad_(false);
  const int before = trained(model), after = trained(*model.clone());
  std::cout << before << " of 4 parameters are trained in the model, " << after << " in its clone\n";
  return before == 2 && after == 4 ? 0 : 1;
}
CPP
torch=$(venv/bin/python -c 'import torch; print(torch.__path__[0])')
g++ -std=c++17 -isystem "$torch/include" -isystem "$torch/include/torch/csrc/api/include" check.cpp -o check \
  -L"$torch/lib" -Wl,-rpath,"$torch/lib" -Wl,--no-as-needed -ltorch_cpu -ltorch -lc10
./check
