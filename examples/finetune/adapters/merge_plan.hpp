#pragma once

#include <torch/types.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "adapters/adapter_files.hpp"
#include "models/base_checkpoint.hpp"

namespace finetune {

/// What is added to one tensor: a sum in the order of the adapters.
struct WeightChange {
  const AdapterLayer* layer;
  double weight;
};

/// The two names of a matrix that is embedding and output, of which a checkpoint needs one.
struct TiedMatrix {
  std::string embedding;  ///< "model.embed_tokens.weight"
  std::string output;     ///< "lm_head.weight"
  std::string stored;     ///< the one that is in the checkpoint
};

/// How a merged checkpoint differs from its base.
struct MergePlan {
  explicit MergePlan(const BaseCheckpoint& base);

  std::map<std::string, std::vector<WeightChange>> changes;  ///< by the tensor's name
  std::map<std::string, torch::Tensor> replacements;         ///< what stands in the place of the base's tensor
  /// The matrix that is embedding and output. Where an adapter changes one of both, both are written.
  std::optional<TiedMatrix> tied;
  bool unties = false;

  /// The tensors of the merged checkpoint, and the base's tensor that each comes from.
  std::map<std::string, std::string> tensors(const BaseCheckpoint& base) const;
};

/// The base's tensor that is the weight of a module which the adapter changes; of a tied matrix the one that is there.
/// Throws Error as BaseCheckpoint::tensor_of.
std::string stored_weight(const BaseCheckpoint& base, const std::string& module, const AdapterFile& adapter);

/// Adds an adapter to the plan, times `weight`. Throws Error or c10::Error naming adapter, module and reason where they
/// do not fit together, the adapter is more than a merged checkpoint can hold, or it replaces something (biases,
/// modules trained whole) and is not alone.
void plan_adapter(const BaseCheckpoint& base, const AdapterFile& adapter, double weight, bool is_alone,
                  MergePlan& plan);

/// The tensor of this name as the merged checkpoint has it, `source` being the base's: the sum is made in float (or
/// double) and rounded once. Throws Error if a value that is finite in the base is not finite in the dtype.
torch::Tensor merged_tensor(const BaseCheckpoint& base, const MergePlan& plan, const std::string& name,
                            const std::string& source, c10::ScalarType dtype);

/// Sets config.json's tie_word_embeddings to false.
void write_untied(const std::filesystem::path& config);

}  // namespace finetune
