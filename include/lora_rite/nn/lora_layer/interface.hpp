#pragma once

#include <c10/util/Exception.h>
#include <torch/nn/module.h>
#include <torch/types.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/factor_pair.hpp"
#include "lora_rite/nn/lora_config.hpp"

/// What every LoRA layer can do, whatever its base layer: `LoraLayer`, and the adapters it holds.
namespace lora_rite::nn {

/// One adapter of a layer.
struct LoraAdapter {
  LoraConfig config;        ///< with the rank and the alpha of this layer
  torch::Tensor a;          ///< [r, in...]
  torch::Tensor b;          ///< [out, r, ...]
  torch::Tensor initial_a,  ///< LoraInit::Pissa only: A as it started, a buffer "lora_A.<adapter>.initial"
      initial_b;            ///< likewise; the base weight lacks the product of the two
};

/// Values for the factors of a new adapter, from a file.
struct FactorValues {
  torch::Tensor a,  ///< in the shape of LoraLayer::factor_shapes, of any floating dtype
      b;            ///< likewise
};

namespace detail {

inline std::string quoted_list(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "'" : ", '") + name + "'";
  return text.empty() ? "none" : text;
}

}  // namespace detail

/// What LoraLinear, LoraEmbedding and LoraConv2d have in common: a base layer and named adapters, of which some are
/// active,
///     forward(x) = base(x) + Σ over active adapters of scale · B(A(dropout(x))),
/// all of it the base layer alone while adapters are disabled.
///
/// Without an adapter the layer's parameters are those of the layer it stands for, `weight` and `bias`. With one they
/// are those of PEFT's model in memory: `base_layer.weight`, `base_layer.bias`, `lora_A.<adapter>.weight` and
/// `lora_B.<adapter>.weight` (embeddings: `lora_embedding_A.<adapter>` and `lora_embedding_B.<adapter>`), which
/// find_factor_pairs knows.
///
/// Errors are c10::Error, and nothing has changed then.
class LoraLayer {
 public:
  virtual ~LoraLayer() = default;

  /// Adds an adapter by the fields of `config` that concern one layer. The first one becomes active; a later one is
  /// trainable once it is (set_active), as in PEFT. The base's parameters keep their requires_grad: inject_lora freezes
  /// them. Throws if the name is taken, empty or has a dot in it, if a field is out of its range, or if the layer
  /// cannot have such an adapter.
  void add_adapter(const std::string& name, const LoraConfig& config) {
    attach_adapter(name, prepare_adapter(std::string(type_name()) + ": ", name, config));
  }

  /// Removes an adapter. If it was the only active one, none is. Takes the initial product of LoraInit::Pissa back into
  /// the base weight, which is then the original one up to round-off. Throws if there is no such adapter.
  virtual void delete_adapter(const std::string& name) = 0;

  /// In the order in which they were added.
  std::vector<std::string> adapter_names() const {
    std::vector<std::string> names;
    for (const auto& [name, adapter] : adapters_) names.push_back(name);
    return names;
  }

  /// Also true of one that is not active.
  bool has_adapter(const std::string& name) const { return find(name) != nullptr; }

  /// Throws if there is no such adapter.
  const LoraAdapter& adapter(const std::string& name) const {
    const LoraAdapter* found = find(name);
    TORCH_CHECK(found != nullptr, type_name(), ": there is no adapter '", name, "', expected one of ",
                detail::quoted_list(adapter_names()));
    return *found;
  }

  /// The adapters that take part; each adds its ΔW. Their factors become trainable, those of all others do not. Throws
  /// if one is not there.
  void set_active(const std::vector<std::string>& names) {
    for (size_t i = 0; i < names.size(); ++i) {
      adapter(names[i]);
      TORCH_CHECK(std::find(names.begin(), names.begin() + i, names[i]) == names.begin() + i, type_name(),
                  ": the adapter '", names[i], "' stands twice in the list of active ones");
    }
    active_ = names;
    set_trainable();
  }

