#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/optim/optimizer.h>

#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "lora_rite/distributed/process_group.hpp"
#include "lora_rite/factor_pair.hpp"

namespace lora_rite {

namespace detail {

inline constexpr const char* kAveraging = "averaging gradients";

inline void check_dense(const char* who, size_t parameter, const at::Tensor& gradient) {
  TORCH_CHECK(!gradient.defined() || gradient.layout() == at::kStrided, who, ": the gradient of parameter ", parameter,
              " has layout ", gradient.layout(), ", expected a dense one");
}

/// What check_dense throws for one of these, kept until the other processes, which wait for this one, have its message.
inline std::exception_ptr complaint_of(const char* who, const std::vector<torch::Tensor>& parameters) {
  try {
    for (size_t i = 0; i < parameters.size(); ++i) check_dense(who, i, parameters[i].grad());
  } catch (const c10::Error&) {
    return std::current_exception();
  }
  return nullptr;
}

inline std::vector<torch::Tensor> parameters_of(const torch::optim::Optimizer& optimizer) {
  std::vector<torch::Tensor> parameters;
  for (const auto& group : optimizer.param_groups())
    parameters.insert(parameters.end(), group.params().begin(), group.params().end());
  return parameters;
}

/// Sums over the processes of small numbers, such as 1 for every parameter that has a gradient.
inline std::vector<int> total_counts(const std::vector<int>& own, at::Device device, Collectives& collectives) {
  const at::Tensor counts = at::tensor(own, at::kInt).to(device);
  collectives.reduce(counts, kAveraging);
  const at::Tensor totals = counts.cpu();
  const int* begin = totals.const_data_ptr<int>();
  return {begin, begin + own.size()};
}

/// The gradient of a parameter that some process has one of: zeros, from now on, where this process has none.
inline at::Tensor gradient_or_zeros(const at::Tensor& parameter) {
  if (!parameter.grad().defined()) parameter.mutable_grad() = at::zeros_like(parameter);
  return parameter.grad();
}

}  // namespace detail

/// Replaces every gradient by its mean over the processes: what data-parallel training does between `backward` and
/// `step`. Collective; the parameters are the same, in the same order, everywhere. A gradient that only some processes
/// have counts as zero in the others; one that none has stays undefined. All messages of about `bucket_bytes` are under
/// way at once. The result is the same bit for bit in all processes. Throws c10::Error if a gradient is sparse or a
/// process does not answer.
inline void average_gradients(const std::vector<torch::Tensor>& parameters, const ProcessGroup& group,
                              int64_t bucket_bytes = kBucketBytes) {
  at::NoGradGuard no_grad;
  if (parameters.empty()) return;
  detail::Collectives collectives(group);
  const std::exception_ptr complaint = detail::complaint_of("average_gradients", parameters);
  // Who has a gradient, and behind that who has one that cannot be used.
  std::vector<int> own;
  for (const at::Tensor& parameter : parameters) own.push_back(parameter.grad().defined() ? 1 : 0);
  own.push_back(complaint ? 1 : 0);
  const auto counts = detail::total_counts(own, parameters[0].device(), collectives);
  if (complaint) std::rethrow_exception(complaint);
  TORCH_CHECK(counts.back() == 0, "average_gradients: ", counts.back(), " of ", collectives.size(),
              " processes have a gradient that is not dense, expected none; the gradients are as they were");
  std::vector<at::Tensor> gradients;
  for (size_t i = 0; i < parameters.size(); ++i)
    if (counts[i] > 0) gradients.push_back(detail::gradient_or_zeros(parameters[i]));
  struct Message {
    at::Tensor sum;
    detail::Collectives::Pending pending;
  };
  const auto buckets = detail::buckets(gradients, bucket_bytes);
  std::vector<Message> messages;
  for (const auto& bucket : buckets) {
    const at::Tensor sum = detail::flat(bucket);
    messages.push_back({sum, collectives.start_reduce(sum, detail::kAveraging)});
  }
  for (size_t i = 0; i < buckets.size(); ++i) {
    collectives.finish(messages[i].pending, detail::kAveraging);
    detail::copy_back(messages[i].sum.div_(collectives.size()), buckets[i]);
  }
}

/// The same for all parameters of an optimizer.
inline void average_gradients(const torch::optim::Optimizer& optimizer, const ProcessGroup& group,
                              int64_t bucket_bytes = kBucketBytes) {
  average_gradients(detail::parameters_of(optimizer), group, bucket_bytes);
}

/// The same for factor pairs.
inline void average_gradients(const std::vector<FactorPair>& pairs, const ProcessGroup& group,
                              int64_t bucket_bytes = kBucketBytes) {
  average_gradients(detail::leaves_of(pairs), group, bucket_bytes);
}

/// Averages gradients while `backward` computes the others: a message leaves as soon as the gradients in it are there,
/// those of the last parameters first, because backward comes to them first. The means are those of `average_gradients`
/// with the same `bucket_bytes`: bit for bit if every parameter has a gradient, else to round-off.
///
///     lora_rite::GradientAverager averager(optimizer, group);
///     loss.backward();
///     averager.finish();  // in place of average_gradients
///     optimizer.step();
///
/// It pays where messages take long and there are several: docs/distributed.md. All processes construct it, and then
/// each calls `finish` or `reset` once a step. Gradients are not changed between backward and `finish`.
class GradientAverager {
 public:
  /// The parameters are leaves, the same, in the same order, everywhere. Throws c10::Error if one is no leaf, is listed
  /// twice, or has a post-accumulate hook, of which LibTorch keeps one a tensor.
  GradientAverager(std::vector<torch::Tensor> parameters, ProcessGroup group, int64_t bucket_bytes = kBucketBytes)
      : parameters_(std::move(parameters)), collectives_(std::move(group)) {
    std::map<const void*, size_t> places;
    for (size_t i = 0; i < parameters_.size(); ++i) {
      const at::Tensor& parameter = parameters_[i];
      TORCH_CHECK(parameter.defined() && parameter.is_leaf(), "GradientAverager: parameter ", i, " is ",
                  parameter.defined() ? "the result of a computation" : "undefined", ", expected a leaf");
      TORCH_CHECK(torch::autograd::impl::post_acc_grad_hooks(parameter) == nullptr, "GradientAverager: parameter ", i,
                  " has a post-accumulate hook, expected none");
      const auto [other, is_new] = places.emplace(parameter.unsafeGetTensorImpl(), i);
      TORCH_CHECK(is_new, "GradientAverager: parameters ", other->second, " and ", i,
                  " are the same tensor, expected each once");
    }
    bucket_of_.resize(parameters_.size());
    for (const auto& bucket : detail::buckets(parameters_, bucket_bytes)) {
      members_.emplace_back();
      for (const at::Tensor& parameter : bucket) {
        members_.back().push_back(places.at(parameter.unsafeGetTensorImpl()));
        bucket_of_[members_.back().back()] = members_.size() - 1;
      }
    }
    restart();
    for (size_t i = 0; i < parameters_.size(); ++i)
      torch::autograd::impl::set_post_acc_grad_hooks(parameters_[i], std::make_unique<Hook>(*this, i));
  }

