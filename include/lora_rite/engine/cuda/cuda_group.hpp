#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "lora_rite/engine/acts.hpp"
#include "lora_rite/engine/cuda/cuda_batch.hpp"
#include "lora_rite/engine/cuda/launch.hpp"
#include "lora_rite/engine/cuda_engine.hpp"
#include "lora_rite/engine/device/rank_group.hpp"
#include "lora_rite/engine/device_numbers.hpp"

/// The front of the kernels: LibTorch's tensors as plain structs. Five launches a step for all pairs of all shapes of a
/// rank, and no value is read back to the host.
namespace lora_rite::cuda {

/// Plain structs on the device, uploaded when they change.
template <class T>
class Table {
 public:
  /// Returns whether they had changed.
  bool upload(const std::vector<T>& rows, at::Device device) {
    static_assert(std::has_unique_object_representations_v<T>, "compared by bytes");
    const size_t bytes = rows.size() * sizeof(T);
    if (bytes == known_.size() && std::memcmp(rows.data(), known_.data(), bytes) == 0) return false;
    const auto* begin = reinterpret_cast<const char*>(rows.data());
    std::vector<char> copy(begin, begin + bytes);
    known_.clear();  // should the copy fail
    const at::Tensor fresh = at::from_blob(copy.data(), {static_cast<int64_t>(bytes)}, at::kByte);
    if (!tensor_.defined()) tensor_ = at::empty(fresh.sizes(), fresh.options().device(device));
    tensor_.copy_(fresh);
    known_ = std::move(copy);
    return true;
  }
  const T* data() const { return static_cast<const T*>(tensor_.const_data_ptr()); }

 private:
  std::vector<char> known_;
  at::Tensor tensor_;
};

/// Memory on the device that is asked for once and divided among arrays.
class Arena {
 public:
  /// An array of `size` numbers, with the place where its address is to stand.
  template <class T>
  void add(T*& place, int64_t size) {
    wanted_.emplace_back(reinterpret_cast<char**>(&place), total_);
    total_ += (size * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
  }
  /// Asks for all of it.
  at::Tensor allocate(at::Device device) {
    at::Tensor memory = at::empty({total_}, at::TensorOptions().dtype(at::kByte).device(device));
    for (const auto& [place, begin] : wanted_) *place = static_cast<char*>(memory.mutable_data_ptr()) + begin;
    return memory;
  }

 private:
  std::vector<std::pair<char**, int64_t>> wanted_;
  int64_t total_ = 0;
};

/// The batches of one param group that agree in rank, dtype and device.
template <class Basis>
class CudaGroup final : public engine::BatchGroup {
 public:
  /// `places` are the batches' among all of the param group.
  CudaGroup(std::vector<CudaBatch*> batches, std::vector<size_t> places, const Kernels& kernels)
      : batches_(std::move(batches)),
        places_(std::move(places)),
        kernels_(kernels),
        others_({batches_.begin(), batches_.end()}, places_) {
    lay_out();
  }

  at::Device device() const override { return batches_[0]->device(); }

  void upload_rates(const LoraRiteOptions& options) override {
    rates_.upload(rates_of(options), device());
    others_.upload_rates(options);
  }

  std::unique_ptr<engine::Observation> observe(const LoraRiteOptions& options) override {
    if (needs_other_engine(options)) {
      sums_known_ = false;
      return others_.observe(options);
    }
    auto result = std::make_unique<Observed>(*this);
    if (!result->find_inputs(options)) return nullptr;
    result->observe(options);
    return result;
  }

  bool step_alone(const LoraRiteOptions& options, at::Tensor& skipped) override {
    if (needs_other_engine(options)) return false;
    Observed step(*this);
    if (!step.find_inputs(options)) return true;  // nothing to do
    if (!skipped.defined()) skipped = at::zeros({}, at::TensorOptions().dtype(at::kLong).device(device()));
    if (skipped.device() != device()) skipped = skipped.to(device());
    step.observe(options);
    step.decide_alone(options, skipped);
    step.move();
    return true;
  }

