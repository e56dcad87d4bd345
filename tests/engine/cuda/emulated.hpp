#pragma once

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "engine/cuda/host_team.hpp"
#include "lora_rite/engine/cuda/cuda_group.hpp"
#include "lora_rite/engine/cuda/decide.hpp"
#include "lora_rite/engine/cuda/kernels.hpp"
#include "lora_rite/engine/cuda/rank_class.hpp"

/// The kernels of Engine::Cuda on a CPU: the source that nvcc compiles, threads and blocks in shuffled order, shared
/// memory poisoned.
namespace lora_rite::test::emulated {

using namespace cuda;

/// Another one shuffles otherwise.
inline uint64_t seed = 1;

/// f(block) of all blocks, in some order, each with a team of its own.
template <class Function>
void run_blocks(int count, const Function& function) {
  HostTeam order(seed++);
  order.for_each(count, [&](int block) {
    HostTeam team(order.next());
    function(team, block);
  });
}

inline std::vector<double> poisoned(int64_t size) {
  return std::vector<double>(static_cast<size_t>(size), std::numeric_limits<double>::quiet_NaN());
}

/// f(rank class, team, tile) for every tile.
template <class Function>
void for_tiles(const Set& set, const Function& function) {
  with_rank_class(set.rank, [&](auto rank) {
    run_blocks(set.tile_count, [&](HostTeam& team, int tile) {
      std::vector<double> shared = poisoned(Tall<rank()>::kShared);
      team.share(shared.data());
      function(rank, team, tile);
    });
  });
}

/// The most matrices that act 2 had at once.
inline int peak = 0;

/// The most barriers of a block in each kernel of act 2.
struct Barriers {
  int64_t unmagnify = 0, decide = 0;
};
inline Barriers barriers;

/// Some of the rule's matrices lie in "global memory".
constexpr int kSharedMatrices = 4;

/// f(pool, factor) for every factor. Returns the most barriers of a block.
template <class Function>
int64_t for_factors(const Set& set, const Function& function) {
  int64_t most = 0;
  with_rank_class(set.rank, [&](auto rank) {
    using PoolType = Pool<HostTeam, rank()>;
    run_blocks(set.factor_count, [&](HostTeam& team, int factor) {
      std::vector<double> shared = poisoned(PoolType::shared_size(kSharedMatrices));
      std::vector<double> global = poisoned(PoolType::global_size(kSharedMatrices));
      team.share(shared.data());
      PoolType pool(team, set.rank, kSharedMatrices, global.data());
      function(pool, factor);
      peak = std::max(peak, pool.matrices.peak());
      most = std::max(most, team.barriers());
    });
  });
  return most;
}

inline constexpr Kernels kEmulated = {
    /*on_gpu=*/false,
    [](int, int64_t rank) { return rank <= kMostRank; },
    [](int, int64_t, int64_t) -> int64_t { return 0; },
    [](const Arguments& step, const AllPointers& pointers, int) -> const char* {
      for_tiles(step.set, [&](auto rank, HostTeam& team, int tile) { observe<rank()>(team, step, pointers, tile); });
      return nullptr;
    },
    [](const Arguments& step, const AllPointers& pointers, int) -> const char* {
      barriers.unmagnify = for_factors(step.set, [&](auto& pool, int factor) {
        if (step.qr_basis) {
          unmagnify<QrBasis>(pool, step, pointers, factor);
        } else {
          unmagnify<PolarBasis>(pool, step, pointers, factor);
        }
      });
      return nullptr;
    },
    [](const Arguments& step, const AllPointers& pointers, int) -> const char* {
      barriers.decide = for_factors(step.set, [&](auto& pool, int factor) { decide(pool, step, pointers, factor); });
      return nullptr;
    },
    [](const Arguments& step, const AllPointers& pointers, int) -> const char* {
      for_tiles(step.set, [&](auto rank, HostTeam& team, int tile) { apply<rank()>(team, step, pointers, tile); });
      return nullptr;
    },
    [](const Arguments& step, const AllPointers& pointers, int) -> const char* {
      for_factors(step.set, [&](auto& pool, int factor) { remember(pool, step, pointers, factor); });
      return nullptr;
    },
};

inline constexpr engine::CudaEngine kEmulatedEngine = engine_of<kEmulated>();

/// While it lives, Engine::Cuda is the emulated one.
class Emulation {
 public:
  Emulation() : before_(std::exchange(engine::cuda_engine, &kEmulatedEngine)) {}
  ~Emulation() { engine::cuda_engine = before_; }
  Emulation(const Emulation&) = delete;
  Emulation& operator=(const Emulation&) = delete;

 private:
  const engine::CudaEngine* before_;
};

}  // namespace lora_rite::test::emulated
