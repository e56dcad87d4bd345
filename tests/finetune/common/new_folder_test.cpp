#include "common/new_folder.hpp"

#include <gtest/gtest.h>

#include "common/error.hpp"
#include "support/temporary_folder.hpp"

namespace finetune {
namespace {

namespace fs = std::filesystem;
using lora_rite::test::read_bytes;
using lora_rite::test::TemporaryFolder;
using lora_rite::test::write_bytes;

std::string refusal_of(const fs::path& path) {
  try {
    NewFolder folder(path);
    folder.finish();
  } catch (const Error& error) {
    return error.what();
  }
  return {};
}

TEST(NewFolder, AppearsWithItsContentOrNotAtAll) {
  const TemporaryFolder folder;
  {
    const NewFolder made(folder / "deep/out");
    write_bytes(made.inside() / "file", "1");
  }
  EXPECT_TRUE(fs::is_empty(folder / "deep"));
  NewFolder made(folder / "deep/out/");
  write_bytes(made.inside() / "file", "1");
  EXPECT_FALSE(fs::exists(folder / "deep/out"));
  made.finish();
  EXPECT_EQ(read_bytes(folder / "deep/out/file"), "1");
  EXPECT_FALSE(fs::exists(folder / "deep/out.tmp"));
}

TEST(NewFolder, TakesAnEmptyFolderAndNothingElse) {
  const TemporaryFolder folder;
  fs::create_directories(folder / "out");
  EXPECT_EQ(refusal_of(folder / "out"), "");
  write_bytes(folder / "out/file", "1");
  EXPECT_NE(refusal_of(folder / "out").find("is there already"), std::string::npos);
  write_bytes(folder / "file", "1");
  EXPECT_NE(refusal_of(folder / "file").find("is there already"), std::string::npos);
  EXPECT_EQ(read_bytes(folder / "file"), "1");
}

// It may be another process's, or the user's.
TEST(NewFolder, LeavesWhatIsCalledLikeItsUnfinishedSelf) {
  const TemporaryFolder folder;
  fs::create_directories(folder / "out.tmp");
  write_bytes(folder / "out.tmp/precious", "1");
  const std::string message = refusal_of(folder / "out");
  EXPECT_NE(message.find("out.tmp, where the folder is filled first, is there already"), std::string::npos) << message;
  EXPECT_NE(message.find("remove it"), std::string::npos) << message;
  EXPECT_EQ(read_bytes(folder / "out.tmp/precious"), "1");
  EXPECT_FALSE(fs::exists(folder / "out"));
  {
    const NewFolder first(folder / "other");
    EXPECT_NE(refusal_of(folder / "other"), "") << "two processes at once";
  }
  EXPECT_EQ(refusal_of(folder / "other"), "");
}

}  // namespace
}  // namespace finetune
