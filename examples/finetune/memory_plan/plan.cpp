#include "memory_plan/plan.hpp"

#include <sys/resource.h>

#include <torch/version.h>
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 11
#include <c10/core/CachingDeviceAllocator.h>
#endif

#include <algorithm>
#include <cmath>
#include <fstream>
#include <functional>
#include <limits>
#include <lora_rite/nn/inject.hpp>
#include <map>
#include <numeric>
#include <optional>
#include <set>
#include <sstream>

#include "common/dtypes.hpp"
#include "common/error.hpp"
#include "models/base_checkpoint.hpp"
#include "models/bert.hpp"
#include "models/config.hpp"
#include "models/load_model.hpp"

namespace finetune {
namespace {

namespace fs = std::filesystem;

constexpr double kFloatBytes = 4;
constexpr double kDoubleBytes = 8;

// --- The parts that are exact ---------------------------------------------------------------------------------------

double count(const std::vector<int64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), 1.0,
                         [](double product, int64_t side) { return product * static_cast<double>(side); });
}

// A pair of factors by their shapes: A [r, in], B [out, r].
struct Factors {
  std::vector<int64_t> a, b;
  double rank() const { return static_cast<double>(a.front()); }
  double size() const { return count(a) + count(b); }
};

// What inject_lora would add.
std::vector<Factors> plan_factors(torch::nn::Module& model, const lora_rite::nn::LoraConfig& config) {
  std::vector<Factors> factors;
  for (const auto& step : lora_rite::nn::detail::plan_injection("inject_lora", model, config, "default").steps) {
    auto [a, b] = step.layer->factor_shapes(step.config.rank);
    factors.push_back({std::move(a), std::move(b)});
  }
  return factors;
}

// A side of Shampoo's or SOAP's two matrices: the statistics and the root or basis. Long sides go without.
double preconditioner(const std::vector<int64_t>& shape) {
  constexpr int64_t kMaxPreconditioner = 1024;
  const int64_t columns = shape.size() > 1 ? static_cast<int64_t>(count(shape)) / shape.front() : 1;
  double size = 0;
  for (const int64_t side : {shape.front(), columns}) {
    if (side <= kMaxPreconditioner) size += 2 * static_cast<double>(side * side);
  }
  return size;
}

// The bytes that an optimizer remembers of a pair.
double state_bytes(const MemoryQuestion& question, const Factors& pair) {
  const std::string& name = question.optimizer;
  if (name == "rite" || name == "rite-qr") {
    // One momentum; V and R⁺ of both sides, the column sums of factors and momentum, four scalars a side.
    const double r = pair.rank();
    double bytes = kFloatBytes * pair.size() + kDoubleBytes * (4 * r * r + 4 * r + 8);
    if (question.row_equilibration) bytes += kFloatBytes * pair.size() / r;
    return bytes;
  }
  static const std::map<std::string, double> moments = {
      {"sgd", 0},  {"adagrad", 1}, {"rmsprop", 1},     {"muon", 1}, {"adam", 2},   {"adamw", 2},
      {"lamb", 2}, {"lora+", 2},   {"scaled-adam", 2}, {"soap", 2}, {"shampoo", 3}};
  const auto found = moments.find(name);
  if (found == moments.end()) fail("--optimizer ", name, ": its memory is not known");
  double size = found->second * pair.size();
  if (name == "soap" || name == "shampoo") size += preconditioner(pair.a) + preconditioner(pair.b);
  return kFloatBytes * size;
}

// --- Files ----------------------------------------------------------------------------------------------------------

// What the headers tell.
struct Headers {
  bool has_both_outputs = false;  // an output matrix beside the embedding
  double largest_cast = 0;        // bytes in the file of the largest tensor that is of another dtype
  c10::ScalarType largest_dtype = c10::kFloat;
};

