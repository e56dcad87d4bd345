#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <functional>
#include <map>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "lora_rite/distributed/distributed_lora_rite.hpp"

namespace lora_rite {

/// Which factors of a pair are divided over the processes; the other is whole, and the same, in all of them.
struct RowSharding {
  bool a = true;  ///< A [r, in]: each process has columns of it, a part of `in`
  bool b = true;  ///< B [out, r]: each process has rows of it, a part of `out`
};

/// LoRA-RITE on factors of which each process holds a part of the long dimension: tensor parallel layers (one factor of
/// a pair is divided), fully sharded parameters (both are). A step is exact, as if the factors were whole: between
/// the acts r×r matrices are added up over the processes, whose size does not depend on `in` and `out`. The parts lie
/// in the order of the processes and need not be equal; gradients are those of the parts, and of a whole factor the
/// same in all processes.
///
/// All processes call constructor, `step`, `save`, `load`, `load_matching` and `reset_state` together; errors are those
/// of ShardedLoraRite. `save` writes the state of the whole factors in every process, in the format of `LoraRite`: any
/// other number of processes, or one without this class, resumes from it. `diagnostics` describes the parts at hand.
/// Takes Engine::Device.
template <class Basis = PolarBasis>
class RowShardedLoraRite final : public detail::DistributedLoraRite<Basis> {
 public:
  /// As LoraRite's, with this process's parts of matrices (two dimensions); `sharding` tells which factors are divided,
  /// by default both of every pair.
  RowShardedLoraRite(
      ProcessGroup group, std::vector<FactorPair> pairs, LoraRiteOptions options = {},
      std::function<RowSharding(const FactorPair&)> sharding = [](const FactorPair&) { return RowSharding(); })
      : detail::DistributedLoraRite<Basis>(std::move(group), pairs, options, /*parts=*/true),
        sharding_(std::move(sharding)) {
    this->start(std::move(pairs), options);
  }

 protected:
  /// That of the rows: 1 of A [r, in], 0 of B [out, r], or −1 where `sharding` does not divide the factor.
  PerSide<int64_t> divided_dimensions(const FactorPair& pair) const override {
    const RowSharding sharding = sharding_(pair);
    return {sharding.a ? 1 : -1, sharding.b ? 0 : -1};
  }

  /// Every process tells its rows. Where they do not fit nothing is remembered, in any process.
  void divide() override {
    const size_t known = rows_.size();
    try {
      gather_rows();
    } catch (...) {
      rows_.resize(known);
      throw;
    }
  }

  /// Collective: asks all processes for their rows of the groups that are new, and throws c10::Error if they do not
  /// fit.
  void gather_rows() {
    for (size_t g = rows_.size(); g < this->group_count(); ++g) {
      const auto& pairs = this->pairs_of(g);
      std::vector<int64_t> own;
      for (size_t p = 0; p < pairs.size(); ++p) {
        TORCH_CHECK(pairs[p].a.dim() == 2 && pairs[p].b.dim() == 2, this->label_of(g, p), " has shapes ",
                    pairs[p].a.sizes(), " and ", pairs[p].b.sizes(), ", expected matrices to divide by rows");
        own.insert(own.end(), {pairs[p].a.size(1), pairs[p].b.size(0)});
      }
      rows_.emplace_back(pairs.size());
      if (pairs.empty()) continue;
      const auto all = this->collectives().gather(at::tensor(own, at::kLong).to(this->device()), "comparing rows");
      for (const at::Tensor& process : all) {
        const at::Tensor rows = process.cpu();
        for (size_t p = 0; p < pairs.size(); ++p)
          for (const Side side : kSides)
            rows_[g][p][side].push_back(rows.const_data_ptr<int64_t>()[2 * static_cast<int64_t>(p) + index_of(side)]);
      }
      // Pairs whose wholes agree in shape are batched, which their parts must allow in every process.
      std::map<std::tuple<int64_t, int64_t, bool, bool>, size_t> first;
      for (size_t p = 0; p < pairs.size(); ++p) {
        const auto shards = *row_shards(g, p);
        const std::tuple whole(shards.rows.a, shards.rows.b, shards.sharded.a, shards.sharded.b);
        const size_t same = first.emplace(whole, p).first->second;
        TORCH_CHECK(
            rows_[g][p].a == rows_[g][same].a && rows_[g][p].b == rows_[g][same].b, this->label_of(g, p), " and ",
            this->label_of(g, same),
            " have the same shape and are divided differently, expected pairs of one shape to be divided alike");
      }
    }
  }

