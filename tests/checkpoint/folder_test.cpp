// CheckpointFolder: which files stay, which is the latest, and a run that is killed while it saves.

#include "checkpoint/support.hpp"

#include <signal.h>
#include <sys/fsuid.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <random>
#include <thread>

namespace {

/// What was synchronised while a test listened.
std::vector<std::string>* synchronised = nullptr;

}  // namespace

/// The C library's, for this whole program: nothing else tells that a folder's entry was brought to the disk.
extern "C" int fsync(int descriptor) {
  std::error_code error;
  if (synchronised != nullptr) {
    const auto link = std::filesystem::path("/proc/self/fd") / std::to_string(descriptor);
    synchronised->push_back(std::filesystem::read_symlink(link, error).string());
  }
  return static_cast<int>(syscall(SYS_fsync, descriptor));
}

namespace lora_rite::test {
namespace {

TEST(CheckpointFolder, KeepsTheLastOnesAndFindsTheLatest) {
  const TemporaryFolder folder;
  const CheckpointFolder checkpoints(folder / "run", 3);
  EXPECT_FALSE(checkpoints.latest());
  TrainingRun run;
  write_bytes(folder / "run-notes.txt", "");
  for (int64_t step : {8, 9, 10, 11}) {  // by number: as text, 9 would come last
    run.state.step = step;
    EXPECT_EQ(checkpoints.save(run.state), folder / ("run/step-" + std::to_string(step) + ".ckpt"));
  }
  write_bytes(folder / "run/step-x.ckpt", "");
  write_bytes(folder / "run/step-012.ckpt", "");
  EXPECT_EQ(names_in(folder / "run"),
            (std::set<std::string>{"step-9.ckpt", "step-10.ckpt", "step-11.ckpt", "step-x.ckpt", "step-012.ckpt"}));
  ASSERT_TRUE(checkpoints.latest());
  EXPECT_EQ(*checkpoints.latest(), folder / "run/step-11.ckpt");
  EXPECT_TRUE(mentions(error_of([&] { CheckpointFolder("x", 0); }), "keep is 0, expected ≥ 1"));
}

TEST(CheckpointFolder, SkipsDamagedOnesAndLetsTheRunWriteOverThem) {
  const TemporaryFolder folder;
  const CheckpointFolder checkpoints(folder.string(), 2);
  TrainingRun run;
  for (const int64_t step : {10, 20}) {
    run.state.step = step;
    checkpoints.save(run.state);
  }
  write_bytes(folder / "step-20.ckpt", read_bytes(folder / "step-20.ckpt").substr(0, 1000));
  write_bytes(folder / "step-30.ckpt", "");
  write_bytes(folder / "step-30.ckpt.tmp", "left by a kill");
  EXPECT_EQ(*checkpoints.latest(), folder / "step-10.ckpt");

  run.state.step = 15;  // from step 10 on, saving more often than before
  checkpoints.save(run.state);
  EXPECT_EQ(*checkpoints.latest(), folder / "step-15.ckpt");
  EXPECT_EQ(names_in(folder.string()),
            (std::set<std::string>{"step-10.ckpt", "step-15.ckpt", "step-20.ckpt", "step-30.ckpt"}));
  run.state.step = 20;
  checkpoints.save(run.state);
  EXPECT_EQ(*checkpoints.latest(), folder / "step-20.ckpt");
  EXPECT_EQ(names_in(folder.string()), (std::set<std::string>{"step-15.ckpt", "step-20.ckpt", "step-30.ckpt"}));
}

TEST(CheckpointFolder, FindsTheLatestUpToAStep) {
  const TemporaryFolder folder;
  const CheckpointFolder checkpoints(folder.string());
  TrainingRun run;
  for (const int64_t step : {10, 20, 30}) {
    run.state.step = step;
    checkpoints.save(run.state);
  }
  EXPECT_EQ(checkpoints.latest_step(), 30);
  EXPECT_EQ(checkpoints.latest_step(29), 20);
  EXPECT_EQ(*checkpoints.latest(20), checkpoints.path_of(20));
  write_bytes(folder / "step-20.ckpt", "");
  EXPECT_EQ(*checkpoints.latest(20), folder / "step-10.ckpt");
  EXPECT_FALSE(checkpoints.latest(9));
}

/// While this lives the thread has only the rights of others, also if it is root's.
class AsNobody {
 public:
  AsNobody() {
    if (geteuid() == 0) setfsuid(65534);
  }
  ~AsNobody() { setfsuid(geteuid()); }
};

/// A run that took an older step, or none, for the latest would write over the files.
TEST(CheckpointFolder, SaysWhatTheSystemRefusesInsteadOfTakingItForDamage) {
  const TemporaryFolder folder;
  const CheckpointFolder checkpoints(folder.string());
  TrainingRun run;
  for (const int64_t step : {10, 20}) {
    run.state.step = step;
    checkpoints.save(run.state);
  }
  const auto refusal = [&] {
    return error_of([&] {
      const AsNobody nobody;
      checkpoints.latest();
    });
  };
  chmod(folder.string().c_str(), 0755);
  chmod((folder / "step-20.ckpt").c_str(), 0);
  EXPECT_TRUE(mentions(refusal(), "step-20.ckpt: cannot be read: Permission denied"));
  chmod((folder / "step-20.ckpt").c_str(), 0644);
  chmod(folder.string().c_str(), 0311);
  EXPECT_TRUE(mentions(refusal(), "checkpoint folder " + folder.string() + ": cannot be read: Permission denied"));
  chmod(folder.string().c_str(), 0755);

  rlimit limit{};
  getrlimit(RLIMIT_NOFILE, &limit);
  const rlimit none{0, limit.rlim_max};
  setrlimit(RLIMIT_NOFILE, &none);
  const std::string message = error_of([&] { checkpoints.latest(); });
  setrlimit(RLIMIT_NOFILE, &limit);
  EXPECT_TRUE(mentions(message, "cannot be read: Too many open files"));

  std::filesystem::create_directory(folder / "step-30.ckpt");
  EXPECT_TRUE(mentions(error_of([&] { checkpoints.latest(); }), "step-30.ckpt: cannot be read: it is a folder"));
  std::filesystem::remove(folder / "step-30.ckpt");
  EXPECT_EQ(checkpoints.latest_step(), 20);
  EXPECT_FALSE(CheckpointFolder(folder / "none").latest());
  const CheckpointFolder below_a_file(folder / "step-20.ckpt/checkpoints");
  EXPECT_TRUE(mentions(error_of([&] { below_a_file.latest(); }), "cannot be read: Not a directory"));
}

/// A file in a new folder outlives a power failure only if every folder on the way to it does.
TEST(CheckpointFolder, BringsEveryNewFolderToTheDisk) {
  const TemporaryFolder temporary;
  const std::filesystem::path folder = std::filesystem::canonical(temporary.string());
  TrainingRun run;
  std::vector<std::string> found;
  synchronised = &found;
  CheckpointFolder(folder / "a/b/c").save(run.state);
  synchronised = nullptr;
  EXPECT_EQ(found, (std::vector<std::string>{folder, folder / "a", folder / "a/b", folder / "a/b/c/step-0.ckpt.tmp",
                                             folder / "a/b/c"}));
}

/// The run that is killed: goes on from its latest checkpoint, saves after every step and reports the step then.
[[noreturn]] void train_until_killed(const CheckpointFolder& checkpoints, int report) {
  TrainingRun run;
  if (const auto latest = checkpoints.latest()) load_checkpoint(*latest, run.state);
  for (;;) {
    if (write(report, &run.state.step, sizeof(run.state.step)) < 0) _exit(1);
    run.train(1);
    checkpoints.save(run.state);
  }
}

TEST(KilledWhileSaving, ARunLosesNothingThatWasSavedAndGoesOnBitForBit) {
  const TemporaryFolder folder;
  const CheckpointFolder checkpoints(folder.string(), 2);
  std::mt19937 random(33);
  TrainingRun uninterrupted;
  std::chrono::duration<double> duration_of_a_step(0);  // a save included
  auto generator = detail::generator_states();
  int64_t unfinished = 0;
  for (int kill_number = 0; kill_number < 200; ++kill_number) {
    int ends[2];
    ASSERT_EQ(pipe(ends), 0);
    const pid_t child = fork();
    if (child == 0) train_until_killed(checkpoints, ends[1]);
    close(ends[1]);
    int64_t saved = 0;
    for (auto reports = 1 + random() % 3; reports > 0; --reports) {
      const auto start = std::chrono::steady_clock::now();
      ASSERT_EQ(read(ends[0], &saved, sizeof(saved)), static_cast<ssize_t>(sizeof(saved)));
      duration_of_a_step = std::chrono::steady_clock::now() - start;
    }
    std::this_thread::sleep_for(duration_of_a_step * (1.5 * static_cast<double>(random()) / std::mt19937::max()));
    kill(child, SIGKILL);
    int status = 0;
    waitpid(child, &status, 0);
    ASSERT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) << status;
    while (read(ends[0], &saved, sizeof(saved)) > 0) {
    }
    close(ends[0]);

    for (const std::string& name : names_in(folder.string())) {
      const bool is_whole = std::filesystem::path(name).extension() == ".ckpt";
      if (is_whole) detail::read_checkpoint_file(folder / name);
      unfinished += is_whole ? 0 : 1;
    }
    const auto latest = checkpoints.latest();
    if (!latest && saved == 0) continue;  // killed before its first save
    ASSERT_TRUE(latest);
    TrainingRun found;
    load_checkpoint(*latest, found.state);
    ASSERT_GE(found.state.step, saved);
    const std::string bytes = fingerprint(found.state);
    detail::set_generator_states(generator);
    uninterrupted.train(static_cast<int>(found.state.step - uninterrupted.state.step));
    generator = detail::generator_states();
    ASSERT_EQ(bytes, fingerprint(uninterrupted.state)) << "step " << found.state.step;
  }
  EXPECT_GT(unfinished, 0) << "no kill came in the middle of a save";
  EXPECT_GT(uninterrupted.state.step, 100);
}

}  // namespace
}  // namespace lora_rite::test
