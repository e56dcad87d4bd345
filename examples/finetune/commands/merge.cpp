#include "commands/merge.hpp"

#include <torch/types.h>
#include <torch/utils.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <lora_rite/io/safetensors.hpp>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <system_error>
#include <utility>

#include "adapters/adapter_files.hpp"
#include "adapters/merge_plan.hpp"
#include "common/dtypes.hpp"
#include "common/error.hpp"
#include "common/files.hpp"
#include "common/new_folder.hpp"
#include "models/base_checkpoint.hpp"
#include "models/classifier.hpp"

namespace finetune {
namespace {

namespace fs = std::filesystem;

constexpr double kGiga = 1e9;

// Copies what belongs to a model beside its weights: descriptions, the tokenizer, code, the licence, at any depth.
class Companions {
 public:
  // `out` is left out of the copy if it lies within `from`.
  Companions(fs::path from, fs::path to, fs::path out)
      : from_(std::move(from)), to_(std::move(to)), out_(std::move(out)) {
    find_parts();
    copy("");
  }

  // What was not copied, by its path in the folder: weights, which the merged ones replace or which are as the base's
  // were, and what belongs to adapters and runs or is hidden.
  const std::vector<std::string>& left_out() const { return left_out_; }

 private:
  // sentence-transformers puts modules behind the model into folders; their weights are theirs alone.
  void find_parts() {
    if (!fs::exists(from_ / "modules.json")) return;
    const nlohmann::json modules = read_json(from_ / "modules.json");
    if (!modules.is_array()) return;
    for (const auto& module : modules) {
      if (!module.is_object() || !module.contains("path") || !module["path"].is_string()) continue;
      const auto path = fs::path(module["path"].get<std::string>()).lexically_normal();
      if (!path.empty() && path != ".") parts_.insert(path.begin()->string());
    }
  }

  bool is_left_out(const fs::path& inner) const {
    const std::string name = inner.filename().string();
    if (name.empty() || name[0] == '.') return true;  // a repository's own, a cache
    const fs::path path = from_ / inner;
    const bool is_folder = fs::is_directory(path);
    if (is_folder ? fs::is_symlink(path) : !fs::is_regular_file(path)) return true;  // may lead anywhere, or nowhere
    if (parts_.count(inner.begin()->string()) > 0) return false;
    if (is_folder) return fs::exists(path / "adapter_config.json");
    if (ends_with(name, ".index.json") || name == "adapter_config.json" || name == "run.json") return true;
    return lora_rite::detail::is_weight_file(name) && inner != kHeadFile;
  }

  void copy(const fs::path& folder) {
    std::vector<fs::path> entries;
    for (const auto& entry : fs::directory_iterator(from_ / folder)) {
      entries.push_back(folder / entry.path().filename());
    }
    std::sort(entries.begin(), entries.end());
    for (const fs::path& inner : entries) {
      std::error_code error;
      if (fs::equivalent(from_ / inner, out_, error) || fs::equivalent(from_ / inner, to_, error)) continue;
      if (inner == "config.json") continue;  // write_config's
      error.clear();
      if (is_left_out(inner)) {
        left_out_.push_back(inner.string());
      } else if (fs::is_directory(from_ / inner)) {
        copy(inner);
      } else if (fs::create_directories((to_ / inner).parent_path(), error), !error) {
        fs::copy_file(from_ / inner, to_ / inner, error);
      }
      if (error) fail((from_ / inner).string(), ": cannot be copied to ", to_.string(), ": ", error.message());
    }
  }

