#pragma once

#include <torch/nn/module.h>

#include <memory>
#include <string>

#include "memory_plan/plan.hpp"

namespace finetune {

/// A model, and what a batch needs beside its weights and factors.
struct ModelNeeds {
  std::shared_ptr<torch::nn::Module> model;  ///< without memory for its weights
  double activations = 0;                    ///< bytes that forward keeps for backward
  double logits = 0;                         ///< bytes; 0 for a classifier, whose logits are few
  double head = 0;                           ///< parameters of a classifier's head
  std::string dimensions;                    ///< of the batch: "4 × 128 tokens"
};

/// Of the model that config.json describes, with weights of `element` bytes. Throws as plan_memory.
ModelNeeds plan_model(const MemoryQuestion& question, double element);

}  // namespace finetune
