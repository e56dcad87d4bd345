#include "data/records.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string_view>

#include "common/error.hpp"
#include "common/files.hpp"

namespace finetune {
namespace {

constexpr std::string_view kFormat = "finetune-tasks 1";  // prepare_tasks.py's FORMAT

const nlohmann::json& field(const nlohmann::json& record, const char* name) {
  const auto found = record.find(name);
  if (found == record.end()) fail("has no '", name, "'");
  return *found;
}

void only_fields(const nlohmann::json& record, const std::vector<std::string_view>& names) {
  for (const auto& item : record.items()) {
    if (std::find(names.begin(), names.end(), item.key()) == names.end())
      fail("has an unknown field '", item.key(), "'");
  }
}

int64_t number(const nlohmann::json& value, const char* name, int64_t begin, int64_t end) {
  const bool fits = value.is_number_integer() && !(value.is_number_unsigned() && value.get<uint64_t>() > INT64_MAX) &&
                    value.get<int64_t>() >= begin && value.get<int64_t>() < end;
  if (!fits)
    fail("has ", value.dump(), " in '", name, "' where a number from ", begin, " to ", end - 1, " is expected");
  return value.get<int64_t>();
}

std::vector<int64_t> numbers(const nlohmann::json& value, const char* name, int64_t begin, int64_t end) {
  if (!value.is_array() || value.empty()) fail("has no list of numbers in '", name, "'");
  std::vector<int64_t> result;
  result.reserve(value.size());
  for (const nlohmann::json& element : value) result.push_back(number(element, name, begin, end));
  return result;
}

std::vector<std::vector<int64_t>> token_lists(const nlohmann::json& value, const char* name, int64_t vocab_size) {
  if (!value.is_array() || value.empty()) fail("has no list of token lists in '", name, "'");
  std::vector<std::vector<int64_t>> result;
  result.reserve(value.size());
  for (const nlohmann::json& element : value) result.push_back(numbers(element, name, 0, vocab_size));
  return result;
}

void parse(const nlohmann::json& json, int64_t vocab_size, TextRecord& record) {
  only_fields(json, {"prompt", "completion", "references"});
  record.prompt = numbers(field(json, "prompt"), "prompt", 0, vocab_size);
  record.completion = numbers(field(json, "completion"), "completion", 0, vocab_size);
  const nlohmann::json& references = field(json, "references");
  if (!references.is_array() || references.empty()) fail("has no list of texts in 'references'");
  for (const nlohmann::json& reference : references) {
    if (!reference.is_string()) fail("has ", reference.dump(), " in 'references' where a text is expected");
    record.references.push_back(reference.get<std::string>());
  }
}

void parse(const nlohmann::json& json, int64_t vocab_size, ChoiceRecord& record) {
  only_fields(json, {"prompts", "choices", "characters", "bytes", "answer"});
  record.prompts = token_lists(field(json, "prompts"), "prompts", vocab_size);
  record.choices = token_lists(field(json, "choices"), "choices", vocab_size);
  record.characters = numbers(field(json, "characters"), "characters", 1, INT64_MAX);
  record.bytes = numbers(field(json, "bytes"), "bytes", 1, INT64_MAX);
  const size_t count = record.choices.size();
  if (record.prompts.size() != 1 && record.prompts.size() != count) {
    fail("has ", record.prompts.size(), " 'prompts' for ", count, " 'choices'");
  }
  if (record.characters.size() != count || record.bytes.size() != count) {
    fail("has ", record.characters.size(), " 'characters' and ", record.bytes.size(), " 'bytes' for ", count,
         " 'choices'");
  }
  record.answer = number(field(json, "answer"), "answer", 0, static_cast<int64_t>(count));
}

// The first line says what the file is.
std::string check_header(const nlohmann::json& header, std::string_view kind, bool encoder_decoder) {
  const auto task = header.is_object() ? header.find("task") : header.end();
  if (!header.is_object() || header.value("format", nlohmann::json()) != kFormat || task == header.end() ||
      !task->is_string()) {
    fail("is not the first line of a task file ('", kFormat, "'); make one with prepare_tasks.py");
  }
  if (header.value("kind", nlohmann::json()) != kind) {
    fail("the file holds ", header.value("kind", nlohmann::json()).dump(), " records where \"", kind,
         "\" is expected; prepare_tasks.py --for ", kind == "text" ? "train" : "evaluate", " makes them");
  }
  if (header.value("encoder_decoder", nlohmann::json()) != encoder_decoder) {
    fail("the file is made for ", encoder_decoder ? "a decoder" : "an encoder-decoder", " and the model is ",
         encoder_decoder ? "an encoder-decoder" : "a decoder", "; prepare it with this model");
  }
  return task->get<std::string>();
}

template <class Record>
TaskFile<Record> read_records(const std::filesystem::path& path, std::string_view kind, const TaskReading& reading) {
  std::istringstream content(read_file(path));
  TaskFile<Record> file;
  std::string line;
  for (int64_t number = 1; std::getline(content, line); ++number) {
    const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    try {
      if (number == 1) {
        file.task = check_header(json, kind, reading.encoder_decoder);
        continue;
      }
      if (!json.is_object()) fail("is no JSON object");
      Record record;
      parse(json, reading.vocab_size, record);
      file.records.push_back(std::move(record));
    } catch (const Error& error) {
      const std::string message = concat(path.string(), ":", number, ": ", error.what());
      if (number == 1) throw Error(message);
      if (reading.malformed == Malformed::Refuse) throw Error(message + "; make the file again with prepare_tasks.py");
      file.skipped.push_back(message);
    }
  }
  if (file.records.empty()) {
    fail(path.string(), ": holds no record of a task; make the file with prepare_tasks.py");
  }
  return file;
}

}  // namespace

TaskFile<TextRecord> read_text_records(const std::filesystem::path& path, const TaskReading& reading) {
  return read_records<TextRecord>(path, "text", reading);
}

TaskFile<ChoiceRecord> read_choice_records(const std::filesystem::path& path, const TaskReading& reading) {
  return read_records<ChoiceRecord>(path, "choices", reading);
}

}  // namespace finetune
