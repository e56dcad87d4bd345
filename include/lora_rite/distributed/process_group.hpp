#pragma once

#include <ATen/ATen.h>
#include <torch/types.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <algorithm>
#include <cstring>
#include <map>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

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

}  // namespace lora_rite
