#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/optimizer.hpp"

/// Training with several processes, on LibTorch's own process groups: Gloo on a CPU, NCCL on GPUs. See
/// docs/distributed.md. All calls here are collective: every process of the group makes them, in the same order.
namespace lora_rite {

/// A process group, such as c10d::ProcessGroupGloo; from a c10d::ProcessGroup take `getBackend(device type)`.
using ProcessGroup = c10::intrusive_ptr<c10d::Backend>;

/// Gradients and factors travel in messages of about this many bytes.
constexpr int64_t kBucketBytes = 25 << 20;

namespace detail {

/// Collective calls that wait, say what failed, and count bytes.
class Collectives {
 public:
  explicit Collectives(ProcessGroup group) : group_(std::move(group)) {
    TORCH_CHECK(group_ != nullptr, "distributed: the process group is null");
  }

  int rank() const { return group_->getRank(); }
  int size() const { return group_->getSize(); }
  int64_t bytes() const { return bytes_; }

  using Pending = c10::intrusive_ptr<c10d::Work>;

  /// Sum (or minimum) over all processes, in place; done when `finish` has returned.
  Pending start_reduce(const at::Tensor& tensor, const char* what, c10d::ReduceOp::RedOpType op = c10d::ReduceOp::SUM) {
    return start(what, tensor.nbytes(), [&] {
      std::vector<at::Tensor> tensors = {tensor};
      c10d::AllreduceOptions options;
      options.reduceOp = op;
      return group_->allreduce(tensors, options);
    });
  }
  Pending start_broadcast(const at::Tensor& tensor, int from, const char* what) {
    return start(what, tensor.nbytes(), [&] {
      std::vector<at::Tensor> tensors = {tensor};
      c10d::BroadcastOptions options;
      options.rootRank = from;
      return group_->broadcast(tensors, options);
    });
  }
  void finish(const Pending& pending, const char* what) {
    explain(what, [&] { return pending->wait(); });
  }
  void reduce(const at::Tensor& tensor, const char* what, c10d::ReduceOp::RedOpType op = c10d::ReduceOp::SUM) {
    finish(start_reduce(tensor, what, op), what);
  }
  void broadcast(const at::Tensor& tensor, int from, const char* what) {
    finish(start_broadcast(tensor, from, what), what);
  }

  /// The tensors of all processes, which agree in shape.
  std::vector<at::Tensor> gather(const at::Tensor& tensor, const char* what) {
    std::vector<std::vector<at::Tensor>> gathered(1);
    for (int process = 0; process < size(); ++process) gathered[0].push_back(at::empty_like(tensor));
    std::vector<at::Tensor> own = {tensor};
    finish(start(what, tensor.nbytes(), [&] { return group_->allgather(gathered, own); }), what);
    return gathered[0];
  }

  /// The bytes that process `from` has.
  std::string broadcast_bytes(const std::string& own, int from, at::Device device, const char* what) {
    at::Tensor size = at::tensor(static_cast<int64_t>(own.size()), at::kLong).to(device);
    broadcast(size, from, what);
    at::Tensor bytes = at::empty({size.item<int64_t>()}, at::kByte);
    if (rank() == from) std::memcpy(bytes.data_ptr(), own.data(), own.size());
    bytes = bytes.to(device);
    broadcast(bytes, from, what);
    bytes = bytes.cpu();
    return std::string(static_cast<const char*>(bytes.const_data_ptr()), static_cast<size_t>(bytes.numel()));
  }

  /// Throws in all processes if any of them has something to complain about.
  void check(const std::string& complaint, at::Device device) {
    constexpr int64_t kLongest = 1024;
    at::Tensor text = at::zeros({kLongest}, at::kByte);
    std::memcpy(text.data_ptr(), complaint.data(), std::min<size_t>(complaint.size(), kLongest));
    const char* what = "comparing the processes";
    for (const at::Tensor& other : gather(text.to(device), what)) {
      const at::Tensor found = other.cpu();
      const char* begin = static_cast<const char*>(found.const_data_ptr());
      const std::string message(begin, std::find(begin, begin + kLongest, '\0'));
      TORCH_CHECK(message.empty(), "distributed: ", message);
    }
  }

