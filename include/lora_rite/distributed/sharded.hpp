#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/distributed/distributed_lora_rite.hpp"

namespace lora_rite {

/// LoRA-RITE whose pairs are divided over processes that all hold the whole factors (data-parallel training). Each
/// process keeps the state of its pairs only, about 1/N of it, does their share of the work, and broadcasts the moved
/// factors. Steps are those of LoraRite, bit for bit.
///
///     lora_rite::average_gradients(optimizer, group);
///     optimizer.step();
///
/// All processes call constructor, `step`, `save`, `load`, `load_matching` and `reset_state` together. `save` writes
/// the whole state in every process, in the format of `LoraRite`: a checkpoint of N processes resumes in M, or in one
/// without this class. `diagnostics` of a pair that another process keeps has its condition numbers only, and
/// `state_of` throws. Each call throws c10::Error in all processes,
/// before anything is changed, if groups, pairs, options or calls differ, in `step` also if the presence of gradients
/// does, or if one process refuses its input or its closure throws: that process throws its own error, the others one
/// that names it. All calls throw if a process leaves. Then the factors may be those of before or after the step: go
/// on from a checkpoint. May be moved.
template <class Basis = PolarBasis>
class ShardedLoraRite final : public detail::DistributedLoraRite<Basis> {
 public:
  /// As LoraRite's. The pairs have the same values in all processes.
  ShardedLoraRite(ProcessGroup group, std::vector<FactorPair> pairs, LoraRiteOptions options = {})
      : detail::DistributedLoraRite<Basis>(std::move(group), pairs, options) {
    this->start(std::move(pairs), options);
  }

  /// The process that keeps a pair. Throws c10::Error if there is no such pair, or the processes have not agreed on its
  /// group yet: they do in the next call that all of them make.
  int owner(size_t group, size_t pair) const {
    TORCH_CHECK(group < owners_.size() && pair < owners_[group].size(), "owner: pair ", pair, " of group ", group,
                " is kept by no process, expected one of the ", owners_.size(), " groups that the processes divided");
    return owners_[group][pair];
  }

 protected:
  bool keeps(size_t group, size_t pair) const override { return owner(group, pair) == this->collectives().rank(); }

  at::Tensor sum_over_processes(const at::Tensor& squared_norms) override {
    at::Tensor norms = squared_norms.clone();
    this->collectives().reduce(norms, "adding up the norm of the gradients");
    return norms;
  }

  /// The longest job first, to the process with the least work; pairs of earlier groups keep their place.
  void divide() override {
    std::vector<double> load(static_cast<size_t>(this->collectives().size()), 0.0);
    for (size_t g = 0; g < this->group_count(); ++g) {
      const auto& pairs = this->pairs_of(g);
      // Per element: memory, and operations that grow with the rank.
      const auto cost = [&](size_t p) {
        return static_cast<double>(pairs[p].a.numel() + pairs[p].b.numel()) *
               (20.0 + static_cast<double>(pairs[p].a.size(0)));
      };
      if (g < owners_.size()) {
        for (size_t p = 0; p < pairs.size(); ++p) load[static_cast<size_t>(owners_[g][p])] += cost(p);
        continue;
      }
      std::vector<size_t> order(pairs.size());
      std::iota(order.begin(), order.end(), size_t{0});
      std::stable_sort(order.begin(), order.end(), [&](size_t x, size_t y) { return cost(x) > cost(y); });
      owners_.emplace_back(pairs.size());
      for (const size_t p : order) {
        const auto least = std::min_element(load.begin(), load.end());
        owners_[g][p] = static_cast<int>(least - load.begin());
        *least += cost(p);
      }
    }
  }

  /// The factors go from their owners to everyone.
  void publish() override {
    struct Message {
      int from;
      std::vector<at::Tensor> factors;
      at::Tensor data;
      detail::Collectives::Pending pending;
    };
    const char* what = "sending moved factors";
    const int rank = this->collectives().rank();
    std::vector<Message> messages;
    for (int from = 0; from < this->collectives().size(); ++from) {
      std::vector<at::Tensor> factors;
      for (size_t g = 0; g < owners_.size(); ++g)
        for (size_t p = 0; p < owners_[g].size(); ++p)
          if (owners_[g][p] == from) factors.insert(factors.end(), {this->pairs_of(g)[p].a, this->pairs_of(g)[p].b});
      for (auto& bucket : detail::buckets(factors, kBucketBytes)) {
        at::Tensor data = detail::flat(bucket);
        const auto pending = this->collectives().start_broadcast(data, from, what);
        messages.push_back({from, std::move(bucket), data, pending});
      }
    }
    for (const Message& message : messages) {
      this->collectives().finish(message.pending, what);
      if (message.from != rank) detail::copy_back(message.data, message.factors);
    }
  }

  void save_state(torch::serialize::OutputArchive& archive, size_t group, size_t pair) const override {
    std::string bytes;
    if (keeps(group, pair)) {
      torch::serialize::OutputArchive own;
      this->pick(group, pair).save(own);
      std::ostringstream stream;
      own.save_to(stream);
      bytes = stream.str();
    }
    bytes = this->collectives().broadcast_bytes(bytes, owner(group, pair), this->device(), "gathering a checkpoint");
    std::istringstream stream(bytes);
    torch::serialize::InputArchive received;
    received.load_from(stream, at::Device(at::kCPU));  // the owner's device may not be here
    const FactorPair& factors = this->pairs_of(group)[pair];
    PairState::load(received, this->label_of(group, pair), {factors.a.sizes().vec(), factors.b.sizes().vec()},
                    factors.a.size(0), engine::wide_dtype(factors.a.scalar_type()), at::kCPU)
        .save(archive);
  }

 private:
  std::vector<std::vector<int>> owners_;  ///< by group and pair
};

}  // namespace lora_rite
