#pragma once

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

/// Files as all readers and writers of this library treat them: replaced whole and durably, read only if they are
/// regular files of a bearable size, or mapped. POSIX only. A `label` is how an error message begins: "checkpoint c: ".
namespace lora_rite::detail {

/// A POSIX file descriptor, closed when it goes.
class FileDescriptor {
 public:
  explicit FileDescriptor(int number) : number_(number) {}
  ~FileDescriptor() {
    if (number_ >= 0) ::close(number_);
  }
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;

  int number() const { return number_; }

  /// False if the system says so, in errno.
  bool close() { return ::close(std::exchange(number_, -1)) == 0; }

 private:
  int number_;
};

/// Bytes on their way into a file. Once the system has refused some, the rest is dropped.
class FileWriter {
 public:
  explicit FileWriter(int descriptor) : descriptor_(descriptor) {}

  /// Appends `size` bytes; `data` may be null if there are none.
  void append(const void* data, size_t size) {
    const char* bytes = static_cast<const char*>(data);
    for (size_t done = 0; done < size && error_ == 0;) {
      const ssize_t count = ::write(descriptor_, bytes + done, size - done);
      if (count >= 0) {
        done += static_cast<size_t>(count);
      } else if (errno != EINTR) {
        error_ = errno;
      }
    }
  }

  /// The system's reason for refusing, as in errno; 0 if it took everything.
  int error() const { return error_; }