  /// The same for all parameters of an optimizer, or for factor pairs.
  GradientAverager(const torch::optim::Optimizer& optimizer, ProcessGroup group, int64_t bucket_bytes = kBucketBytes)
      : GradientAverager(detail::parameters_of(optimizer), std::move(group), bucket_bytes) {}
  GradientAverager(const std::vector<FactorPair>& pairs, ProcessGroup group, int64_t bucket_bytes = kBucketBytes)
      : GradientAverager(detail::leaves_of(pairs), std::move(group), bucket_bytes) {}

  ~GradientAverager() {
    for (const at::Tensor& parameter : parameters_) torch::autograd::impl::set_post_acc_grad_hooks(parameter, nullptr);
  }
  GradientAverager(const GradientAverager&) = delete;
  GradientAverager& operator=(const GradientAverager&) = delete;

  /// While one exists, gradients are added up in this process only: for all but the last backward of a step.
  class Pause {
   public:
    explicit Pause(GradientAverager& averager) : averager_(averager) { ++averager_.pauses_; }
    ~Pause() { --averager_.pauses_; }
    Pause(const Pause&) = delete;
    Pause& operator=(const Pause&) = delete;

   private:
    GradientAverager& averager_;
  };

  /// Waits, and replaces every gradient by its mean, as average_gradients does. Throws c10::Error, with the gradients
  /// as they were, if another process gave the step up or does not answer.
  void finish() { complete(/*gives_up=*/false); }

