#pragma once

#include <sys/mman.h>
#include <torch/torch.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <lora_rite/checkpoint.hpp>
#include <lora_rite/io/peft.hpp>
#include <lora_rite/io/safetensors.hpp>
#include <lora_rite/lora_rite.hpp>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

/// What is done with every input of a fuzzer: the readers of files see it as a file. A c10::Error is how they refuse
/// it; any other exception, a broken promise (`require`) and whatever the sanitizers see ends the process.
/// tests/io/corpus_test.cpp does the same with the inputs of corpus/.
namespace lora_rite::fuzz {

/// Ends the process unless the condition holds.
inline void require(bool condition, const char* promise) {
  if (condition) return;
  std::fprintf(stderr, "broken promise: %s\n", promise);
  std::abort();
}

/// A file of these bytes that lies in memory.
class MemoryFile {
 public:
  explicit MemoryFile(const std::string& bytes) : descriptor_(::memfd_create("fuzz", MFD_CLOEXEC)) {
    detail::FileWriter writer(descriptor_.number());
    writer.append(bytes.data(), bytes.size());
    require(writer.error() == 0, "a file in memory can be written");
  }

  std::string path() const { return "/proc/self/fd/" + std::to_string(descriptor_.number()); }

 private:
  detail::FileDescriptor descriptor_;
};

/// The bytes as a safetensors file, and as the index of a sharded one.
inline void safetensors(const std::string& bytes) {
  const MemoryFile memory(bytes);
  try {
    const SafetensorsFile file(memory.path());
    size_t data_bytes = 0;
    for (const std::string& name : file.names()) {
      data_bytes += c10::elementSize(file.info(name).dtype) * c10::multiply_integers(file.info(name).shape);
    }
    uint64_t header_bytes = 0;
    std::memcpy(&header_bytes, bytes.data(), sizeof header_bytes);
    require(sizeof header_bytes + header_bytes + data_bytes == bytes.size(), "header and tensors are the whole file");
    unsigned sum = 0;
    for (const std::string& name : file.names()) {
      const torch::Tensor tensor = file.tensor(name);
      require(tensor.sizes() == file.info(name).shape && tensor.scalar_type() == file.info(name).dtype,
              "a tensor is what was said of it");
      const auto* data = static_cast<const unsigned char*>(tensor.const_data_ptr());
      for (size_t i = 0; i < tensor.nbytes(); ++i) sum += data[i];  // within the mapping, or a sanitizer sees it
    }
    require(sum != 1U << 31, "no input is so large");
  } catch (const c10::Error&) {
  }
  try {
    detail::ShardIndexReader reader("index: ");
    reader.read(bytes.data(), bytes.data() + bytes.size());
    for (const auto& [tensor, shard] : reader.take()) {
      detail::check_shard_name("index: ", shard);
      const std::string path = (std::filesystem::path("/a/b") / shard).lexically_normal().string();
      require(path.compare(0, 5, "/a/b/") == 0 && path.size() > 5, "shards lie inside the folder");
    }
  } catch (const c10::Error&) {
  }
}

/// The bytes as an adapter_config.json. What is accepted is written, and then read and written the same.
inline void adapter_config(const std::string& bytes) {
  AdapterConfig config;
  try {
    config = parse_adapter_config(bytes, "description: ");
  } catch (const c10::Error&) {
    return;
  }
  const std::string text = adapter_config_text(config);
  require(adapter_config_text(parse_adapter_config(text, "description: ")) == text, "what was written reads the same");
}

/// A run with a pair, a head and a schedule, small because every input saves and loads it.
struct SmallRun {
  SmallRun() {
    optimizer.add_parameters({head}, torch::optim::AdamWOptions(1e-2));
    scheduler.emplace(optimizer, /*warmup_steps=*/2, /*total_steps=*/10);
    state.tensors = trained_tensors(pairs);
    state.tensors["head"] = head;
    state.optimizers = {&optimizer};
    state.others = {&*scheduler};
    state.values = {{"loss", 0.5}, {"order", torch::arange(3)}};
    train();
  }

  void train() {
    for (auto& [name, tensor] : state.tensors) tensor.mutable_grad() = torch::ones_like(tensor.detach());
    optimizer.step();
    scheduler->step();
    ++state.step;
  }

  /// All that the run is, but for what the generators are.
  std::string fingerprint() const {
    std::ostringstream text;
    for (const auto& [name, tensor] : state.tensors) {
      text.write(static_cast<const char*>(tensor.const_data_ptr()), static_cast<std::streamsize>(tensor.nbytes()));
    }
    text << detail::saved_object(optimizer) << detail::saved_object(*scheduler) << state.step << state.values.size();
    return text.str();
  }

