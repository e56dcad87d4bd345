#pragma once

#include <torch/types.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace finetune {

/// One line of a data file.
struct LabelledText {
  std::string label;
  std::string text;
  int64_t line;  ///< counted from 1, for messages
};

/// Reads lines of the form `label TAB text` (UTF-8; LF or CRLF; blank lines are skipped; further tabs
/// belong to the text). A line without tab, label or text is an Error naming file and line.
std::vector<LabelledText> read_tsv(const std::filesystem::path& path);

/// The labels in `rows`, sorted, each once. Fewer than two are an Error.
std::vector<std::string> find_classes(const std::vector<LabelledText>& rows, const std::filesystem::path& path);

/// Each row's index into `classes`; a label that is not among them is an Error naming the line.
std::vector<int64_t> index_labels(const std::vector<LabelledText>& rows, const std::vector<std::string>& classes,
                                  const std::filesystem::path& path);

/// Tokenised sentences with their class.
struct Dataset {
  std::vector<std::vector<int64_t>> tokens;  ///< with the special tokens, without padding
  std::vector<int64_t> labels;

  int64_t size() const { return static_cast<int64_t>(labels.size()); }
};

/// What the model takes in one step.
struct Batch {
  torch::Tensor tokens;  ///< [batch, length] int64, padded on the right to the batch's longest
  torch::Tensor mask;    ///< [batch, length] bool, true where a token stands
  torch::Tensor labels;  ///< [batch] int64
};

/// Gathers the examples at `indices`.
Batch make_batch(const Dataset& data, const std::vector<int64_t>& indices, int64_t pad_token);

/// Which examples each training step takes: the data in a new order every epoch.
///
/// The order is a pure function of size, seed and step, the same on every machine: a resumed run
/// needs to know its step alone.
class BatchOrder {
 public:
  BatchOrder(int64_t size, int64_t batch, uint64_t seed);

  /// Indices of the examples of `step` (from 0). A batch may reach into the next epoch.
  std::vector<int64_t> indices(int64_t step);

 private:
  void shuffle(int64_t epoch);

  int64_t size_;
  int64_t batch_;
  uint64_t seed_;
  int64_t epoch_ = -1;
  std::vector<int64_t> order_;
};

/// Batches for evaluation: sorted by length, so that little is padding.
std::vector<std::vector<int64_t>> batches_by_length(const Dataset& data, int64_t batch);

}  // namespace finetune