Headers read_headers(const fs::path& folder, c10::ScalarType dtype) {
  Headers result;
  const BaseCheckpoint base(folder);
  for (const auto& item : base.file_of()) {
    const lora_rite::TensorInfo info = base.info(item.first);
    const double bytes = count(info.shape) * static_cast<double>(c10::elementSize(info.dtype));
    if (info.dtype != dtype && bytes > result.largest_cast) {
      result.largest_cast = bytes;
      result.largest_dtype = info.dtype;
    }
  }
  result.has_both_outputs = !base.output_name().empty() && !base.embedding_name().empty();
  return result;
}

// --- Activations ----------------------------------------------------------------------------------------------------

// The bytes that the layers of one kind keep for the backward pass.
struct Layers {
  double number = 0;
  double kept = 0;   // by one of them
  double input = 0;  // the one tensor that gradient checkpointing keeps of it
};

double as_double(int64_t value) { return static_cast<double>(value); }

// What each adapter adds to what the layer keeps anyway, bytes a token: its input in the factors' float32 where the
// layer's is of another dtype, the input after dropout with its mask, and A's result.
double adapter_bytes(const MemoryQuestion& question, double in) {
  double copies = question.dtype == c10::kFloat ? 0 : 1;
  if (question.lora.dropout > 0) copies = 2;
  return kFloatBytes * (copies * in + as_double(question.lora.rank));
}

// An RmsNorm's own copy of its input in float32.
double norm_bytes(const MemoryQuestion& question, double width) {
  return question.dtype == c10::kFloat ? 0 : kFloatBytes * width;
}

// One token of a decoder layer that sees `keys`: the inputs of both halves and their normalised forms; queries, keys,
// values (shared heads are copied) and the result of the attention; four widths of the feed-forward layer.
double decoder_layer_bytes(const MemoryQuestion& question, const DecoderConfig& config, double keys, double element) {
  const double d = as_double(config.hidden_size), f = as_double(config.intermediate_size);
  const double h = as_double(config.num_attention_heads), e = as_double(config.head_dim);
  double bytes = element * (4 * d + 4 * h * e + 4 * f) + 2 * norm_bytes(question, d);
  if (config.norms_after) bytes += element * 2 * d + 2 * norm_bytes(question, d);
  if (config.attn_logit_softcapping > 0) {
    // Scores after the cap, the softmax in float32 and, if that is another, in the dtype of the values.
    bytes += h * keys * (element + kFloatBytes + (question.dtype == c10::kFloat ? 0 : element));
  } else if (config.attention_dropout > 0) {
    bytes += h * keys * 3 * element;  // softmax, mask, and the product of both
  }
  return bytes + 5 * adapter_bytes(question, d) + adapter_bytes(question, h * e) + adapter_bytes(question, f);
}

// One token of T5's attention that sees `keys`: normalised input, queries, result, the mask of the dropout behind it;
// beside its own keys and values also scores, or softmax, mask and product where there is dropout.
double t5_attention_bytes(const MemoryQuestion& question, const T5Config& config, double keys, double element) {
  const double d = as_double(config.d_model), inner = as_double(config.num_heads * config.d_kv);
  const bool drops = config.dropout_rate > 0;
  double bytes = element * (2 * d + 2 * inner) + norm_bytes(question, d);
  if (drops) bytes += element * (d + 3 * as_double(config.num_heads) * keys);
  return bytes + adapter_bytes(question, d) + adapter_bytes(question, inner);
}

// One token that is seen: its key and its value.
double t5_seen_bytes(const MemoryQuestion& question, const T5Config& config, double element) {
  return 2 * (element * as_double(config.num_heads * config.d_kv) + adapter_bytes(question, as_double(config.d_model)));
}

// One token of T5's feed-forward layer: input, normalised input, the mask of the dropout behind it; what the activation
// and the product with the second branch keep; the inner dropout's mask and result.
double t5_feed_forward_bytes(const MemoryQuestion& question, const T5Config& config, double element) {
  const double d = as_double(config.d_model), f = as_double(config.d_ff);
  const bool drops = config.dropout_rate > 0;
  const double inner = (config.gated ? 3 : 1) + (drops ? 2 : config.gated ? 1 : 0);
  const double bytes = element * ((drops ? 3 : 2) * d + inner * f) + norm_bytes(question, d);
  return bytes + adapter_bytes(question, f) + (config.gated ? 2 : 1) * adapter_bytes(question, d);
}