  std::vector<FactorPair> pairs = {{"q", torch::ones({1, 2}).requires_grad_(), torch::ones({2, 1}).requires_grad_()}};
  torch::Tensor head = torch::ones({2}).requires_grad_();
  LoraRite<> optimizer = LoraRite<>(pairs, LoraRiteOptions(1e-3));
  std::optional<WarmupCosine> scheduler;
  TrainingState state;
};

/// The bytes of an input one after the other; zeros behind the end.
class Decisions {
 public:
  explicit Decisions(const std::string& bytes) : bytes_(bytes) {}
  int next() { return position_ < bytes_.size() ? static_cast<unsigned char>(bytes_[position_++]) : 0; }

 private:
  const std::string& bytes_;
  size_t position_ = 0;
};

/// Some value of any kind.
inline c10::IValue any_value(Decisions& decisions) {
  const int64_t number = decisions.next();
  switch (decisions.next() % 12) {
    case 0:
      return number - 128;
    case 1:
      return number << 55;
    case 2:
      return number / 16.0 - 8;
    case 3:
      return std::numeric_limits<double>::quiet_NaN();
    case 4:
      return number % 2 == 0;
    case 5:
      return std::string(static_cast<size_t>(number), 'x');
    case 6:
      return torch::ones({number % 4, number / 4 % 4});
    case 7:
      return torch::zeros({number % 4}, static_cast<at::ScalarType>(number / 4 % 8));
    case 8:
      return std::vector<int64_t>(static_cast<size_t>(number % 5), number);
    case 9:
      return std::vector<double>(static_cast<size_t>(number % 5), -1.0);
    case 10:
      return c10::List<std::string>(c10::ArrayRef<std::string>(std::vector<std::string>(number % 5, "q.a")));
    default:
      return std::vector<torch::Tensor>(static_cast<size_t>(number % 5), torch::ones({2}));
  }
}

/// Copies an archive; decisions other than 0 leave entries out, or put other values or other archives in their place.
inline void distort(torch::serialize::InputArchive& from, torch::serialize::OutputArchive& to, Decisions& decisions) {
  for (const std::string& key : from.keys()) {
    c10::IValue value;
    from.read(key, value);
    const int decision = decisions.next() % 16;
    if (decision == 1) continue;
    if (decision == 2) {
      to.write(key, any_value(decisions));
    } else if (decision == 3) {
      torch::serialize::OutputArchive nothing(to.compilation_unit());
      to.write(key, nothing);
    } else if (value.isModule()) {
      torch::serialize::InputArchive nested;
      from.try_read(key, nested);
      torch::serialize::OutputArchive copy(to.compilation_unit());
      distort(nested, copy, decisions);
      to.write(key, copy);
    } else if (decision == 4 && value.isTensor()) {
      to.write(key, c10::IValue(value.toTensor().flatten()));
    } else if (decision == 5 && value.isTensor()) {
      to.write(key, c10::IValue(value.toTensor().to(torch::kHalf)));
    } else if (decision == 6 && value.isTensor()) {
      to.write(key, c10::IValue(torch::full_like(value.toTensor(), -1)));
    } else {
      to.write(key, value);
    }
  }
}

/// A checkpoint whose checksum is right and whose archive is not that of any run, so that what this library reads of an
/// archive meets whatever an archive can hold. The bytes are decisions on its entries; behind a 'P' they are places in
/// the archive (two bytes each) and what stands there instead (one byte). Bytes that begin as a checkpoint does are
/// taken for the file itself.
inline void checkpoint(const std::string& bytes) {
  static SmallRun run;
  static const std::string payload = detail::payload_of(run.state);
  static std::string before = run.fingerprint();
  std::string file = bytes;
  if (bytes.compare(0, 1, "P") == 0) {
    std::string patched = payload;
    for (size_t at = 1; at + 2 < bytes.size(); at += 3) {
      const size_t place = (static_cast<unsigned char>(bytes[at]) << 8) | static_cast<unsigned char>(bytes[at + 1]);
      patched[place % patched.size()] = bytes[at + 2];
    }
    file = detail::checkpoint_file(patched);
  } else if (bytes.compare(0, detail::kMagicBytes, detail::kCheckpointMagic) != 0) {
    torch::serialize::InputArchive whole;
    whole.load_from(payload.data(), payload.size());
    torch::serialize::OutputArchive distorted;
    Decisions decisions(bytes);
    distort(whole, distorted, decisions);
    file = detail::checkpoint_file(detail::archive_bytes(distorted));
  }
  const MemoryFile memory(file);
  try {
    load_checkpoint(memory.path(), run.state);
  } catch (const c10::Error&) {
    require(run.fingerprint() == before, "a checkpoint that is refused changes nothing");
    return;
  }
  run.train();  // what was accepted can be trained on
  before = run.fingerprint();
}

}  // namespace lora_rite::fuzz
