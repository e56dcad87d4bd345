#include "common/new_folder.hpp"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <lora_rite/io/files.hpp>
#include <system_error>
#include <utility>

#include "common/error.hpp"

namespace finetune {

namespace fs = std::filesystem;

NewFolder::NewFolder(fs::path path) : path_(std::move(path)) {
  while (!path_.has_filename() && path_.has_parent_path()) path_ = path_.parent_path();  // "merged/"
  std::error_code error;
  if (fs::exists(path_, error) && !(fs::is_directory(path_, error) && fs::is_empty(path_, error))) {
    fail("--out ", path_.string(), ": is there already; name a folder that is not, or remove it");
  }
  fs::path temporary = path_;
  temporary += ".tmp";
  // Whose it is cannot be known: another process may be filling it, or it was there before this program.
  if (fs::exists(fs::symlink_status(temporary, error))) {
    fail("--out ", path_.string(), ": ", temporary.string(), ", where the folder is filled first, is there already; ",
         "if it was left by a run that was killed, remove it");
  }
  error.clear();
  fs::create_directories(temporary, error);
  if (error) {
    fail("--out ", path_.string(), ": cannot be made (", error.message(), "); choose a folder you can write to");
  }
  temporary_ = std::move(temporary);
}

NewFolder::~NewFolder() {
  std::error_code ignored;
  if (!temporary_.empty()) fs::remove_all(temporary_, ignored);
}

void NewFolder::finish() {
  lora_rite::detail::sync_folder(temporary_);
  if (std::rename(temporary_.c_str(), path_.c_str()) != 0) {  // also onto an empty folder
    fail("--out ", path_.string(), ": cannot be put in place: ", std::strerror(errno));
  }
  temporary_.clear();
  lora_rite::detail::sync_folder(path_.parent_path());
}

}  // namespace finetune
