#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "lora_rite/diagnostics.hpp"
#include "lora_rite/engine/host/chunked_sums.hpp"
#include "lora_rite/engine/host/fingerprint.hpp"
#include "lora_rite/engine/host/kernels/types.hpp"
#include "lora_rite/engine/host/work.hpp"

namespace lora_rite::host {

/// What is known of a factor from one step to the next. It begins as of nothing.
struct KnownFactor {
  Fingerprint seen;        ///< of the factor that the sums belong to
  bool wide_cross = true;  ///< is XᵀN summed in double? The next pass begins as the last one ended.
  bool knows_eigenvalues = false;
  DoubleSteps double_steps;
};

/// What is known of the k factors of a side.
struct KnownFactors {
  kernels::Shape shape{};
  Chunks chunks{};
  int64_t stride = 0;    ///< of fingerprints
  ChunkedSums products;  ///< XᵀX | XᵀN [k, p, 2p]
  ChunkedSums columns;   ///< weighted sums of X's columns | ‖n‖² of N's columns [k, 2, p]
  std::vector<KnownFactor> factors;
  std::vector<double> eigenvalues;  ///< of the second moments [k, r], ascending

  KnownFactors() = default;
  KnownFactors(int64_t count, const kernels::Shape& shape)
      : shape(shape),
        chunks(Chunks::of(shape)),
        stride(Fingerprint::stride_of(shape.rows * shape.rank)),
        factors(static_cast<size_t>(count)),
        eigenvalues(static_cast<size_t>(count * shape.rank)) {
    const int64_t p = kernels::padded_rank(shape.rank);
    products = ChunkedSums(count, chunks.count, 2 * p * p);
    columns = ChunkedSums(count, chunks.count, 2 * p);
  }
};

}  // namespace lora_rite::host
