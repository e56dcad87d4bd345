// The file itself: damage is noticed, and what cannot be written leaves the old one.

#include "checkpoint/support.hpp"

#include <signal.h>
#include <sys/fsuid.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <random>

namespace lora_rite::test {
namespace {

/// A run with a checkpoint in a folder, and a second run that is elsewhere and is to stay there.
class DamagedCheckpoint : public testing::Test {
 protected:
  DamagedCheckpoint() {
    running.train(2);
    save_checkpoint(path, running.state);
    bytes = read_bytes(path);
    running.train(2);
    before = fingerprint(running.state);
  }

  /// The message with which these bytes are refused; the run is where it was.
  std::string refusal(const std::string& damaged) {
    write_bytes(path, damaged);
    const std::string message = error_of([&] { load_checkpoint(path, running.state); });
    EXPECT_EQ(fingerprint(running.state), before);
    return message;
  }

  TemporaryFolder folder;
  const std::filesystem::path path = folder / "c";
  TrainingRun running;
  std::string bytes, before;
};

TEST_F(DamagedCheckpoint, TruncatedAtAnyLengthIsRefused) {
  std::mt19937 random(31);
  std::set<size_t> lengths = {bytes.size() - 1};
  for (size_t length = 0; length < 64; ++length) lengths.insert(length);
  while (lengths.size() < 300) lengths.insert(random() % bytes.size());
  for (const size_t length : lengths) {
    EXPECT_TRUE(mentions(refusal(bytes.substr(0, length)), "c: is truncated: ")) << length;
  }
}

TEST_F(DamagedCheckpoint, WithAnySingleBitFlippedIsRefused) {
  std::mt19937 random(32);
  std::set<size_t> bits;
  for (size_t bit = 0; bit < 8 * detail::kHeaderBytes; ++bit) bits.insert(bit);
  while (bits.size() < 1000) bits.insert(random() % (8 * bytes.size()));
  for (const size_t bit : bits) {
    std::string flipped = bytes;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << (bit % 8)));
    const std::string message = refusal(flipped);
    if (bit < 8 * detail::kMagicBytes) {
      EXPECT_TRUE(mentions(message, "c: is no checkpoint")) << bit;
    } else if (bit < 8 * (detail::kMagicBytes + detail::kVersionBytes)) {
      EXPECT_TRUE(mentions(message, "this library reads up to 1")) << bit;
    } else if (bit < 8 * detail::kHeaderBytes) {
      EXPECT_TRUE(mentions(message, "its payload has ")) << bit;
    } else {
      EXPECT_TRUE(mentions(message, "c: checksum differs: the file is damaged")) << bit;
    }
  }
}

TEST_F(DamagedCheckpoint, OfAnotherKindIsRefused) {
  EXPECT_TRUE(mentions(refusal("PK and so on, for some length"), "c: is no checkpoint"));
  EXPECT_TRUE(mentions(refusal(bytes + "x"), "c: is damaged: its payload has "));
  std::string later = bytes;
  later[detail::kMagicBytes] = 3;
  EXPECT_TRUE(mentions(refusal(later), "c: is of version 3, this library reads up to 1"));
  EXPECT_TRUE(mentions(refusal(detail::checkpoint_file("no archive")), "c: does not fit this run: "));
}

TEST_F(DamagedCheckpoint, ThatIsNotThereOrNoFileIsRefused) {
  EXPECT_TRUE(mentions(error_of([&] { load_checkpoint(folder / "d", running.state); }), "d: does not exist"));
  EXPECT_TRUE(mentions(error_of([&] { load_checkpoint(folder.string(), running.state); }), "cannot be read: "));
  EXPECT_EQ(fingerprint(running.state), before);
}

TEST(Crc64, IsThatOfXz) {
  // The catalogue's check value, and that of nothing.
  EXPECT_EQ(detail::crc64("123456789", 9), 0x995DC9BBDF1939FAU);
  EXPECT_EQ(detail::crc64("", 0), 0U);
}

/// No file of this process grows beyond so many bytes while this lives: a full disk.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) : old_handler_(signal(SIGXFSZ, SIG_IGN)) {
    getrlimit(RLIMIT_FSIZE, &old_limit_);
    const rlimit limit{bytes, old_limit_.rlim_max};
    setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() {
    setrlimit(RLIMIT_FSIZE, &old_limit_);
    signal(SIGXFSZ, old_handler_);
  }

 private:
  rlimit old_limit_;
  void (*old_handler_)(int);
};

/// This thread cannot write to the folder while this lives, not even as root: permission bits do not hold root back,
/// but they do whoever it poses as to the file system.
class ReadOnlyFolder {
 public:
  explicit ReadOnlyFolder(std::string folder) : folder_(std::move(folder)) {
    chmod(folder_.c_str(), 0555);
    if (geteuid() == 0) setfsuid(65534);
  }
  ~ReadOnlyFolder() {
    setfsuid(geteuid());
    chmod(folder_.c_str(), 0700);
  }

 private:
  std::string folder_;
};

TEST(CheckpointThatCannotBeWritten, BecauseTheDiskIsFullLeavesTheOldOne) {
  const TemporaryFolder folder;
  TrainingRun run;
  save_checkpoint(folder / "c", run.state);
  const std::string old = read_bytes(folder / "c");
  run.train(1);
  for (const rlim_t limit : std::vector<rlim_t>{0, 1, 4096, old.size() - 1}) {
    const std::string message = error_of([&] {
      const FileSizeLimit full(limit);
      save_checkpoint(folder / "c", run.state);
    });
    EXPECT_TRUE(mentions(message, "c: cannot be written: File too large"));
    EXPECT_EQ(read_bytes(folder / "c"), old);
    EXPECT_EQ(names_in(folder.string()), std::set<std::string>{"c"});
  }
  save_checkpoint(folder / "c", run.state);
  EXPECT_NE(read_bytes(folder / "c"), old);
}

TEST(CheckpointThatCannotBeWritten, BecauseTheFolderIsReadOnlyLeavesTheOldOne) {
  const TemporaryFolder folder;
  TrainingRun run;
  save_checkpoint(folder / "c", run.state);
  const std::string old = read_bytes(folder / "c");
  run.train(1);
  const std::string message = error_of([&] {
    const ReadOnlyFolder read_only(folder.string());
    save_checkpoint(folder / "c", run.state);
  });
  EXPECT_TRUE(mentions(message, "c: cannot be written: Permission denied"));
  EXPECT_EQ(read_bytes(folder / "c"), old);
}

TEST(CheckpointThatCannotBeWritten, BecauseThereIsNoFolderOrAFolderIsInItsPlaceIsRefused) {
  const TemporaryFolder folder;
  const TrainingRun run;
  const auto refusal = [&](const char* path) { return error_of([&] { save_checkpoint(folder / path, run.state); }); };
  EXPECT_TRUE(mentions(refusal("missing/c"), "missing/c: cannot be written: No such file or directory"));
  write_bytes(folder / "file", "x");
  EXPECT_TRUE(mentions(refusal("file/c"), "file/c: cannot be written: Not a directory"));
  std::filesystem::create_directory(folder / "c");
  EXPECT_TRUE(mentions(refusal("c"), "c: cannot be written: Is a directory"));
  EXPECT_EQ(names_in(folder.string()), (std::set<std::string>{"c", "file"}));
  const std::string message = error_of([&] { CheckpointFolder(folder / "file/checkpoints").save(run.state); });
  EXPECT_TRUE(mentions(message, "file/checkpoints: cannot be made: "));
}

}  // namespace
}  // namespace lora_rite::test