  /// set_active with one adapter more, which becomes trainable; the factors of all others stay as trainable as they
  /// are. Throws if it is not there.
  void add_active(const std::string& name) {
    const LoraAdapter& added = adapter(name);
    if (std::find(active_.begin(), active_.end(), name) == active_.end()) active_.push_back(name);
    set_trainable(name, added);
  }

  /// The adapters that take part, if enabled: what set_active was told, at first the one that was added first.
  const std::vector<std::string>& active() const { return active_; }

  /// Whether active adapters take part at all. While they do not, their factors are not trainable.
  void enable_adapters(bool enabled) {
    enabled_ = enabled;
    set_trainable();
  }

  /// What enable_adapters was told; true at first, and after merge_and_unload.
  bool adapters_enabled() const { return enabled_; }

  /// From now on forward costs what the base layer costs: it uses `effective_weight()`, which is kept beside the base
  /// weight. That one is not touched, so that unmerge is exact to the bit, a weight tied to another module keeps its
  /// value there, and files have the base and the factors as they are. If base, factors or active adapters change, the
  /// merged weight is made again (changes through `Tensor::data()` cannot be seen: call merge again). Factors get no
  /// gradient while merged; a forward pass in training mode that would need one throws.
  virtual void merge() = 0;

  /// Ends merge.
  virtual void unmerge() = 0;

  /// Whether `merge` was called and not ended since.
  virtual bool merged() const = 0;

  /// ΔW = scale · B A of one adapter, in the shape of the base weight; in float if the factors are half or bfloat16.
  virtual torch::Tensor delta_weight(const std::string& name) const = 0;

  /// The base weight and ΔW of every active adapter, whether enabled or not, rounded once to the base's dtype.
  virtual torch::Tensor effective_weight() const = 0;

  /// Gives the base layer `effective_weight()` for good and removes all adapters: a plain layer again. A weight that
  /// was tied to another module is tied no longer, since the other one must keep its value.
  virtual void merge_and_unload() = 0;

  /// "LoraLinear", …
  virtual const char* type_name() const = 0;

  /// The two words behind the layer's name in the names of factors: lora_A, lora_B.
  virtual std::pair<const char*, const char*> factor_tokens() const = 0;

  /// The base layer.
  virtual torch::nn::Module& base_module() const = 0;

  /// The first half of add_adapter, for those who must know that several layers will do it before one does: checks, and
  /// makes the factors. `label` begins every error. Given factors are copied, whatever the config's `init` says:
  /// nothing is drawn or computed then, and it throws if a shape is not `factor_shapes`.
  virtual LoraAdapter prepare_adapter(const std::string& label, const std::string& name, const LoraConfig& config,
                                      const std::optional<FactorValues>& factors = std::nullopt) const = 0;

  /// The shapes of A and B with this rank.
  virtual std::pair<std::vector<int64_t>, std::vector<int64_t>> factor_shapes(int64_t rank) const = 0;

  /// The second half, which only fails for want of memory.
  virtual void attach_adapter(const std::string& name, LoraAdapter adapter) = 0;

 protected:
  /// Null if there is no such adapter.
  const LoraAdapter* find(const std::string& name) const {
    const auto found =
        std::find_if(adapters_.begin(), adapters_.end(), [&](const auto& entry) { return entry.first == name; });
    return found == adapters_.end() ? nullptr : &found->second;
  }

  /// Makes the factors of enabled, active adapters trainable, and no others.
  void set_trainable() {
    for (const auto& [name, adapter] : adapters_) set_trainable(name, adapter);
  }
  /// The same for the factors of one adapter.
  void set_trainable(const std::string& name, const LoraAdapter& adapter) const {
    const bool trainable = enabled_ && std::find(active_.begin(), active_.end(), name) != active_.end();
    adapter.a.set_requires_grad(trainable);
    adapter.b.set_requires_grad(trainable);
  }

  std::vector<std::pair<std::string, LoraAdapter>> adapters_;  ///< by name, in the order in which they were added
  std::vector<std::string> active_;                            ///< names of those that take part
  bool enabled_ = true;                                        ///< else the layer is its base layer
};

}  // namespace lora_rite::nn
