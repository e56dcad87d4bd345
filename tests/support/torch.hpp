#pragma once

/// The parts of LibTorch that most tests use; what else one needs it includes itself. torch/torch.h has all modules,
/// their functional forms and data loaders, and costs each file four seconds more, even where it is precompiled.

#include <torch/nn/cloneable.h>
#include <torch/nn/init.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/sgd.h>
#include <torch/serialize.h>
#include <torch/types.h>
#include <torch/utils.h>
