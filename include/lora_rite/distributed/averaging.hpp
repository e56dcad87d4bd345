#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/optim/optimizer.h>

#include <algorithm>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/distributed/process_group.hpp"
#include "lora_rite/factor_pair.hpp"

namespace lora_rite {

namespace detail {

inline constexpr const char* kAveraging = "averaging gradients";

inline void check_gradient(const char* who, size_t place, const at::Tensor& parameter) {
  TORCH_CHECK(parameter.defined(), who, ": parameter ", place, " is undefined, expected a tensor");
  const at::Tensor& gradient = parameter.grad();
  if (!gradient.defined()) return;
  TORCH_CHECK(gradient.layout() == at::kStrided, who, ": the gradient of parameter ", place, " has layout ",
              gradient.layout(), ", expected a dense one; the gradients are as they were");
  TORCH_CHECK(gradient.sizes() == parameter.sizes() && gradient.device() == parameter.device(), who,
              ": the gradient of parameter ", place, " has shape ", gradient.sizes(), " on ", gradient.device(),
              ", expected ", parameter.sizes(), " on ", parameter.device(), "; the gradients are as they were");
  TORCH_CHECK(!may_overlap(gradient), who, ": the gradient of parameter ", place, " has strides ", gradient.strides(),
              ", expected elements that do not overlap (give it a clone()); the gradients are as they were");
  TORCH_CHECK(!at::isIntegralType(gradient.scalar_type(), /*includeBool=*/true), who, ": the gradient of parameter ",
              place, " is ", gradient.scalar_type(), ", expected a floating type; the gradients are as they were");
}

inline std::vector<torch::Tensor> parameters_of(const torch::optim::Optimizer& optimizer) {
  std::vector<torch::Tensor> parameters;
  for (const auto& group : optimizer.param_groups())
    parameters.insert(parameters.end(), group.params().begin(), group.params().end());
  return parameters;
}

/// What all processes must have in common before they send gradients.
inline std::string describe(const char* call, const std::vector<at::Tensor>& parameters, int64_t bucket_bytes) {
  std::string lines = c10::str("call: ", call, "\nbuckets of ", bucket_bytes, " bytes\n");
  Descriptions descriptions;
  for (size_t i = 0; i < parameters.size(); ++i) {
    lines += "parameter " + std::to_string(i) + ": ";
    descriptions.append(lines, parameters[i]);
    lines += '\n';
  }
  return lines;
}

/// The dtype in which each parameter's gradient is averaged: the one it has in all processes that have it, Undefined
/// where none has. Throws in all processes if one of them has `complaint` or they do not agree.
inline std::vector<at::ScalarType> agree_on_gradients(const char* who, const std::string& lines,
                                                      const std::exception_ptr& complaint,
                                                      const std::vector<at::Tensor>& parameters,
                                                      Collectives& collectives) {
  std::vector<at::ScalarType> dtypes(parameters.size(), at::ScalarType::Undefined);
  for (size_t i = 0; i < parameters.size(); ++i)
    if (parameters[i].defined() && parameters[i].grad().defined()) dtypes[i] = parameters[i].grad().scalar_type();
  const at::Device device = device_of(parameters);
  std::vector<uint8_t> own;
  for (const at::ScalarType dtype : dtypes) own.push_back(static_cast<uint8_t>(dtype));
  if (collectives.agree(lines, device, complaint, std::string(own.begin(), own.end()))) return dtypes;
  // Most often nothing differs, and this message is not needed.
  const auto all = collectives.gather(at::tensor(own, at::kByte).to(device), kAveraging);
  std::vector<size_t> owner(parameters.size());
  std::fill(dtypes.begin(), dtypes.end(), at::ScalarType::Undefined);
  for (size_t process = 0; process < all.size(); ++process) {
    const at::Tensor codes = all[process].cpu();
    for (size_t i = 0; i < dtypes.size(); ++i) {
      const auto dtype = static_cast<at::ScalarType>(codes.const_data_ptr<uint8_t>()[i]);
      if (dtype == at::ScalarType::Undefined || dtype == dtypes[i]) continue;
      // Two types of one gradient mean that processes have done different things to it, such as unscaling.
      TORCH_CHECK(dtypes[i] == at::ScalarType::Undefined, who, ": the gradient of parameter ", i, " is ", dtype,
                  " in process ", process, " and ", dtypes[i], " in process ", owner[i],
                  ", expected one type in all processes that have it; the gradients are as they were");
      dtypes[i] = dtype;
      owner[i] = process;
    }
  }
  return dtypes;
}

/// The gradient of a parameter that some process has one of: zeros, from now on, where this process has none.
inline at::Tensor gradient_or_zeros(const at::Tensor& parameter, at::ScalarType dtype) {
  if (!parameter.grad().defined())
    parameter.mutable_grad() = at::zeros_like(parameter, parameter.options().dtype(dtype).requires_grad(false));
  return parameter.grad();
}

/// Sums of half gradients can leave half's range where their mean does not: these are divided before they are sent.
/// Others after, which rounds once.
inline bool is_divided_first(const at::Tensor& tensor) { return tensor.scalar_type() == at::kHalf; }

/// Tensors as one, as it is sent to become a sum.
inline at::Tensor summand_of(const std::vector<at::Tensor>& tensors, const Collectives& collectives) {
  at::Tensor summand = flat(tensors);
  if (is_divided_first(summand)) summand.div_(collectives.size());
  return summand;
}

/// What the processes' summands have become → their mean, in place.
inline at::Tensor mean_of(const at::Tensor& sum, const Collectives& collectives) {
  return is_divided_first(sum) ? sum : sum.div_(collectives.size());
}

/// Replaces tensors, which agree in everything but values, by their means over the processes.
inline void average(const std::vector<at::Tensor>& tensors, int64_t bucket_bytes, Collectives& collectives) {
  struct Message {
    at::Tensor sum;
    Collectives::Pending pending;
  };
  const auto parts = buckets(tensors, bucket_bytes);
  std::vector<Message> messages;
  for (const auto& bucket : parts) {
    const at::Tensor sum = summand_of(bucket, collectives);
    messages.push_back({sum, collectives.start_reduce(sum, kAveraging)});
  }
  for (size_t i = 0; i < parts.size(); ++i) {
    collectives.finish(messages[i].pending, kAveraging);
    copy_back(mean_of(messages[i].sum, collectives), parts[i]);
  }
}

}  // namespace detail

/// Replaces every gradient by its mean over the processes: what data-parallel training does between `backward` and
/// `step`. Collective; the parameters are the same, in the same order, everywhere. A gradient that only some processes
/// have counts as zero in the others; one that none has stays undefined. All messages of about `bucket_bytes` are under
/// way at once. The result is the same bit for bit in all processes. Throws c10::Error in all processes, with the
/// gradients as they were, if parameters differ in number, shape, dtype or kind of device, a gradient has two dtypes in
/// two processes, or one is sparse, of another shape or device than its parameter or of an integral type; and if a
/// process does not answer. An empty list needs a group that takes messages on a CPU.
inline void average_gradients(const std::vector<torch::Tensor>& parameters, const ProcessGroup& group,
                              int64_t bucket_bytes = kBucketBytes) {
  at::NoGradGuard no_grad;
  detail::Collectives collectives(group);
  const char* who = "average_gradients";
  std::string lines;
  const auto complaint = detail::complaint_of([&] {
    for (size_t i = 0; i < parameters.size(); ++i) detail::check_gradient(who, i, parameters[i]);
    lines = detail::describe(who, parameters, bucket_bytes);
  });
  const auto dtypes = detail::agree_on_gradients(who, lines, complaint, parameters, collectives);
  std::vector<at::Tensor> gradients;
  for (size_t i = 0; i < parameters.size(); ++i)
    if (dtypes[i] != at::ScalarType::Undefined)
      gradients.push_back(detail::gradient_or_zeros(parameters[i], dtypes[i]));
  detail::average(gradients, bucket_bytes, collectives);
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
  /// Collective. The parameters are leaves, the same, in the same order, everywhere. Throws c10::Error in all processes
  /// if they differ, or in one of them a parameter is no leaf, is listed twice, or has a post-accumulate hook, of which
  /// LibTorch keeps one a tensor.
  GradientAverager(std::vector<torch::Tensor> parameters, ProcessGroup group, int64_t bucket_bytes = kBucketBytes)
      : parameters_(std::move(parameters)), bucket_bytes_(bucket_bytes), collectives_(std::move(group)) {
    std::map<const void*, size_t> places;
    std::string lines;
    const auto complaint = detail::complaint_of([&] {
      places = checked_places();
      lines = detail::describe(kWho, parameters_, bucket_bytes_);
    });
    collectives_.agree(lines, detail::device_of(parameters_), complaint);
    bucket_of_.resize(parameters_.size());
    for (const auto& bucket : detail::buckets(parameters_, bucket_bytes_)) {
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

  /// The same for all parameters of an optimizer.
  GradientAverager(const torch::optim::Optimizer& optimizer, ProcessGroup group, int64_t bucket_bytes = kBucketBytes)
      : GradientAverager(detail::parameters_of(optimizer), std::move(group), bucket_bytes) {}
  /// The same for factor pairs.
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
    /// `averager` must outlive it. Several may exist at once.
    explicit Pause(GradientAverager& averager) : averager_(averager) { ++averager_.pauses_; }
    ~Pause() { --averager_.pauses_; }
    Pause(const Pause&) = delete;
    Pause& operator=(const Pause&) = delete;

   private:
    GradientAverager& averager_;
  };

  /// Waits, and replaces every gradient by its mean, as average_gradients does, with its errors; throws also if another
  /// process gave the step up.
  void finish() {
    complete(detail::complaint_of([&] {
      for (size_t i = 0; i < parameters_.size(); ++i) detail::check_gradient(kWho, i, parameters_[i]);
    }));
  }

  /// In place of `finish` after a backward that threw: drops this step's messages; `finish` then throws in the other
  /// processes, and all can go on with another step.
  void reset() {
    try {
      complete(std::make_exception_ptr(GivenUp()));
    } catch (const GivenUp&) {
    }
  }

  /// Messages that are under way: how much of the averaging backward has started.
  size_t messages_under_way() const { return messages_.size(); }

 private:
  static constexpr const char* kWho = "GradientAverager";

  /// What `reset` has to say to the other processes.
  struct GivenUp : std::exception {
    const char* what() const noexcept override {
      return "GradientAverager: this step was given up by reset(), expected finish() in all processes; the gradients "
             "are as they were";
    }
  };

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

  std::map<const void*, size_t> checked_places() const {
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
    return places;
  }

  /// Messages leave before processes can agree on gradients, so their layout is that of the parameters, whatever the
  /// gradients are. What does not fit counts as zero until `complete`, which looks at it.
  void send() {
    const at::NoGradGuard no_grad;
    const size_t bucket = next_bucket();
    std::vector<at::Tensor> gradients;
    for (const size_t i : members_[bucket]) {
      const at::Tensor &parameter = parameters_[i], &gradient = parameter.grad();
      const bool fits = gradient.defined() && gradient.layout() == at::kStrided &&
                        gradient.sizes() == parameter.sizes() && gradient.device() == parameter.device() &&
                        gradient.scalar_type() == parameter.scalar_type();
      gradients.push_back(fits ? gradient : at::zeros_like(parameter));
    }
    const at::Tensor sum = detail::summand_of(gradients, collectives_);
    messages_.push_back({bucket, sum, collectives_.start_reduce(sum, detail::kAveraging)});
  }

  void complete(const std::exception_ptr& complaint) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const at::NoGradGuard no_grad;
    struct Restart {
      GradientAverager& averager;
      ~Restart() { averager.restart(); }
    } const restart_at_the_end{*this};
    while (messages_.size() < members_.size()) send();
    for (const Message& message : messages_) collectives_.finish(message.pending, detail::kAveraging);
    const auto dtypes = detail::agree_on_gradients(kWho, "call: GradientAverager, finish or reset\n", complaint,
                                                   parameters_, collectives_);
    for (const Message& message : messages_) {
      std::vector<at::Tensor> targets;
      for (const size_t i : members_[message.bucket]) {
        const at::Tensor& parameter = parameters_[i];
        targets.push_back(dtypes[i] == parameter.scalar_type() ? detail::gradient_or_zeros(parameter, dtypes[i])
                                                               : at::empty_like(parameter));
      }
      detail::copy_back(detail::mean_of(message.sum, collectives_), targets);
    }
    // Gradients of another type than their parameter's, such as GradScaler's.
    std::vector<at::Tensor> others;
    for (size_t i = 0; i < parameters_.size(); ++i)
      if (dtypes[i] != at::ScalarType::Undefined && dtypes[i] != parameters_[i].scalar_type())
        others.push_back(detail::gradient_or_zeros(parameters_[i], dtypes[i]));
    detail::average(others, bucket_bytes_, collectives_);
  }

  void restart() {
    has_arrived_.assign(parameters_.size(), false);
    missing_.clear();
    for (const auto& bucket : members_) missing_.push_back(bucket.size());
    messages_.clear();
  }

  std::vector<torch::Tensor> parameters_;
  int64_t bucket_bytes_;
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