  fs::path from_, to_, out_;
  std::set<std::string> parts_;
  std::vector<std::string> left_out_;
};

// config.json says in which dtype the weights are.
void write_config(const fs::path& from, const fs::path& to, const std::string& dtype) {
  nlohmann::json config = read_json(from / "config.json");
  if (!dtype.empty()) {
    const bool is_new = config.contains("dtype");  // transformers 5; before it was "torch_dtype"
    if (is_new) config["dtype"] = dtype;
    if (!is_new || config.contains("torch_dtype")) config["torch_dtype"] = dtype;
    // Parts of a model, such as text_config, have theirs where they say one.
    for (auto& part : config) {
      for (const char* key : {"dtype", "torch_dtype"}) {
        if (part.is_object() && part.contains(key)) part[key] = dtype;
      }
    }
  }
  write_json(to / "config.json", config);
}

int64_t bytes_of(const torch::Tensor& tensor, c10::ScalarType dtype) {
  return tensor.numel() * static_cast<int64_t>(c10::elementSize(dtype));
}

// The tensors of each file: as the base has them, or cut where a file would get too large. `sources` tells the base's
// tensor that each comes from.
std::map<std::string, std::vector<std::string>> divide(const BaseCheckpoint& base,
                                                       const std::map<std::string, std::string>& sources,
                                                       const std::function<int64_t(const std::string&)>& bytes,
                                                       double limit) {
  std::map<std::string, std::vector<std::string>> files;
  if (base.is_sharded()) {
    for (const auto& [name, source] : sources) files[base.file_of().at(source)].push_back(name);
    return files;
  }
  std::vector<std::vector<std::string>> parts(1);
  double size = 0;
  for (const auto& [name, source] : sources) {
    const auto own = static_cast<double>(bytes(source));
    if (!parts.back().empty() && size + own > limit) {
      parts.emplace_back();
      size = 0;
    }
    parts.back().push_back(name);
    size += own;
  }
  if (parts.size() == 1) return {{"model.safetensors", parts[0]}};
  for (size_t i = 0; i < parts.size(); ++i) {
    char name[64];
    std::snprintf(name, sizeof name, "model-%05zu-of-%05zu.safetensors", i + 1, parts.size());
    files[name] = parts[i];
  }
  return files;
}

// The head of a classifier that the adapters bring; empty if none has one, or the base has the same. A head is no ΔW:
// it replaces the base's.
fs::path head_of(const MergeOptions& options) {
  const auto same_as = [](const fs::path& path, const std::string& content) {
    return fs::exists(path) && read_file(path) == content;
  };
  const char* advice =
      "; merge that adapter alone and without a weight, or put the head you want beside the merged "
      "model and leave it out of the adapter's folder";
  fs::path head;
  for (const WeightedAdapter& adapter : options.adapters) {
    const fs::path path = adapter.folder / kHeadFile;
    if (!fs::exists(path)) continue;
    const std::string found = read_file(path);
    if (same_as(options.model / kHeadFile, found)) continue;
    if (!head.empty() && !same_as(head, found)) {
      fail(path.string(), ": is another head than ", head.string(), ", and heads replace the base's and have no sum",
           advice);
    }
    if (adapter.weight != 1) {
      fail(path.string(), ": a head replaces the base's and has no share, but the adapter's weight is ", adapter.weight,
           advice);
    }
    head = path;
  }
  return head;
}

}  // namespace

WeightedAdapter parse_weighted_adapter(const std::string& text) {
  const size_t at = text.rfind('=');
  if (at == std::string::npos || fs::is_directory(text)) return {text, 1};
  const std::string number = text.substr(at + 1);
  char* end = nullptr;
  const double weight = std::strtod(number.c_str(), &end);
  if (number.empty() || *end != '\0' || !std::isfinite(weight)) {
    fail("--adapter ", text, ": '", number, "' is no finite number, and there is no folder of the whole name; ",
         "write DIR or DIR=WEIGHT");
  }
  return {text.substr(0, at), weight};
}

void merge_adapters(const MergeOptions& options, std::ostream& log) {
  if (options.adapters.empty()) fail("merge: no --adapter is given; name at least one");
  if (!(options.shard_size > 0)) fail("--shard-size ", options.shard_size, ": expected a number above 0");
  const bool keeps_dtypes = options.dtype.empty();
  const c10::ScalarType dtype = keeps_dtypes ? c10::kFloat : parse_dtype("--dtype", options.dtype);
  const torch::NoGradGuard no_grad;
  const BaseCheckpoint base(options.model);

  std::vector<AdapterFile> adapters;
  for (const WeightedAdapter& adapter : options.adapters) adapters.push_back(read_adapter(adapter.folder));
  for (AdapterFile& adapter : adapters) drop_copies(adapter, base);
  MergePlan plan(base);
  std::vector<std::string> fingerprints = base.merged_adapters();
  std::set<std::string> own;
  for (size_t i = 0; i < adapters.size(); ++i) {
    check_not_merged(adapters[i], base);
    fingerprints.push_back(fingerprint(adapters[i]));
    if (!own.insert(fingerprints.back()).second) {
      fail("--adapter ", adapters[i].folder.string(),
           ": the same adapter stands there twice; give it a weight instead");
    }
    plan_adapter(base, adapters[i], options.adapters[i].weight, adapters.size() == 1, plan);
    for (const std::string& note : adapters[i].notes) log << adapters[i].folder.string() << ": " << note << '\n';
  }

  const fs::path head = head_of(options);

  const auto dtype_of = [&](const torch::Tensor& tensor) {
    return keeps_dtypes || !tensor.is_floating_point() ? tensor.scalar_type() : dtype;
  };
  const auto bytes = [&](const std::string& name) {
    const torch::Tensor& tensor = base.tensors().at(name);
    return bytes_of(tensor, dtype_of(tensor));
  };
  const std::map<std::string, std::string> sources = plan.tensors(base);
  const auto files = divide(base, sources, bytes, options.shard_size * kGiga);

  NewFolder folder(options.out);
  const Companions companions(options.model, folder.inside(), options.out);
  write_config(options.model, folder.inside(), options.dtype);
  if (plan.unties) write_untied(folder.inside() / "config.json");
  if (!head.empty()) {
    fs::copy_file(head, folder.inside() / kHeadFile, fs::copy_options::overwrite_existing);  // the base's may be there
  }
  int64_t total = 0;
  nlohmann::json weight_map = nlohmann::json::object();
  for (const auto& [file, names] : files) {
    std::map<std::string, torch::Tensor> tensors;
    for (const std::string& name : names) {
      const std::string& source = sources.at(name);
      tensors.emplace(name, merged_tensor(base, plan, name, source, dtype_of(base.tensors().at(source))));
      weight_map[name] = file;
      total += bytes(source);
    }
    const auto old = base.metadata().find(file);
    std::map<std::string, std::string> metadata =
        old != base.metadata().end() ? old->second : std::map<std::string, std::string>();
    metadata["format"] = "pt";  // transformers asks for it
    metadata[kMergedKey] = nlohmann::json(fingerprints).dump();
    fs::create_directories((folder.inside() / file).parent_path());  // an index may put shards into a folder of theirs
    lora_rite::save_safetensors(folder.inside() / file, tensors, metadata);
    log << "wrote " << file << ": " << tensors.size() << " tensors\n";
  }
  if (files.size() > 1 || base.is_sharded()) {
    write_json(folder.inside() / lora_rite::detail::kShardIndex,
               {{"metadata", {{"total_size", total}}}, {"weight_map", weight_map}});
  }
  folder.finish();
  std::vector<std::string> left_out;  // beside the very files that were merged
  for (const std::string& name : companions.left_out()) {
    const bool is_written_anew = base.is_sharded() && name == lora_rite::detail::kShardIndex;
    if (base.metadata().count(name) == 0 && !is_written_anew) left_out.push_back(name);
  }
  if (!left_out.empty()) log << "left out what is none of the merged model's: " << join(left_out) << '\n';
  if (plan.unties) log << "Embedding and output are two matrices now (tie_word_embeddings is false)\n";
  log << "Merged " << plan.changes.size() << " weights of " << base.tensors().size() << " tensors; the model is in "
      << options.out.string() << '\n';
}

void add_merge_command(CLI::App& app, std::function<int()>& action) {
  CLI::App* command = app.add_subcommand(
      "merge", "Write a base model and an adapter as one ordinary checkpoint, which needs no LoRA to be used");
  struct Given {
    MergeOptions options;
    std::vector<std::string> adapters;
  };
  const auto given = std::make_shared<Given>();
  command->add_option("--model", given->options.model, "Folder of the base model that the adapter was trained on")
      ->required()
      ->type_name("DIR");
  command
      ->add_option("--adapter", given->adapters,
                   "Folder of a PEFT adapter; several are added up, each times its WEIGHT (default 1)")
      ->required()
      ->type_name("DIR[=WEIGHT]");
  command->add_option("--out", given->options.out, "Folder to be made")->required()->type_name("DIR");
  command->add_option("--dtype", given->options.dtype, "Dtype of all weights: " + join(dtype_names()))
      ->default_str("as in the base");
  command
      ->add_option("--shard-size", given->options.shard_size,
                   "10^9 bytes of a file, above which there are several; a sharded base keeps its files")
      ->capture_default_str();
  command->footer(
      "\n"
      "Every weight that the adapter changes becomes W + scale * B A, computed in float32 (a float64 base's in "
      "float64)\n"
      "and rounded once; all other tensors and whatever lies beside the weights are copied, subfolders included; what\n"
      "is left out is said.\n"
      "transformers loads the folder, and so does this program.\n"
      "Biases, modules that were trained whole (modules_to_save) and a classifier's head replace the base's, and have\n"
      "no sum or share: such an adapter is merged without a weight. If an adapter changes\n"
      "embedding or output of a decoder that has one matrix for both, both are written, and config.json says so\n"
      "(of Llama, Gemma, Mistral, Qwen, Phi, OLMo and others of their layout; docs/merge.md).\n"
      "Any model works whose tensors are called as transformers calls them, also such that cannot be trained here.\n"
      "\n"
      "An adapter that is in the weights already is refused: the files remember what was merged into them. So is one\n"
      "that is more than B A and whole parameters (DoRA, fan_in_fan_out, lora_bias, factors of experts, ...).\n"
      "\n"
      "Example:\n"
      "  finetune merge --model .deps/smollm2 --adapter runs/arc --out merged --dtype bfloat16\n");
  command->callback([given, &action] {
    action = [given] {
      for (const std::string& adapter : given->adapters) {
        given->options.adapters.push_back(parse_weighted_adapter(adapter));
      }
      merge_adapters(given->options, std::cout);
      return 0;
    };
  });
}

}  // namespace finetune
