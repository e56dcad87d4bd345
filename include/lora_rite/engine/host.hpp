#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "lora_rite/engine/batch.hpp"
#include "lora_rite/engine/chunk_sums.hpp"
#include "lora_rite/engine/expert_packing.hpp"
#include "lora_rite/engine/kernels.hpp"
#include "lora_rite/engine/lanes.hpp"
#include "lora_rite/engine/layout.hpp"
#include "lora_rite/engine/parallel.hpp"

/// Acts 1 and 3 for float factors on a CPU, without ATen in between: the gradients are read once for act 1, and one
/// pass over the rows does act 3 and leaves the Gram matrices that the next step's act 1 needs. Pairs, and chunks of
/// rows where factors are long, are shared out over LibTorch's threads; sums over chunks are added in a fixed order, so
/// a result does not depend on the number of threads.
///
/// Shapes: k pairs, rank r padded to p, factor X of n rows. Factors are numbered side · k + pair.
namespace lora_rite::engine {

/// A batch whose tall data are moved by `kernels.hpp`.
template <class Basis>
class HostBatch final : public Batch {
 public:
  /// Is the pair one for this engine: contiguous float factors on a CPU, the rank last in B but for dimensions of one?
  /// B may be one expert's part of a tensor, too.
  static bool takes(const FactorPair& pair) {
    bool rank_is_last = true;
    for (int64_t d = 2; d < pair.b.dim(); ++d) rank_is_last = rank_is_last && pair.b.size(d) == 1;
    const auto fits = [](const at::Tensor& factor) {
      return factor.is_cpu() && factor.scalar_type() == at::kFloat && factor.is_contiguous() && factor.numel() > 0;
    };
    return rank_is_last && fits(pair.a) && (fits(pair.b) || ExpertPacking::packs(pair.b));
  }

  HostBatch(std::vector<FactorPair> pairs, std::vector<std::string> labels)
      : Batch(std::move(pairs), std::move(labels)), padded_(kernels::padded_rank(rank_)), packing_(factors_b()) {
    int64_t longest = 0;
    for (const size_t side : {0, 1}) {
      Side& s = sides_[side];
      s.shape = {(side == 0 ? pairs_[0].a : pairs_[0].b).numel() / rank_, rank_, /*rank_first=*/side == 0};
      longest = std::max(longest, s.shape.rows);
      s.glimpse_stride = Glimpse::stride_of(s.shape.rows * rank_);
      // Equal chunks: a short last one would cost as much as it saves.
      s.chunks = std::max<int64_t>(1, s.shape.rows / std::max(kChunk / padded_, kChunkRanks * padded_));
      s.chunk_rows = (s.shape.rows + s.chunks - 1) / s.chunks;
      s.gradient_gram = sums_of_rows(s, square());
      s.products = sums_of_rows(s, 2 * square());
      s.weighted = sums_of_rows(s, static_cast<size_t>(padded_));
      s.gradients.resize(static_cast<size_t>(count()));
      s.seen.resize(static_cast<size_t>(count()));
      s.stale.resize(static_cast<size_t>(count()));
      s.edited.resize(static_cast<size_t>(count()));
      s.finite.resize(static_cast<size_t>(count()));
      s.unmagnified_squared.resize(static_cast<size_t>(count()));
      s.momentum_maps.resize(static_cast<size_t>(count()) * square());
      s.wide_momentum_maps.resize(static_cast<size_t>(count()) * square());
      s.is_wide.resize(static_cast<size_t>(count()));
      s.gradient_maps.resize(static_cast<size_t>(count()) * square());
    }
    weights_ = column_weights(longest, double_options());
    groups_.resize(static_cast<size_t>((2 * count() + kLanes - 1) / kLanes));
  }