// With the checkpoints of all layers, one of them is computed again at a time.
double kept_bytes(const std::vector<Layers>& stacks, bool checkpointing) {
  double all = 0, largest = 0;
  for (const Layers& layers : stacks) {
    all += layers.number * (checkpointing ? layers.input : layers.kept);
    largest = std::max(largest, layers.kept);
  }
  return checkpointing ? all + largest : all;
}

// In the backward pass: log-softmax, its gradient and the logits' one in float32, and that in the logits' own dtype.
double logit_bytes(const MemoryQuestion& question, double tokens, int64_t vocabulary, bool capped, double element) {
  double bytes = 3 * kFloatBytes + (capped ? element : 0);
  if (question.dtype != c10::kFloat) bytes += element;
  return tokens * as_double(vocabulary) * bytes;
}

// --- The families of models -----------------------------------------------------------------------------------------

struct Parts {
  std::shared_ptr<torch::nn::Module> model;  // without memory for its weights
  double activations = 0;
  double logits = 0;
  double head = 0;         // parameters
  std::string dimensions;  // of the batch
};

Parts plan_classifier(const MemoryQuestion& question) {
  const BertConfig config = BertConfig::from_file(question.model / "config.json");
  const double tokens = as_double(question.rows * question.length);
  const double d = as_double(config.hidden_size), f = as_double(config.intermediate_size);
  Parts parts;
  parts.model = std::make_shared<BertModel>(config);
  // Queries, keys, values and the attention's result, padded and packed; the inputs and results of both norms; two
  // widths of the feed-forward layer.
  const double bytes = kFloatBytes * (9 * d + 2 * f) + 5 * adapter_bytes(question, d) + adapter_bytes(question, f);
  // And what the backward pass works with in a feed-forward layer, which large logits would outweigh.
  const double work = kFloatBytes * 4 * (d + f);
  parts.activations = tokens * (as_double(config.num_hidden_layers) * bytes + work);
  parts.head = (d + 1) * as_double(question.classes);
  parts.dimensions = concat(question.rows, " × ", question.length, " tokens");
  return parts;
}

Parts plan_decoder(const MemoryQuestion& question, double element) {
  const DecoderConfig config = DecoderConfig::from_file(question.model / "config.json");
  const double tokens = as_double(question.rows * question.length);
  Parts parts;
  const double layer = tokens * decoder_layer_bytes(question, config, as_double(question.length), element);
  const Layers layers{as_double(config.num_hidden_layers), layer, tokens * as_double(config.hidden_size) * element};
  parts.activations = kept_bytes({layers}, question.gradient_checkpointing);
  parts.logits = logit_bytes(question, as_double(question.rows * question.completion), config.vocab_size,
                             config.final_logit_softcapping > 0, element);
  parts.dimensions = concat(question.rows, " × ", question.length, " tokens");
  return parts;
}

Parts plan_encoder_decoder(const MemoryQuestion& question, double element) {
  const T5Config config = T5Config::from_file(question.model / "config.json");
  const double sources = as_double(question.rows * question.length);
  const double targets = as_double(question.rows * question.completion);
  const double seen = t5_seen_bytes(question, config, element);
  const double feed_forward = t5_feed_forward_bytes(question, config, element);
  const auto attention = [&](int64_t keys) { return t5_attention_bytes(question, config, as_double(keys), element); };
  const double width = as_double(config.d_model) * element;
  const Layers encoder{as_double(config.num_layers), sources * (attention(question.length) + seen + feed_forward),
                       sources * width};
  const Layers decoder{
      as_double(config.num_decoder_layers),
      targets * (attention(question.completion) + seen + attention(question.length) + feed_forward) + sources * seen,
      targets * width};
  Parts parts;
  parts.activations = kept_bytes({encoder, decoder}, question.gradient_checkpointing);
  parts.logits = logit_bytes(question, targets, config.vocab_size, false, element);
  parts.dimensions = concat(question.rows, " × ", question.length, " + ", question.completion, " tokens");
  return parts;
}

