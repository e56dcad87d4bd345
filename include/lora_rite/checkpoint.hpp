#pragma once

#include <ATen/Context.h>
#include <ATen/core/Generator.h>
#include <c10/util/Exception.h>
#include <c10/util/Type.h>
#include <torch/nn/module.h>
#include <torch/optim/optimizer.h>
#include <torch/serialize/archive.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <system_error>
#include <typeinfo>
#include <utility>
#include <vector>

#include "lora_rite/factor_pair.hpp"
#include "lora_rite/io/files.hpp"

/// Checkpoints of a training run that survive a crash while they are written, and are refused when damaged: see
/// docs/checkpoints.md for the file format. POSIX only.
namespace lora_rite {

/// A pointer to an object with LibTorch's members `save(OutputArchive&) const` and `load(InputArchive&)`: a
/// WarmupScheduler, a GradScaler, a sampler of torch::data, a class of yours. The object must outlive it.
class Stateful {
 public:
  /// Of the object behind `object`, which must not be null. Implicit, so that a list of pointers is a list of these.
  template <class Object>
  Stateful(Object* object)
      : type_(c10::demangle(typeid(*object).name())),
        save_([object](torch::serialize::OutputArchive& archive) { object->save(archive); }),
        load_([object](torch::serialize::InputArchive& archive) { object->load(archive); }) {}

  /// The object's class, as its namespace and name.
  const std::string& type() const { return type_; }

  /// The object's own `save`.
  void save(torch::serialize::OutputArchive& archive) const { save_(archive); }

  /// The object's own `load`.
  void load(torch::serialize::InputArchive& archive) { load_(archive); }