  bool observe(const LoraRiteOptions& options) override {
    TORCH_CHECK(!options.capturable(),
                "LoraRite: capturable was set when the engine was chosen already, expected before the first step or "
                "`load`");
    bool any = false;
    lora_rite::detail::Gradients gradients;
    for (int64_t factor = 0; factor < 2 * count(); ++factor) {
      TORCH_CHECK(is_packed(factor) || tensor_of(factor).is_contiguous(), labels_[index_of(factor)], ": factor ",
                  factor < count() ? "a" : "b", " now has strides ", tensor_of(factor).strides(),
                  ", expected a contiguous one as in the first step; give it set_data(x.contiguous())");
      const at::Tensor gradient = gradients.of(tensor_of(factor));
      const bool plain = !gradient.defined() ||
                         (gradient.scalar_type() == at::kFloat && (gradient.is_contiguous() || is_packed(factor)));
      side_of(factor).gradients[index_of(factor)] = plain ? gradient : gradient.to(at::kFloat).contiguous();
      any = any || gradient.defined();
    }
    if (!any) return false;
    for (int64_t factor = count(); factor < 2 * count(); ++factor) {
      const at::Tensor& gradient = sides_[1].gradients[index_of(factor)];
      if (is_packed(factor) && gradient.defined() && !gradient.is_contiguous())
        packing_.add_gradient(index_of(factor), gradient);
    }
    packing_.pack();
    equilibrates_ = options.row_equilibration();
    if (equilibrates_) {
      for (Side& s : sides_) {
        s.equilibrated_gram = sums_of_rows(s, square());
        s.plain_maps.resize(s.gradient_maps.size());
        s.row_decay.resize(static_cast<size_t>(count()));
      }
    }
    find_rows(state_.rows);
    workspaces_.clear();
    for (int thread = 0; thread < at::get_num_threads(); ++thread) workspaces_.emplace_back(rank_);
    for_each_chunk([&](Side& s, size_t i, int64_t first, int64_t end, size_t part, const kernels::Blocks& blocks) {
      double* gram = s.gradient_gram.emptied_part(part);
      double* equilibrated = s.rows == nullptr ? nullptr : s.equilibrated_gram.emptied_part(part);
      if (!s.gradients[i].defined()) return;
      kernels::best().gram(gradient_of(s, i), rows_of(s, i), s.shape, first, end, blocks, gram, equilibrated);
    });
    for_each_factor([&](Side& s, size_t i) {
      s.gradient_gram.add_up(i);
      if (s.rows != nullptr) s.equilibrated_gram.add_up(i);
      s.stale[i] = !(Glimpse::of(tensor_of(factor_number(s, i)), s.glimpse_stride) == s.seen[i]);
    });
    for (int64_t factor = count(); factor < 2 * count(); ++factor) {
      // All, for what is written back is all of them: an edit that the glimpse missed must not be undone.
      if (is_packed(factor)) packing_.add_values(index_of(factor), tensor_of(factor));
    }
    packing_.pack();
    for (int64_t factor = 0; factor < 2 * count(); ++factor) {
      if (side_of(factor).stale[index_of(factor)]) remember_rows(side_of(factor), index_of(factor));
    }
    for_each_factor([&](Side& s, size_t i) {
      s.edited[i] = sums_changed(factor_number(s, i));
      s.finite[i] = all_finite(s.gradient_gram.total(i), square()) && all_finite(s.products.total(i), 2 * square());
    });
    return true;
  }

  at::Tensor finite() const override {
    bool finite = true;
    for (const Side& s : sides_)
      for (const char flag : s.finite) finite = finite && flag != 0;
    return at::scalar_tensor(finite, at::kBool);
  }

  at::Tensor unmagnify(const at::Tensor& proceed) override {
    at::Tensor norms = at::zeros({count()}, double_options());
    if (!proceed.item<bool>()) return norms;
    parallel_tasks(static_cast<int64_t>(groups_.size()), [&](int64_t g) {
      rule::Statistics<LaneMatrix> statistics = {{}, LaneMatrix(rank_), LaneMatrix(rank_), LaneMatrix(rank_), {}, {}};
      if (equilibrates_) statistics.plain_gradient_gram = LaneMatrix(rank_);
      for (int64_t lane = 0; lane < kLanes; ++lane) load_statistics(factor_in(g, lane), lane, statistics);
      Group& group = groups_[static_cast<size_t>(g)];
      group = rule::unmagnify<Basis>(std::move(statistics), kEpsilon);
      const Lanes squared = at_least(trace_of(equilibrates_ ? group.plain_gradient_gram : group.gradient_gram), 0.0);
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t factor = factor_in(g, lane);
        side_of(factor).unmagnified_squared[index_of(factor)] = squared[lane];
      }
    });
    double* sums = norms.template data_ptr<double>();
    for (size_t i = 0; i < static_cast<size_t>(count()); ++i)
      sums[i] = sides_[0].unmagnified_squared[i] + sides_[1].unmagnified_squared[i];
    return norms;
  }

