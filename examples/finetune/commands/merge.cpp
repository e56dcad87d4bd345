#include "commands/merge.hpp"

#include <torch/torch.h>

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

#include "adapter_files.hpp"
#include "classifier.hpp"
#include "dtypes.hpp"
#include "error.hpp"
#include "files.hpp"
#include "merge_plan.hpp"
#include "new_folder.hpp"

namespace finetune {
namespace {

namespace fs = std::filesystem;

constexpr const char* kIndexFile = "model.safetensors.index.json";
constexpr double kGiga = 1e9;

// What belongs to a model beside its weights: descriptions, the tokenizer, the licence.
bool is_companion(const fs::path& path) {
  const std::string name = path.filename().string();
  const std::string extension = path.extension().string();
  if (name == "config.json" || name == "adapter_config.json" || name == "run.json") return false;
  if (ends_with(name, ".index.json")) return false;
  if (name.rfind("LICENSE", 0) == 0 || name.rfind("NOTICE", 0) == 0) return true;
  for (const char* known : {".json", ".txt", ".model", ".jinja"}) {
    if (extension == known) return true;
  }
  return false;
}

void copy_companions(const fs::path& from, const fs::path& to) {
  for (const auto& entry : fs::directory_iterator(from)) {
    if (!entry.is_regular_file() || !is_companion(entry.path())) continue;
    std::error_code error;
    fs::copy_file(entry.path(), to / entry.path().filename(), error);
    if (error) fail(entry.path().string(), ": cannot be copied to ", to.string(), ": ", error.message());
  }
}

// config.json says in which dtype the weights are.
void write_config(const fs::path& from, const fs::path& to, const std::string& dtype) {
  nlohmann::json config = read_json(from / "config.json");
  if (!dtype.empty()) {
    const bool is_new = config.contains("dtype");  // transformers 5; before it was "torch_dtype"
    if (is_new) config["dtype"] = dtype;
    if (!is_new || config.contains("torch_dtype")) config["torch_dtype"] = dtype;
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
  copy_companions(options.model, folder.inside());
  write_config(options.model, folder.inside(), options.dtype);
  if (plan.unties) write_untied(folder.inside() / "config.json");
  for (const AdapterFile& adapter : adapters) {
    if (fs::exists(adapter.folder / kHeadFile)) {
      fs::copy_file(adapter.folder / kHeadFile, folder.inside() / kHeadFile, fs::copy_options::overwrite_existing);
    }
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
    write_json(folder.inside() / kIndexFile, {{"metadata", {{"total_size", total}}}, {"weight_map", weight_map}});
  }
  folder.finish();
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
      "Every weight that the adapter changes becomes W + scale * B A, computed in float32 and rounded once; all other\n"
      "tensors and the tokenizer's files are copied. transformers loads the folder, and so does this program.\n"
      "Biases and modules that were trained whole (modules_to_save) replace the base's. If an adapter changes "
      "embedding\n"
      "or output of a decoder that has one matrix for both, both are written, and config.json says so.\n"
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
