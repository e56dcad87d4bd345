#!/usr/bin/env bash
# LibTorch's ReduceLROnPlateauScheduler takes every negative metric that is to be maximised for a bad one.
#
# Guess: in its mode "max" a metric that rises by 1 at each call keeps the rate, whatever its sign, as in Python.
# Found (LibTorch 2.13.0, g++): the best value begins not at minus infinity, so that of -10, -9, -8, … none counts as better:
# with a patience of 1 the rate is 1 0.1 0.1 0.01 0.01 0.001 …. A log-likelihood, or a loss with its sign turned, lowers the
# rate while all goes well. A metric that is positive from the start is judged as in Python.
#
# Takes some minutes and 5 GB in a temporary folder, and needs g++. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip --disable-pip-version-check -q install torch==2.13.0 numpy
cat >check.cpp <<'CPP'
#include <torch/optim/schedulers/reduce_on_plateau_scheduler.h>
#include <torch/optim/sgd.h>
#include <torch/types.h>

#include <cmath>
#include <iostream>

// The rate after six calls with a metric that rises from `first`.
double last_rate(float first) {
  using torch::optim::ReduceLROnPlateauScheduler;
  torch::optim::SGD optimizer({torch::zeros({1}).requires_grad_()}, /*lr=*/1.0);
  ReduceLROnPlateauScheduler scheduler(optimizer, ReduceLROnPlateauScheduler::max, /*factor=*/0.1, /*patience=*/1);
  std::cout << "from " << first << ':';
  for (int call = 0; call < 6; ++call) {
    scheduler.step(first + static_cast<float>(call));
    std::cout << ' ' << optimizer.param_groups()[0].options().get_lr();
  }
  std::cout << '\n';
  return optimizer.param_groups()[0].options().get_lr();
}

int main() { return std::abs(last_rate(-10) - 1e-3) < 1e-9 && last_rate(1) == 1 ? 0 : 1; }
CPP
torch=$(venv/bin/python -c 'import torch; print(torch.__path__[0])')
g++ -std=c++17 -isystem "$torch/include" -isystem "$torch/include/torch/csrc/api/include" check.cpp -o check \
  -L"$torch/lib" -Wl,-rpath,"$torch/lib" -Wl,--no-as-needed -ltorch_cpu -ltorch -lc10
./check