  void prepare(const LoraRiteOptions& options, const at::Tensor& clip_factor, const at::Tensor& proceed) override {
    proceed_ = proceed.item<bool>();
    clip_ = clip_factor.item<double>();
    if (!proceed_) return;
    next_momentum_ = state_.momentum;
    next_rows_ = state_.rows;
    for (const size_t side : {0, 1}) {
      Side& s = sides_[side];
      const double rate = options.lr() * (side == 0 ? 1.0 : options.lr_ratio_b());
      s.rate = static_cast<float>(rate);
      s.decay = static_cast<float>(rate * options.weight_decay());
      const bool any = std::any_of(s.gradients.begin(), s.gradients.end(), [](const auto& g) { return g.defined(); });
      const at::TensorOptions floats = double_options().dtype(at::kFloat);
      if (any && !next_momentum_[side].defined()) {
        std::vector<int64_t> shape = shapes_[side];
        shape.insert(shape.begin(), count());
        next_momentum_[side] = at::zeros(shape, floats);
      }
      if (any && equilibrates_ && !next_rows_[side].defined())
        next_rows_[side] = at::ones({count(), s.shape.rows}, floats);
      s.momentum = next_momentum_[side].defined() ? next_momentum_[side].template data_ptr<float>() : nullptr;
    }
    find_rows(next_rows_);
    const rule::Moments<at::Tensor>& old = state_.moments;
    next_moments_ = {at::empty_like(old.second_moment), at::empty_like(old.escaped_mass),
                     at::empty_like(old.inverse_root), at::empty_like(old.step)};
    parallel_tasks(static_cast<int64_t>(groups_.size()), [&](int64_t g) { decide(g, options, clip_); });
    if (options.max_update_rms() > 0) bound_updates(options.max_update_rms());
  }

  void commit(const LoraRiteOptions& options) override {
    if (proceed_) {
      state_.momentum = next_momentum_;
      state_.rows = next_rows_;
      std::swap(state_.moments, next_moments_);
      for_each_chunk([&](Side& s, size_t i, int64_t first, int64_t end, size_t part, const kernels::Blocks& blocks) {
        move_rows(s, i, first, end, part, blocks);
      });
      for_each_factor([&](Side& s, size_t i) { add_sums(s, i); });
      for (int64_t factor = 0; factor < 2 * count(); ++factor) {
        // Autograd must notice, as it would an in-place operator.
        if (side_of(factor).gradients[index_of(factor)].defined())
          tensor_of(factor).unsafeGetTensorImpl()->bump_version();
      }
      if (options.balance()) balance();
      for (int64_t factor = count(); factor < 2 * count(); ++factor) {
        if (is_packed(factor) && sides_[1].gradients[index_of(factor)].defined())
          packing_.add_values(index_of(factor), tensor_of(factor));
      }
      packing_.write_back();
      finish_step();
    }
    // Nothing of a step stays behind but what is remembered.
    for (Side& s : sides_) std::fill(s.gradients.begin(), s.gradients.end(), at::Tensor());
    for (Group& group : groups_) group = {};
    next_momentum_ = next_rows_ = {};
    next_moments_ = {};
    workspaces_.clear();
  }

  void restore(const std::vector<PairState>& states) override {
    Batch::restore(states);
    for (Side& s : sides_) std::fill(s.seen.begin(), s.seen.end(), Glimpse());
  }

 private:
  // Rows that one thread takes at a time: some elements, and many times more than the sums that they leave behind.
  static constexpr int64_t kChunk = 32768, kChunkRanks = 64;

  static constexpr double kEpsilon = std::numeric_limits<float>::epsilon();  ///< of factors and gradients

  static constexpr double kMostInFloat = 4;  ///< largest entry of a momentum's map with which floats are exact enough

  /// What of a factor is looked at in every step to notice that someone wrote to it: where it lies, its version
  /// counter, and, for who wrote past the counter, the bits of up to 64 of its elements. Where one of them differs, all
  /// elements are read again.
  struct Glimpse {
    const void* data = nullptr;
    int64_t version = 0;
    uint64_t bits = 0;

    /// How far apart the elements lie. No common divisor with the size, hence with neither dimension: else all of them
    /// could be of one column.
    static int64_t stride_of(int64_t size) {
      int64_t stride = std::max<int64_t>(1, size / 64);
      while (std::gcd(stride, size) != 1) ++stride;
      return stride;
    }
    static Glimpse of(const at::Tensor& factor, int64_t stride) {
      const char* data = static_cast<const char*>(factor.const_data_ptr());
      const int64_t size = factor.numel();
      const auto take = [data](uint64_t& bits, int64_t place) {
        uint32_t element;
        std::memcpy(&element, data + place * static_cast<int64_t>(sizeof(float)), sizeof(element));
        bits = bits * 0x9E3779B97F4A7C15U + element;
      };
      uint64_t bits = 0;
      int64_t e = 0;
      if (factor.is_contiguous()) {
        uint64_t second = 0, third = 0, fourth = 0;  // four chains, for a product takes longer than a load
        for (; e + 3 * stride < size; e += 4 * stride) {
          take(bits, e);
          take(second, e + stride);
          take(third, e + 2 * stride);
          take(fourth, e + 3 * stride);
        }
        for (; e < size; e += stride) take(bits, e);
        for (const uint64_t other : {second, third, fourth}) bits = bits * 0x9E3779B97F4A7C15U + other;
        return {data, factor._version(), bits};
      }
      // An expert's elements [n, r] lie apart. A division for each would take longer than all else here.
      const int64_t columns = factor.size(1);
      const int64_t rows_on = stride / columns, columns_on = stride % columns;
      for (int64_t row = 0, column = 0; e < size; e += stride, row += rows_on, column += columns_on) {
        if (column >= columns) {
          column -= columns;
          ++row;
        }
        take(bits, row * factor.stride(0) + column * factor.stride(1));
      }
      return {data, factor._version(), bits};
    }
    bool operator==(const Glimpse& other) const {
      return data == other.data && version == other.version && bits == other.bits;
    }
  };

