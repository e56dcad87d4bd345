#include "files.hpp"

#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <system_error>

#include "error.hpp"

namespace finetune {

void replace_file(const std::filesystem::path& path, const std::function<void(std::ostream&)>& write) {
  std::filesystem::path temporary = path;
  temporary += ".tmp";
  {
    std::ofstream file(temporary, std::ios::binary | std::ios::trunc);
    if (file) write(file);
    file.flush();
    if (!file) {
      fail(temporary.string(), ": cannot be written; check that the folder exists, is writable and has space");
    }
  }
  std::error_code error;
  std::filesystem::rename(temporary, path, error);
  if (error) fail(path.string(), ": cannot be put in place: ", error.message());
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
