#pragma once

#include <c10/core/ScalarType.h>

#include <filesystem>
#include <memory>

#include "models/language_model.hpp"

namespace finetune {

/// The model that `folder`'s config.json describes, without weights and without memory for them: each is one zero, seen
/// many times. Errors of config.json as load_model's.
std::shared_ptr<LanguageModel> build_model(const std::filesystem::path& folder);

/// Builds the model that `folder`'s config.json describes by `model_type` (llama, gemma, gemma2, t5, mt5) and fills it
/// from its BaseCheckpoint. dtype: torch::kFloat or torch::kBFloat16.
///
/// Throws Error naming file, field or tensor, what was found and what was expected: as BaseCheckpoint does, if the
/// config asks for something this program has not, if a tensor is missing or has another shape, and if the checkpoint
/// has one that the model has not. An output matrix that the checkpoint holds beside the embedding is tied to it only
/// where both are equal.
std::shared_ptr<LanguageModel> load_model(const std::filesystem::path& folder, c10::ScalarType dtype = c10::kFloat);

}  // namespace finetune