 private:
  std::string type_;
  std::function<void(torch::serialize::OutputArchive&)> save_;
  std::function<void(torch::serialize::InputArchive&)> load_;
};

/// What changes while a run trains, as references to the run's own tensors and objects. LibTorch's default random
/// number generators, of the CPU and of every CUDA device, belong to a checkpoint without being named here. Gradients
/// do not: save between steps.
struct TrainingState {
  std::map<std::string, torch::Tensor> tensors;      ///< by name, all parameters of the optimizers among them
  std::vector<torch::optim::Optimizer*> optimizers;  ///< of any class that LibTorch can save
  std::vector<Stateful> others;                      ///< schedulers, a GradScaler, samplers
  int64_t step = 0;                                  ///< finished steps, ≥ 0: where in its data the run stands
  std::map<std::string, c10::IValue> values;         ///< whatever else: numbers, strings, tensors, lists of them
};

/// The tensors of a module that training changes: parameters that require a gradient, LoRA factors whether they do or
/// not (an inactive adapter's do not, and LoraRite(module) holds them; a checkpoint fits whichever is active), and all
/// buffers. By the names that LibTorch gives them.
inline std::map<std::string, torch::Tensor> trained_tensors(const torch::nn::Module& module) {
  std::map<std::string, torch::Tensor> result;
  for (const auto& item : module.named_parameters()) {
    const bool is_factor = detail::first_factor_token(item.key()).position != std::string::npos;
    if (is_factor || item.value().requires_grad()) result.emplace(item.key(), item.value());
  }
  for (const auto& item : module.named_buffers()) result.emplace(item.key(), item.value());
  return result;
}

/// The factors of all pairs, as "name.a" and "name.b"; a pair without a name goes by its place in the list. A leaf of
/// which pairs are parts (`expert_pairs`) is there once, whole, by the name of the first of them. Throws c10::Error if
/// two pairs have one name.
inline std::map<std::string, torch::Tensor> trained_tensors(const std::vector<FactorPair>& pairs) {
  std::map<std::string, torch::Tensor> result;
  std::set<std::string> names;
  std::set<const void*> known;  // leaves of which a part was there
  for (size_t i = 0; i < pairs.size(); ++i) {
    const std::string name = pairs[i].name.empty() ? std::to_string(i) : pairs[i].name;
    TORCH_CHECK(names.insert(name).second, "trained_tensors: two pairs are named '", name,
                "', expected a name of its own for each");
    for (const auto& [ending, factor] : {std::pair{".a", pairs[i].a}, std::pair{".b", pairs[i].b}}) {
      const torch::Tensor leaf = detail::leaf_of(factor);
      if (detail::is_part(factor) && !known.insert(leaf.unsafeGetTensorImpl()).second) continue;
      result.emplace(name + ending, leaf);
    }
  }
  return result;
}

namespace detail {

inline constexpr char kCheckpointMagic[] = "LORARITE";
inline constexpr uint32_t kCheckpointVersion = 1;
inline constexpr size_t kMagicBytes = 8, kVersionBytes = 4, kSizeBytes = 8, kChecksumBytes = 8;
inline constexpr size_t kHeaderBytes = kMagicBytes + kVersionBytes + kSizeBytes;

inline std::string checkpoint_label(const std::filesystem::path& path) { return "checkpoint " + path.string() + ": "; }

// --- The file: magic, version, size of the payload, payload, checksum of all that.

/// CRC-64/XZ: detects every burst of up to 64 bits, and any other damage but for one in 2⁶⁴.
inline uint64_t crc64(const char* data, size_t size) {
  static const auto table = [] {
    std::array<uint64_t, 256> entries{};
    for (uint64_t byte = 0; byte < entries.size(); ++byte) {
      uint64_t entry = byte;
      for (int bit = 0; bit < 8; ++bit) entry = (entry >> 1) ^ ((entry & 1) != 0 ? 0xC96C5795D7870F42U : 0);
      entries[byte] = entry;
    }
    return entries;
  }();
  uint64_t crc = ~uint64_t{0};
  for (size_t i = 0; i < size; ++i) crc = (crc >> 8) ^ table[(crc ^ static_cast<unsigned char>(data[i])) & 0xFF];
  return ~crc;
}

/// The lowest `bytes` bytes of `number`, the lowest first.
inline std::string little_endian(uint64_t number, size_t bytes) {
  std::string text;
  for (size_t i = 0; i < bytes; ++i) text += static_cast<char>((number >> (8 * i)) & 0xFF);
  return text;
}

/// The inverse, read at `position`.
inline uint64_t read_little_endian(const std::string& text, size_t position, size_t bytes) {
  uint64_t number = 0;
  for (size_t i = 0; i < bytes; ++i) number |= uint64_t{static_cast<unsigned char>(text[position + i])} << (8 * i);
  return number;
}

/// The whole file around a payload.
inline std::string checkpoint_file(const std::string& payload) {
  std::string file(kCheckpointMagic, kMagicBytes);
  file += little_endian(kCheckpointVersion, kVersionBytes);
  file += little_endian(payload.size(), kSizeBytes);
  file += payload;
  file += little_endian(crc64(file.data(), file.size()), kChecksumBytes);
  return file;
}

/// The file with what surrounds its payload verified. Throws c10::Error naming the file, what was found and what was
/// expected.
inline std::string read_checkpoint_file(const std::filesystem::path& path) {
  const std::string label = checkpoint_label(path);
  std::string file = read_file(path, label);
  TORCH_CHECK(file.compare(0, kMagicBytes, kCheckpointMagic, std::min(file.size(), kMagicBytes)) == 0, label,
              "is no checkpoint (its first bytes are not '", kCheckpointMagic, "')");
  TORCH_CHECK(file.size() >= kHeaderBytes + kChecksumBytes, label, "is truncated: it has ", file.size(),
              " bytes, expected at least ", kHeaderBytes + kChecksumBytes);
  const uint64_t version = read_little_endian(file, kMagicBytes, kVersionBytes);
  TORCH_CHECK(version >= 1 && version <= kCheckpointVersion, label, "is of version ", version,
              ", this library reads up to ", kCheckpointVersion);
  const uint64_t found = file.size() - kHeaderBytes - kChecksumBytes;
  const uint64_t expected = read_little_endian(file, kMagicBytes + kVersionBytes, kSizeBytes);
  TORCH_CHECK(found == expected, label, "is ", found < expected ? "truncated" : "damaged", ": its payload has ", found,
              " bytes, expected ", expected);
  const size_t end = file.size() - kChecksumBytes;
  TORCH_CHECK(crc64(file.data(), end) == read_little_endian(file, end, kChecksumBytes), label,
              "checksum differs: the file is damaged");
  return file;
}

// --- The payload: an archive of LibTorch.

/// What the archive holds, as bytes.
inline std::string archive_bytes(torch::serialize::OutputArchive& archive) {
  std::string bytes;
  archive.save_to([&bytes](const void* data, size_t size) {
    bytes.append(static_cast<const char*>(data), size);
    return size;
  });
  return bytes;
}

/// What an object saves of itself, for a way back.
template <class Object>
std::string saved_object(const Object& object) {
  torch::serialize::OutputArchive archive;
  object.save(archive);
  return archive_bytes(archive);
}

/// Loads an optimizer into a state of nothing: LibTorch's keep what they remember of a parameter of which the archive
/// says nothing.
inline void load_object(torch::optim::Optimizer& optimizer, torch::serialize::InputArchive& archive) {
  optimizer.state().clear();
  optimizer.load(archive);
}

inline void load_object(Stateful& object, torch::serialize::InputArchive& archive) { object.load(archive); }

/// Entries by their place, with a list of the names beside them: not every name can be an archive's key.
template <class Map>
void write_named(torch::serialize::OutputArchive& archive, const std::string& key, const Map& entries) {
  torch::serialize::OutputArchive nested(archive.compilation_unit());
  c10::List<std::string> names;
  for (const auto& [name, value] : entries) {
    nested.write(std::to_string(names.size()), c10::IValue(value));
    names.push_back(name);
  }
  nested.write("names", c10::IValue(names));
  archive.write(key, nested);
}

/// The value under a key; c10::Error if there is none.
inline c10::IValue read_value(torch::serialize::InputArchive& archive, const std::string& key) {
  c10::IValue value;
  TORCH_CHECK(archive.try_read(key, value), "entry '", key, "' is missing");
  return value;
}

/// The archive under a key; c10::Error if there is none.
inline torch::serialize::InputArchive read_nested(torch::serialize::InputArchive& archive, const std::string& key) {
  torch::serialize::InputArchive nested;
  TORCH_CHECK(archive.try_read(key, nested), "entry '", key, "' is missing");
  return nested;
}

inline std::vector<std::string> to_strings(const c10::IValue& value) {
  std::vector<std::string> result;
  for (const c10::IValue& element : value.toListRef()) result.push_back(element.toStringRef());
  return result;
}

/// What `write_named` wrote.
inline std::map<std::string, c10::IValue> read_named(torch::serialize::InputArchive& archive, const std::string& key) {
  torch::serialize::InputArchive nested = read_nested(archive, key);
  const std::vector<std::string> names = to_strings(read_value(nested, "names"));
  std::map<std::string, c10::IValue> result;
  for (size_t i = 0; i < names.size(); ++i) result[names[i]] = read_value(nested, std::to_string(i));
  return result;
}

/// Writes what an object saves of itself, and its class. `parameters` are the names of what an optimizer steps.
template <class Object>
void write_object(torch::serialize::OutputArchive& archive, const std::string& key, const std::string& type,
                  const std::vector<std::string>& parameters, const Object& object) {
  torch::serialize::OutputArchive nested(archive.compilation_unit()), own(archive.compilation_unit());
  object.save(own);
  nested.write("type", c10::IValue(type));
  nested.write("parameters", c10::IValue(c10::List<std::string>(c10::ArrayRef<std::string>(parameters))));
  nested.write("state", own);
  archive.write(key, nested);
}

/// The object's own part of what `write_object` wrote; c10::Error unless it was written of such an object.
inline torch::serialize::InputArchive read_object(torch::serialize::InputArchive& archive, const std::string& key,
                                                  const std::string& type, const std::vector<std::string>& parameters) {
  torch::serialize::InputArchive nested = read_nested(archive, key);
  const std::string found_type = read_value(nested, "type").toStringRef();
  TORCH_CHECK(found_type == type, key, " is of ", found_type, ", expected ", type);
  const std::vector<std::string> found = to_strings(read_value(nested, "parameters"));
  TORCH_CHECK(found.size() == parameters.size(), key, " has ", found.size(), " parameters, expected ",
              parameters.size());
  for (size_t i = 0; i < found.size(); ++i) {
    TORCH_CHECK(found[i] == parameters[i], key, ": parameter ", i, " is '", found[i], "', expected '", parameters[i],
                "'");
  }
  return read_nested(nested, "state");
}

/// The class of its options stands for an optimizer's: that of the optimizer itself may differ where the format of what
/// it saves does not.
inline std::string type_of(const torch::optim::Optimizer& optimizer) {
  const torch::optim::OptimizerOptions& options = optimizer.defaults();
  return c10::demangle(typeid(options).name());
}

/// What the optimizer's parameters are called in `tensors`, group by group. Throws c10::Error if one of them is not
/// there: its value would be lost.
inline std::vector<std::string> parameter_names(const torch::optim::Optimizer& optimizer,
                                                const std::map<std::string, torch::Tensor>& tensors) {
  std::map<const void*, std::string> names;
  for (const auto& [name, tensor] : tensors) names.emplace(tensor.unsafeGetTensorImpl(), name);
  std::vector<std::string> result;
  for (size_t group = 0; group < optimizer.param_groups().size(); ++group) {
    const auto& parameters = optimizer.param_groups()[group].params();
    for (size_t i = 0; i < parameters.size(); ++i) {
      const auto found = names.find(parameters[i].unsafeGetTensorImpl());
      TORCH_CHECK(found != names.end(), "parameter ", i, " of group ", group, " of the optimizer with ",
                  type_of(optimizer), " is not among TrainingState::tensors, expected all that an optimizer steps");
      result.push_back(found->second);
    }
  }
  return result;
}

/// LibTorch's default generators: the CPU's, and those of all CUDA devices.
inline std::vector<at::Generator> default_generators() {
  std::vector<at::Generator> result = {at::globalContext().defaultGenerator(at::Device(at::kCPU))};
  if (!at::hasCUDA()) return result;
  for (size_t i = 0; i < at::getNumGPUs(); ++i) {
    const at::Device device(at::kCUDA, static_cast<at::DeviceIndex>(i));
    result.push_back(at::globalContext().defaultGenerator(device));
  }
  return result;
}

/// Their states, by device.
inline std::map<std::string, torch::Tensor> generator_states() {
  std::map<std::string, torch::Tensor> states;
  for (at::Generator& generator : default_generators()) {
    const std::lock_guard<std::mutex> lock(generator.mutex());
    states[generator.device().str()] = generator.get_state();
  }
  return states;
}

/// Sets those whose device is among `states`: a checkpoint can come from a machine with other devices.
inline void set_generator_states(const std::map<std::string, torch::Tensor>& states) {
  for (at::Generator& generator : default_generators()) {
    const auto found = states.find(generator.device().str());
    if (found == states.end()) continue;
    const std::lock_guard<std::mutex> lock(generator.mutex());
    generator.set_state(found->second);
  }
}

inline std::string optimizer_key(size_t index) { return "optimizer" + std::to_string(index); }
inline std::string other_key(size_t index) { return "other" + std::to_string(index); }

inline std::string payload_of(const TrainingState& state) {
  TORCH_CHECK(state.step >= 0, "TrainingState::step is ", state.step, ", expected ≥ 0");
  torch::serialize::OutputArchive archive;
  std::map<std::string, torch::Tensor> tensors;
  // Copies: a view would bring its whole storage along.
  for (const auto& [name, tensor] : state.tensors) {
    TORCH_CHECK(tensor.defined(), "tensor '", name, "' is undefined");
    tensors.emplace(name, tensor.detach().clone());
  }
  write_named(archive, "tensors", tensors);
  archive.write("optimizer_count", c10::IValue(static_cast<int64_t>(state.optimizers.size())));
  for (size_t i = 0; i < state.optimizers.size(); ++i) {
    const torch::optim::Optimizer& optimizer = *state.optimizers[i];
    write_object(archive, optimizer_key(i), type_of(optimizer), parameter_names(optimizer, state.tensors), optimizer);
  }
  archive.write("other_count", c10::IValue(static_cast<int64_t>(state.others.size())));
  for (size_t i = 0; i < state.others.size(); ++i) {
    write_object(archive, other_key(i), state.others[i].type(), {}, state.others[i]);
  }
  write_named(archive, "generators", generator_states());
  archive.write("step", c10::IValue(state.step));
  write_named(archive, "values", state.values);
  return archive_bytes(archive);
}

/// The values for the tensors of a run: the same names, shapes and dtypes, on the devices of the run's.
inline std::map<std::string, torch::Tensor> read_tensors(torch::serialize::InputArchive& archive,
                                                         const std::map<std::string, torch::Tensor>& expected) {
  std::map<std::string, torch::Tensor> result;
  for (const auto& [name, value] : read_named(archive, "tensors")) {
    const auto own = expected.find(name);
    TORCH_CHECK(own != expected.end(), "the file has a tensor '", name, "', which the run lacks");
    const torch::Tensor& found = value.toTensor();
    TORCH_CHECK(found.sizes() == own->second.sizes() && found.scalar_type() == own->second.scalar_type(), "tensor '",
                name, "' is ", found.scalar_type(), found.sizes(), ", expected ", own->second.scalar_type(),
                own->second.sizes());
    result.emplace(name, found.to(own->second.device()));
  }
  for (const auto& [name, tensor] : expected) {
    TORCH_CHECK(result.count(name) == 1, "the file has no tensor '", name, "'");
  }
  return result;
}

inline void check_count(torch::serialize::InputArchive& archive, const std::string& key, size_t expected) {
  const int64_t found = read_value(archive, key).toInt();
  TORCH_CHECK(found == static_cast<int64_t>(expected), key, " is ", found, ", expected ", expected);
}

/// Loads what checks its archive only while it is loaded, or brings all of it back to where it was.
class Restoration {
 public:
  explicit Restoration(TrainingState& state) : state_(state), generators_(generator_states()) {
    for (const Stateful& other : state.others) others_.push_back(saved_object(other));
    for (const torch::optim::Optimizer* optimizer : state.optimizers) optimizers_.push_back(saved_object(*optimizer));
  }