Parts plan_parts(const MemoryQuestion& question, double element) {
  const std::string type = read_model_type(question.model / "config.json");
  if (type == "bert") return plan_classifier(question);
  Parts parts =
      type == "t5" || type == "mt5" ? plan_encoder_decoder(question, element) : plan_decoder(question, element);
  parts.model = build_model(question.model);
  return parts;
}

// --- Text -----------------------------------------------------------------------------------------------------------

// "134.5 M"
std::string in_short(double number) {
  if (number < 1e6) return fixed(number / 1e3, 1) + " k";
  return number < 1e9 ? fixed(number / 1e6, 1) + " M" : fixed(number / 1e9, 2) + " G";
}

std::string in_unit(double bytes, bool megabytes) { return fixed(bytes / (megabytes ? 1e6 : 1e9), 2); }

// --- What the system says -------------------------------------------------------------------------------------------

std::optional<double> read_number(const fs::path& path) {
  std::ifstream file(path);
  double number = 0;
  if (!(file >> number)) return std::nullopt;  // "max" is no number
  return number;
}

// The value behind `name` in lines "name value" or "name: value kB".
std::optional<double> read_field(const fs::path& path, const std::string& name) {
  std::ifstream file(path);
  std::string line;
  while (std::getline(file, line)) {
    std::istringstream words(line);
    std::string key;
    double value = 0;
    if (words >> key >> value && (key == name || key == name + ":")) return value;
  }
  return std::nullopt;
}

// Names of the files in which a control group tells about its memory.
struct GroupFiles {
  const char* limit;
  const char* use;
  const char* reclaimable;  // in memory.stat
};

double room_in_group(const fs::path& group, const GroupFiles& names) {
  const auto limit = read_number(group / names.limit);
  const auto use = read_number(group / names.use);
  if (!limit || !use) return std::numeric_limits<double>::infinity();
  const double reclaimable = read_field(group / "memory.stat", names.reclaimable).value_or(0);
  return std::max(0.0, *limit - std::max(0.0, *use - reclaimable));
}

// The group at `path` below `mount` and those around it. In a container the mount is often the group itself, although
// the path is the machine's.
double room_in_groups(const fs::path& mount, const fs::path& path, const GroupFiles& names) {
  double room = room_in_group(mount, names);
  fs::path group = mount;
  for (const fs::path& part : path.relative_path()) {
    group /= part;
    room = std::min(room, room_in_group(group, names));
  }
  return room;
}

}  // namespace

double MemoryPlan::total() const {
  double sum = 0;
  for (const auto& [name, bytes] : parts) sum += bytes;
  return sum;
}

std::string MemoryPlan::text() const {
  const bool megabytes = total() < 1e9;
  const std::string unit = megabytes ? " MB  " : " GB  ";
  std::ostringstream lines;
  const auto line = [&](const std::string& name, double bytes) {
    lines << std::setw(10) << in_unit(bytes, megabytes) << unit << name << '\n';
  };
  for (const auto& [name, bytes] : parts) line(name, bytes);
  line("together", total());
  return lines.str();
}

