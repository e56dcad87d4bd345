#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

/// Factors that are parts of a leaf: all experts of a layer can share one parameter (`expert_pairs`). Whoever asks for
/// a factor's gradient, or for what autograd and LibTorch know of it, asks here.
namespace lora_rite::detail {

/// Is the tensor a view whose gradient arrives as a part of its base's? It is also while the base is frozen: who
/// freezes a factor for a while has the same pairs as before. A view that itself requires a gradient is a leaf (a
/// parameter in a flat buffer), and so is a frozen one of a buffer of one dimension, which no factor is. Autograd must
/// not be asked about a part (is_leaf, grad): once the leaf has been written to, it throws.
inline bool is_part(const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_view()) return false;
  const at::Tensor base(tensor._base());
  return base.requires_grad() || (!tensor.requires_grad() && base.dim() > 1);
}

/// The tensor that has the gradient: the base of a part, else the tensor itself.
inline at::Tensor leaf_of(const at::Tensor& tensor) { return is_part(tensor) ? at::Tensor(tensor._base()) : tensor; }

/// The leaves of these factors, once each, in the order in which they appear first.
inline std::vector<at::Tensor> leaves_of(const std::vector<at::Tensor>& factors) {
  std::vector<at::Tensor> leaves;
  std::map<const void*, size_t> known;
  for (const auto& factor : factors) {
    const at::Tensor leaf = leaf_of(factor);
    if (known.emplace(leaf.unsafeGetTensorImpl(), leaves.size()).second) leaves.push_back(leaf);
  }
  return leaves;
}

/// How many elements lie from a tensor's first to its last one in memory.
inline int64_t extent_of(const at::Tensor& tensor) {
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  return tensor.numel() == 0 ? 0 : last + 1;
}

/// Where a part begins, in elements from its leaf's first one.
inline int64_t begin_of(const at::Tensor& part) { return part.storage_offset() - part._base().storage_offset(); }

/// Throws c10::Error naming `label` unless a part is still one of what its leaf is now: `set_data` and `module.to` give
/// a leaf other memory, and views stay with the old.
inline void check_part(const at::Tensor& tensor, const std::string& label, const char* which) {
  if (!is_part(tensor)) return;
  const at::Tensor leaf(tensor._base());
  TORCH_CHECK(leaf.is_leaf() && leaf.layout() == at::kStrided && leaf.scalar_type() == tensor.scalar_type(), label,
              ": factor ", which, " is a view of ", leaf.scalar_type(), leaf.sizes(),
              leaf.is_leaf() ? "" : ", the result of an operation",
              ", expected a view of a dense leaf tensor of dtype ", tensor.scalar_type());
  const int64_t begin = begin_of(tensor);
  TORCH_CHECK(leaf.device() == tensor.device() && leaf.is_alias_of(tensor) && begin >= 0 &&
                  begin + extent_of(tensor) <= extent_of(leaf),
              label, ": factor ", which, " is a view of memory that its leaf, now ", leaf.scalar_type(), leaf.sizes(),
              " on ", leaf.device(), ", has left (by set_data or module.to), expected a view of what the leaf is now; ",
              "make the pairs anew, and the optimizer");
}

/// Gradients of factors. Of a part it is the same part of the leaf's; a leaf's gradient that lies otherwise in memory
/// than the leaf is copied once for all its parts. Numbers are what memory holds: no tensor with the negative bit.
class Gradients {
 public:
  at::Tensor of(const at::Tensor& factor) {
    if (!is_part(factor)) return resolved(factor.grad());
    const at::Tensor leaf(factor._base());
    at::Tensor gradient = resolved(leaf.grad());
    if (!gradient.defined()) return gradient;
    if (gradient.strides() != leaf.strides()) {
      at::Tensor& agreed = agreed_[leaf.unsafeGetTensorImpl()];
      if (!agreed.defined())
        agreed = at::empty_strided(leaf.sizes(), leaf.strides(), gradient.options()).copy_(gradient);
      gradient = agreed;
    }
    return gradient.as_strided(factor.sizes(), factor.strides(), gradient.storage_offset() + begin_of(factor));
  }

 private:
  /// Without a call of an operator for each of the others.
  static at::Tensor resolved(const at::Tensor& gradient) {
    return gradient.defined() && gradient.is_neg() ? gradient.resolve_neg() : gradient;
  }

  std::map<const void*, at::Tensor> agreed_;  ///< by leaf
};

/// Throws c10::Error naming the tensor, by a label in pieces, if a step cannot write it in place.
template <class... Label>
void check_writable(const at::Tensor& tensor, const Label&... label) {
  TORCH_CHECK(!tensor.is_inference(), label...,
              " was made in inference mode, expected one that autograd can use: clone() it outside of the mode");
  TORCH_CHECK(!tensor.is_neg(), label..., " is a negated view, whose memory holds the numbers with the other sign, ",
              "expected a tensor of its own: resolve_neg() makes one");
}

