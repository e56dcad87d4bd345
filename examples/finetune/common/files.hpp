#pragma once

#include <filesystem>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <ostream>
#include <string>

namespace finetune {

/// Writes a file as the library writes its own: an interruption leaves either the old content or the new one, and what
/// has been written outlives a power failure. Throws Error if the disk refuses; the old file is still there then.
void replace_file(const std::filesystem::path& path, const std::function<void(std::ostream&)>& write);

/// Writes a JSON value in the same way, indented for people.
void write_json(const std::filesystem::path& path, const nlohmann::json& value);

/// The whole file as bytes; throws Error naming it if it cannot be read.
std::string read_file(const std::filesystem::path& path);

/// The file parsed as one JSON value; throws Error naming it otherwise.
nlohmann::json read_json(const std::filesystem::path& path);

}  // namespace finetune
