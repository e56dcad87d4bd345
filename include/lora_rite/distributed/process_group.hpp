#pragma once

#include <ATen/ATen.h>
#include <torch/types.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <map>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/factor_pair.hpp"

namespace lora_rite {

/// A process group, such as c10d::ProcessGroupGloo; from a c10d::ProcessGroup take `getBackend(device type)`.
using ProcessGroup = c10::intrusive_ptr<c10d::Backend>;

/// Gradients and factors travel in messages of about this many bytes.
constexpr int64_t kBucketBytes = 25 << 20;

namespace detail {

/// Calls function() and returns what it throws, to be kept until the other processes, which wait, have its message.
template <class Function>
std::exception_ptr complaint_of(const Function& function) {
  try {
    function();
  } catch (...) {
    return std::current_exception();
  }
  return nullptr;
}

/// The message of an exception, which is not empty; "" for none.
inline std::string message_of(const std::exception_ptr& complaint) {
  if (!complaint) return "";
  std::string message;
  try {
    std::rethrow_exception(complaint);
  } catch (const c10::Error& error) {
    message = error.what_without_backtrace();
  } catch (const std::exception& error) {
    message = error.what();
  } catch (...) {
  }
  return message.empty() ? "an exception without a message" : message;
}

/// FNV-1a: the same number on every machine, as std::hash need not be.
inline int64_t hash_of(const std::string& text) {
  uint64_t hash = 14695981039346656037U;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211U;
  return static_cast<int64_t>(hash);
}

/// "Float[4, 24] on cpu" for what the layout of a message depends on. Processes number their devices differently, so
/// those of one kind are told apart by the order in which they come.
class Descriptions {
 public:
  /// Appended, and without streams, because it is done in every step.
  void append(std::string& text, const at::Tensor& tensor, int64_t divided_dimension = -1) {
    text += c10::toString(tensor.scalar_type());
    text += '[';
    for (int64_t d = 0; d < tensor.dim(); ++d) {
      if (d > 0) text += ", ";
      text += d == divided_dimension ? "divided" : std::to_string(tensor.size(d));
    }
    text += "] on ";
    text += c10::DeviceTypeName(tensor.device().type(), /*lower_case=*/true);
    const auto known = std::find(devices_.begin(), devices_.end(), tensor.device());
    const auto place = known - devices_.begin();
    if (known == devices_.end()) devices_.push_back(tensor.device());
    if (place > 0) text += " (device " + std::to_string(place) + " in the order of use)";
  }

 private:
  std::vector<at::Device> devices_;
};

/// Where messages lie that go with these tensors.
inline at::Device device_of(const std::vector<at::Tensor>& tensors) {
  for (const at::Tensor& tensor : tensors)
    if (tensor.defined()) return tensor.device();
  return at::kCPU;
}
/// The same of factors, whatever else is wrong with them.
inline at::Device device_of(const std::vector<FactorPair>& pairs) {
  for (const FactorPair& pair : pairs)
    for (const at::Tensor& factor : {pair.a, pair.b})
      if (factor.defined()) return factor.device();
  return at::kCPU;
}

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

  /// What every public call that sends something begins with. It always has the same form, so that processes which
  /// differ in anything that a later message's layout depends on, or are in different calls, are told, where a backend
  /// would wait or abort. Throws in all processes: if one has a `complaint`, that in it and its message in the others;
  /// else if their `lines` differ, the first that does. Says whether `may_differ` is the same in all.
  bool agree(const std::string& lines, at::Device device, const std::exception_ptr& complaint = nullptr,
             const std::string& may_differ = "") {
    bool is_alike = true;
    const std::exception_ptr failure = complaint_of([&] { is_alike = compare(lines, device, complaint, may_differ); });
    if (!failure) return is_alike;
    ++failures();
    std::rethrow_exception(failure);
  }

  /// How often on this thread a call on this group has failed such that no other process waits to hear of it.
  int64_t& failures() const {
    thread_local std::map<const void*, int64_t> counts;
    return counts[group_.get()];
  }

 private:
  static constexpr const char* kComparing = "comparing the processes";

  bool compare(const std::string& lines, at::Device device, const std::exception_ptr& complaint,
               const std::string& may_differ) {
    const std::string message = message_of(complaint);
    const std::vector<int64_t> own = {static_cast<int64_t>(message.size()), static_cast<int64_t>(lines.size()),
                                      hash_of(lines), hash_of(may_differ)};
    const at::Tensor all = at::stack(gather(at::tensor(own, at::kLong).to(device), kComparing)).cpu();
    const at::Tensor message_sizes = all.select(1, 0), line_sizes = all.select(1, 1);
    const at::Tensor differs = (all != all[0]).any(0);
    if (message_sizes.max().item<int64_t>() > 0) {
      const auto messages = gather_texts(message, message_sizes, device);
      if (complaint) std::rethrow_exception(complaint);
      for (size_t process = 0; process < messages.size(); ++process)
        TORCH_CHECK(messages[process].empty(), "distributed: process ", process, ": ", messages[process]);
    }
    if (differs[1].item<bool>() || differs[2].item<bool>()) {
      const auto texts = gather_texts(lines, line_sizes, device);
      for (size_t process = 1; process < texts.size(); ++process) check_lines(texts[process], process, texts[0]);
    }
    return !differs[3].item<bool>();
  }