 private:
  int descriptor_;
  int error_ = 0;
};

/// Waits until the disk has the folder's entries. False with errno set if the system refuses.
inline bool sync_folder(const std::filesystem::path& folder) {
  const FileDescriptor opened(::open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (opened.number() < 0) return false;
  // EINVAL: a file system whose folders cannot be synchronised, and there is nothing to wait for.
  return ::fsync(opened.number()) == 0 || errno == EINVAL;
}

/// Makes a folder, and those above it that are missing, and waits until the disk has each: a file in the last one is
/// found only by way of all of them. Throws c10::Error with the label if the system refuses.
inline void make_folders(const std::filesystem::path& folder, const std::string& label) {
  std::error_code error;
  if (std::filesystem::is_directory(folder, error)) return;
  const std::filesystem::path parent = folder.parent_path();
  if (!parent.empty() && parent != folder && !std::filesystem::exists(parent, error)) make_folders(parent, label);
  const bool is_new = std::filesystem::create_directory(folder, error);
  TORCH_CHECK(!error, label, "cannot be made: ", error.message());
  // EACCES: a folder that may be written to and not read, and so not be synchronised.
  TORCH_CHECK(!is_new || sync_folder(parent) || errno == EACCES, label,
              "cannot be made: the folder above it cannot be synchronised: ", std::strerror(errno));
}

/// Makes a new file of what `write(FileWriter&)` appends and waits until the disk has it. False with errno set if the
/// system refuses.
template <class Write>
bool write_and_sync(const std::filesystem::path& path, Write& write) {
  FileDescriptor file(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
  if (file.number() < 0) return false;
  FileWriter writer(file.number());
  write(writer);
  if (writer.error() != 0) {
    errno = writer.error();
    return false;
  }
  return ::fsync(file.number()) == 0 && file.close();
}

/// Puts a file of what `write(FileWriter&)` appends in place of whatever is there, by way of "<path>.tmp", so that an
/// interruption leaves the old one or the new one. Throws c10::Error with the label if the system refuses, and what
/// `write` throws; the old one is still there then.
template <class Write>
void replace_file(const std::filesystem::path& path, const std::string& label, Write write) {
  std::filesystem::path temporary = path;
  temporary += ".tmp";
  bool written = false;
  try {
    written = write_and_sync(temporary, write) && ::rename(temporary.c_str(), path.c_str()) == 0;
  } catch (...) {
    ::unlink(temporary.c_str());
    throw;
  }
  if (!written) {
    const std::string reason = std::strerror(errno);
    ::unlink(temporary.c_str());
    TORCH_CHECK(false, label, "cannot be written: ", reason);
  }
  TORCH_CHECK(sync_folder(path.parent_path()), label,
              "is written, but its folder cannot be synchronised: ", std::strerror(errno));
}

/// The same with these bytes.
inline void replace_file(const std::filesystem::path& path, const std::string& label, const std::string& bytes) {
  replace_file(path, label, [&](FileWriter& file) { file.append(bytes.data(), bytes.size()); });
}

/// A regular file, open for reading.
struct OpenFile {
  /// Throws c10::Error with the label if the file does not exist, may not be read, or is a folder, a pipe, a device.
  OpenFile(const std::filesystem::path& path, const std::string& label)
      // Non-blocking: opening a pipe would wait for somebody who writes.
      : descriptor(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
    TORCH_CHECK(descriptor.number() >= 0 || errno != ENOENT, label, "does not exist");
    TORCH_CHECK(descriptor.number() >= 0, label, "cannot be read: ", std::strerror(errno));
    struct stat status = {};
    TORCH_CHECK(::fstat(descriptor.number(), &status) == 0, label, "cannot be read: ", std::strerror(errno));
    TORCH_CHECK(!S_ISDIR(status.st_mode), label, "cannot be read: it is a folder, expected a file");
    TORCH_CHECK(S_ISREG(status.st_mode), label, "cannot be read: it is no regular file");
    size = static_cast<uint64_t>(status.st_size);
  }

  FileDescriptor descriptor;
  uint64_t size = 0;  ///< in bytes
};

/// The whole file. Throws c10::Error with the label if it cannot be read, or holds more than `max_bytes`.
inline std::string read_file(const std::filesystem::path& path, const std::string& label,
                             uint64_t max_bytes = UINT64_MAX) {
  const OpenFile file(path, label);
  TORCH_CHECK(file.size <= max_bytes, label, "has ", file.size, " bytes, expected at most ", max_bytes);
  std::string bytes;
  try {
    bytes.resize(file.size);
  } catch (const std::exception&) {  // bad_alloc or length_error: a sparse file can claim any size
    TORCH_CHECK(false, label, "has ", file.size, " bytes, for which there is no memory");
  }
  for (size_t done = 0; done < bytes.size();) {
    const ssize_t count = ::read(file.descriptor.number(), bytes.data() + done, bytes.size() - done);
    if (count < 0 && errno == EINTR) continue;
    TORCH_CHECK(count >= 0, label, "cannot be read: ", std::strerror(errno));
    TORCH_CHECK(count > 0, label, "was cut short while it was read");
    done += static_cast<size_t>(count);
  }
  return bytes;
}

/// A file's content as memory that is read from the disk when it is touched. Writing to it changes a private copy of
/// the page, never the file. The file may be renamed, removed or replaced meanwhile, but must not be cut short:
/// touching what is gone then ends the process (SIGBUS), as with every mapping.
class MappedFile {
 public:
  /// Throws c10::Error with the label if the file cannot be mapped.
  MappedFile(const std::filesystem::path& path, const std::string& label) {
    const OpenFile file(path, label);
    if (file.size == 0) return;  // POSIX maps no empty range
    TORCH_CHECK(file.size <= SIZE_MAX, label, "has ", file.size, " bytes, more than can be mapped");
    // No reserve: pages that nobody writes to need no memory of their own.
    void* data = ::mmap(nullptr, static_cast<size_t>(file.size), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE,
                        file.descriptor.number(), 0);
    TORCH_CHECK(data != MAP_FAILED, label, "cannot be mapped: ", std::strerror(errno));
    data_ = static_cast<char*>(data);
    size_ = static_cast<size_t>(file.size);
  }
  ~MappedFile() {
    if (data_ != nullptr) ::munmap(data_, size_);
  }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

/// A text from a file, fit for an error message: in quotes, at most 100 bytes of it, and no control characters.
inline std::string in_quotes(const std::string& text) {
  constexpr size_t kMostBytes = 100;
  size_t end = text.size();
  if (end > kMostBytes) {
    end = kMostBytes;
    while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;  // not within a UTF-8 character
  }
  std::string result = "'";
  for (size_t i = 0; i < end; ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    result += byte < 0x20 || byte == 0x7F ? '?' : text[i];
  }
  return result + (end < text.size() ? "…'" : "'");
}

}  // namespace lora_rite::detail
