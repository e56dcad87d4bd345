#include "common/files.hpp"

#include <gtest/gtest.h>

#include "common/error.hpp"
#include "support/temporary_folder.hpp"

namespace finetune {
namespace {

using lora_rite::test::read_bytes;
using lora_rite::test::TemporaryFolder;
using lora_rite::test::write_bytes;

TEST(ReplaceFile, PutsTheNewContentInPlaceAndLeavesNothingElse) {
  const TemporaryFolder folder;
  write_bytes(folder / "file", "a longer old content");
  replace_file(folder / "file", [](std::ostream& file) { file << "new"; });
  EXPECT_EQ(read_bytes(folder / "file"), "new");
  EXPECT_FALSE(std::filesystem::exists(folder / "file.tmp"));
}

TEST(ReplaceFile, KeepsTheOldFileIfTheContentCannotBeMade) {
  const TemporaryFolder folder;
  write_bytes(folder / "file", "old");
  const auto write = [](std::ostream& file) {
    file << "half";
    fail("no more");
  };
  EXPECT_THROW(replace_file(folder / "file", write), Error);
  EXPECT_EQ(read_bytes(folder / "file"), "old");
  EXPECT_FALSE(std::filesystem::exists(folder / "file.tmp"));
}

TEST(ReplaceFile, NamesAFolderThatIsMissing) {
  const TemporaryFolder folder;
  try {
    replace_file(folder / "none/file", [](std::ostream& file) { file << "new"; });
    ADD_FAILURE() << "expected an Error";
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()), (folder / "none/file").string() +
                                             ": cannot be written: No such file or directory; check that the folder "
                                             "exists, is writable and has space");
  }
}

}  // namespace
}  // namespace finetune
