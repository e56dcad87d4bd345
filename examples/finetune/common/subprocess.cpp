#include "common/subprocess.hpp"

#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>

#include "common/error.hpp"

namespace finetune {

int run_program(const std::vector<std::string>& arguments) {
  std::vector<char*> argv;
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  // In a process group of its own: Ctrl-C is for this program, which ends when its work is saved.
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP);
  pid_t child = 0;
  const int error = posix_spawnp(&child, argv[0], nullptr, &attributes, argv.data(), environ);
  posix_spawnattr_destroy(&attributes);
  if (error != 0) return 127;
  int status = 0;
  while (waitpid(child, &status, 0) < 0) {
    if (errno != EINTR) return 127;
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

std::string find_python(const std::string& preferred) {
  if (!preferred.empty()) return preferred;
  const char* from_environment = std::getenv("FINETUNE_PYTHON");
  return from_environment != nullptr && *from_environment != '\0' ? from_environment : "python3";
}

std::filesystem::path script_path(const std::string& name) {
  const std::filesystem::path path = std::filesystem::path(FINETUNE_SCRIPT_DIR) / name;
  if (!std::filesystem::exists(path)) {
    fail(path.string(),
         ": is missing; it belongs to the source tree this program was built from, so put it back or build anew");
  }
  return path;
}

}  // namespace finetune
