#include "memory_plan/plan.hpp"

#include <iomanip>
#include <lora_rite/nn/inject.hpp>
#include <set>
#include <sstream>

#include "common/dtypes.hpp"
#include "common/error.hpp"
#include "memory_plan/activations.hpp"
#include "memory_plan/optimizer_state.hpp"
#include "memory_plan/sizes.hpp"
#include "models/base_checkpoint.hpp"
#include "models/config.hpp"

namespace finetune {
namespace {

// What the headers tell.
struct Headers {
  bool has_both_outputs = false;  // an output matrix beside the embedding
  double largest_cast = 0;        // bytes in the file of the largest tensor that is of another dtype
  c10::ScalarType largest_dtype = c10::kFloat;
};

Headers read_headers(const std::filesystem::path& folder, c10::ScalarType dtype) {
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

// "134.5 M"
std::string in_short(double number) {
  if (number < 1e6) return fixed(number / 1e3, 1) + " k";
  return number < 1e9 ? fixed(number / 1e6, 1) + " M" : fixed(number / 1e9, 2) + " G";
}

std::string in_unit(double bytes, bool megabytes) { return fixed(bytes / (megabytes ? 1e6 : 1e9), 2); }

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
  const ModelNeeds needs = plan_model(asked, element);
  const Headers checkpoint = read_headers(asked.model, asked.dtype);

  double weights = 0;
  double output = 0;
  std::set<const void*> seen;  // one tensor may have several names
  for (const auto& item : needs.model->named_parameters()) {
    if (!seen.insert(item.value().unsafeGetTensorImpl()).second) continue;
    weights += as_double(item.value().numel());
    if (lora_rite::nn::detail::is_or_ends_in_any(item.key(), {"embed_tokens.weight", "shared.weight"})) {
      output = as_double(item.value().numel());
    }
  }
  if (checkpoint.has_both_outputs && !is_classifier) weights += output;

  const std::vector<FactorShapes> pairs = plan_factors(*needs.model, asked.lora);
  double factors = 0;
  double state = 0;
  for (const FactorShapes& pair : pairs) {
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
  if (needs.head > 0) add("head with gradient and state of AdamW", 4 * needs.head * kFloatBytes);
  add(concat("activations of ", needs.dimensions, asked.gradient_checkpointing ? " with gradient checkpointing" : ""),
      needs.activations);
  if (needs.logits > 0) {
    add(concat("logits of ", asked.rows, " × ", asked.completion, " tokens in float32"), needs.logits);
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

}  // namespace finetune
