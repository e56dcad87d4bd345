#pragma once

#include <map>
#include <string>
#include <vector>

#include "lora_rite/baselines/baseline.hpp"
#include "lora_rite/factor_pair.hpp"

namespace lora_rite::baselines {

/// Throws c10::Error naming `optimizer` unless a param group's tensors are the factors a0, b0, a1, b1, … of pairs.
inline void check_alternating_factors(const std::vector<at::Tensor>& factors, const std::string& optimizer) {
  TORCH_CHECK(factors.size() % 2 == 0, optimizer, ": a param group has ", factors.size(),
              " tensors, expected alternating factors a0, b0, a1, b1, …");
  for (size_t i = 0; i < factors.size(); i += 2) {
    const std::string label =
        optimizer + ": tensors " + std::to_string(i) + " and " + std::to_string(i + 1) + " of a param group";
    TORCH_CHECK(!detail::is_part(factors[i]) && !detail::is_part(factors[i + 1]), label,
                ": one is a view of a leaf, expected leaves");
    detail::check_trained_pair({"", factors[i], factors[i + 1]}, label);
  }
}

/// The factors A, or the factors B, of k pairs of one shape. As matrices [k, r, d] they have the rank first: A itself,
/// and Bᵀ, so that a rule is the same for both. Matrices of half types are in float.
class FactorBatch : public Batch {
 public:
  /// Of the factors A if `is_a`, else of the factors B.
  explicit FactorBatch(bool is_a) : is_a_(is_a) {}

  /// x in the parameters' shape, [k, r, in…] of A or [k, out, r, …] of B, as matrices [k, r, d].
  at::Tensor matrix(const at::Tensor& x) const {
    return (is_a_ ? x : x.movedim(2, 1)).flatten(2).to(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  }
  /// The parameters as matrices [k, r, d].
  at::Tensor matrix() const { return matrix(parameter()); }

  /// The inverse of `matrix`, of the parameters' dtype.
  at::Tensor shaped(const at::Tensor& matrix) const {
    const at::Tensor rank_first = matrix.to(gradient.scalar_type());
    if (is_a_) return rank_first.reshape(gradient.sizes());
    return rank_first.reshape(gradient.movedim(2, 1).sizes()).movedim(1, 2).contiguous();
  }

  /// matrix ← matrix · keep − update [k, r, d]
  void move_matrix(double keep, const at::Tensor& update) { move(keep, shaped(update)); }

  /// matrix ← values [k, r, d]
  void assign(const at::Tensor& values) { at::_foreach_copy_(parameters, shaped(values).unbind(0)); }

 private:
  bool is_a_;
};

/// A rule for LoRA pairs, over batches of pairs of one shape. A pair rests unless both factors have gradients.
template <class Options>
class PairBaseline : public OverGroups<Options> {
 protected:
  /// One group of these pairs. Throws c10::Error naming a pair that does not fit together. `name` is this optimizer's,
  /// for errors.
  PairBaseline(const char* name, const std::vector<FactorPair>& pairs, const Options& options)
      : OverGroups<Options>({torch::optim::OptimizerParamGroup(detail::alternating_factors(pairs))}, options),
        name_(name) {
    for (size_t i = 0; i < pairs.size(); ++i) detail::check_trained_pair(pairs[i], detail::pair_label(pairs[i], 0, i));
  }

  /// One step of a batch.
  virtual void update(const Options& options, FactorBatch& a, FactorBatch& b) = 0;

  /// Calls `update` for each batch of pairs that agree in shapes, dtype, device and number of steps.
  void step_group(const torch::optim::OptimizerParamGroup& group, const Options& options) override {
    const std::vector<at::Tensor>& factors = group.params();
    check_alternating_factors(factors, name_);
    std::vector<at::Tensor> gradients;
    for (const auto& factor : factors) gradients.push_back(factor.grad());
    std::map<std::string, std::vector<size_t>> batches;  // places of A
    for (size_t i = 0; i < factors.size(); i += 2) {
      if (!gradients[i].defined() || !gradients[i + 1].defined()) continue;
      this->check_dense(gradients[i], i);
      this->check_dense(gradients[i + 1], i + 1);
      batches[c10::str(factors[i].sizes(), factors[i + 1].sizes(), factors[i].scalar_type(), factors[i].device(),
                       this->state_of(factors[i]).step)]
          .push_back(i);
    }
    for (auto& [key, indices] : batches) {
      FactorBatch a(true), b(false);
      this->fill(a, factors, gradients, indices);
      for (size_t& i : indices) ++i;
      this->fill(b, factors, gradients, indices);
      update(options, a, b);
    }
  }

 private:
  const char* name_;
};

}  // namespace lora_rite::baselines
