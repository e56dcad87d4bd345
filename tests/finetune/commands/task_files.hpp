#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "data/records.hpp"
#include "support.hpp"

namespace finetune {

inline std::string task_header(const std::string& task, const std::string& kind, bool encoder_decoder) {
  return nlohmann::json{
             {"format", "finetune-tasks 1"}, {"task", task}, {"kind", kind}, {"encoder_decoder", encoder_decoder}}
             .dump() +
         "\n";
}

/// A file as prepare_tasks.py writes it.
inline std::filesystem::path write_texts(const std::filesystem::path& path, const std::vector<TextRecord>& records,
                                         bool encoder_decoder = false, const std::string& task = "gsm8k") {
  std::string content = task_header(task, "text", encoder_decoder);
  for (const TextRecord& record : records) {
    content +=
        nlohmann::json{{"prompt", record.prompt}, {"completion", record.completion}, {"references", record.references}}
            .dump() +
        "\n";
  }
  lora_rite::test::write_bytes(path, content);
  return path;
}

/// Questions of the tiny language models' tokens, with three choices each.
inline std::vector<ChoiceRecord> tiny_choices(int64_t size = 12) {
  std::vector<ChoiceRecord> records;
  for (const TextRecord& text : tiny_texts(size, 5)) {
    ChoiceRecord record;
    record.prompts = {text.prompt};
    record.choices = {text.completion, {9, 4}, {7}};
    record.characters = {5, 2, 3};
    record.bytes = {6, 2, 4};
    record.answer = static_cast<int64_t>(records.size() % 3);
    records.push_back(record);
  }
  return records;
}

inline std::filesystem::path write_choices(const std::filesystem::path& path, const std::vector<ChoiceRecord>& records,
                                           bool encoder_decoder = false) {
  std::string content = task_header("arc", "choices", encoder_decoder);
  for (const ChoiceRecord& record : records) {
    content += nlohmann::json{{"prompts", record.prompts},
                              {"choices", record.choices},
                              {"characters", record.characters},
                              {"bytes", record.bytes},
                              {"answer", record.answer}}
                   .dump() +
               "\n";
  }
  lora_rite::test::write_bytes(path, content);
  return path;
}

/// A stand-in for the interpreter: of token ids "5 6" it makes the text "5 6 ", of texts "5 6" the ids 5 and 6, as many
/// as --max-length says.
inline std::filesystem::path write_interpreter(const std::filesystem::path& path) {
  return write_program(path,
                       "script=$1\n"
                       "while [ $# -gt 0 ]; do case $1 in --input) in=$2;; --output) out=$2;; --header) header=$2;;\n"
                       "--max-length) length=$2;; esac; shift; done\n"
                       "case $script in *decode_tokens.py) sed 's/.*/\"&\"/' \"$in\" > \"$out\";;\n"
                       "*) { printf '%s\\n' \"$header\"; cut -d ' ' -f \"1-$length\" \"$in\"; } > \"$out\";; esac\n");
}

}  // namespace finetune