/// Which tensors, or which parts of them, belong to whom.
class Owners {
 public:
  /// Throws c10::Error naming both owners if the tensor, or an element of it, has one already: through the same leaf,
  /// or, of trained ones, through another leaf that begins at the same place, as PEFT's `ensure_weight_tying` makes
  /// them.
  void claim(const at::Tensor& tensor, const std::string& label) {
    const at::Tensor leaf = leaf_of(tensor);
    std::vector<Claim>& claims = claims_[leaf.unsafeGetTensorImpl()];
    const auto check_free = [&](bool is_free, const std::string& owner) {
      TORCH_CHECK(is_free, label, ": a tensor of shape ", tensor.sizes(), " is used twice, the other time in ", owner,
                  "; expected every tensor once");
    };
    const bool part = is_part(tensor);
    if (claims.empty()) {
      const Beginning* twin = twin_of(leaf);
      TORCH_CHECK(twin == nullptr, label, ": a tensor of shape ", leaf.sizes(),
                  " lies in the memory of another one, of ", twin->label,
                  "; expected memory of its own, for both would be stepped");
    } else {
      check_free(part && claims[0].is_part, claims[0].label);
    }
    record(tensor, label);
    if (!part) return;
    // Which claim, counted from 1, has which element of the leaf.
    std::vector<size_t>& owner = maps_[leaf.unsafeGetTensorImpl()];
    const size_t first_new = owner.empty() ? 0 : claims.size() - 1;
    for (size_t i = first_new; i < claims.size(); ++i) {
      const at::Tensor& claimed = claims[i].tensor;
      const int64_t begin = begin_of(claimed);
      if (begin < 0) continue;  // a part that the leaf has left: a step says so
      owner.resize(std::max(owner.size(), static_cast<size_t>(begin + extent_of(claimed))));
      for_each_place(claimed.sizes(), claimed.strides(), begin, [&](int64_t place) {
        size_t& other = owner[static_cast<size_t>(place)];
        if (other != 0) check_free(false, claims[other - 1].label);
        other = i + 1;
      });
    }
  }

  /// As `claim`, of a tensor that was claimed before, in another object: nothing is asked again.
  void record(const at::Tensor& tensor, const std::string& label) {
    const at::Tensor leaf = leaf_of(tensor);
    std::vector<Claim>& claims = claims_[leaf.unsafeGetTensorImpl()];
    const auto place = place_of(leaf);
    if (claims.empty() && place && leaf.requires_grad()) beginnings_.insert_or_assign(*place, Beginning{leaf, label});
    claims.push_back({is_part(tensor), label, tensor});
  }

  bool know(const at::Tensor& tensor) const { return claims_.count(leaf_of(tensor).unsafeGetTensorImpl()) > 0; }

  /// Whose the tensor is, or its first part.
  std::optional<std::string> owner_of(const at::Tensor& tensor) const {
    const auto claims = claims_.find(leaf_of(tensor).unsafeGetTensorImpl());
    if (claims == claims_.end() || claims->second.empty()) return std::nullopt;
    return claims->second[0].label;
  }

  /// Drops what only makes further claims faster.
  void settle() { maps_.clear(); }

 private:
  struct Claim {
    bool is_part;
    std::string label;
    at::Tensor tensor;
  };

  /// The storage in which a leaf lies, and its first byte there. Two leaves of one place have that element in common;
  /// those that overlap otherwise are not looked for.
  using Place = std::pair<const void*, int64_t>;
  struct Beginning {
    at::Tensor leaf;
    std::string label;
  };

  static std::optional<Place> place_of(const at::Tensor& leaf) {
    if (!leaf.has_storage() || leaf.numel() == 0) return std::nullopt;
    return Place(leaf.storage().unsafeGetStorageImpl(), leaf.storage_offset() * leaf.element_size());
  }

  /// The other trained leaf at this one's place. `set_data` gives a leaf other memory, and its old one may be another's
  /// by now.
  const Beginning* twin_of(const at::Tensor& leaf) const {
    const auto place = place_of(leaf);
    const auto other = place ? beginnings_.find(*place) : beginnings_.end();
    if (other == beginnings_.end() || !leaf.requires_grad() || !other->second.leaf.requires_grad()) return nullptr;
    return place_of(other->second.leaf) == place ? &other->second : nullptr;
  }

  template <class Visit>
  static void for_each_place(at::IntArrayRef sizes, at::IntArrayRef strides, int64_t begin, const Visit& visit) {
    if (sizes.empty()) return visit(begin);
    for (int64_t i = 0; i < sizes[0]; ++i)
      for_each_place(sizes.slice(1), strides.slice(1), begin + i * strides[0], visit);
  }

  std::map<const void*, std::vector<Claim>> claims_;  ///< by leaf
  std::map<Place, Beginning> beginnings_;             ///< of trained leaves
  std::map<const void*, std::vector<size_t>> maps_;   ///< by leaf of which parts are claimed
};

}  // namespace lora_rite::detail
