#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace finetune {

/// A prompt and how it goes on.
struct TextRecord {
  std::vector<int64_t> prompt;
  std::vector<int64_t> completion;      ///< with the end token
  std::vector<std::string> references;  ///< the texts that count as right when the model writes its own
};

/// A question with the answers to choose from.
struct ChoiceRecord {
  std::vector<std::vector<int64_t>> prompts;  ///< one for all choices, or one for each
  std::vector<std::vector<int64_t>> choices;  ///< without an end token
  std::vector<int64_t> characters;            ///< of each choice's text, without the space before it
  std::vector<int64_t> bytes;                 ///< likewise, in UTF-8
  int64_t answer = 0;                         ///< index of the right choice

  const std::vector<int64_t>& prompt(size_t choice) const { return prompts[prompts.size() == 1 ? 0 : choice]; }
};

/// What becomes of a record that does not keep to the format.
enum class Malformed {
  Refuse,  ///< an Error naming file and line
  Skip,    ///< it is left out and its Error's message kept
};

/// What a task file is read for.
struct TaskReading {
  int64_t vocab_size = 0;  ///< ids are checked to lie in [0, vocab_size)
  bool encoder_decoder = false;
  Malformed malformed = Malformed::Refuse;
};

/// A file of prepare_tasks.py.
template <class Record>
struct TaskFile {
  std::string task;  ///< "gsm8k", "arc", …
  std::vector<Record> records;
  std::vector<std::string> skipped;  ///< why, one message a record that was left out
};

/// Reads what `prepare_tasks.py` wrote to train on, or to have the model write. Throws Error naming the file if it is
/// another file, one of choices, one for the other kind of model (encoder-decoder or not) or without records.
TaskFile<TextRecord> read_text_records(const std::filesystem::path& path, const TaskReading& reading);

/// Reads what `prepare_tasks.py --for evaluate` wrote of a form with choices; errors likewise.
TaskFile<ChoiceRecord> read_choice_records(const std::filesystem::path& path, const TaskReading& reading);

}  // namespace finetune
