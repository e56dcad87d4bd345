#pragma once

#include <torch/serialize/archive.h>

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

/// Bodies of LoraRiteBase: what writes and reads archives.
namespace lora_rite {

LORA_RITE_BODY void LoraRiteBase::save_state(torch::serialize::OutputArchive& archive, size_t group,
                                             size_t pair) const {
  pick(group, pair).save(archive);
}

LORA_RITE_BODY PairState LoraRiteBase::read_state(torch::serialize::InputArchive* archive, size_t group,
                                                  size_t pair) const {
  const Group::Pairs& pairs = *own_->all[group].pairs();
  const auto slot = *pairs.slot_of(pair);
  return pairs.batch(slot.batch).read(archive, slot.index);
}

LORA_RITE_BODY void LoraRiteBase::write_own_pair(torch::serialize::OutputArchive& entry, size_t group,
                                                 size_t pair) const {
  const bool stepped = own_->all[group].pairs()->batches.has_value();
  entry.write("stepped", c10::IValue(stepped));
  if (stepped) save_state(entry, group, pair);
}

LORA_RITE_BODY void LoraRiteBase::write(torch::serialize::OutputArchive& archive, const WritePair& write_pair,
                                        const WriteAdamW& write_adamw) const {
  check_groups();
  archive.write("format", c10::IValue(std::string(detail::kFormat)));
  archive.write("basis", c10::IValue(std::string(own_->basis.name)));
  archive.write("skipped_steps", c10::IValue(skipped_steps()));
  archive.write("group_count", c10::IValue(static_cast<int64_t>(group_count())));
  for (size_t i = 0; i < group_count(); ++i) {
    const Group& group = own_->all[i];
    torch::serialize::OutputArchive group_archive(archive.compilation_unit());
    torch::serialize::OutputArchive options(archive.compilation_unit());
    param_groups_[i].options().serialize(options);
    group_archive.write("options", options);
    group_archive.write("kind", c10::IValue(std::string(group.kind())));
    group_archive.write("size", c10::IValue(static_cast<int64_t>(group.state_count())));
    if (group.adamw()) write_adamw(group_archive, i);
    for (size_t p = 0; p < group.pair_count(); ++p) {
      torch::serialize::OutputArchive entry(archive.compilation_unit());
      entry.write("name", c10::IValue(pairs_of(i)[p].name));
      write_pair(entry, i, p);
      group_archive.write(std::to_string(p), entry);
    }
    archive.write(std::to_string(i), group_archive);
  }
}

LORA_RITE_BODY void LoraRiteBase::save(torch::serialize::OutputArchive& archive) const {
  write(
      archive,
      [this](torch::serialize::OutputArchive& entry, size_t group, size_t pair) { write_own_pair(entry, group, pair); },
      [this](torch::serialize::OutputArchive& entry, size_t group) { own_->all[group].adamw()->save(entry); });
}

/// Is it an archive of this class? Returns its number of groups.
LORA_RITE_BODY int64_t LoraRiteBase::read_header(torch::serialize::InputArchive& archive) const {
  const std::string whole = "the archive";
  c10::IValue format;
  TORCH_CHECK(archive.try_read("format", format), "load: the archive holds no LoraRite optimizer (it has no entry ",
              "'format', expected '", detail::kFormat, "')");
  TORCH_CHECK(format.isString() && format.toStringRef() == detail::kFormat,
              "load: the archive holds no LoraRite optimizer ", "(entry 'format' is ", format, ", expected '",
              detail::kFormat, "')");
  const std::string basis = detail::read_text(archive, whole, "basis");
  TORCH_CHECK(basis == own_->basis.name, "load: the archive's basis is '", basis, "', expected '", own_->basis.name,
              "'");
  return detail::read_int(archive, whole, "group_count");
}

LORA_RITE_BODY PairState LoraRiteBase::read_pair(torch::serialize::InputArchive& group_archive, size_t g,
                                                 size_t p) const {
  const std::string label = label_of(g, p);
  torch::serialize::InputArchive entry = detail::read_archive(group_archive, label, std::to_string(p));
  const std::string name = detail::read_text(entry, label, "name");
  TORCH_CHECK(name == pairs_of(g)[p].name, "load: ", label, " is '", name, "' in the archive, expected '",
              pairs_of(g)[p].name, "'");
  return read_state(detail::read_bool(entry, label, "stepped") ? &entry : nullptr, g, p);
}

/// What an archive has of a param group.
struct LoraRiteBase::SavedGroup {
  std::unique_ptr<torch::optim::OptimizerOptions> options;
  std::vector<PairState> pairs;
  engine::AdamWParameters::Memory adamw;
  std::string steps;  ///< how many steps each tensor has seen: tells processes whether they have the same file
};

LORA_RITE_BODY LoraRiteBase::SavedGroup LoraRiteBase::read_group(torch::serialize::InputArchive& archive,
                                                                 size_t index) const {
  const Group& group = own_->all[index];
  const std::string label = "group " + std::to_string(index);
  const std::string found = detail::read_text(archive, label, "kind");
  TORCH_CHECK(found == group.kind(), "load: ", label, " holds '", found, "', expected '", group.kind(), "'");
  const int64_t size = detail::read_int(archive, label, "size");
  TORCH_CHECK(size == static_cast<int64_t>(group.state_count()), "load: ", label, " has ", size,
              " parameters in the archive, expected ", group.state_count());
  auto options_archive = detail::read_archive(archive, label + ", entry 'options'", "options");
  SavedGroup saved;
  saved.options = param_groups_[index].options().clone();
  saved.options->serialize(options_archive);
  if (group.adamw()) {
    detail::check_options_of_adam(static_cast<const torch::optim::AdamWOptions&>(*saved.options), "load: " + label);
    saved.adamw = group.adamw()->read(archive, label);
    saved.steps = saved.adamw.steps();
    return saved;
  }
  detail::check_options(static_cast<const LoraRiteOptions&>(*saved.options), "load: " + label);
  for (size_t p = 0; p < group.pair_count(); ++p) {
    saved.steps += detail::steps_of_pair(archive, p);
    saved.pairs.push_back(group.pairs()->slot_of(p) ? read_pair(archive, index, p) : PairState());
  }
  return saved;
}

LORA_RITE_BODY void LoraRiteBase::load(torch::serialize::InputArchive& archive) {
  at::NoGradGuard no_grad;
  with_batches([&] {
    const int64_t count = read_header(archive);
    const int64_t skipped = detail::read_int(archive, "the archive", "skipped_steps");
    TORCH_CHECK(count == static_cast<int64_t>(group_count()), "load: the archive has ", count,
                " param groups, expected ", group_count());

    // Everything is read and checked before anything is changed.
    std::vector<SavedGroup> saved;
    std::string steps;
    for (size_t i = 0; i < group_count(); ++i) {
      torch::serialize::InputArchive group_archive =
          detail::read_archive(archive, "group " + std::to_string(i), std::to_string(i));
      saved.push_back(read_group(group_archive, i));
      steps += saved.back().steps;
    }
    at::Tensor skipped_steps = at::tensor(skipped, at::kLong);

    agree_before_change(c10::str("archive: ", skipped, " skipped steps", steps));
    for (size_t i = 0; i < group_count(); ++i)
      if (own_->all[i].pairs()) own_->all[i].restore(saved[i].pairs);
    for (size_t i = 0; i < group_count(); ++i) {
      torch::optim::OptimizerOptions &own = param_groups_[i].options(), &read = *saved[i].options;
      if (auto* adamw = own_->all[i].adamw()) {
        adamw->restore(std::move(saved[i].adamw));
        static_cast<torch::optim::AdamWOptions&>(own) = static_cast<torch::optim::AdamWOptions&>(read);
      } else {
        static_cast<LoraRiteOptions&>(own) = static_cast<LoraRiteOptions&>(read);
      }
    }
    own_->skipped = std::move(skipped_steps);
  });
}

}  // namespace lora_rite
