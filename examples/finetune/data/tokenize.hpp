#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace finetune {

/// How sentences become tokens.
struct TokenizerOptions {
  std::filesystem::path model;  ///< folder with tokenizer.json
  int64_t max_length = 128;     ///< longer sentences are cut, special tokens included
  std::string python;           ///< interpreter with the package `tokenizers`
};

/// Token ids of each text, with the model's special tokens. The work is done by tokenize_text.py;
/// its result stays in `cache` and is used again while texts, tokenizer and max_length are the same.
/// Ids are checked to lie in [0, vocab_size).
std::vector<std::vector<int64_t>> tokenize(const std::vector<std::string>& texts, const TokenizerOptions& options,
                                           int64_t vocab_size, const std::filesystem::path& cache);

}  // namespace finetune
