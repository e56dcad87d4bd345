#pragma once

#include <ATen/ATen.h>

#include <exception>
#include <memory>
#include <utility>
#include <vector>

#include "lora_rite/engine/acts.hpp"
#include "lora_rite/engine/device/device_batch.hpp"
#include "lora_rite/engine/device/joined.hpp"
#include "lora_rite/engine/device/product_roots.hpp"
#include "lora_rite/engine/device_numbers.hpp"
#include "lora_rite/rule/decide.hpp"

namespace lora_rite::device {

/// The batches of one param group that agree in rank, dtype and device. They do act 2 together: on a GPU its small
/// matrices cost per operator call.
template <class Basis>
class RankGroup final : public engine::BatchGroup {
 public:
  /// `places` are the batches' among all of the param group.
  RankGroup(std::vector<DeviceBatch*> batches, std::vector<size_t> places)
      : batches_(std::move(batches)), places_(std::move(places)) {}

  at::Device device() const override { return batches_[0]->device(); }

  void upload_rates(const LoraRiteOptions& options) override {
    rates_.upload({options.lr(), options.lr() * options.lr_ratio_b()}, device());
  }

  std::unique_ptr<engine::Observation> observe(const LoraRiteOptions& options) override {
    auto result = std::make_unique<Observed>(*this, options.capturable());
    for (size_t i = 0; i < batches_.size(); ++i) {
      auto found = batches_[i]->observe(options, options.capturable() ? &by_pivots : &by_basis);
      if (found) result->add(*batches_[i], places_[i], std::move(*found));
    }
    return result->batches().empty() ? nullptr : std::move(result);
  }

 private:
  static at::Tensor by_pivots(const at::Tensor& gram, double cutoff) {
    return PivotedCholesky::inverse_root(gram, cutoff);
  }
  static at::Tensor by_basis(const at::Tensor& gram, double cutoff) { return Basis::inverse_root(gram, cutoff); }

  class Planned final : public engine::Plan {
   public:
    void add(DeviceBatch& batch, BatchPlan plan) { plans_.emplace_back(&batch, std::move(plan)); }

    void commit() noexcept override {
      try {
        for (auto& [batch, plan] : plans_) batch->commit(plan);
      } catch (...) {  // an accelerator that takes no more commands
        error_ = std::current_exception();
      }
    }

   private:
    std::vector<std::pair<DeviceBatch*, BatchPlan>> plans_;
  };

  class Observed final : public engine::Observation {
   public:
    Observed(RankGroup& group, bool capturable) : group_(group), capturable_(capturable) {}

    void add(DeviceBatch& batch, size_t place, BatchObservation found) {
      batches_.push_back(&batch);
      places_.push_back(place);
      found_.push_back(std::move(found));
    }

    at::Tensor finite() const override {
      std::vector<at::Tensor> flags;
      for (const BatchObservation& found : found_) {
        const rule::Statistics<at::Tensor>& sums = found.statistics;
        flags.push_back(is_finite(sums.gram.sum() + sums.cross.sum() + sums.gradient_gram.sum()));
      }
      return flags.size() == 1 ? flags[0] : at::stack(flags).all();
    }

    at::Tensor unmagnify(const at::Tensor& step_allowed) override {
      std::vector<rule::Statistics<at::Tensor>> statistics;
      for (BatchObservation& found : found_) statistics.push_back(std::move(found.statistics));
      rule::Statistics<at::Tensor> all = joined(std::move(statistics));
      for (at::Tensor* matrix : {&all.gram, &all.cross, &all.gradient_gram, &all.unscaled_gradient_gram}) {
        if (matrix->defined()) *matrix = choose(step_allowed, *matrix, 0.0);
      }
      const double epsilon = found_[0].factor_epsilon();
      unmagnified_ = capturable_ ? rule::unmagnify<PivotedCholesky>(std::move(all), epsilon)
                                 : rule::unmagnify<Basis>(std::move(all), epsilon);
      const at::Tensor& gram = unmagnified_.unscaled_gradient_gram.defined() ? unmagnified_.unscaled_gradient_gram
                                                                             : unmagnified_.gradient_gram;
      squared_norm_ = gram.diagonal(0, -2, -1).sum(-1).clamp_min(0);
      return squared_norm_.sum(0);
    }

    std::unique_ptr<engine::Plan> plan(const LoraRiteOptions& options, const at::Tensor& clip_factor,
                                       const at::Tensor& step_allowed) override {
      group_.upload_rates(options);
      const at::Tensor rates = group_.rates_.tensor().view({2, 1, 1, 1});
      const rule::Decision<at::Tensor> decision = decide(options, clip_factor, rates);
      auto result = std::make_unique<Planned>();
      int64_t begin = 0;
      for (size_t i = 0; i < batches_.size(); ++i) {
        const int64_t count = batches_[i]->count();
        result->add(*batches_[i], batches_[i]->plan(std::move(found_[i]), part_of(decision, begin, count),
                                                    squared_norm_.narrow(1, begin, count), options, rates, clip_factor,
                                                    step_allowed));
        begin += count;
      }
      return result;
    }

    const std::vector<size_t>& batches() const override { return places_; }

   private:
    rule::Decision<at::Tensor> decide(const LoraRiteOptions& options, const at::Tensor& clip_factor,
                                      const at::Tensor& rates) {
      std::vector<rule::Moments<at::Tensor>> moments;
      std::vector<at::Tensor> rows, has_gradient, partner_edited;
      for (size_t i = 0; i < batches_.size(); ++i) {
        moments.push_back(batches_[i]->state().moments);
        rows.push_back(batches_[i]->rows().expand({2, batches_[i]->count(), 1, 1}));
        has_gradient.push_back(found_[i].has_gradient);
        // The transport of a side's moments depends on its partner.
        partner_edited.push_back(at::stack({found_[i].edited.b, found_[i].edited.a}));
      }
      rule::Unmagnified<at::Tensor> all = std::move(unmagnified_);
      const at::Tensor all_rows = joined(rows);
      if (options.max_relative_change() > 0) {
        const at::Tensor& roots = all.inverse_root;  // each side has its partner's
        all.damping = rule::relative_change_damping(roots, at::stack({roots[1], roots[0]}), rates, all_rows,
                                                    options.max_relative_change());
      }
      const auto act = [&](const auto& roots) {
        return rule::decide(joined(std::move(moments)), all, all_rows, clip_factor, joined(has_gradient),
                            joined(partner_edited), epsilon_of(batches_[0]->dtype()), hyperparameters(options), roots);
      };
      return capturable_ ? act(ProductRoots()) : act(rule::Eigenvalues());
    }

    RankGroup& group_;
    bool capturable_;
    std::vector<DeviceBatch*> batches_;
    std::vector<size_t> places_;
    std::vector<BatchObservation> found_;
    rule::Unmagnified<at::Tensor> unmagnified_;  ///< of all batches [2, k, r, r]
    at::Tensor squared_norm_;                    ///< ‖Ḡ‖² [2, k]
  };

  std::vector<DeviceBatch*> batches_;
  std::vector<size_t> places_;
  engine::DeviceNumbers rates_;  ///< of A and B [2]
};

}  // namespace lora_rite::device
