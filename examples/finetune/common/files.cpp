#include "common/files.hpp"

#include <fstream>
#include <iterator>
#include <lora_rite/io/files.hpp>
#include <nlohmann/json.hpp>
#include <sstream>

#include "common/error.hpp"

namespace finetune {

void replace_file(const std::filesystem::path& path, const std::function<void(std::ostream&)>& write) {
  std::ostringstream content;
  write(content);
  try {
    lora_rite::detail::replace_file(path, path.string() + ": ", content.str());
  } catch (const c10::Error& error) {
    fail(error.what_without_backtrace(), "; check that the folder exists, is writable and has space");
  }
}

void write_json(const std::filesystem::path& path, const nlohmann::json& value) {
  replace_file(path, [&](std::ostream& file) { file << value.dump(2) << '\n'; });
}

std::string read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file || std::filesystem::is_directory(path)) {
    fail(path.string(), ": cannot be read; check that the path names a readable file");
  }
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

nlohmann::json read_json(const std::filesystem::path& path) {
  try {
    return nlohmann::json::parse(read_file(path));
  } catch (const nlohmann::json::exception& error) {
    fail(path.string(), ": is not valid JSON (", error.what(), "); restore or rewrite the file");
  }
}

}  // namespace finetune