  std::optional<engine::RowShards> row_shards(size_t group, size_t pair) const override {
    const FactorPair& factors = this->pairs_of(group)[pair];
    const RowSharding sharding = sharding_(factors);
    const auto rank = static_cast<size_t>(this->collectives().rank());
    const PerSide<std::vector<int64_t>>& of_processes = rows_[group][pair];
    const PerSide<int64_t> told = {of_processes.a[rank], of_processes.b[rank]};
    TORCH_CHECK(factors.a.size(1) == told.a && factors.b.size(0) == told.b, this->label_of(group, pair),
                " has factors of shapes ", factors.a.sizes(), " and ", factors.b.sizes(), ", expected ", told.a,
                " and ", told.b,
                " rows as the other processes were told; build the optimizer after changing the module");
    engine::RowShards shards;
    for (const Side side : kSides) {
      const std::vector<int64_t>& rows = of_processes[side];
      const bool is_sharded = side == Side::A ? sharding.a : sharding.b;
      shards.sharded[side] = is_sharded;
      shards.begin[side] =
          is_sharded ? std::accumulate(rows.begin(), rows.begin() + this->collectives().rank(), int64_t{0}) : 0;
      shards.rows[side] = is_sharded ? std::accumulate(rows.begin(), rows.end(), int64_t{0}) : rows[0];
    }
    shards.sum = [collectives = this->shared_collectives()](at::Tensor& sums) {
      collectives->reduce(sums, "adding up the processes' rows");
    };
    shards.first = this->collectives().rank() == 0;
    return shards;
  }

  void save_state(torch::serialize::OutputArchive& archive, size_t group, size_t pair) const override {
    PairState state = this->pick(group, pair);
    for_each_tall(state, group, pair, [&](at::Tensor& tensor, int64_t dimension, const std::vector<int64_t>& rows) {
      tensor = gather_rows(tensor, dimension, rows);
    });
    state.save(archive);
  }

  PairState read_state(torch::serialize::InputArchive* archive, size_t group, size_t pair) const override {
    if (archive == nullptr) return LoraRite<Basis>::read_state(archive, group, pair);
    const FactorPair& factors = this->pairs_of(group)[pair];
    const auto shards = *row_shards(group, pair);
    const int64_t rank = factors.a.size(0);
    PairState state =
        PairState::load(*archive, this->label_of(group, pair), {{rank, shards.rows.a}, {shards.rows.b, rank}}, rank,
                        engine::wide_dtype(factors.a.scalar_type()), this->device());
    state.check_finite(this->label_of(group, pair));
    const auto process = this->collectives().rank();
    for_each_tall(state, group, pair, [&](at::Tensor& tensor, int64_t dimension, const std::vector<int64_t>& rows) {
      const int64_t begin = std::accumulate(rows.begin(), rows.begin() + process, int64_t{0});
      tensor = tensor.narrow(dimension, begin, rows[static_cast<size_t>(process)]).contiguous();
    });
    return state;
  }

 private:
  /// The bytes of a tensor of any process's shard in the order of the processes, along `dimension`; `rows` of each.
  at::Tensor gather_rows(const at::Tensor& own, int64_t dimension, const std::vector<int64_t>& rows) const {
    const int64_t longest = *std::max_element(rows.begin(), rows.end());
    std::vector<int64_t> sizes = own.sizes().vec();
    sizes[static_cast<size_t>(dimension)] = longest;
    at::Tensor padded = at::zeros(sizes, own.options());
    padded.narrow(dimension, 0, own.size(dimension)).copy_(own);
    std::vector<at::Tensor> parts = this->collectives().gather(padded, "gathering a checkpoint");
    for (size_t process = 0; process < parts.size(); ++process)
      parts[process] = parts[process].narrow(dimension, 0, rows[process]);
    return at::cat(parts, dimension);
  }

  /// function(tensor, its dimension of rows, rows of every process) for all of a state (k = 1) that lies by rows of a
  /// divided factor.
  template <class Function>
  void for_each_tall(PairState& state, size_t group, size_t pair, const Function& function) const {
    const RowSharding sharding = sharding_(this->pairs_of(group)[pair]);
    for (const Side side : kSides) {
      if (!(side == Side::A ? sharding.a : sharding.b)) continue;
      const auto& rows = rows_[group][pair][side];
      const int64_t dimension = side == Side::A ? 2 : 1;  // behind k = 1
      if (state.momentum[side].defined()) function(state.momentum[side], dimension, rows);
      if (state.master[side].defined()) function(state.master[side], dimension, rows);
      if (state.row_moments[side].defined()) function(state.row_moments[side], 1, rows);
    }
  }

  std::function<RowSharding(const FactorPair&)> sharding_;
  std::vector<std::vector<PerSide<std::vector<int64_t>>>> rows_;  ///< by group, pair, side and process
};

}  // namespace lora_rite
