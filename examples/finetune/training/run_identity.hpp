#pragma once

#include <ATen/core/ivalue.h>
#include <torch/nn/module.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "common/fingerprint.hpp"

namespace finetune {

/// One of the things that a run is begun with.
struct RunPart {
  std::string name;     ///< "training data", "base weights", …
  std::string origin;   ///< the file or folder that it comes from: said in messages, and no part of what it is
  std::string content;  ///< what tells it apart, such as "45 examples of fingerprint 0123456789abcdef"
  bool is_saved;  ///< whether a saved adapter depends on it beside what is trained: PiSSA's base, a head's classes
};

/// What a run is, beside its options (RunOptions): its data, its base and its tokenizer, each by its content alone, so
/// that moved folders and other shards are the same. Workload::identity() says it, every checkpoint remembers it,
/// processes that train together compare it.
using RunIdentity = std::vector<RunPart>;

/// Data that are `count` examples with this fingerprint.
RunPart data_part(const std::string& name, const std::string& origin, int64_t count, const Fingerprint& fingerprint);

/// Of a base without adapters, as it was loaded from `folder`: its weights (all of them, by name, shape and value, at
/// some GB a second), its config.json, generation_config.json and tokenizer.json, as far as they are there.
RunIdentity base_identity(const torch::nn::Module& base, const std::filesystem::path& folder);

/// A line each, for Processes::check_same.
std::string lines_of(const RunIdentity& identity);

/// Puts an identity into the values of a checkpoint, in place of one that is there.
void remember(const RunIdentity& identity, std::map<std::string, c10::IValue>& values);

/// Where the run that a checkpoint remembers was begun otherwise.
struct RunDifference {
  bool is_unknown = false;  ///< it remembers nothing: it was written before checkpoints did
  std::string text;         ///< each part that differs, as it was and as it is; empty if none does
};

/// Compares the parts that `identity` has with a checkpoint's values.
RunDifference compare(const RunIdentity& identity, const std::map<std::string, c10::IValue>& values);

}  // namespace finetune