  /// Throws in all processes unless all have the same lines, naming the first that differs.
  void check_same(const std::string& lines, at::Device device) {
    const std::string reference = broadcast_bytes(lines, 0, device, "comparing the processes");
    std::istringstream own(lines), expected(reference);
    std::string complaint, line, other;
    while (complaint.empty()) {
      const bool has_line = static_cast<bool>(std::getline(own, line));
      const bool has_other = static_cast<bool>(std::getline(expected, other));
      if (!has_line && !has_other) break;
      if (has_line && has_other && line == other) continue;
      complaint = c10::str("process ", rank(), " has '", has_line ? line : "nothing more", "' where process 0 has '",
                           has_other ? other : "nothing more", "', expected the same in all processes");
    }
    check(complaint, device);
  }

 private:
  template <class Call>
  Pending start(const char* what, size_t bytes, const Call& call) {
    bytes_ += static_cast<int64_t>(bytes);
    return explain(what, call);
  }

  /// What c10d throws names sockets and files, not what the program was about.
  template <class Call>
  auto explain(const char* what, const Call& call) -> decltype(call()) {
    try {
      return call();
    } catch (const std::exception& error) {
      const std::string text = error.what();
      TORCH_CHECK(false, "distributed: ", what, " failed in process ", rank(), " of ", size(),
                  ": another process has left or did not answer in time; go on from the last checkpoint (",
                  text.substr(0, text.find('\n')), ")");
    }
  }