  // Optimizers after the schedulers, which set rates of their own: a rate is what it was when it was saved.
  void load(std::vector<torch::serialize::InputArchive>& others,
            std::vector<torch::serialize::InputArchive>& optimizers,
            const std::map<std::string, torch::Tensor>& generators) {
    try {
      for (size_t i = 0; i < others.size(); ++i) load_object(state_.others[i], others[i]);
      for (size_t i = 0; i < optimizers.size(); ++i) load_object(*state_.optimizers[i], optimizers[i]);
      set_generator_states(generators);
    } catch (...) {
      undo();
      throw;
    }
  }

 private:
  void undo() {
    const auto restore = [](auto& object, const std::string& bytes) {
      torch::serialize::InputArchive archive;
      archive.load_from(bytes.data(), bytes.size());
      load_object(object, archive);
    };
    for (size_t i = 0; i < others_.size(); ++i) restore(state_.others[i], others_[i]);
    for (size_t i = 0; i < optimizers_.size(); ++i) restore(*state_.optimizers[i], optimizers_[i]);
    set_generator_states(generators_);
  }

  TrainingState& state_;
  std::vector<std::string> others_, optimizers_;
  std::map<std::string, torch::Tensor> generators_;
};

/// Everything that can be refused comes first; what follows cannot fail.
inline void load_archive(torch::serialize::InputArchive& archive, TrainingState& state) {
  const auto tensors = read_tensors(archive, state.tensors);
  check_count(archive, "optimizer_count", state.optimizers.size());
  check_count(archive, "other_count", state.others.size());
  std::vector<torch::serialize::InputArchive> optimizers, others;
  for (size_t i = 0; i < state.optimizers.size(); ++i) {
    const torch::optim::Optimizer& optimizer = *state.optimizers[i];
    optimizers.push_back(
        read_object(archive, optimizer_key(i), type_of(optimizer), parameter_names(optimizer, state.tensors)));
  }
  for (size_t i = 0; i < state.others.size(); ++i) {
    others.push_back(read_object(archive, other_key(i), state.others[i].type(), {}));
  }
  std::map<std::string, torch::Tensor> generators;
  for (const auto& [device, value] : read_named(archive, "generators"))
    generators.emplace(device, value.toTensor().cpu());
  const int64_t step = read_value(archive, "step").toInt();
  auto values = read_named(archive, "values");

  Restoration(state).load(others, optimizers, generators);
  const at::NoGradGuard no_grad;
  for (auto& [name, tensor] : state.tensors) tensor.copy_(tensors.at(name));
  state.step = step;
  state.values = std::move(values);
}

/// use(archive) with the content of a checkpoint. Throws c10::Error naming the file, also for what `use` throws.
template <class Use>
void with_archive(const std::filesystem::path& path, std::optional<torch::Device> device, const Use& use) {
  const std::string file = read_checkpoint_file(path);
  try {
    torch::serialize::InputArchive archive;
    archive.load_from(file.data() + kHeaderBytes, file.size() - kHeaderBytes - kChecksumBytes, device);
    use(archive);
  } catch (const c10::Error& error) {
    TORCH_CHECK(false, checkpoint_label(path), "does not fit this run: ", error.what_without_backtrace());
  } catch (const std::exception& error) {
    TORCH_CHECK(false, checkpoint_label(path), "does not fit this run: ", error.what());
  }
}

}  // namespace detail

/// Writes a checkpoint of the run: to "<path>.tmp" in the same folder, which then takes the place of `path`. Returns
/// when the disk has it. Whatever happens in between, `path` is the old file or the new one, whole. Throws c10::Error
/// naming the file if the system refuses (no such folder, not writable, disk full), an optimizer steps a parameter that
/// is not in `state.tensors`, or something cannot be saved; an old file is untouched then.
inline void save_checkpoint(const std::filesystem::path& path, const TrainingState& state) {
  std::string payload;
  try {
    payload = detail::payload_of(state);
  } catch (const c10::Error& error) {
    TORCH_CHECK(false, detail::checkpoint_label(path), "cannot be saved: ", error.what_without_backtrace());
  }
  detail::replace_file(path, detail::checkpoint_label(path), detail::checkpoint_file(payload));
}

/// Brings a run to where it was when `path` was written: it goes on bit for bit. The run must be built as that one was:
/// tensors of the same names, shapes and dtypes, optimizers and others of the same classes over the same parameters.
/// Optimizer state comes to the device it was saved from, or all of it to `device`, as with torch::load;
/// `state.tensors` stay where they are. Throws c10::Error naming the file, what was found and what was expected if it
/// is missing, damaged, of a later version, or of another run; the run, generators included, is as it was before then.
/// As with torch::load, load only files that you trust.
inline void load_checkpoint(const std::filesystem::path& path, TrainingState& state,
                            std::optional<torch::Device> device = std::nullopt) {
  detail::with_archive(path, device,
                       [&](torch::serialize::InputArchive& archive) { detail::load_archive(archive, state); });
}

/// Copies the tensors of a checkpoint into `tensors`, of the same names, shapes and dtypes, and nothing else: what a
/// run has learned, to be used without its optimizer. Returns the number of finished steps. Throws c10::Error as
/// load_checkpoint; nothing is changed then.
inline int64_t load_checkpoint_tensors(const std::filesystem::path& path,
                                       const std::map<std::string, torch::Tensor>& tensors) {
  int64_t step = 0;
  detail::with_archive(path, torch::Device(torch::kCPU), [&](torch::serialize::InputArchive& archive) {
    const auto found = detail::read_tensors(archive, tensors);
    step = detail::read_value(archive, "step").toInt();
    const at::NoGradGuard no_grad;
    for (const auto& [name, tensor] : tensors) torch::Tensor(tensor).copy_(found.at(name));
  });
  return step;
}

/// The `values` of a checkpoint and nothing else: what a program noted of a run, to be looked at before the run is
/// built or loaded. Throws c10::Error naming the file if it is missing, damaged or of a later version.
inline std::map<std::string, c10::IValue> load_checkpoint_values(const std::filesystem::path& path) {
  std::map<std::string, c10::IValue> values;
  detail::with_archive(path, torch::Device(torch::kCPU), [&](torch::serialize::InputArchive& archive) {
    values = detail::read_named(archive, "values");
  });
  return values;
}

/// The last checkpoints of one run in a folder, as step-<step>.ckpt.
class CheckpointFolder {
 public:
  /// Keeps the last `keep` ≥ 1 checkpoints; c10::Error otherwise. The folder is made when something is saved.
  explicit CheckpointFolder(std::filesystem::path folder, int64_t keep = 3) : folder_(std::move(folder)), keep_(keep) {
    TORCH_CHECK(keep >= 1, "CheckpointFolder: keep is ", keep, ", expected ≥ 1");
  }