  /// All there is of the k factors of a side. Parts of sums are numbered pair · chunks + chunk.
  struct Side {
    kernels::Shape shape;
    int64_t chunk_rows, chunks;
    int64_t glimpse_stride;
    ChunkSums gradient_gram;                  ///< GᵀG [k, p, p]
    ChunkSums equilibrated_gram;              ///< GᵀDG, the same of scaled rows, where `rows` are known
    ChunkSums products;                       ///< XᵀX | XᵀN [k, p, 2p]
    ChunkSums weighted;                       ///< column sums with `weights_` [k, p]
    std::vector<at::Tensor> gradients;        ///< undefined where there is none
    std::vector<Glimpse> seen;                ///< of the factors whose sums `products` and `weighted` are
    std::vector<char> stale;                  ///< are these sums perhaps no longer true?
    std::vector<char> edited;                 ///< by someone else, since the last step
    std::vector<char> finite;                 ///< factor, momentum and gradient
    std::vector<double> unmagnified_squared;  ///< ‖Ḡ‖²
    std::vector<float> momentum_maps;         ///< N → N [k, p, p]
    std::vector<double> wide_momentum_maps;   ///< the same in double
    std::vector<char> is_wide;                ///< is it the one in double that is needed?
    std::vector<double> gradient_maps;        ///< G → N [k, p, p]
    std::vector<double> plain_maps;           ///< G → S₀, for row equilibration only [k, p, p]
    std::vector<double> row_decay;            ///< β₂' [k], for row equilibration only
    float decay = 0, rate = 0;                ///< X ← X − (rate · N + decay · X)
    float* momentum = nullptr;                ///< [k, factor]
    float* rows = nullptr;                    ///< second moments of rows [k, n], null if not known or not wanted
  };
  using Group = rule::Unmagnified<LaneMatrix>;  ///< of eight factors

  struct Workspace {
    Buffer memory;
    kernels::Blocks blocks;

    explicit Workspace(int64_t rank)
        : memory(static_cast<size_t>(kernels::Blocks::size(rank))), blocks(kernels::Blocks::in(memory.data(), rank)) {}
  };

  const kernels::Blocks& blocks_of(int64_t thread) const { return workspaces_[static_cast<size_t>(thread)].blocks; }
  size_t square() const { return static_cast<size_t>(padded_ * padded_); }
  Side& side_of(int64_t factor) { return sides_[factor < count() ? 0 : 1]; }
  size_t index_of(int64_t factor) const { return static_cast<size_t>(factor % count()); }
  int64_t factor_number(const Side& s, size_t i) const {
    return (&s == &sides_[0] ? 0 : count()) + static_cast<int64_t>(i);
  }
  std::vector<at::Tensor> factors_b() const {
    std::vector<at::Tensor> factors;
    for (const FactorPair& pair : pairs_) factors.push_back(pair.b);
    return factors;
  }
  bool is_packed(int64_t factor) const { return factor >= count() && packing_.is_packed(index_of(factor)); }

  /// The rows of a factor, where they are moved.
  float* values_of(int64_t factor) {
    if (is_packed(factor)) return packing_.values(index_of(factor));
    return static_cast<float*>(tensor_of(factor).unsafeGetTensorImpl()->mutable_data());
  }
  const at::Tensor& tensor_of(int64_t factor) const { return factor_of(factor % count(), factor < count() ? 0 : 1); }

  /// body(side, pair, first row, end row, part, work space) for every chunk of every factor, in parallel.
  template <class Body>
  void for_each_chunk(const Body& body) {
    const int64_t of_a = count() * sides_[0].chunks, of_b = count() * sides_[1].chunks;
    parallel_tasks(of_a + of_b, [&](int64_t task, int64_t thread) {
      Side& s = sides_[task < of_a ? 0 : 1];
      const size_t part = static_cast<size_t>(task < of_a ? task : task - of_a);
      const size_t i = part / static_cast<size_t>(s.chunks);
      const int64_t first = static_cast<int64_t>(part) % s.chunks * s.chunk_rows;
      body(s, i, first, std::min(first + s.chunk_rows, s.shape.rows), part, blocks_of(thread));
    });
  }