  /// The texts of all processes, whose sizes are known.
  std::vector<std::string> gather_texts(const std::string& own, const at::Tensor& sizes, at::Device device) {
    at::Tensor bytes = at::zeros({sizes.max().item<int64_t>()}, at::kByte);
    std::copy(own.begin(), own.end(), bytes.data_ptr<uint8_t>());
    std::vector<std::string> texts;
    for (const at::Tensor& other : gather(bytes.to(device), kComparing)) {
      const at::Tensor found = other.cpu();
      const uint8_t* begin = found.const_data_ptr<uint8_t>();
      texts.emplace_back(begin, begin + sizes[static_cast<int64_t>(texts.size())].item<int64_t>());
    }
    return texts;
  }

  static void check_lines(const std::string& lines, size_t process, const std::string& lines_of_first) {
    std::istringstream found(lines), expected(lines_of_first);
    std::string line, other;
    while (true) {
      const bool has_line = static_cast<bool>(std::getline(found, line));
      const bool has_other = static_cast<bool>(std::getline(expected, other));
      if (!has_line && !has_other) return;
      TORCH_CHECK(has_line && has_other && line == other, "distributed: process ", process, " has '",
                  has_line ? line : "nothing more", "' where process 0 has '", has_other ? other : "nothing more",
                  "', expected the same in all processes");
    }
  }

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
      ++failures();
      TORCH_CHECK(false, "distributed: ", what, " failed in process ", rank(), " of ", size(),
                  ": another process has left or did not answer in time; go on from the last checkpoint (",
                  text.substr(0, text.find('\n')), ")");
    }
  }

  ProcessGroup group_;
  int64_t bytes_ = 0;
};

/// Tensors of one dtype and device, in order, in runs of about `bytes` bytes. What is in which run, and their order, is
/// the same in all processes, whatever their devices are called.
inline std::vector<std::vector<at::Tensor>> buckets(const std::vector<at::Tensor>& tensors, int64_t bytes) {
  struct Open {
    std::vector<at::Tensor> bucket;
    int64_t size;
  };
  std::vector<Open> open;
  std::vector<std::vector<at::Tensor>> result;
  for (const at::Tensor& tensor : tensors) {
    auto found = std::find_if(open.begin(), open.end(), [&](const Open& other) {
      return other.bucket[0].scalar_type() == tensor.scalar_type() && other.bucket[0].device() == tensor.device();
    });
    if (found == open.end()) found = open.insert(found, {{}, 0});
    found->bucket.push_back(tensor);
    found->size += static_cast<int64_t>(tensor.nbytes());
    if (found->size < bytes) continue;
    result.push_back(std::move(found->bucket));
    open.erase(found);
  }
  for (Open& rest : open) result.push_back(std::move(rest.bucket));
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

}  // namespace detail

/// Replaces a dense tensor by its sum over the processes, the same bit for bit in all of them. Collective. Throws
/// c10::Error in all processes if shapes, dtypes or kinds of device differ or a tensor is undefined or sparse, and if a
/// process does not answer.
inline void sum_over_processes(const torch::Tensor& tensor, const ProcessGroup& group) {
  at::NoGradGuard no_grad;
  detail::Collectives collectives(group);
  std::string lines = "call: sum_over_processes\n";
  const auto complaint = detail::complaint_of([&] {
    TORCH_CHECK(tensor.defined() && tensor.layout() == at::kStrided, "sum_over_processes: the tensor is ",
                tensor.defined() ? c10::str(tensor.layout()) : "undefined", ", expected a dense one");
    detail::Descriptions().append(lines, tensor);
  });
  collectives.agree(lines, detail::device_of({tensor}), complaint);
  const at::Tensor sum = tensor.contiguous();  // a message has no strides
  collectives.reduce(sum, "adding up over the processes");
  if (!sum.is_same(tensor)) at::Tensor(tensor).copy_(sum);
}

/// Throws c10::Error in all processes unless `lines`, such as a program's settings, are the same text in all of them;
/// the message names the first line that differs, and its process. Collective; where they agree 32 bytes are sent.
/// `device` is one of the group's.
inline void check_same(const std::string& lines, const ProcessGroup& group, torch::Device device = torch::kCPU) {
  detail::Collectives(group).agree("call: check_same\n" + lines, device);
}

}  // namespace lora_rite