  /// In place of `finish` after a backward that threw: drops this step's messages; `finish` then throws in the other
  /// processes, and all can go on with another step.
  void reset() { complete(/*gives_up=*/true); }

  /// Messages that are under way: how much of the averaging backward has started.
  size_t messages_under_way() const { return messages_.size(); }

 private:
  struct Hook final : torch::autograd::PostAccumulateGradHook {
    Hook(GradientAverager& owner, size_t place) : averager(owner), parameter(place) {}
    void operator()(const torch::autograd::Variable& /*tensor*/) override { averager.arrive(parameter); }

    GradientAverager& averager;
    size_t parameter;
  };

  struct Message {
    size_t bucket;
    at::Tensor sum;
    detail::Collectives::Pending pending;
  };

  /// On a thread of autograd's, which has one a device.
  void arrive(size_t i) {
    if (pauses_ > 0) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!has_arrived_[i], "GradientAverager: parameter ", i, " has got a second gradient before finish(); ",
                "call finish() or reset() after each backward, or keep a Pause during all but the last");
    has_arrived_[i] = true;
    --missing_[bucket_of_[i]];
    while (messages_.size() < members_.size() && missing_[next_bucket()] == 0) send();
  }

  /// In the same order in all processes, whatever the order in which gradients arrive.
  size_t next_bucket() const { return members_.size() - 1 - messages_.size(); }

  /// Of a step that is given up only the length counts.
  void send(bool gives_up = false) {
    const at::NoGradGuard no_grad;
    const size_t bucket = next_bucket();
    std::vector<at::Tensor> gradients;
    for (const size_t i : members_[bucket]) {
      const at::Tensor& gradient = parameters_[i].grad();
      if (!gives_up) detail::check_dense("GradientAverager", i, gradient);
      gradients.push_back(gradient.defined() && !gives_up ? gradient : at::zeros_like(parameters_[i]));
    }
    const at::Tensor sum = detail::flat(gradients);
    messages_.push_back({bucket, sum, collectives_.start_reduce(sum, detail::kAveraging)});
  }

  void complete(bool gives_up) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const at::NoGradGuard no_grad;
    if (parameters_.empty()) return;
    struct Restart {
      GradientAverager& averager;
      ~Restart() { averager.restart(); }
    } const restart_at_the_end{*this};
    const std::exception_ptr complaint = gives_up ? nullptr : detail::complaint_of("GradientAverager", parameters_);
    gives_up = gives_up || complaint != nullptr;
    while (messages_.size() < members_.size()) send(gives_up);
    // Who has a gradient, and behind that who gave up.
    std::vector<int> own;
    for (const at::Tensor& parameter : parameters_) own.push_back(parameter.grad().defined() ? 1 : 0);
    own.push_back(gives_up ? 1 : 0);
    const auto counts = detail::total_counts(own, parameters_[0].device(), collectives_);
    for (const Message& message : messages_) collectives_.finish(message.pending, detail::kAveraging);
    if (complaint) std::rethrow_exception(complaint);
    if (gives_up) return;
    TORCH_CHECK(counts.back() == 0, "GradientAverager: ", counts.back(), " of ", collectives_.size(),
                " processes gave this step up, by reset() or with an error, expected finish() in all; ",
                "the gradients are as they were");
    for (const Message& message : messages_) {
      std::vector<at::Tensor> targets;
      for (const size_t i : members_[message.bucket]) {
        const at::Tensor& parameter = parameters_[i];
        targets.push_back(counts[i] > 0 ? detail::gradient_or_zeros(parameter) : at::empty_like(parameter));
      }
      detail::copy_back(message.sum.div_(collectives_.size()), targets);
    }
  }

  void restart() {
    has_arrived_.assign(parameters_.size(), false);
    missing_.clear();
    for (const auto& bucket : members_) missing_.push_back(bucket.size());
    messages_.clear();
  }

  std::vector<torch::Tensor> parameters_;
  detail::Collectives collectives_;
  std::vector<std::vector<size_t>> members_;  ///< parameters by bucket
  std::vector<size_t> bucket_of_;             ///< by parameter
  int pauses_ = 0;
  std::mutex mutex_;  ///< of what a step changes:
  std::vector<bool> has_arrived_;
  std::vector<size_t> missing_;    ///< gradients by bucket
  std::vector<Message> messages_;  ///< of the last buckets, the very last first
};

}  // namespace lora_rite