  /// body(side, pair) for every factor, in parallel.
  template <class Body>
  void for_each_factor(const Body& body) {
    parallel_tasks(2 * count(), [&](int64_t factor) { body(side_of(factor), index_of(factor)); });
  }

  ChunkSums sums_of_rows(const Side& s, size_t size) const {
    return ChunkSums(count(), s.chunks, static_cast<int64_t>(size));
  }
  static void add_sums(Side& s, size_t i) {
    s.products.add_up(i);
    s.weighted.add_up(i);
  }

  /// Where the rows' second moments are now.
  void find_rows(const std::array<at::Tensor, 2>& rows) {
    for (const size_t side : {0, 1})
      sides_[side].rows = equilibrates_ && rows[side].defined() ? rows[side].template data_ptr<float>() : nullptr;
  }
  static float* rows_of(const Side& s, size_t i) {
    return s.rows == nullptr ? nullptr : s.rows + static_cast<int64_t>(i) * s.shape.rows;
  }

  static kernels::Sums emptied_sums(Side& s, size_t part) {
    return {s.products.emptied_part(part), s.weighted.emptied_part(part)};
  }

  static bool all_finite(const double* numbers, size_t size) {
    std::array<double, 8> sums = {};  // side by side: one sum would wait for itself
    size_t e = 0;
    for (; e + sums.size() <= size; e += sums.size())
      for (size_t k = 0; k < sums.size(); ++k) sums[k] += numbers[e + k] - numbers[e + k];
    for (; e < size; ++e) sums[0] += numbers[e] - numbers[e];
    return std::accumulate(sums.begin(), sums.end(), 0.0) == 0;  // else NaN
  }

  /// XᵀX, XᵀN and column sums of a factor from its rows: what act 3 usually leaves behind.
  void remember_rows(Side& s, size_t i) {
    const at::Tensor& momentum = state_.momentum[&s == &sides_[0] ? 0 : 1];
    const int64_t size = s.shape.rows * rank_;
    const float* n =
        momentum.defined() ? momentum.template const_data_ptr<float>() + static_cast<int64_t>(i) * size : nullptr;
    const float* x = values_of(factor_number(s, i));
    parallel_tasks(s.chunks, [&](int64_t chunk, int64_t thread) {
      const int64_t first = chunk * s.chunk_rows, end = std::min(first + s.chunk_rows, s.shape.rows);
      kernels::best().remember(x, n, weights_.template const_data_ptr<double>(), s.shape, first, end, blocks_of(thread),
                               emptied_sums(s, i * static_cast<size_t>(s.chunks) + static_cast<size_t>(chunk)));
    });
    add_sums(s, i);
    s.seen[i] = Glimpse::of(tensor_of(factor_number(s, i)), s.glimpse_stride);
  }

  /// Squared norm of column j, and its weighted sum.
  std::pair<double, double> column_sums(const Side& s, size_t i, int64_t j) const {
    return {s.products.total(i)[j * 2 * padded_ + j], s.weighted.total(i)[j]};
  }

  /// The remembered column sums [2, 2, k, r] (side, kind, pair, column) of a factor's first kind; k r further: the
  /// second.
  double* known_sums(int64_t factor) {
    const int64_t side = factor < count() ? 0 : 1;
    return state_.column_sums.template data_ptr<double>() + (side * 2 * count() + factor % count()) * rank_;
  }

  /// Do a factor's column sums differ from the remembered ones by more than round-off?
  bool sums_changed(int64_t factor) {
    const Side& s = side_of(factor);
    const double* known = known_sums(factor);
    for (int64_t j = 0; j < rank_; ++j) {
      const auto [norm, weighted] = column_sums(s, index_of(factor), j);
      const double known_norm = known[j], known_weighted = known[count() * rank_ + j];
      if (std::abs(norm - known_norm) > kRoundOff * known_norm ||
          std::abs(weighted - known_weighted) > kRoundOff * std::sqrt(known_norm * static_cast<double>(s.shape.rows)))
        return true;
    }
    return false;
  }

  /// The factor in a lane of a group; a lane too many repeats the last one.
  int64_t factor_in(int64_t g, int64_t lane) const { return std::min(g * kLanes + lane, 2 * count() - 1); }

