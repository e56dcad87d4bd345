#!/usr/bin/env bash
# In LibTorch 2.6 an optimizer can be moved into a new one, but not into another.
#
# Guess: torch::optim::Optimizer has had both moves, or neither, in every release: a class with a defaulted move
# constructor has usually a move assignment beside it.
# Found (torch 2.6.0 and 2.13.0, headers alone, g++): both have the move constructor; 2.6.0 has no assignment of any kind,
# 2.13.0 has the move assignment. So code that replaces an optimizer (optimizer = Adam(...) after a change of parameters)
# compiles with the one and not with the other.
#
# Needs unzip. Downloads 1.3 GB into a temporary folder. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat >check.cpp <<'CPP'
#include <torch/optim/adam.h>

#include <type_traits>

using torch::optim::Adam;
static_assert(std::is_move_constructible_v<Adam>);
static_assert(std::is_move_assignable_v<Adam> == IS_ASSIGNED);
CPP
for case in "torch==2.6.0 false" "torch==2.13.0 true"; do
  read -r package assigned <<<"$case"
  version=${package#torch==}
  python3 -m pip --disable-pip-version-check -q download --no-deps --only-binary :all: --python-version 3.12 "$package"
  unzip -q "torch-$version"*.whl 'torch/include/*' -d "$version"
  include=$version/torch/include
  g++ -std=c++17 -fsyntax-only -DIS_ASSIGNED="$assigned" -isystem "$include" \
    -isystem "$include/torch/csrc/api/include" check.cpp
  echo "torch $version: an Adam can be move-assigned: $assigned"
  rm -rf "$version" "torch-$version"*.whl
done
