#pragma once

#include <torch/serialize/archive.h>

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/bodies.hpp"
#include "lora_rite/optimizer_base.hpp"
#include "lora_rite/step/archive_entries.hpp"
#include "lora_rite/step/group.hpp"

/// Bodies of LoraRiteBase: `load_matching`. An archive is made as `save` of this optimizer would write it, with the
/// entries that were found in place of its own; `load` takes it and checks it, and changes nothing where something does
/// not fit.
namespace lora_rite {

/// What `load_matching` works on.
struct LoraRiteBase::Matching {
  struct Found {
    std::string name;  ///< in the archive
    std::unique_ptr<torch::serialize::InputArchive> entry;
  };

  // Of the archive.
  std::map<std::string, Found> pairs;  ///< by their names here
  std::vector<Found> adamw;            ///< groups of other parameters
  std::vector<std::string> names;      ///< of all its pairs

  // Of this optimizer.
  std::vector<std::string> own_names;
  std::set<std::string> used;                                            ///< those of `pairs`
  std::map<std::pair<size_t, size_t>, std::optional<PairState>> states;  ///< by group and pair; none: not stepped yet
  std::map<size_t, engine::AdamWParameters::Memory> memories;            ///< by group

  LoadReport report;
  std::string lines;  ///< what was found, for processes to compare

  static Found found_at(std::string name, torch::serialize::InputArchive entry) {
    return {std::move(name), std::make_unique<torch::serialize::InputArchive>(std::move(entry))};
  }

  void take(const std::string& own, bool is_found) {
    (is_found ? report.loaded : report.kept).push_back(own);
    if (is_found) lines += "from the archive: " + own + "\n";
  }
};

/// A pair's state of another optimizer, for the whole factors and in the dtypes that it has here.
LORA_RITE_BODY PairState LoraRiteBase::read_converted(torch::serialize::InputArchive& entry, size_t g, size_t p) const {
  const FactorPair& pair = pairs_of(g)[p];
  PerSide<std::vector<int64_t>> shapes = {pair.a.sizes().vec(), pair.b.sizes().vec()};
  const int64_t rank = pair.a.size(0);
  if (const auto shards = row_shards(g, p)) shapes = {{rank, shards->rows.a}, {shards->rows.b, rank}};
  const at::ScalarType dtype = pair.a.scalar_type();
  PairState state =
      PairState::load(entry, label_of(g, p), shapes, rank, engine::wide_dtype(dtype), at::kCPU, /*convert=*/true);
  if (dtype == at::kDouble || dtype == at::kFloat) state.master = {};  // they are their own
  return state;
}

/// Looks what there is in the archive.
LORA_RITE_BODY LoraRiteBase::Matching LoraRiteBase::find_in(torch::serialize::InputArchive& archive,
                                                            const LoadOptions& options) const {
  Matching matching;
  const int64_t count = read_header(archive);
  for (int64_t g = 0; g < count; ++g) {
    const std::string label = "group " + std::to_string(g);
    torch::serialize::InputArchive group = detail::read_archive(archive, label, std::to_string(g));
    const int64_t size = detail::read_int(group, label, "size");
    if (detail::read_text(group, label, "kind") != Group{Group::Pairs()}.kind()) {
      matching.adamw.push_back(Matching::found_at(label, std::move(group)));
      continue;
    }
    for (int64_t p = 0; p < size / 2; ++p) {
      const std::string place = "pair " + std::to_string(p) + " of " + label;
      torch::serialize::InputArchive entry = detail::read_archive(group, place, std::to_string(p));
      std::string name = detail::read_text(entry, place, "name");
      if (name.empty()) name = place;
      matching.names.push_back(name);
      const std::string own = options.rename ? options.rename(name) : name;
      if (own.empty()) {
        matching.report.unused.push_back(name);
        continue;
      }
      const auto [other, is_new] = matching.pairs.emplace(own, Matching::found_at(name, std::move(entry)));
      TORCH_CHECK(is_new, "load: the archive's pairs '", other->second.name, "' and '", name, "' are both '", own,
                  "' here, expected one");
    }
  }
  return matching;
}

/// Reads what this optimizer has a place for. All of it is read before anything is written: what a process keeps goes
/// to the others while they write.
LORA_RITE_BODY void LoraRiteBase::read_matching(Matching& matching, const LoadOptions& options) const {
  size_t next = 0;  // of the archive's groups of other parameters
  for (size_t g = 0; g < group_count(); ++g) {
    if (const auto* adamw = own_->all[g].adamw()) {
      const std::string label = "group " + std::to_string(g);
      if (options.other_parameters && next < matching.adamw.size()) {
        Matching::Found& found = matching.adamw[next++];
        if (detail::read_int(*found.entry, found.name, "size") == static_cast<int64_t>(own_->all[g].state_count())) {
          auto& memory = matching.memories[g] = adamw->read(*found.entry, label);
          memory.maximize = adamw->maximize();  // an option
        } else {
          matching.report.unused.push_back(found.name);
        }
      }
      matching.take(label, matching.memories.count(g) > 0);
    }
    for (size_t p = 0; p < own_->all[g].pair_count(); ++p) {
      const std::string own = name_of(g, p);
      matching.own_names.push_back(own);
      const auto found = matching.pairs.find(own);
      if (found != matching.pairs.end()) {
        TORCH_CHECK(matching.used.insert(own).second, "load: two pairs of this optimizer are called '", own,
                    "', expected one for that of the archive (see FactorPair::name)");
        auto& entry = *found->second.entry;
        auto& state = matching.states[{g, p}];
        if (detail::read_bool(entry, label_of(g, p), "stepped")) state = read_converted(entry, g, p);
      }
      matching.take(own, found != matching.pairs.end());
    }
  }
  for (const auto& [own, found] : matching.pairs)
    if (matching.used.count(own) == 0) matching.report.unused.push_back(found.name);
  for (; next < matching.adamw.size(); ++next) matching.report.unused.push_back(matching.adamw[next].name);
  TORCH_CHECK(!matching.report.loaded.empty(), "load: nothing of the archive is here: its pairs are ",
              detail::listed(matching.names), ", expected some of ", detail::listed(matching.own_names),
              " (see LoadOptions::rename)");
}

LORA_RITE_BODY LoadReport LoraRiteBase::load_matching(torch::serialize::InputArchive& archive,
                                                      const LoadOptions& options) {
  at::NoGradGuard no_grad;
  agree_on_groups();
  check_groups();
  Matching matching = find_in(archive, options);
  read_matching(matching, options);

  agree_before_change(matching.lines);
  torch::serialize::OutputArchive merged;
  write(
      merged,
      [&](torch::serialize::OutputArchive& entry, size_t g, size_t p) {
        const auto state = matching.states.find({g, p});
        if (state == matching.states.end()) {
          write_own_pair(entry, g, p);
          return;
        }
        entry.write("stepped", c10::IValue(state->second.has_value()));
        if (state->second) state->second->save(entry);
      },
      [&](torch::serialize::OutputArchive& group_archive, size_t g) {
        const auto memory = matching.memories.find(g);
        if (memory == matching.memories.end()) {
          own_->all[g].adamw()->save(group_archive);
        } else {
          memory->second.save(group_archive);
        }
      });

  std::stringstream bytes;
  merged.save_to(bytes);
  torch::serialize::InputArchive in;
  in.load_from(bytes, at::Device(at::kCPU));
  load(in);
  return std::move(matching.report);
}

}  // namespace lora_rite
