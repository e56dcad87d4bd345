#!/usr/bin/env bash
# LibTorch's StepLR changes the rate one call later than Python's.
#
# Guess: torch::optim::StepLR(optimizer, 3, 0.1) has lowered the rate after its third step(), as Python's StepLR of the same
# arguments has after three calls.
# Found (LibTorch 2.13.0, g++): it counts from 0 and lowers at the fourth call, and from there on every third: 1 1 1 0.1 0.1
# 0.1 0.01, where Python has 1 1 0.1 0.1 0.1 0.01 0.01. With a step size of 1 the first call does nothing.
#
# Takes some minutes and 5 GB in a temporary folder, and needs g++. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip --disable-pip-version-check -q install torch==2.13.0 numpy
cat >check.cpp <<'CPP'
#include <torch/optim/schedulers/step_lr.h>
#include <torch/optim/sgd.h>
#include <torch/types.h>

#include <cmath>
#include <iostream>

int main() {
  torch::optim::SGD optimizer({torch::zeros({1}).requires_grad_()}, /*lr=*/1.0);
  torch::optim::StepLR scheduler(optimizer, /*step_size=*/3, /*gamma=*/0.1);
  const double seen[] = {1, 1, 1, 0.1, 0.1, 0.1, 0.01};
  bool as_found = true;
  for (const double expected : seen) {
    scheduler.step();
    const double rate = optimizer.param_groups()[0].options().get_lr();
    std::cout << rate << ' ';
    as_found = as_found && std::abs(rate - expected) < 1e-9;
  }
  std::cout << '\n';
  return as_found ? 0 : 1;
}
CPP
torch=$(venv/bin/python -c 'import torch; print(torch.__path__[0])')
g++ -std=c++17 -isystem "$torch/include" -isystem "$torch/include/torch/csrc/api/include" check.cpp -o check \
  -L"$torch/lib" -Wl,-rpath,"$torch/lib" -Wl,--no-as-needed -ltorch_cpu -ltorch -lc10
./check