  /// What act 2 reads of one factor's partner and gradient.
  void load_statistics(int64_t factor, int64_t lane, rule::Statistics<LaneMatrix>& statistics) {
    const size_t side = factor < count() ? 0 : 1, index = index_of(factor);
    const Side &own = sides_[side], &partner = sides_[1 - side];
    const double* plain_gram = own.gradient_gram.total(index);
    const double* gradient_gram = own.rows == nullptr ? plain_gram : own.equilibrated_gram.total(index);
    const double* products = partner.products.total(index);
    const size_t place = (1 - side) * static_cast<size_t>(count()) + index;
    const bool edited = partner.edited[index] != 0;
    const double scale = edited ? 1 : state_.previous_scale.template const_data_ptr<double>()[place];
    const double rate = edited ? 0 : state_.previous_rate.template const_data_ptr<double>()[place];
    statistics.steps[lane] = state_.moments.step.template const_data_ptr<double>()[place];
    for (int64_t i = 0; i < rank_; ++i) {
      for (int64_t j = 0; j < rank_; ++j) {
        const int64_t row = std::min(i, j), column = std::max(i, j);
        const double gram = products[row * 2 * padded_ + column];
        statistics.gram.at(i, j, lane) = gram;
        statistics.cross.at(i, j, lane) = scale * gram + rate * products[(2 * i + 1) * padded_ + j];
        statistics.gradient_gram.at(i, j, lane) = gradient_gram[row * padded_ + column];
        if (equilibrates_) statistics.plain_gradient_gram.at(i, j, lane) = plain_gram[row * padded_ + column];
      }
    }
  }

