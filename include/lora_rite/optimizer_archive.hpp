#pragma once

// What of optimizer.hpp, which includes it, writes and reads archives.

#include <torch/serialize/archive.h>

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/optimizer.hpp"

namespace lora_rite {

namespace detail {

/// The entry `key`; throws c10::Error naming it if it is missing or `is_right` says no. `where` begins the message.
template <class IsRight>
c10::IValue read_entry(torch::serialize::InputArchive& archive, const std::string& where, const std::string& key,
                       const char* expected, const IsRight& is_right) {
  c10::IValue value;
  TORCH_CHECK(archive.try_read(key, value), "load: ", where, " has no entry '", key, "', expected ", expected);
  TORCH_CHECK(is_right(value), "load: ", where, ": entry '", key, "' is ", value, ", expected ", expected);
  return value;
}

inline std::string read_text(torch::serialize::InputArchive& archive, const std::string& where,
                             const std::string& key) {
  return read_entry(archive, where, key, "a text", [](const c10::IValue& v) { return v.isString(); }).toStringRef();
}

inline int64_t read_int(torch::serialize::InputArchive& archive, const std::string& where, const std::string& key) {
  return read_entry(archive, where, key, "a number", [](const c10::IValue& v) { return v.isInt(); }).toInt();
}

inline bool read_bool(torch::serialize::InputArchive& archive, const std::string& where, const std::string& key) {
  return read_entry(archive, where, key, "true or false", [](const c10::IValue& v) { return v.isBool(); }).toBool();
}

inline torch::serialize::InputArchive read_archive(torch::serialize::InputArchive& archive, const std::string& where,
                                                   const std::string& key) {
  torch::serialize::InputArchive entry;
  TORCH_CHECK(archive.try_read(key, entry), "load: ", where, " is missing in the archive");
  return entry;
}

}  // namespace detail

template <class Basis>
void LoraRite<Basis>::write_pair(torch::serialize::OutputArchive& entry, size_t group, size_t pair) const {
  const bool stepped = !groups_[group].places.empty();
  entry.write("stepped", c10::IValue(stepped));
  if (stepped) save_state(entry, group, pair);
}

template <class Basis>
void LoraRite<Basis>::write(torch::serialize::OutputArchive& archive, const WritePair& pair_to,
                            const WriteOthers& others_to) const {
  check_groups();
  archive.write("format", c10::IValue(std::string(kFormat)));
  archive.write("basis", c10::IValue(std::string(Basis::name())));
  archive.write("skipped_steps", c10::IValue(skipped_steps()));
  archive.write("group_count", c10::IValue(static_cast<int64_t>(groups_.size())));
  for (size_t i = 0; i < groups_.size(); ++i) {
    const Group& group = groups_[i];
    torch::serialize::OutputArchive group_archive(archive.compilation_unit());
    torch::serialize::OutputArchive options(archive.compilation_unit());
    param_groups_[i].options().serialize(options);
    group_archive.write("options", options);
    group_archive.write("kind", c10::IValue(std::string(kind(group))));
    group_archive.write("size", c10::IValue(static_cast<int64_t>(state_count(group))));
    if (group.others) others_to(group_archive, i);
    for (size_t p = 0; p < group.pairs.size(); ++p) {
      torch::serialize::OutputArchive entry(archive.compilation_unit());
      entry.write("name", c10::IValue(group.pairs[p].name));
      pair_to(entry, i, p);
      group_archive.write(std::to_string(p), entry);
    }
    archive.write(std::to_string(i), group_archive);
  }
}

template <class Basis>
void LoraRite<Basis>::save(torch::serialize::OutputArchive& archive) const {
  write(
      archive,
      [this](torch::serialize::OutputArchive& entry, size_t group, size_t pair) { write_pair(entry, group, pair); },
      [this](torch::serialize::OutputArchive& entry, size_t group) { groups_[group].others->save(entry); });
}

/// Is it an archive of this class? Returns its number of groups.
template <class Basis>
int64_t LoraRite<Basis>::read_header(torch::serialize::InputArchive& archive) {
  const std::string whole = "the archive";
  c10::IValue format;
  TORCH_CHECK(archive.try_read("format", format), "load: the archive holds no LoraRite optimizer (it has no entry ",
              "'format', expected '", kFormat, "')");
  TORCH_CHECK(format.isString() && format.toStringRef() == kFormat, "load: the archive holds no LoraRite optimizer ",
              "(entry 'format' is ", format, ", expected '", kFormat, "')");
  const std::string basis = detail::read_text(archive, whole, "basis");
  TORCH_CHECK(basis == Basis::name(), "load: the archive's basis is '", basis, "', expected '", Basis::name(), "'");
  return detail::read_int(archive, whole, "group_count");
}

template <class Basis>
PairState LoraRite<Basis>::read_pair(torch::serialize::InputArchive& group_archive, size_t g, size_t p) const {
  const std::string label = label_of(g, p);
  torch::serialize::InputArchive entry = detail::read_archive(group_archive, label, std::to_string(p));
  const std::string name = detail::read_text(entry, label, "name");
  TORCH_CHECK(name == groups_[g].pairs[p].name, "load: ", label, " is '", name, "' in the archive, expected '",
              groups_[g].pairs[p].name, "'");
  return read_state(detail::read_bool(entry, label, "stepped") ? &entry : nullptr, g, p);
}

/// ", t of A t of B" of a pair in an archive, whoever keeps it; what is missing is told when it is read.
template <class Basis>
std::string LoraRite<Basis>::steps_of_pair(torch::serialize::InputArchive& group_archive, size_t p) {
  torch::serialize::InputArchive entry;
  at::Tensor scalars;
  if (!group_archive.try_read(std::to_string(p), entry) || !entry.try_read("scalars", scalars, /*is_buffer=*/true) ||
      scalars.numel() < 2)
    return ", -";
  const at::Tensor steps = scalars.flatten().to(at::kCPU, at::kDouble);
  return c10::str(", ", steps[0].item<double>(), " ", steps[1].item<double>());
}

template <class Basis>
void LoraRite<Basis>::load(torch::serialize::InputArchive& archive) {
  at::NoGradGuard no_grad;
  with_batches([&] {
    const int64_t count = read_header(archive);
    const int64_t skipped = detail::read_int(archive, "the archive", "skipped_steps");
    TORCH_CHECK(count == static_cast<int64_t>(groups_.size()), "load: the archive has ", count,
                " param groups, expected ", groups_.size());

    // Everything is read and checked before anything is changed. `steps` tell processes whether they have the same
    // file.
    std::string steps;
    std::vector<std::unique_ptr<torch::optim::OptimizerOptions>> options;
    std::vector<std::vector<PairState>> pair_states(groups_.size());
    std::vector<engine::AdamWParameters::Memory> other_states(groups_.size());
    for (size_t i = 0; i < groups_.size(); ++i) {
      const Group& group = groups_[i];
      const std::string label = "group " + std::to_string(i);
      torch::serialize::InputArchive group_archive = detail::read_archive(archive, label, std::to_string(i));
      const std::string found = detail::read_text(group_archive, label, "kind");
      TORCH_CHECK(found == kind(group), "load: ", label, " holds '", found, "', expected '", kind(group), "'");
      const int64_t size = detail::read_int(group_archive, label, "size");
      TORCH_CHECK(size == static_cast<int64_t>(state_count(group)), "load: ", label, " has ", size,
                  " parameters in the archive, expected ", state_count(group));
      auto options_archive = detail::read_archive(group_archive, label + ", entry 'options'", "options");
      options.push_back(param_groups_[i].options().clone());
      options.back()->serialize(options_archive);
      if (group.others) {
        detail::check_options_of_adam(static_cast<const torch::optim::AdamWOptions&>(*options.back()),
                                      "load: " + label);
        other_states[i] = group.others->read(group_archive, label);
        steps += other_states[i].steps();
        continue;
      }
      for (size_t p = 0; p < group.pairs.size(); ++p) steps += steps_of_pair(group_archive, p);
      detail::check_options(static_cast<const LoraRiteOptions&>(*options.back()), "load: " + label);
      for (size_t p = 0; p < group.pairs.size(); ++p)
        pair_states[i].push_back(group.places[p] ? read_pair(group_archive, i, p) : PairState());
    }
    at::Tensor skipped_steps = at::tensor(skipped, at::kLong);

    checked(c10::str("archive: ", skipped, " skipped steps", steps));
    for (size_t i = 0; i < groups_.size(); ++i) restore(groups_[i], pair_states[i]);
    for (size_t i = 0; i < groups_.size(); ++i) {
      torch::optim::OptimizerOptions& own = param_groups_[i].options();
      if (groups_[i].others) {
        groups_[i].others->restore(std::move(other_states[i]));
        static_cast<torch::optim::AdamWOptions&>(own) = static_cast<torch::optim::AdamWOptions&>(*options[i]);
      } else {
        static_cast<LoraRiteOptions&>(own) = static_cast<LoraRiteOptions&>(*options[i]);
      }
    }
    skipped_ = std::move(skipped_steps);
  });
}

/// A pair's state of another optimizer, for the whole factors and in the dtypes that it has here.
template <class Basis>
PairState LoraRite<Basis>::read_converted(torch::serialize::InputArchive& entry, size_t g, size_t p) const {
  const FactorPair& pair = groups_[g].pairs[p];
  std::array<std::vector<int64_t>, 2> shapes = {pair.a.sizes().vec(), pair.b.sizes().vec()};
  const int64_t rank = pair.a.size(0);
  if (const auto shards = row_shards(g, p)) shapes = {std::vector{rank, shards->rows[0]}, {shards->rows[1], rank}};
  const at::ScalarType dtype = pair.a.scalar_type();
  PairState state =
      PairState::load(entry, label_of(g, p), shapes, rank, engine::wide_dtype(dtype), at::kCPU, /*convert=*/true);
  if (dtype == at::kDouble || dtype == at::kFloat) state.master = {};  // they are their own
  return state;
}

/// An archive is made as `save` of this optimizer would write it, with the entries that were found in place of its own;
/// `load` takes it and checks it, and changes nothing where something does not fit.
template <class Basis>
LoadReport LoraRite<Basis>::load_matching(torch::serialize::InputArchive& archive, const LoadOptions& options) {
  at::NoGradGuard no_grad;
  agree_on_groups();
  check_groups();
  struct Found {
    std::string name;  // in the archive
    std::unique_ptr<torch::serialize::InputArchive> entry;
  };
  const auto found_at = [](std::string name, torch::serialize::InputArchive entry) {
    return Found{std::move(name), std::make_unique<torch::serialize::InputArchive>(std::move(entry))};
  };
  std::map<std::string, Found> pairs;  // by their names here
  std::vector<Found> others;
  std::vector<std::string> names;
  LoadReport report;
  const int64_t count = read_header(archive);
  for (int64_t g = 0; g < count; ++g) {
    const std::string label = "group " + std::to_string(g);
    torch::serialize::InputArchive group = detail::read_archive(archive, label, std::to_string(g));
    const int64_t size = detail::read_int(group, label, "size");
    if (detail::read_text(group, label, "kind") != kind(Group())) {
      others.push_back(found_at(label, std::move(group)));
      continue;
    }
    for (int64_t p = 0; p < size / 2; ++p) {
      const std::string place = "pair " + std::to_string(p) + " of " + label;
      torch::serialize::InputArchive entry = detail::read_archive(group, place, std::to_string(p));
      std::string name = detail::read_text(entry, place, "name");
      if (name.empty()) name = place;
      names.push_back(name);
      const std::string own = options.rename ? options.rename(name) : name;
      if (own.empty()) {
        report.unused.push_back(name);
        continue;
      }
      const auto [other, is_new] = pairs.emplace(own, found_at(name, std::move(entry)));
      TORCH_CHECK(is_new, "load: the archive's pairs '", other->second.name, "' and '", name, "' are both '", own,
                  "' here, expected one");
    }
  }

  // All of it is read before anything is written: what a process keeps goes to the others while they write.
  size_t next_others = 0;
  std::vector<std::string> own_names;
  std::set<std::string> used;
  std::map<std::pair<size_t, size_t>, std::optional<PairState>> states;  // by group and pair; none: not stepped yet
  std::map<size_t, engine::AdamWParameters::Memory> memories;            // by group
  std::string lines;
  const auto take = [&](const std::string& own, bool is_found) {
    (is_found ? report.loaded : report.kept).push_back(own);
    if (is_found) lines += "from the archive: " + own + "\n";
  };
  for (size_t g = 0; g < groups_.size(); ++g) {
    if (groups_[g].others) {
      const std::string label = "group " + std::to_string(g);
      if (options.other_parameters && next_others < others.size()) {
        Found& found = others[next_others++];
        if (detail::read_int(*found.entry, found.name, "size") == static_cast<int64_t>(state_count(groups_[g]))) {
          auto& memory = memories[g] = groups_[g].others->read(*found.entry, label);
          memory.maximize = groups_[g].others->maximize();  // an option
        } else {
          report.unused.push_back(found.name);
        }
      }
      take(label, memories.count(g) > 0);
    }
    for (size_t p = 0; p < groups_[g].pairs.size(); ++p) {
      const std::string own = name_of(g, p);
      own_names.push_back(own);
      const auto found = pairs.find(own);
      if (found != pairs.end()) {
        TORCH_CHECK(used.insert(own).second, "load: two pairs of this optimizer are called '", own,
                    "', expected one for that of the archive (see FactorPair::name)");
        auto& entry = *found->second.entry;
        auto& state = states[{g, p}];
        if (detail::read_bool(entry, label_of(g, p), "stepped")) state = read_converted(entry, g, p);
      }
      take(own, found != pairs.end());
    }
  }
  for (const auto& [own, found] : pairs)
    if (used.count(own) == 0) report.unused.push_back(found.name);
  for (; next_others < others.size(); ++next_others) report.unused.push_back(others[next_others].name);
  TORCH_CHECK(!report.loaded.empty(), "load: nothing of the archive is here: its pairs are ", listed(names),
              ", expected some of ", listed(own_names), " (see LoadOptions::rename)");

  checked(lines);
  torch::serialize::OutputArchive merged;
  write(
      merged,
      [&](torch::serialize::OutputArchive& entry, size_t g, size_t p) {
        const auto state = states.find({g, p});
        if (state == states.end()) {
          write_pair(entry, g, p);
          return;
        }
        entry.write("stepped", c10::IValue(state->second.has_value()));
        if (state->second) state->second->save(entry);
      },
      [&](torch::serialize::OutputArchive& group_archive, size_t g) {
        const auto memory = memories.find(g);
        if (memory == memories.end()) {
          groups_[g].others->save(group_archive);
        } else {
          memory->second.save(group_archive);
        }
      });

  std::stringstream bytes;
  merged.save_to(bytes);
  torch::serialize::InputArchive in;
  in.load_from(bytes, at::Device(at::kCPU));
  load(in);
  return report;
}

}  // namespace lora_rite