  /// save_checkpoint to step-<state.step>.ckpt; then all but the last `keep` up to this step are removed. Files of
  /// later steps stay: a run that went back to an earlier step writes over them when it comes there. Returns the file's
  /// path. Throws as save_checkpoint does, and c10::Error if the folder cannot be made; nothing is removed then.
  std::filesystem::path save(const TrainingState& state) const {
    std::error_code error;
    if (std::filesystem::create_directories(folder_, error)) detail::sync_folder(folder_ / "..");
    TORCH_CHECK(!error, "checkpoint folder ", folder_.string(), ": cannot be made: ", error.message());
    std::filesystem::path path = path_of(state.step);
    save_checkpoint(path, state);
    std::vector<int64_t> old = steps_of(kEnding);
    old.erase(std::upper_bound(old.begin(), old.end(), state.step), old.end());
    // A file that cannot be removed does no harm to the new one, hence no error.
    for (int64_t i = 0; i < static_cast<int64_t>(old.size()) - keep_; ++i) {
      std::filesystem::remove(path_of(old[static_cast<size_t>(i)]), error);
    }
    for (const int64_t step : steps_of(kUnfinishedEnding)) {
      std::filesystem::remove(path_of(step, kUnfinishedEnding), error);
    }
    return path;
  }

  /// The checkpoint of the latest step that is neither truncated nor damaged nor of a later version; nothing if there
  /// is none. Reads the whole file.
  std::optional<std::filesystem::path> latest() const {
    const std::vector<int64_t> steps = steps_of(kEnding);
    for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
      try {
        detail::read_checkpoint_file(path_of(*step));
        return path_of(*step);
      } catch (const c10::Error&) {  // the next older one, then
      }
    }
    return std::nullopt;
  }

 private:
  static constexpr const char* kEnding = ".ckpt";
  static constexpr const char* kUnfinishedEnding = ".ckpt.tmp";  ///< what a save that was killed leaves

  std::filesystem::path path_of(int64_t step, const char* ending = kEnding) const {
    return folder_ / ("step-" + std::to_string(step) + ending);
  }

  /// The steps of all files that are named like that, in ascending order.
  std::vector<int64_t> steps_of(const char* ending) const {
    std::vector<int64_t> result;
    std::error_code error;  // no folder, no files
    for (const auto& entry : std::filesystem::directory_iterator(folder_, error)) {
      const std::string name = entry.path().filename().string();
      if (name.rfind("step-", 0) != 0) continue;
      const int64_t step = std::strtoll(name.c_str() + 5, nullptr, 10);
      if (path_of(step, ending).filename() == name) result.push_back(step);
    }
    std::sort(result.begin(), result.end());
    return result;
  }

  std::filesystem::path folder_;
  int64_t keep_;
};

}  // namespace lora_rite