 private:
  /// Factors from `begin` on that are launched together, and their tiles.
  struct Part {
    int64_t begin;
    Set set;  ///< without what belongs to a step
    std::vector<int32_t> factor_of_tile;
    Table<int32_t> tiles;
    Table<Factor> factors;
  };

  static std::vector<double> rates_of(const LoraRiteOptions& options) {
    return {options.lr(), options.lr() * options.lr_ratio_b()};
  }

  /// These options are Engine::Device's, and so are gradients that the factors' dtype would round, to nothing or to
  /// infinity.
  bool needs_other_engine(const LoraRiteOptions& options) const {
    return options.row_equilibration() || options.balance() || options.max_update_rms() > 0 ||
           std::any_of(batches_.begin(), batches_.end(),
                       [](const CudaBatch* batch) { return batch->has_other_gradients(); });
  }

  /// Divides the factors into parts and tiles, and asks for the memory that stays.
  void lay_out() {
    std::vector<int64_t> rows;
    for (const CudaBatch* batch : batches_)
      for (int64_t i = 0; i < batch->count(); ++i)
        for (const Side side : kSides) rows.push_back(batch->rows_of(side));
    const int64_t rank = batches_[0]->rank(), square = rank * rank;
    Arena arena;
    const auto total = static_cast<int64_t>(rows.size());
    parts_.reserve(static_cast<size_t>(total / kMostFactors + 1));  // the arena writes to them
    for (int64_t begin = 0; begin < total; begin += kMostFactors) {
      Part& part = parts_.emplace_back();
      part.begin = begin;
      part.set = {};
      part.set.factor_count = static_cast<int32_t>(std::min<int64_t>(kMostFactors, total - begin));
      part.set.rank = static_cast<int32_t>(rank);
      part.set.dtype = batches_[0]->kernel_dtype();
      for (int32_t factor = 0; factor < part.set.factor_count; ++factor) {
        first_tiles_.push_back(static_cast<int32_t>(part.factor_of_tile.size()));
        const int64_t tiles = (rows[static_cast<size_t>(begin + factor)] + kTileRows - 1) / kTileRows;
        part.factor_of_tile.insert(part.factor_of_tile.end(), static_cast<size_t>(tiles), factor);
      }
      part.set.tile_count = static_cast<int32_t>(part.factor_of_tile.size());
      arena.add(part.set.tile_gram, part.set.tile_count * square);
      arena.add(part.set.tile_cross, part.set.tile_count * square);
      arena.add(part.set.tile_columns, part.set.tile_count * 2 * rank);
      arena.add(part.set.eigenvalues, part.set.factor_count * rank);
    }
    sums_ = arena.allocate(device());
  }

  class Observed;

  /// The rest of a step.
  class Planned final : public engine::Plan {
   public:
    explicit Planned(std::unique_ptr<Observed> observed) : observed_(std::move(observed)) {}

    void commit() noexcept override {
      try {
        observed_->move();
      } catch (...) {  // an accelerator that takes no more commands
        error_ = std::current_exception();
      }
    }

   private:
    std::unique_ptr<Observed> observed_;
  };

  /// A step in all its acts. What `plan` returns is of the same making, with this one's contents.
  class Observed final : public engine::Observation {
   public:
    explicit Observed(CudaGroup& group) : group_(&group) {}

    /// Returns whether anyone has a gradient.
    bool find_inputs(const LoraRiteOptions& options) {
      std::vector<Pointers> all;
      bool any = false;
      for (CudaBatch* batch : group_->batches_) any = batch->add_pointers(all, kept_) || any;
      if (!any) return false;
      pointers_ = std::move(all);
      for (const Part& part : group_->parts_) {
        by_part_.push_back(std::make_unique<AllPointers>());
        std::copy_n(pointers_.begin() + part.begin, part.set.factor_count, by_part_.back()->at);
      }
      std::vector<Factor> factors;
      size_t begin = 0;
      for (CudaBatch* batch : group_->batches_) {
        states_.push_back(batch->state_for(pointers_.data() + begin, options.master_weights()));
        batch->add_factors(states_.back(), factors);
        begin = factors.size();
        if (batch->take_restored()) group_->sums_known_ = false;
      }
      lay_out(factors, options.master_weights());
      return true;
    }