MemoryPlan plan_memory(const MemoryQuestion& question) {
  const bool is_classifier = read_model_type(question.model / "config.json") == "bert";
  MemoryQuestion asked = question;
  if (is_classifier) asked.dtype = c10::kFloat;
  const auto element = static_cast<double>(c10::elementSize(asked.dtype));
  const Parts parts = plan_parts(asked, element);
  const Headers checkpoint = read_headers(asked.model, asked.dtype);

  double weights = 0;
  double output = 0;
  std::set<const void*> seen;  // one tensor may have several names
  for (const auto& item : parts.model->named_parameters()) {
    if (!seen.insert(item.value().unsafeGetTensorImpl()).second) continue;
    weights += as_double(item.value().numel());
    if (lora_rite::nn::detail::is_or_ends_in_any(item.key(), {"embed_tokens.weight", "shared.weight"})) {
      output = as_double(item.value().numel());
    }
  }
  if (checkpoint.has_both_outputs && !is_classifier) weights += output;

  const std::vector<Factors> pairs = plan_factors(*parts.model, asked.lora);
  double factors = 0;
  double state = 0;
  for (const Factors& pair : pairs) {
    factors += pair.size();
    state += state_bytes(asked, pair);
  }

  MemoryPlan plan;
  const auto add = [&](const std::string& name, double bytes) { plan.parts.emplace_back(name, bytes); };
  add(concat("base weights: ", in_short(weights), " in ", dtype_name(asked.dtype)), weights * element);
  add(concat("factors: ", in_short(factors), " in float32, rank ", asked.lora.rank, " on ", pairs.size(), " layers"),
      factors * kFloatBytes);
  add("their gradients", factors * kFloatBytes);
  add("state of " + asked.optimizer, state);
  if (asked.lora.init == lora_rite::nn::LoraInit::Pissa) add("PiSSA's first factors", factors * kFloatBytes);
  if (parts.head > 0) add("head with gradient and state of AdamW", 4 * parts.head * kFloatBytes);
  add(concat("activations of ", parts.dimensions, asked.gradient_checkpointing ? " with gradient checkpointing" : ""),
      parts.activations);
  if (parts.logits > 0) {
    add(concat("logits of ", asked.rows, " × ", asked.completion, " tokens in float32"), parts.logits);
  }
  if (checkpoint.largest_cast > 0) {
    add(concat("while loading: the largest tensor in ", dtype_name(checkpoint.largest_dtype)), checkpoint.largest_cast);
  }
  return plan;
}

void check_memory(const MemoryPlan& plan, double limit) {
  if (plan.total() <= limit) return;
  const bool megabytes = plan.total() < 1e9;
  std::ostringstream sum;
  const char* separator = "";
  for (const auto& [name, bytes] : plan.parts) {
    sum << separator << in_unit(bytes, megabytes) << " (" << name << ")";
    separator = " + ";
  }
  const char* unit = megabytes ? " MB" : " GB";
  fail(
      "the run needs about ", in_unit(plan.total(), megabytes), unit, ", but may take ", in_unit(limit, megabytes),
      unit, ": ", sum.str(), " = ", in_unit(plan.total(), megabytes), unit,
      "; take --dtype bfloat16, a smaller --micro-batch, --gradient-checkpointing or a lower --rank, or allow more by ",
      "--memory-limit");
}

double available_memory(const MemorySources& sources) {
  double available = std::numeric_limits<double>::infinity();
  if (const auto kilobytes = read_field(sources.meminfo, "MemAvailable")) available = *kilobytes * 1024;
  std::ifstream groups(sources.cgroup);
  std::string line;
  while (std::getline(groups, line)) {
    // "4:memory:/path" in version 1, "0::/path" in version 2
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const fs::path path = line.substr(second + 1);
    if (controllers == ",,") {
      const GroupFiles names{"memory.max", "memory.current", "inactive_file"};
      available = std::min(available, room_in_groups(sources.cgroup_mount, path, names));
    } else if (controllers.find(",memory,") != std::string::npos) {
      const GroupFiles names{"memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"};
      available = std::min(available, room_in_groups(sources.cgroup_mount / "memory", path, names));
    }
  }
  return available;
}

double peak_memory() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_maxrss) * 1024;  // Linux counts kilobytes
}

#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 11

double available_gpu_memory() {
  return static_cast<double>(at::getDeviceAllocator(at::kCUDA)->getMemoryInfo(/*device=*/0).first);
}

double peak_gpu_memory() {
  const auto every = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
  return static_cast<double>(
      at::getDeviceAllocator(at::kCUDA)->getDeviceStats(/*device=*/0).allocated_bytes.at(every).peak);
}

#else

double available_gpu_memory() { return std::numeric_limits<double>::infinity(); }

double peak_gpu_memory() { return 0; }

#endif

}  // namespace finetune
