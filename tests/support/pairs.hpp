#pragma once

#include <lora_rite/lora_rite.hpp>

#include <algorithm>
#include <cmath>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "support/torch.hpp"

/// Small pieces that many tests share.
namespace lora_rite::test {

/// A pair with normal entries, both factors requiring a gradient.
inline FactorPair random_pair(const std::string& name, int64_t rank, int64_t in, int64_t out,
                              torch::Dtype dtype = torch::kDouble) {
  const auto options = torch::TensorOptions().dtype(torch::kDouble);
  return {name, torch::randn({rank, in}, options).to(dtype).requires_grad_(),
          (0.3 * torch::randn({out, rank}, options)).to(dtype).requires_grad_()};
}

/// Copies with the same values, for a second run.
inline std::vector<FactorPair> clone_pairs(const std::vector<FactorPair>& pairs) {
  std::vector<FactorPair> copies;
  for (const auto& pair : pairs) {
    copies.push_back({pair.name, pair.a.detach().clone().set_requires_grad(pair.a.requires_grad()),
                      pair.b.detach().clone().set_requires_grad(pair.b.requires_grad())});
  }
  return copies;
}

/// Gives every factor a normal gradient drawn with `seed`, times `scale`.
inline void set_gradients(const std::vector<FactorPair>& pairs, uint64_t seed, double scale = 1) {
  torch::manual_seed(seed);
  for (const auto& pair : pairs) {
    for (torch::Tensor factor : {pair.a, pair.b}) {
      factor.mutable_grad() = (scale * torch::randn(factor.sizes(), torch::kDouble)).to(factor.scalar_type());
    }
  }
}

/// Steps `optimizer` with random gradients, step numbers first ≤ i < last giving the seeds.
inline void run_steps(torch::optim::Optimizer& optimizer, const std::vector<FactorPair>& pairs, int64_t first,
                      int64_t last, double scale = 1) {
  for (int64_t i = first; i < last; ++i) {
    set_gradients(pairs, static_cast<uint64_t>(1000 + i), scale);
    optimizer.step();
  }
}

/// Bitwise equality of all factors.
inline bool equal_factors(const std::vector<FactorPair>& left, const std::vector<FactorPair>& right) {
  for (size_t i = 0; i < left.size(); ++i) {
    if (!torch::equal(left[i].a, right[i].a) || !torch::equal(left[i].b, right[i].b)) return false;
  }
  return left.size() == right.size();
}

/// Largest relative distance of two runs' factors, over all pairs; infinite where one is not finite.
inline double distance(const std::vector<FactorPair>& left, const std::vector<FactorPair>& right) {
  double worst = 0;
  for (size_t i = 0; i < left.size(); ++i) {
    for (const Side side : kSides) {
      const torch::Tensor x = left[i].factor(side).to(torch::kCPU, torch::kDouble);
      const torch::Tensor y = right[i].factor(side).to(torch::kCPU, torch::kDouble);
      const double size = y.norm().item<double>(), difference = (x - y).norm().item<double>();
      worst = std::max(worst, std::isfinite(difference) ? difference / (size > 0 ? size : 1) : INFINITY);
    }
  }
  return worst;
}

/// What was written, ready to be read.
inline torch::serialize::InputArchive reopened(torch::serialize::OutputArchive& archive) {
  std::stringstream stream;
  archive.save_to(stream);
  torch::serialize::InputArchive result;
  result.load_from(stream);
  return result;
}

/// The bytes that torch::save writes for a value.
template <class Value>
std::string saved_bytes(const Value& value) {
  std::stringstream stream;
  torch::save(value, stream);
  return stream.str();
}

/// What torch::load makes of such bytes.
template <class Optimizer>
void load_bytes(Optimizer& optimizer, const std::string& bytes) {
  std::stringstream stream(bytes);
  torch::load(optimizer, stream);
}

/// The message of the c10::Error that `function` throws; fails the test if it throws none.
template <class Function>
std::string error_of(Function function) {
  try {
    function();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  ADD_FAILURE() << "expected a c10::Error";
  return "";
}

/// Is `text` part of `message`? Prints the message otherwise.
inline testing::AssertionResult mentions(const std::string& message, const std::string& text) {
  if (message.find(text) != std::string::npos) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "'" << text << "' is not mentioned in: " << message;
}

}  // namespace lora_rite::test