  /// Act 2 for eight factors: new moments go to `next_moments_`, the maps for act 3 to their sides.
  void decide(int64_t g, const LoraRiteOptions& options, double clip) {
    rule::Moments<LaneMatrix> old = {LaneMatrix(rank_), {}, LaneMatrix(rank_), {}};
    Lanes rows(1.0), has_gradient, partner_edited;
    const int64_t size = rank_ * rank_;
    const rule::Moments<at::Tensor>& state = state_.moments;
    const double* old_v = state.second_moment.template const_data_ptr<double>();
    const double* old_root = state.inverse_root.template const_data_ptr<double>();
    const double* old_mass = state.escaped_mass.template const_data_ptr<double>();
    const double* old_step = state.step.template const_data_ptr<double>();
    double* v = next_moments_.second_moment.template data_ptr<double>();
    double* root = next_moments_.inverse_root.template data_ptr<double>();
    double* mass = next_moments_.escaped_mass.template data_ptr<double>();
    double* step = next_moments_.step.template data_ptr<double>();
    const int64_t first = g * kLanes, lanes = std::min<int64_t>(kLanes, 2 * count() - first);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t factor = factor_in(g, lane);
      const size_t index = index_of(factor);
      for (int64_t i = 0; i < rank_; ++i)
        for (int64_t j = 0; j < rank_; ++j) {
          old.second_moment.at(i, j, lane) = old_v[factor * size + i * rank_ + j];
          old.inverse_root.at(i, j, lane) = old_root[factor * size + i * rank_ + j];
        }
      old.escaped_mass[lane] = old_mass[factor];
      old.step[lane] = old_step[factor];
      rows[lane] = static_cast<double>(side_of(factor).shape.rows);
      has_gradient[lane] = side_of(factor).gradients[index].defined() ? 1 : 0;
      partner_edited[lane] = sides_[factor < count() ? 1 : 0].edited[index];
    }
    Group& now = groups_[static_cast<size_t>(g)];
    if (options.max_relative_change() > 0) bound_relative_change(g, options, rows);
    const auto decision = rule::decide<rule::Eigenvalues, LaneMatrix>(old, now, rows, Lanes(clip), has_gradient,
                                                                      partner_edited, kEpsilon, options);
    // N = M R⁺ᵀ, both maps in one. G's map is a double one. βQᵀ R⁺ᵀ is near βI where the partner moved little, and then
    // a float will do; but in coordinates in which the partner is ill-conditioned, it has entries that are large and
    // cancel, and their round-off is amplified once more on the way back to M.
    const LaneMatrix& new_root = decision.moments.inverse_root;
    const LaneMatrix momentum_to_momentum = matmul(decision.momentum_map, transpose(new_root));
    const LaneMatrix gradient_to_momentum = matmul(decision.gradient_map, transpose(new_root));
    Lanes row_decay;
    if (equilibrates_)
      row_decay = rule::bias_corrected_decay(std::get<1>(options.betas()), decision.moments.step, has_gradient);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t factor = first + lane;
      float* momentum_map = side_of(factor).momentum_maps.data() + index_of(factor) * square();
      double* wide_momentum_map = side_of(factor).wide_momentum_maps.data() + index_of(factor) * square();
      double* gradient_map = side_of(factor).gradient_maps.data() + index_of(factor) * square();
      double largest = 0;
      for (int64_t i = 0; i < rank_; ++i)
        for (int64_t j = 0; j < rank_; ++j) {
          const int64_t e = i * padded_ + j;
          momentum_map[e] = narrow(momentum_to_momentum.at(i, j, lane));
          wide_momentum_map[e] = momentum_to_momentum.at(i, j, lane);
          largest = std::max(largest, std::abs(wide_momentum_map[e]));
          gradient_map[e] = gradient_to_momentum.at(i, j, lane);
          v[factor * size + i * rank_ + j] = decision.moments.second_moment.at(i, j, lane);
          root[factor * size + i * rank_ + j] = new_root.at(i, j, lane);
        }
      side_of(factor).is_wide[index_of(factor)] = largest > kMostInFloat;
      if (side_of(factor).rows != nullptr) {
        double* plain_map = side_of(factor).plain_maps.data() + index_of(factor) * square();
        for (int64_t i = 0; i < rank_; ++i)
          for (int64_t j = 0; j < rank_; ++j) plain_map[i * padded_ + j] = decision.plain_map.at(i, j, lane);
        side_of(factor).row_decay[index_of(factor)] = row_decay[lane];
      }
      mass[factor] = decision.moments.escaped_mass[lane];
      step[factor] = decision.moments.step[lane];
    }
  }

  /// Sets a group's damping.
  void bound_relative_change(int64_t g, const LoraRiteOptions& options, const Lanes& rows) {
    LaneMatrix own(rank_);
    Lanes rate;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t factor = factor_in(g, lane);
      const int64_t partner = (factor + count()) % (2 * count());  // which holds this factor's root
      const LaneMatrix& root = groups_[static_cast<size_t>(partner / kLanes)].inverse_root;
      for (int64_t i = 0; i < rank_; ++i)
        for (int64_t j = 0; j < rank_; ++j) own.at(i, j, lane) = root.at(i, j, partner % kLanes);
      rate[lane] = options.lr() * (factor < count() ? 1 : options.lr_ratio_b());
    }
    Group& now = groups_[static_cast<size_t>(g)];
    now.damping = rule::relative_change_damping(now.inverse_root, own, rate, rows, options.max_relative_change());
  }

  /// As a float; beyond its range the largest one, for a map must not bring forth an infinity.
  static float narrow(double value) {
    constexpr double most = std::numeric_limits<float>::max();
    return static_cast<float>(std::min(std::max(value, -most), most));
  }

  kernels::Maps maps_of(const Side& s, size_t i) const {
    kernels::Maps maps = {s.momentum_maps.data() + i * square(),
                          s.gradient_maps.data() + i * square(),
                          s.decay,
                          s.rate,
                          s.gradients[i].defined(),
                          s.is_wide[i] ? s.wide_momentum_maps.data() + i * square() : nullptr};
    if (s.rows != nullptr && maps.has_gradient)
      maps.rows = {s.plain_maps.data() + i * square(), rows_of(s, i), s.row_decay[i]};
    return maps;
  }
  float* momentum_of(const Side& s, size_t i) const {
    return s.momentum + static_cast<int64_t>(i) * s.shape.rows * rank_;
  }
  const float* gradient_of(const Side& s, size_t i) {
    if (!s.gradients[i].defined()) return nullptr;
    if (is_packed(factor_number(s, i)) && !s.gradients[i].is_contiguous()) return packing_.gradient(i);
    return s.gradients[i].template const_data_ptr<float>();
  }

  /// Act 3 for some rows of one factor.
  void move_rows(Side& s, size_t i, int64_t first, int64_t end, size_t part, const kernels::Blocks& blocks) {
    if (s.momentum == nullptr) return;
    kernels::Maps maps = maps_of(s, i);
    maps.rows.next = rows_of(s, i);
    // A factor that rests keeps its sums; XᵀN is then not asked for, as its rate was 0.
    const kernels::Sums sums = maps.has_gradient ? emptied_sums(s, part) : kernels::Sums{};
    float* x = values_of(factor_number(s, i));
    kernels::best().apply(x, momentum_of(s, i), gradient_of(s, i), weights_.template const_data_ptr<double>(), s.shape,
                          first, end, maps, blocks, sums);
  }

  /// Where the RMS of M exceeds `bound`, both maps are scaled so that it is `bound`. One more pass over the rows finds
  /// ‖M‖² = tr(NᵀN YᵀY).
  void bound_updates(double bound) {
    std::array<ChunkSums, 2> grams = {sums_of_rows(sides_[0], square()), sums_of_rows(sides_[1], square())};
    for_each_chunk([&](Side& s, size_t i, int64_t first, int64_t end, size_t part, const kernels::Blocks& blocks) {
      if (s.momentum == nullptr) return;
      kernels::best().update_gram(momentum_of(s, i), gradient_of(s, i), s.shape, first, end, maps_of(s, i), blocks,
                                  grams[&s == &sides_[0] ? 0 : 1].emptied_part(part));
    });
    for (const size_t side : {0, 1}) {
      Side& s = sides_[side];
      const Side& partner = sides_[1 - side];
      for (size_t i = 0; i < static_cast<size_t>(count()); ++i) {
        grams[side].add_up(i);
        const double* gram = grams[side].total(i);
        const double* products = partner.products.total(i);
        double squared = 0;
        for (int64_t a = 0; a < rank_; ++a)
          for (int64_t b = a; b < rank_; ++b)
            squared += (a == b ? 1 : 2) * gram[a * padded_ + b] * products[a * 2 * padded_ + b];
        const double rms = std::sqrt(std::max(squared, 0.0) / static_cast<double>(s.shape.rows * rank_));
        if (!(rms > bound)) continue;
        for (size_t e = i * square(); e < (i + 1) * square(); ++e) {
          s.momentum_maps[e] *= static_cast<float>(bound / rms);
          s.wide_momentum_maps[e] *= bound / rms;
          s.gradient_maps[e] *= bound / rms;
        }
      }
    }
  }

  /// A ← s A, B ← B / s with s = (‖B‖/‖A‖)^{1/2}: equal norms, the same product. Momenta are vectors in the factors'
  /// own coordinates and go along; R⁺ of a factor scales inversely. Pairs of which one factor is zero, or did not move,
  /// are left alone.
  void balance() {
    for (size_t i = 0; i < static_cast<size_t>(count()); ++i) {
      std::array<double, 2> squared = {0, 0};
      for (const size_t side : {0, 1})
        for (int64_t j = 0; j < rank_; ++j) squared[side] += column_sums(sides_[side], i, j).first;
      const bool both_moved = sides_[0].gradients[i].defined() && sides_[1].gradients[i].defined();
      if (!both_moved || !(squared[0] > 0) || !(squared[1] > 0)) continue;
      const double scale = std::pow(squared[1] / squared[0], 0.25);
      const std::array<double, 2> scales = {scale, 1 / scale};
      for (const size_t side : {0, 1}) {
        Side& s = sides_[side];
        const int64_t factor = factor_number(s, i), size = s.shape.rows * rank_;
        multiply(values_of(factor), size, scales[side]);
        multiply(momentum_of(s, i), size, scales[side]);
        // Side s holds the root of its partner, which is scaled by 1 / scales[s].
        multiply(state_.moments.inverse_root.template data_ptr<double>() + factor * rank_ * rank_, rank_ * rank_,
                 scales[side]);
        remember_rows(s, i);
      }
    }
  }

  template <class Number>
  static void multiply(Number* numbers, int64_t size, double factor) {
    for (int64_t e = 0; e < size; ++e) numbers[e] *= static_cast<Number>(factor);
  }

  /// Remembers where the step left everything.
  void finish_step() {
    double* scale = state_.previous_scale.template data_ptr<double>();
    double* rate = state_.previous_rate.template data_ptr<double>();
    double* norm = state_.unmagnified_norm.template data_ptr<double>();
    double* clip = state_.clip_factor.template data_ptr<double>();
    for_each_factor([&](Side& s, size_t i) {
      const int64_t factor = factor_number(s, i);
      const bool moved = s.gradients[i].defined();
      const double kept = 1 - static_cast<double>(s.decay);
      scale[factor] = moved ? 1 / kept : 1;
      rate[factor] = moved ? static_cast<double>(s.rate) / kept : 0;
      norm[factor] = std::sqrt(s.unmagnified_squared[i]);
      clip[factor] = clip_;
      double* known = known_sums(factor);
      for (int64_t j = 0; j < rank_; ++j) {
        const auto [squared, weighted] = column_sums(s, i, j);
        known[j] = squared;
        known[count() * rank_ + j] = weighted;
      }
      s.seen[i] = Glimpse::of(tensor_of(factor), s.glimpse_stride);
    });
  }

  int64_t padded_;         ///< p
  ExpertPacking packing_;  ///< of B factors that are parts
  std::array<Side, 2> sides_;
  at::Tensor weights_;         ///< of the column sums
  std::vector<Group> groups_;  ///< from the first to the second half of act 2

  // From `observe` to `commit`.
  bool equilibrates_ = false;
  std::vector<Workspace> workspaces_;  ///< one a thread

  // From `prepare` to `commit`.
  bool proceed_ = false;
  double clip_ = 1;
  std::array<at::Tensor, 2> next_momentum_, next_rows_;  ///< the state's, new ones among them
  rule::Moments<at::Tensor> next_moments_;               ///< what the state's become
};

}  // namespace lora_rite::engine
