// How far the host engine's passes over the rows are from what this machine can do: their time beside the time that
// their bytes take at the measured memory bandwidth, and their operations at the measured rate of arithmetic.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <lora_rite/engine/host/kernels/dispatch.hpp>
#include <lora_rite/engine/host/torch_threads.hpp>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace {

namespace kernels = lora_rite::host::kernels;

/// The shortest of several runs, in seconds: a limit is what the machine can do when nobody disturbs it.
template <class Function>
double seconds(const Function& function) {
  double best = 1e9;
  for (int round = 0; round < 9; ++round) {
    const auto start = std::chrono::steady_clock::now();
    function();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

/// Bytes a second of x ← x + y over tensors beyond every cache.
double bandwidth() {
  at::Tensor x = at::ones({32 << 20}), y = at::ones({32 << 20});
  return 3.0 * static_cast<double>(x.nbytes()) / seconds([&] { x.add_(y); });
}

/// Operations a second of the library's product of square matrices.
double arithmetic(at::ScalarType dtype) {
  const int64_t n = 1024;
  const at::Tensor x = at::ones({n, n}, dtype), y = at::ones({n, n}, dtype);
  at::Tensor out = at::empty({n, n}, dtype);
  return 2.0 * n * n * n / seconds([&] { at::mm_out(out, x, y); });
}

struct Pass {
  double nanoseconds;                          ///< an element of the factors
  double bytes, float_operations, operations;  ///< of an element; `operations` are double
};

/// Both passes of a step over `factors` factors of rank r and 2048 rows.
std::vector<std::pair<std::string, Pass>> passes(int64_t r, bool rank_first) {
  const kernels::Shape shape = {2048, r, rank_first};
  const int64_t size = shape.rows * r, p = kernels::padded_rank(r), factors = (96 << 20) / (12 * size);
  at::Tensor x = at::randn({factors, size}), n = at::randn({factors, size}), g = at::randn({factors, size});
  const at::Tensor weights = at::ones({shape.rows}, at::kDouble), momentum_map = at::eye(p, at::kDouble) * 0.9,
                   gradient_map = at::eye(p, at::kDouble) * 0.1;
  at::Tensor products = at::zeros({factors, 2 * p * p + 2 * p}, at::kDouble);
  const kernels::Maps maps = {momentum_map.const_data_ptr<double>(),
                              gradient_map.const_data_ptr<double>(),
                              1,
                              1e-4F,
                              true,
                              /*wide_momentum=*/false,
                              /*wide_gradient=*/false,
                              {}};
  const bool wide_cross = !kernels::sums_in_float(r);
  const auto run = [&](const auto& pass) {
    return 1e9 / static_cast<double>(factors * size) * seconds([&] {
             lora_rite::host::torch_threads().for_each(factors, [&](int64_t i, int64_t) {
               std::vector<double> memory(static_cast<size_t>(kernels::Blocks::size(r)));
               pass(i * size, products.data_ptr<double>() + i * (2 * p * p + 2 * p),
                    kernels::Blocks::in(memory.data(), r));
             });
           });
  };
  const double rank = static_cast<double>(r);
  const double gram = run([&](int64_t at, double* sums, const kernels::Blocks& blocks) {
    kernels::best().gram(g.const_data_ptr<float>() + at, nullptr, shape, 0, shape.rows, blocks, sums, nullptr);
  });
  const double apply = run([&](int64_t at, double* sums, const kernels::Blocks& blocks) {
    kernels::best().apply(x.data_ptr<float>() + at, n.data_ptr<float>() + at, g.const_data_ptr<float>() + at,
                          weights.const_data_ptr<double>(), shape, 0, shape.rows, maps, blocks,
                          {sums, sums + 2 * p * p, sums + 2 * p * p + p, wide_cross});
  });
  // GᵀG: half of r products. Act 3: N and G by float maps, half of XᵀX, XᵀN.
  const double cross = 2 * rank;
  return {{"act 1", {gram, 4, 0, rank}},
          {"act 3", {apply, 20, 4 * rank + (wide_cross ? 0 : cross), rank + (wide_cross ? cross : 0)}}};
}

}  // namespace

int main(int argc, char** argv) {
  nlohmann::json results = nlohmann::json::array();
  for (const int threads : {1, 2}) {
    at::set_num_threads(threads);
    const double bytes = bandwidth(), singles = arithmetic(at::kFloat), doubles = arithmetic(at::kDouble);
    std::printf("%d threads: %.1f GB/s, %.0f GFLOP/s float, %.0f GFLOP/s double; kernels: %s\n", threads, bytes / 1e9,
                singles / 1e9, doubles / 1e9, kernels::best().name);
    for (const int64_t r : {4, 8, 16, 32, 64}) {
      for (const bool rank_first : {true, false}) {
        for (const auto& [name, pass] : passes(r, rank_first)) {
          const double memory = 1e9 * pass.bytes / bytes;
          const double operations = 1e9 * (pass.float_operations / singles + pass.operations / doubles);
          const double limit = std::max(memory, operations);
          std::printf("r = %2d, %s, %s: %5.2f ns an element; memory %.2f, arithmetic %.2f: %.1f times the limit\n",
                      static_cast<int>(r), rank_first ? "A" : "B", name.c_str(), pass.nanoseconds, memory, operations,
                      pass.nanoseconds / limit);
          results.push_back({{"threads", threads},
                             {"rank", r},
                             {"factor", rank_first ? "A" : "B"},
                             {"pass", name},
                             {"nanoseconds", pass.nanoseconds},
                             {"memory_limit", memory},
                             {"arithmetic_limit", operations}});
        }
      }
    }
  }
  if (argc > 1) std::ofstream(argv[1]) << results.dump(1) << '\n';
  return 0;
}