    void observe(const LoraRiteOptions& options) {
      numbers_ = hyperparameters(options);
      if (options.capturable()) group_->rates_.upload(rates_of(options), group_->device());
      rates_ = options.capturable() ? group_->rates_.tensor() : at::Tensor();
      sums_unknown_ = !group_->sums_known_;
      group_->sums_known_ = false;  // should anything go wrong
      launch(group_->kernels_.observe);
      group_->sums_known_ = true;
    }

    at::Tensor finite() const override { return finite_.all(); }

    at::Tensor unmagnify(const at::Tensor& step_allowed) override {
      step_allowed_ = step_allowed;
      launch(group_->kernels_.unmagnify);
      return decided_.select(1, 0).view({-1, 2}).sum(1);
    }

    std::unique_ptr<engine::Plan> plan(const LoraRiteOptions& /*options*/, const at::Tensor& clip_factor,
                                       const at::Tensor& /*step_allowed*/) override {
      clip_factor_ = clip_factor;
      launch(group_->kernels_.decide);
      return std::make_unique<Planned>(std::make_unique<Observed>(std::move(*this)));
    }

    const std::vector<size_t>& batches() const override { return group_->places_; }

    /// Act 2 without anybody else.
    void decide_alone(const LoraRiteOptions& options, const at::Tensor& skipped) {
      verdict_ = at::empty({2}, decided_.options());
      alone_ = {finite_.const_data_ptr<bool>(),        static_cast<const Decided*>(decided_.const_data_ptr()),
                static_cast<int32_t>(finite_.numel()), static_cast<int32_t>(decided_.size(0)),
                options.clip_unmagnified_norm(),       reinterpret_cast<bool*>(verdict_.mutable_data_ptr<double>() + 1),
                verdict_.mutable_data_ptr<double>(),   skipped.mutable_data_ptr<int64_t>()};
      launch(group_->kernels_.unmagnify);
      launch(group_->kernels_.decide);
    }

    /// Act 3.
    void move() {
      launch(group_->kernels_.apply);
      launch(group_->kernels_.remember);
      size_t begin = 0;
      for (size_t i = 0; i < states_.size(); ++i) {
        CudaBatch& batch = *group_->batches_[i];
        batch.finish(pointers_.data() + begin, states_[i]);
        begin += static_cast<size_t>(2 * batch.count());
      }
    }

   private:
    /// The memory of this step, and the tables of what is remembered.
    void lay_out(std::vector<Factor>& factors, bool master_weights) {
      Arena arena;
      sets_.reserve(group_->parts_.size());  // the arena writes to them
      const int64_t total = static_cast<int64_t>(factors.size());
      int64_t tiles = 0;
      for (const Part& part : group_->parts_) tiles += part.set.tile_count;
      finite_ = at::empty({tiles}, at::TensorOptions().dtype(at::kBool).device(group_->device()));
      constexpr int64_t kNumbers = sizeof(Decided) / sizeof(double);
      decided_ = at::empty({total, kNumbers}, at::TensorOptions().dtype(at::kDouble).device(group_->device()));
      auto* finite = static_cast<bool*>(finite_.mutable_data_ptr());
      auto* decided = static_cast<Decided*>(decided_.mutable_data_ptr());
      for (Part& part : group_->parts_) {
        Set& set = sets_.emplace_back(part.set);
        std::vector<Factor> own(factors.begin() + part.begin, factors.begin() + part.begin + set.factor_count);
        for (int32_t i = 0; i < set.factor_count; ++i) {
          const auto number = static_cast<size_t>(part.begin + i);
          own[static_cast<size_t>(i)].first_tile = group_->first_tiles_[number];
          own[static_cast<size_t>(i)].tiles =
              static_cast<int32_t>((own[static_cast<size_t>(i)].rows + kTileRows - 1) / kTileRows);
        }
        part.tiles.upload(part.factor_of_tile, group_->device());
        if (part.factors.upload(own, group_->device())) group_->sums_known_ = false;
        set.factor_epsilon = epsilon_of(master_weights ? Dtype::Float : set.dtype);
        set.factor_of_tile = part.tiles.data();
        set.factors = part.factors.data();
        set.tile_finite = std::exchange(finite, finite + set.tile_count);
        set.decided = std::exchange(decided, decided + set.factor_count);
        const int64_t square = int64_t{set.rank} * set.rank, all = set.factor_count * square;
        arena.add(set.tile_gradient_gram, set.tile_count * square);
        for (double** matrices :
             {&set.gradient_gram, &set.projected_gram, &set.inverse_root, &set.change, &set.second_moment})
          arena.add(*matrices, all);
        arena.add(set.maps, 2 * all);
        arena.add(set.next_eigenvalues, int64_t{set.factor_count} * set.rank);
        arena.add(set.partner_edited, set.factor_count);
        arena.add(set.spill, group_->kernels_.spill(device_index(), set.rank, set.factor_count));
      }
      work_ = arena.allocate(group_->device());
    }

