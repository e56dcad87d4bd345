#include "training/run_identity.hpp"

#include <ATen/Parallel.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "common/error.hpp"
#include "common/files.hpp"

namespace finetune {
namespace {

constexpr const char* kKey = "begun with: ";  // before a part's name, among a checkpoint's values

constexpr const char* kNoFile = "no file";

// Pieces of one size, whatever the number of threads.
uint64_t fingerprint_of(const torch::Tensor& tensor) {
  constexpr int64_t kPiece = int64_t{1} << 20;
  const torch::Tensor plain = tensor.detach().cpu().contiguous();
  const auto* bytes = static_cast<const char*>(plain.const_data_ptr());
  const auto size = static_cast<int64_t>(plain.nbytes());
  std::vector<uint64_t> pieces((size + kPiece - 1) / kPiece);
  at::parallel_for(0, static_cast<int64_t>(pieces.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      Fingerprint fingerprint;
      fingerprint.add_bytes(bytes + piece * kPiece, static_cast<size_t>(std::min(kPiece, size - piece * kPiece)));
      pieces[piece] = fingerprint.value();
    }
  });
  Fingerprint whole;
  whole.add_bytes(pieces.data(), pieces.size() * sizeof(uint64_t));
  return whole.value();
}

std::string of_fingerprint(const Fingerprint& fingerprint) { return concat(" of fingerprint ", fingerprint.text()); }

RunPart weights_part(const torch::nn::Module& base, const std::filesystem::path& folder) {
  Fingerprint fingerprint;
  const auto parameters = base.named_parameters();
  for (const auto& item : parameters) {
    fingerprint.add(item.key());
    fingerprint.add(item.value().sizes().vec());
    fingerprint.add(c10::toString(item.value().scalar_type()));
    fingerprint.add(static_cast<int64_t>(fingerprint_of(item.value())));
  }
  return {"base weights", folder.string(), concat(parameters.size(), " tensors", of_fingerprint(fingerprint)), true};
}

// By its fields, whatever their order and spaces, but for what transformers notes of itself when it writes.
RunPart config_part(const std::filesystem::path& folder, const std::string& name) {
  const std::filesystem::path path = folder / name;
  RunPart part{name, path.string(), kNoFile, false};
  if (!std::filesystem::exists(path)) return part;
  nlohmann::json config = read_json(path);
  for (const char* note : {"_name_or_path", "transformers_version"}) config.erase(note);
  Fingerprint fingerprint;
  fingerprint.add(config.dump());
  part.content = "fields" + of_fingerprint(fingerprint);
  return part;
}

RunPart tokenizer_part(const std::filesystem::path& path) {
  RunPart part{"tokenizer", path.string(), kNoFile, false};
  if (!std::filesystem::exists(path)) return part;
  const std::string bytes = read_file(path);
  Fingerprint fingerprint;
  fingerprint.add(bytes);
  part.content = concat(bytes.size(), " bytes", of_fingerprint(fingerprint));
  return part;
}

}  // namespace

RunPart data_part(const std::string& name, const std::string& origin, int64_t count, const Fingerprint& fingerprint) {
  return {name, origin, count == 0 ? std::string("none") : concat(count, " examples", of_fingerprint(fingerprint)),
          false};
}

RunIdentity base_identity(const torch::nn::Module& base, const std::filesystem::path& folder) {
  return {weights_part(base, folder), config_part(folder, "config.json"), config_part(folder, "generation_config.json"),
          tokenizer_part(folder / "tokenizer.json")};
}

std::string lines_of(const RunIdentity& identity) {
  std::string lines;
  for (const RunPart& part : identity) lines += part.name + ": " + part.content + "\n";
  return lines;
}

void remember(const RunIdentity& identity, std::map<std::string, c10::IValue>& values) {
  for (const RunPart& part : identity) values[kKey + part.name] = part.content;
}

RunDifference compare(const RunIdentity& identity, const std::map<std::string, c10::IValue>& values) {
  const auto first = values.lower_bound(kKey);
  if (first == values.end() || first->first.rfind(kKey, 0) != 0) return {/*is_unknown=*/true, {}};
  RunDifference difference;
  for (const RunPart& part : identity) {
    const auto known = values.find(kKey + part.name);
    const std::string before = known == values.end() ? "none" : known->second.toStringRef();
    if (before == part.content) continue;
    if (!difference.text.empty()) difference.text += "; ";
    difference.text += concat(part.name, ": ", before, " then, ", part.content, " now",
                              part.origin.empty() ? std::string() : " in " + part.origin);
  }
  return difference;
}

}  // namespace finetune
