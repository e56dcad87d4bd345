#pragma once

#include <array>
#include <cstdint>

namespace lora_rite::test::emulated {

/// A team that runs the kernels' source on a CPU: the indices of a loop one after the other, in an order that looks
/// like chance and is another for every loop and seed.
class HostTeam {
 public:
  template <class T, int kMost>
  struct PerThread {
    std::array<T, kMost> values{};
    T& operator[](int index) { return values.at(static_cast<size_t>(index)); }
  };

  explicit HostTeam(uint64_t seed) : random_(seed * 2654435761U + 1) {}

  template <class Function>
  void for_each(int count, const Function& function) {
    ++barriers_;
    if (count <= 0) return;
    // Steps of a prime that does not divide `count` reach every index once.
    constexpr int kPrimes[] = {1009, 2003, 3001, 4001, 5003};
    int stride = kPrimes[next() % 5];
    if (count % stride == 0) stride = 1;
    auto index = static_cast<int64_t>(next() % static_cast<uint64_t>(count));
    for (int turn = 0; turn < count; ++turn) {
      function(static_cast<int>(index));
      index = (index + stride) % count;
    }
  }

  double* shared() const { return shared_; }
  void share(double* memory) { shared_ = memory; }

  int64_t barriers() const { return barriers_; }

  /// A number for the order of blocks, too.
  uint64_t next() {
    random_ = random_ * 6364136223846793005U + 1442695040888963407U;
    return random_ >> 33;
  }

 private:
  uint64_t random_;
  double* shared_ = nullptr;
  int64_t barriers_ = 0;
};

}  // namespace lora_rite::test::emulated