    void launch(const char* (*kernel)(const Arguments&, const AllPointers&, int)) {
      const auto doubles = [](const at::Tensor& tensor, const double* otherwise) {
        return tensor.defined() ? tensor.const_data_ptr<double>() : otherwise;
      };
      const bool* allowed = step_allowed_.defined() ? step_allowed_.const_data_ptr<bool>() : alone_.step_allowed;
      for (size_t i = 0; i < sets_.size(); ++i) {
        const Arguments step = {sets_[i],
                                numbers_,
                                std::is_same_v<Basis, QrBasis>,
                                sums_unknown_,
                                doubles(rates_, nullptr),
                                doubles(clip_factor_, alone_.clip_factor),
                                allowed,
                                alone_};
        const char* const message = kernel(step, *by_part_[i], device_index());
        TORCH_CHECK(message == nullptr, "LoraRite, Engine::Cuda: ", message);
      }
    }

    int device_index() const { return group_->device().is_cpu() ? 0 : group_->device().index(); }

    CudaGroup* group_;
    std::vector<Pointers> pointers_;  ///< of all factors
    std::vector<std::unique_ptr<AllPointers>> by_part_;
    std::vector<at::Tensor> kept_;   ///< gradients
    std::vector<PairState> states_;  ///< of each batch: the state's tensors, and new ones among them
    std::vector<Set> sets_;          ///< by part
    at::Tensor work_, finite_, decided_;
    rule::Hyperparameters numbers_;
    bool sums_unknown_ = false;
    at::Tensor rates_, step_allowed_, clip_factor_;
    at::Tensor verdict_;  ///< c, and behind it whether the step is allowed
    Alone alone_ = {};
  };

  std::vector<CudaBatch*> batches_;
  std::vector<size_t> places_;
  const Kernels& kernels_;
  device::RankGroup<Basis> others_;  ///< the same batches, stepped by Engine::Device
  std::vector<Part> parts_;
  std::vector<int32_t> first_tiles_;  ///< of each factor, within its part
  at::Tensor sums_;                   ///< of the tiles, kept from step to step
  bool sums_known_ = false;
  engine::DeviceNumbers rates_;  ///< of A and B [2], for a recorded step
};

template <class Basis, const Kernels& kernels>
std::unique_ptr<engine::BatchGroup> make_group(const engine::CudaEngine::Batches& batches, std::vector<size_t> places) {
  std::vector<CudaBatch*> own;
  for (engine::Batch* batch : batches) own.push_back(static_cast<CudaBatch*>(batch));  // as make_batch made them
  return std::make_unique<CudaGroup<Basis>>(std::move(own), std::move(places), kernels);
}

/// The engine that runs these kernels.
template <const Kernels& kernels>
constexpr engine::CudaEngine engine_of() {
  return {kernels.on_gpu, [](const FactorPair& pair) { return CudaBatch::takes(pair, kernels); },
          [](std::vector<FactorPair> pairs, std::vector<std::string> labels) -> std::unique_ptr<engine::Batch> {
            return std::make_unique<CudaBatch>(std::move(pairs), std::move(labels));
          },
          &make_group<PolarBasis, kernels>, &make_group<QrBasis, kernels>};
}

}  // namespace lora_rite::cuda
