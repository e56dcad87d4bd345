#pragma once

#include <torch/types.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "models/classifier.hpp"
#include "models/language_model.hpp"

namespace finetune {

/// A classifier that was trained, and the classes that it tells apart.
struct TrainedClassifier {
  std::shared_ptr<SentenceClassifier> model;
  std::vector<std::string> classes;
};

/// The language model of `folder`, with the PEFT adapter of another folder (empty = none) beside its weights, in
/// evaluation mode. Throws Error or c10::Error naming file and field or tensor if one is missing or damaged, they do
/// not fit together, or the adapter was merged into these weights.
std::shared_ptr<LanguageModel> load_adapted_language_model(const std::filesystem::path& folder,
                                                           const std::filesystem::path& adapter, torch::Dtype dtype,
                                                           torch::Device device);

/// The classes that load_adapted_classifier's result tells apart; no other file is read. Throws Error if there is no
/// head, or it does not name them.
std::vector<std::string> read_classes(const std::filesystem::path& folder, const std::filesystem::path& adapter);

/// The BERT of `folder` likewise, with the head.safetensors of the adapter's folder, or without an adapter of its own.
/// Throws Error also if there is no head.
TrainedClassifier load_adapted_classifier(const std::filesystem::path& folder, const std::filesystem::path& adapter,
                                          torch::Device device);

}  // namespace finetune
