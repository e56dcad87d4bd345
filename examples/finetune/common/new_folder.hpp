#pragma once

#include <filesystem>

namespace finetune {

/// A folder of results that appears whole or not at all: it is filled under another name beside its place, and moved
/// there when it is complete. It is gone with this object otherwise, but not with a process that is killed.
class NewFolder {
 public:
  /// Throws Error, naming the option --out, if `path` is there and not an empty folder, if `path`.tmp is there, or it
  /// cannot be made.
  explicit NewFolder(std::filesystem::path path);
  ~NewFolder();
  NewFolder(const NewFolder&) = delete;
  NewFolder& operator=(const NewFolder&) = delete;

  /// Where to write.
  const std::filesystem::path& inside() const { return temporary_; }

  /// Moves it into its place. Throws Error if the system refuses.
  void finish();

 private:
  std::filesystem::path path_, temporary_;
};

}  // namespace finetune