  ProcessGroup group_;
  int64_t bytes_ = 0;
};

/// Tensors of one dtype and device, in order, in runs of about `bytes` bytes.
inline std::vector<std::vector<at::Tensor>> buckets(const std::vector<at::Tensor>& tensors, int64_t bytes) {
  std::map<std::string, std::pair<std::vector<at::Tensor>, int64_t>> open;
  std::vector<std::vector<at::Tensor>> result;
  for (const at::Tensor& tensor : tensors) {
    auto& [bucket, size] = open[c10::str(tensor.scalar_type(), tensor.device())];
    bucket.push_back(tensor);
    size += static_cast<int64_t>(tensor.nbytes());
    if (size < bytes) continue;
    result.push_back(std::move(bucket));
    bucket.clear();
    size = 0;
  }
  for (auto& [key, entry] : open)
    if (!entry.first.empty()) result.push_back(std::move(entry.first));
  return result;
}

inline at::Tensor flat(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> parts;
  for (const at::Tensor& tensor : tensors) parts.push_back(tensor.reshape(-1));
  return at::cat(parts);
}

inline void copy_back(const at::Tensor& flat, const std::vector<at::Tensor>& tensors) {
  int64_t begin = 0;
  for (const at::Tensor& tensor : tensors) {
    at::Tensor target = tensor.detach();
    target.copy_(flat.narrow(0, begin, tensor.numel()).view(tensor.sizes()));
    begin += tensor.numel();
  }
}

inline void check_dense(const char* who, size_t parameter, const at::Tensor& gradient) {
  TORCH_CHECK(!gradient.defined() || gradient.layout() == at::kStrided, who, ": the gradient of parameter ", parameter,
              " has layout ", gradient.layout(), ", expected a dense one");
}

inline std::vector<torch::Tensor> parameters_of(const torch::optim::Optimizer& optimizer) {
  std::vector<torch::Tensor> parameters;
  for (const auto& group : optimizer.param_groups())
    parameters.insert(parameters.end(), group.params().begin(), group.params().end());
  return parameters;
}

inline std::vector<torch::Tensor> parameters_of(const std::vector<FactorPair>& pairs) {
  std::vector<torch::Tensor> parameters;
  for (const FactorPair& pair : pairs) parameters.insert(parameters.end(), {pair.a, pair.b});
  return parameters;
}

}  // namespace detail

/// Replaces a dense tensor by its sum over the processes, the same bit for bit in all of them. Collective; the shapes
/// and dtypes agree. Throws c10::Error if a process does not answer.
inline void sum_over_processes(const torch::Tensor& tensor, const ProcessGroup& group) {
  at::NoGradGuard no_grad;
  detail::Collectives(group).reduce(tensor, "adding up over the processes");
}

/// Throws c10::Error in all processes unless `lines`, such as a program's settings, are the same text in all of them;
/// the message names the first line that differs, and its process. Collective. `device` is one of the group's.
inline void check_same(const std::string& lines, const ProcessGroup& group, torch::Device device = torch::kCPU) {
  detail::Collectives(group).check_same(lines, device);
}

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
  const char* what = "averaging gradients";
  at::Tensor present = at::zeros({static_cast<int64_t>(parameters.size())}, at::kInt);
  for (size_t i = 0; i < parameters.size(); ++i) {
    const at::Tensor& gradient = parameters[i].grad();
    detail::check_dense("average_gradients", i, gradient);
    present.data_ptr<int>()[i] = gradient.defined() ? 1 : 0;
  }
  present = present.to(parameters[0].device());
  collectives.reduce(present, what);
  present = present.cpu();
  std::vector<at::Tensor> gradients;
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (present.data_ptr<int>()[i] == 0) continue;
    const at::Tensor& parameter = parameters[i];
    if (!parameter.grad().defined()) parameter.mutable_grad() = at::zeros_like(parameter);
    gradients.push_back(parameter.grad());
  }
  struct Message {
    at::Tensor sum;
    detail::Collectives::Pending pending;
  };
  const auto buckets = detail::buckets(gradients, bucket_bytes);
  std::vector<Message> messages;
  for (const auto& bucket : buckets) {
    const at::Tensor sum = detail::flat(bucket);
    messages.push_back({sum, collectives.start_reduce(sum, what)});
  }
  for (size_t i = 0; i < buckets.size(); ++i) {
    collectives.finish(messages[i].pending, what);
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
  average_gradients(detail::parameters_of(pairs), group, bucket_bytes);
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
      : GradientAverager(detail::parameters_of(pairs), std::move(group), bucket_bytes) {}

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
  static constexpr const char* kWhat = "averaging gradients";

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

  void send() {
    const at::NoGradGuard no_grad;
    const size_t bucket = next_bucket();
    std::vector<at::Tensor> gradients;
    for (const size_t i : members_[bucket]) {
      const at::Tensor& gradient = parameters_[i].grad();
      detail::check_dense("GradientAverager", i, gradient);
      gradients.push_back(gradient.defined() ? gradient : at::zeros_like(parameters_[i]));
    }
    const at::Tensor sum = detail::flat(gradients);
    messages_.push_back({bucket, sum, collectives_.start_reduce(sum, kWhat)});
  }

  void complete(bool gives_up) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const at::NoGradGuard no_grad;
    if (parameters_.empty()) return;
    struct Restart {
      GradientAverager& averager;
      ~Restart() { averager.restart(); }
    } const restart_at_the_end{*this};
    while (messages_.size() < members_.size()) send();
    // Who has a gradient, and behind that who gave up.
    std::vector<int> own;
    for (const at::Tensor& parameter : parameters_) own.push_back(parameter.grad().defined() ? 1 : 0);
    own.push_back(gives_up ? 1 : 0);
    at::Tensor counts = at::tensor(own, at::kInt).to(parameters_[0].device());
    collectives_.reduce(counts, kWhat);
    counts = counts.cpu();
    for (const Message& message : messages_) collectives_.finish(message.pending, kWhat);
    const int* count = counts.const_data_ptr<int>();
    if (gives_up) return;
    TORCH_CHECK(count[parameters_.size()] == 0, "GradientAverager: ", count[parameters_.size()], " of ",
                collectives_.size(), " processes gave this step up by reset(), expected finish() in all; ",
                "the gradients are as they were");
    for (const Message& message : messages_) {
      std::vector<at::Tensor> targets;
      for (const size_t i : members_[message.bucket]) {
        at::Tensor parameter = parameters_[i];
        const bool is_somewhere = count[i] > 0;
        if (is_somewhere && !parameter.grad().defined()) parameter.mutable_grad() = at::zeros_like(parameter);
        targets.push_back(is_somewhere ? parameter.grad() : at::empty_like(parameter));
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

namespace detail {

/// What `ShardedLoraRite` and `RowShardedLoraRite` share: the processes agree on groups, gradients and skipped steps.
template <class Basis>
class DistributedLoraRite : public LoraRite<Basis> {
 public:
  torch::Tensor step(torch::optim::Optimizer::LossClosure closure = nullptr) override {
    torch::Tensor loss;
    if (closure) {
      at::AutoGradMode enable_grad(true);
      loss = closure();
    }
    at::NoGradGuard no_grad;
    agree_on_groups();
    check_gradients();
    LoraRite<Basis>::step();
    publish();
    return loss;
  }

  void load(torch::serialize::InputArchive& archive) override {
    agree_on_groups();
    LoraRite<Basis>::load(archive);
  }

  /// Bytes that this process handed to collective calls so far.
  int64_t bytes_sent() const { return collectives_.bytes(); }

 protected:
  DistributedLoraRite(ProcessGroup group, std::vector<FactorPair> pairs, LoraRiteOptions options)
      : LoraRite<Basis>(std::move(pairs), options),
        collectives_(std::move(group)),
        device_(this->pairs_of(0)[0].a.device()) {}

  /// Lines that all processes must have in common, beside the options.
  virtual std::string describe(const FactorPair& pair) const = 0;
  /// Once the processes agree on the groups: who does what.
  virtual void divide() = 0;
  /// After a step.
  virtual void publish() {}

  at::Tensor agree(const at::Tensor& proceed) override {
    at::Tensor flag =
        proceed.defined() ? proceed.to(at::kInt) : at::ones({}, at::TensorOptions(at::kInt).device(device_));
    flag = flag.reshape({1});
    collectives_.reduce(flag, "agreeing on a step", c10d::ReduceOp::MIN);
    return flag.to(at::kBool).squeeze();
  }

  /// Compares groups, pairs and options with those of process 0. Throws in all processes, naming the first difference.
  void agree_on_groups() {
    if (this->group_count() == agreed_groups_) return;
    std::ostringstream text;
    text << "basis " << Basis::name() << "\n" << this->group_count() << " groups\n";
    for (size_t g = 0; g < this->group_count(); ++g) {
      const auto& group = this->param_groups()[g];
      const std::string place = "group " + std::to_string(g) + ": ";
      if (const auto* options = dynamic_cast<const LoraRiteOptions*>(&group.options())) {
        LoraRiteOptions::for_each_saved(*options, [&](const char* name, const auto& value) {
          text << place << name << " " << c10::IValue(value) << "\n";
        });
        text << place << this->pairs_of(g).size() << " pairs\n";
        for (size_t p = 0; p < this->pairs_of(g).size(); ++p)
          text << this->label_of(g, p) << ": " << describe(this->pairs_of(g)[p]) << "\n";
      } else {
        for (const auto& parameter : group.params())
          text << place << "a parameter " << parameter.scalar_type() << parameter.sizes() << "\n";
      }
    }
    collectives_.check_same(text.str(), device_);
    divide();
    agreed_groups_ = this->group_count();
  }

  detail::Collectives& collectives() const { return collectives_; }
  at::Device device() const { return device_; }

  /// The bytes of a tensor of any process's shard in the order of the processes, along `dimension`; `rows` of each.
  at::Tensor gather_rows(const at::Tensor& own, int64_t dimension, const std::vector<int64_t>& rows) const {
    const int64_t longest = *std::max_element(rows.begin(), rows.end());
    std::vector<int64_t> sizes = own.sizes().vec();
    sizes[static_cast<size_t>(dimension)] = longest;
    at::Tensor padded = at::zeros(sizes, own.options());
    padded.narrow(dimension, 0, own.size(dimension)).copy_(own);
    std::vector<at::Tensor> parts = collectives_.gather(padded, "gathering a checkpoint");
    for (size_t process = 0; process < parts.size(); ++process)
      parts[process] = parts[process].narrow(dimension, 0, rows[process]);
    return at::cat(parts, dimension);
  }

 private:
  /// Who has a gradient, and each group's rate, must be the same everywhere.
  void check_gradients() {
    std::vector<double> facts;
    std::vector<std::string> names;
    for (size_t g = 0; g < this->group_count(); ++g) {
      const auto& group = this->param_groups()[g];
      facts.push_back(group.options().get_lr());
      names.push_back(c10::str("the learning rate of group ", g));
      for (size_t i = 0; i < group.params().size(); ++i) {
        facts.push_back(group.params()[i].grad().defined() ? 1 : 0);
        names.push_back(c10::str("the number of gradients of ",
                                 this->pairs_of(g).empty()
                                     ? c10::str("parameter ", i, " of group ", g)
                                     : this->label_of(g, i / 2) + (i % 2 == 0 ? ", factor a" : ", factor b")));
      }
    }
    const at::Tensor own = at::tensor(facts, at::kDouble).to(device_);
    const auto all = collectives_.gather(own, "comparing the processes' gradients");
    for (size_t process = 1; process < all.size(); ++process) {
      const at::Tensor first = all[0].cpu(), other = all[process].cpu();
      for (size_t i = 0; i < facts.size(); ++i) {
        const double expected = first.const_data_ptr<double>()[i], found = other.const_data_ptr<double>()[i];
        TORCH_CHECK(found == expected, "distributed: ", names[i], " is ", found, " in process ", process, " and ",
                    expected, " in process 0, expected the same in all processes (see average_gradients)");
      }
    }
  }

  mutable detail::Collectives collectives_;
  at::Device device_;
  size_t agreed_groups_ = 0;
};

}  // namespace detail

/// LoRA-RITE whose pairs are divided over processes that all hold the whole factors (data-parallel training). Each
/// process keeps the state of its pairs only, about 1/N of it, does their share of the work, and broadcasts the moved
/// factors. Steps are those of LoraRite, bit for bit.
///
///     lora_rite::average_gradients(optimizer, group);
///     optimizer.step();
///
/// All processes call constructor, `step`, `save` and `load` together. `save` writes the whole state in every process,
/// in the format of `LoraRite`: a checkpoint of N processes resumes in M, or in one without this class. `diagnostics`
/// of a pair that another process keeps has its condition numbers only. The constructor, and the first step after
/// `add_pairs`, throw c10::Error in all processes if their groups, pairs or options differ, and `step` if learning
/// rates or the presence of gradients do; all calls throw if a process leaves. Then the factors may be those of before
/// or after the step: go on from a checkpoint.
template <class Basis = PolarBasis>
class ShardedLoraRite final : public detail::DistributedLoraRite<Basis> {
 public:
  /// As LoraRite's. The pairs have the same values in all processes.
  ShardedLoraRite(ProcessGroup group, std::vector<FactorPair> pairs, LoraRiteOptions options = {})
      : detail::DistributedLoraRite<Basis>(std::move(group), std::move(pairs), options) {
    this->agree_on_groups();
  }

  /// The process that keeps a pair.
  int owner(size_t group, size_t pair) const { return owners_[group][pair]; }

 protected:
  std::string describe(const FactorPair& pair) const override {
    return c10::str("a ", pair.a.scalar_type(), pair.a.sizes(), ", b ", pair.b.scalar_type(), pair.b.sizes());
  }

  bool keeps(size_t group, size_t pair) const override { return owner(group, pair) == this->collectives().rank(); }

  at::Tensor total(const at::Tensor& norms_squared) override {
    at::Tensor norms = norms_squared.clone();
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
    received.load_from(stream);
    const FactorPair& factors = this->pairs_of(group)[pair];
    const auto wide_dtype = factors.a.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    PairState::load(received, this->label_of(group, pair), {factors.a.sizes().vec(), factors.b.sizes().vec()},
                    factors.a.size(0), wide_dtype, at::kCPU)
        .save(archive);
  }

 private:
  std::vector<std::vector<int>> owners_;  ///< by group and pair
};

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
/// All processes call constructor, `step`, `save` and `load` together; errors are those of ShardedLoraRite. `save`
/// writes the state of the whole factors in every process, in the format of `LoraRite`: any other number of processes,
/// or one without this class, resumes from it. `diagnostics` describes the parts at hand. Takes Engine::Device.
template <class Basis = PolarBasis>
class RowShardedLoraRite final : public detail::DistributedLoraRite<Basis> {
 public:
  /// As LoraRite's, with this process's parts of matrices (two dimensions); `sharding` tells which factors are divided,
  /// by default both of every pair.
  RowShardedLoraRite(
      ProcessGroup group, std::vector<FactorPair> pairs, LoraRiteOptions options = {},
      std::function<RowSharding(const FactorPair&)> sharding = [](const FactorPair&) { return RowSharding(); })
      : detail::DistributedLoraRite<Basis>(std::move(group), std::move(pairs), options),
        sharding_(std::move(sharding)) {
    this->agree_on_groups();
  }

 protected:
  std::string describe(const FactorPair& pair) const override {
    const RowSharding sharding = sharding_(pair);
    const auto shape = [](const at::Tensor& factor, int64_t row_dimension, bool is_sharded) {
      std::ostringstream text;
      for (int64_t d = 0; d < factor.dim(); ++d) {
        text << (d == 0 ? "[" : ", ");
        if (d == row_dimension && is_sharded)
          text << "divided";
        else
          text << factor.size(d);
      }
      return text.str() + "]";
    };
    return c10::str("a ", pair.a.scalar_type(), shape(pair.a, 1, sharding.a), ", b ", pair.b.scalar_type(),
                    shape(pair.b, 0, sharding.b));
  }

  /// Every process tells its rows.
  void divide() override {
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
          for (const size_t side : {0, 1}) rows_[g][p][side].push_back(rows.const_data_ptr<int64_t>()[2 * p + side]);
      }
      // Pairs whose wholes agree in shape are batched, which their parts must allow in every process.
      std::map<std::array<int64_t, 4>, size_t> first;
      for (size_t p = 0; p < pairs.size(); ++p) {
        const auto shards = *row_shards(g, p);
        const size_t same =
            first
                .emplace(std::array<int64_t, 4>{shards.rows[0], shards.rows[1], shards.sharded[0], shards.sharded[1]},
                         p)
                .first->second;
        TORCH_CHECK(
            rows_[g][p] == rows_[g][same], this->label_of(g, p), " and ", this->label_of(g, same),
            " have the same shape and are divided differently, expected pairs of one shape to be divided alike");
      }
    }
  }

  std::optional<engine::RowShards> row_shards(size_t group, size_t pair) const override {
    const RowSharding sharding = sharding_(this->pairs_of(group)[pair]);
    const auto total = [&](size_t side, bool is_sharded) {
      const auto& rows = rows_[group][pair][side];
      return is_sharded ? std::accumulate(rows.begin(), rows.end(), int64_t{0}) : rows[0];
    };
    const auto begin = [&](size_t side, bool is_sharded) {
      const auto& rows = rows_[group][pair][side];
      return is_sharded ? std::accumulate(rows.begin(), rows.begin() + this->collectives().rank(), int64_t{0}) : 0;
    };
    return engine::RowShards{
        {sharding.a, sharding.b},
        {begin(0, sharding.a), begin(1, sharding.b)},
        {total(0, sharding.a), total(1, sharding.b)},
        [this](at::Tensor& sums) { this->collectives().reduce(sums, "adding up the processes' rows"); },
        this->collectives().rank() == 0};
  }

  void save_state(torch::serialize::OutputArchive& archive, size_t group, size_t pair) const override {
    PairState state = this->pick(group, pair);
    for_each_tall(state, group, pair, [&](at::Tensor& tensor, int64_t dimension, const std::vector<int64_t>& rows) {
      tensor = this->gather_rows(tensor, dimension, rows);
    });
    state.save(archive);
  }

  PairState read_state(torch::serialize::InputArchive* archive, size_t group, size_t pair) const override {
    if (archive == nullptr) return LoraRite<Basis>::read_state(archive, group, pair);
    const FactorPair& factors = this->pairs_of(group)[pair];
    const auto shards = *row_shards(group, pair);
    const int64_t rank = factors.a.size(0);
    const auto wide_dtype = factors.a.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    PairState state = PairState::load(*archive, this->label_of(group, pair),
                                      {std::vector<int64_t>{rank, shards.rows[0]}, {shards.rows[1], rank}}, rank,
                                      wide_dtype, this->device());
    const auto process = this->collectives().rank();
    for_each_tall(state, group, pair, [&](at::Tensor& tensor, int64_t dimension, const std::vector<int64_t>& rows) {
      const int64_t begin = std::accumulate(rows.begin(), rows.begin() + process, int64_t{0});
      tensor = tensor.narrow(dimension, begin, rows[static_cast<size_t>(process)]).contiguous();
    });
    return state;
  }

 private:
  /// function(tensor, its dimension of rows, rows of every process) for all of a state (k = 1) that lies by rows of a
  /// divided factor.
  template <class Function>
  void for_each_tall(PairState& state, size_t group, size_t pair, const Function& function) const {
    const RowSharding sharding = sharding_(this->pairs_of(group)[pair]);
    for (const size_t side : {0, 1}) {
      if (!(side == 0 ? sharding.a : sharding.b)) continue;
      const auto& rows = rows_[group][pair][side];
      const int64_t dimension = side == 0 ? 2 : 1;  // behind k = 1
      if (state.momentum[side].defined()) function(state.momentum[side], dimension, rows);
      if (state.master[side].defined()) function(state.master[side], dimension, rows);
      if (state.rows[side].defined()) function(state.rows[side], 1, rows);
    }
  }

  std::function<RowSharding(const FactorPair&)> sharding_;
  std::vector<std::vector<std::array<std::vector<int64_t>, 2>>> rows_;  ///< by group, pair, side and process
};

}  // namespace lora_rite
