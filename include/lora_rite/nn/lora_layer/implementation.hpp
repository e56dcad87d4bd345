#pragma once

#include <ATen/ops/dropout.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>
#include <torch/serialize/input-archive.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "lora_rite/nn/lora_config.hpp"
#include "lora_rite/nn/lora_layer/interface.hpp"
#include "lora_rite/nn/lora_layer/parameters.hpp"

/// What the LoRA layers have in common behind the interface: the base layer, the sum, merging, adding and copying.
namespace lora_rite::nn {

/// The part of a LoRA layer that is the same for every kind. `Base` is the module holder of the base layer
/// (torch::nn::Linear, …).
///
/// Why not a subclass of torch::nn::LinearImpl: its `forward` is not virtual, so a LoraLinear behind a pointer to it
/// would silently compute the base layer alone.
template <class Derived, class Base>
class LoraLayerImpl : public torch::nn::Cloneable<Derived>, public LoraLayer {
 public:
  /// torch::nn::LinearImpl, …
  using BaseImpl = typename Base::ContainedType;

  /// Over an existing layer, whose parameters are shared.
  explicit LoraLayerImpl(Base base) : base_layer_(std::move(base)) {
    TORCH_CHECK(!base_layer_.is_empty(), "LoRA layer: the base layer is empty, expected a module");
    this->train(base_layer_->is_training());
    register_all();
  }

  /// The layer underneath: its weight, bias and options.
  const Base& base_layer() const { return base_layer_; }

  /// What LoraLayer says, in the dtype of the base layer's output. Throws c10::Error while merged if a factor should
  /// get a gradient.
  torch::Tensor forward(const torch::Tensor& input) {
    if (!enabled_ || active_.empty()) return base_layer_->forward(input);
    if (merge_wanted_) {
      TORCH_CHECK(!(this->is_training() && torch::GradMode::is_enabled() && any_trainable()), type_name(),
                  ": a forward pass in training mode while merged, where the factors get no gradient; call unmerge(), "
                  "or eval()");
      return merged_layer().forward(input);
    }
    torch::Tensor output = base_layer_->forward(input);
    const auto dtype = output.scalar_type();
    for (const auto& name : active_) {
      const LoraAdapter& adapter = *find(name);
      output = output.add(adapter_output(input, adapter), adapter.config.scale());
    }
    return output.to(dtype);
  }

  /// @copydoc lora_rite::nn::LoraLayer::merge
  void merge() override {
    merge_wanted_ = true;
    merged_layer_ = nullptr;
    merged_layer();
  }

  /// @copydoc lora_rite::nn::LoraLayer::unmerge
  void unmerge() override {
    merge_wanted_ = false;
    merged_layer_ = nullptr;
  }

  /// @copydoc lora_rite::nn::LoraLayer::merged
  bool merged() const override { return merge_wanted_; }

  /// @copydoc lora_rite::nn::LoraLayer::delta_weight
  torch::Tensor delta_weight(const std::string& name) const override {
    torch::NoGradGuard no_grad;
    const LoraAdapter& found = adapter(name);
    return product(detail::widened(found.a), detail::widened(found.b)).mul(found.config.scale());
  }

  /// @copydoc lora_rite::nn::LoraLayer::effective_weight
  torch::Tensor effective_weight() const override {
    torch::NoGradGuard no_grad;
    const torch::Tensor& weight = base_layer_->weight;
    if (active_.empty()) return weight.detach().clone();
    torch::Tensor sum = detail::widened(weight);
    for (const auto& name : active_) sum = sum.add(delta_weight(name));
    return sum.to(weight.scalar_type());
  }

  /// @copydoc lora_rite::nn::LoraLayer::merge_and_unload
  void merge_and_unload() override {
    set_base_weight(effective_weight());
    clear_adapters();
  }

  /// @copydoc lora_rite::nn::LoraLayer::delete_adapter
  void delete_adapter(const std::string& which) override {
    const std::string name = which;  // which may be one of `active_`
    const LoraAdapter& found = adapter(name);
    if (found.initial_a.defined()) {
      torch::NoGradGuard no_grad;
      const torch::Tensor& weight = base_layer_->weight;
      set_base_weight(detail::widened(weight).add(initial_delta(found)).to(weight.scalar_type()));
    }
    adapters_.erase(std::find_if(adapters_.begin(), adapters_.end(), [&](auto& entry) { return entry.first == name; }));
    active_.erase(std::remove(active_.begin(), active_.end(), name), active_.end());
    register_all();
  }

  /// @copydoc lora_rite::nn::LoraLayer::base_module
  torch::nn::Module& base_module() const override { return *base_layer_.ptr(); }

  /// @copydoc lora_rite::nn::LoraLayer::prepare_adapter
  LoraAdapter prepare_adapter(const std::string& label, const std::string& name, const LoraConfig& config,
                              const std::optional<FactorValues>& factors = std::nullopt) const override {
    check_lora_config(label, config);
    TORCH_CHECK(!name.empty(), label, "the adapter's name is empty");
    TORCH_CHECK(name.find('.') == std::string::npos, label, "the adapter's name is '", name,
                "', expected one without a dot");
    TORCH_CHECK(!has_adapter(name), label, "there is an adapter '", name, "' already");
    const torch::Tensor& weight = base_layer_->weight;
    TORCH_CHECK(at::isFloatingType(weight.scalar_type()), label, "the base weight is ", weight.scalar_type(),
                ", expected a floating dtype");
    for (const auto& [other_name, other] : adapters_) {
      TORCH_CHECK(!other.initial_a.defined() && (config.init != LoraInit::Pissa || factors), label, "the adapter '",
                  other.initial_a.defined() ? other_name : name,
                  "' starts by LoraInit::Pissa, which changes the base weight, so the layer can have no other");
    }
    check_fits(label, config, /*draws=*/!factors);
    torch::NoGradGuard no_grad;
    const auto dtype =
        config.factor_dtype.value_or(detail::is_half(weight.scalar_type()) ? torch::kFloat : weight.scalar_type());
    LoraAdapter adapter;
    adapter.config = config;
    if (factors) {
      const auto [shape_a, shape_b] = factor_shapes(config.rank);
      adapter.a = own_values(label, factor_tokens().first, factors->a, shape_a, weight.options().dtype(dtype));
      adapter.b = own_values(label, factor_tokens().second, factors->b, shape_b, weight.options().dtype(dtype));
      return adapter;
    }
    // Random numbers are drawn in float or double, whatever the factors' dtype.
    std::tie(adapter.a, adapter.b) = initial_factors(
        label, config, weight.options().dtype(dtype == torch::kDouble ? torch::kDouble : torch::kFloat));
    adapter.a = adapter.a.to(dtype).contiguous();
    adapter.b = adapter.b.to(dtype).contiguous();
    if (config.init == LoraInit::Pissa) {
      adapter.initial_a = adapter.a.clone();
      adapter.initial_b = adapter.b.clone();
    }
    return adapter;
  }

  /// @copydoc lora_rite::nn::LoraLayer::attach_adapter
  void attach_adapter(const std::string& name, LoraAdapter adapter) override {
    if (adapter.initial_a.defined()) {
      // What the rounded factors hold, not what they were rounded from: W stays what it was up to its own round-off.
      torch::NoGradGuard no_grad;
      const torch::Tensor& weight = base_layer_->weight;
      set_base_weight(detail::widened(weight).sub(initial_delta(adapter)).to(weight.scalar_type()));
    }
    if (adapters_.empty()) active_ = {name};
    adapters_.emplace_back(name, std::move(adapter));
    set_trainable(name, adapters_.back().second);  // what somebody froze of the others stays frozen
    register_all();
  }

  /// A fresh base layer of the same options, dtype and device, and no adapter.
  void reset() override {
    const torch::Tensor weight = base_layer_->weight;
    auto fresh = std::make_shared<BaseImpl>(*base_layer_);
    detail::ParameterAccess::of(*fresh).clear();
    fresh->reset();
    fresh->to(weight.device(), weight.scalar_type());
    base_layer_ = Base(std::move(fresh));
    clear_adapters();
  }

  /// A copy with parameters of its own: base, adapters, what is active, enabled and merged; and, other than LibTorch's
  /// own layers, what is trainable.
  std::shared_ptr<torch::nn::Module> clone(const std::optional<torch::Device>& device = std::nullopt) const override {
    torch::NoGradGuard no_grad;
    auto copy = std::make_shared<Derived>(static_cast<const Derived&>(*this));
    static_cast<LoraLayerImpl&>(*copy).make_own(device);
    return copy;
  }

  /// As torch::nn::Module, which torch::load calls. Throws c10::Error if a parameter of the file has another shape;
  /// nothing of this layer has changed then.
  void load(torch::serialize::InputArchive& file) override {
    detail::check_shapes(std::string(type_name()) + ": ", *this, file);
    torch::nn::Cloneable<Derived>::load(file);
  }

  /// The base layer as LibTorch prints it, and the rank and scale of each adapter.
  void pretty_print(std::ostream& stream) const override {
    stream << "lora_rite::nn::" << type_name() << '(';
    base_layer_->pretty_print(stream);
    for (const auto& [name, adapter] : adapters_) {
      const bool active = std::find(active_.begin(), active_.end(), name) != active_.end();
      stream << ", " << name << ": r=" << adapter.config.rank << ", scale=" << adapter.config.scale()
             << (active ? "" : ", not active");
    }
    stream << ')';
  }

 protected:
  /// B A in the shape of the base weight.
  virtual torch::Tensor product(const torch::Tensor& a, const torch::Tensor& b) const = 0;

  /// B(A(dropout(input))), not scaled.
  virtual torch::Tensor adapter_output(const torch::Tensor& input, const LoraAdapter& adapter) = 0;

  /// Throws unless the layer can have such an adapter, and, if its factors are to be drawn, start them so.
  virtual void check_fits(const std::string& label, const LoraConfig& config, bool draws) const = 0;

  /// The factors at the start, A and B, in the options' dtype.
  virtual std::pair<torch::Tensor, torch::Tensor> initial_factors(const std::string& label, const LoraConfig& config,
                                                                  const torch::TensorOptions& options) const = 0;

  /// The input as the adapter takes it: in the factors' dtype, some of it dropped.
  torch::Tensor adapter_input(const torch::Tensor& input, const LoraAdapter& adapter) const {
    const torch::Tensor cast = input.to(adapter.a.scalar_type());
    return adapter.config.dropout > 0 ? at::dropout(cast, adapter.config.dropout, this->is_training()) : cast;
  }

 private:
  /// A copy of given values. Throws if they have another shape.
  static torch::Tensor own_values(const std::string& label, const char* token, const torch::Tensor& values,
                                  const std::vector<int64_t>& shape, const torch::TensorOptions& options) {
    TORCH_CHECK(values.defined() && values.sizes() == at::IntArrayRef(shape), label, token, " is ",
                values.defined() ? values.sizes() : at::IntArrayRef(), ", expected ", at::IntArrayRef(shape));
    TORCH_CHECK(at::isFloatingType(values.scalar_type()), label, token, " is ", values.scalar_type(),
                ", expected a floating dtype");
    return torch::empty(shape, options).copy_(values);
  }

  /// What LoraInit::Pissa took out of the base weight.
  torch::Tensor initial_delta(const LoraAdapter& adapter) const {
    const auto device = base_layer_->weight.device();
    return product(detail::widened(adapter.initial_a).to(device), detail::widened(adapter.initial_b).to(device))
        .mul(adapter.config.scale());
  }

  bool any_trainable() const {
    return std::any_of(active_.begin(), active_.end(), [&](const auto& name) {
      const LoraAdapter& adapter = *find(name);
      return adapter.a.requires_grad() || adapter.b.requires_grad();
    });
  }

  /// The base layer with `effective_weight()`, made again if a tensor it was made of has changed.
  BaseImpl& merged_layer() {
    std::vector<detail::Fingerprint> sources = {detail::Fingerprint(base_layer_->weight)};
    for (const auto& name : active_) {
      sources.emplace_back(find(name)->a);
      sources.emplace_back(find(name)->b);
    }
    if (merged_layer_ == nullptr || !(sources == merged_from_)) {
      // A tensor made in inference mode could not serve autograd later. The guard is on the heap, for GCC 14 takes what
      // its destructor reads for uninitialized where it inlines a guard on the stack.
      const auto no_inference = std::make_unique<c10::InferenceMode>(false);
      auto layer = std::make_shared<BaseImpl>(*base_layer_);
      layer->weight = effective_weight();
      merged_layer_ = std::move(layer);
      merged_from_ = std::move(sources);
    }
    return *merged_layer_;
  }

  /// In a tensor of its own: another module that has the old one (tied weights) must not change.
  void set_base_weight(const torch::Tensor& values) {
    const torch::Tensor weight = values.detach().set_requires_grad(base_layer_->weight.requires_grad());
    base_layer_->weight = weight;
    detail::ParameterAccess::of(*base_layer_)["weight"] = weight;
    if (auto* own = this->parameters_.find("weight")) *own = weight;
  }

  void clear_adapters() {
    adapters_.clear();
    active_.clear();
    enabled_ = true;
    unmerge();
    register_all();
  }

  /// Names everything anew: the base's parameters as the layer's own if there is no adapter, else as PEFT has them.
  void register_all() {
    for (const auto& child : this->named_children()) this->unregister_module(child.key());
    this->parameters_.clear();
    if (adapters_.empty()) {
      for (const auto& item : detail::ParameterAccess::of(*base_layer_)) {
        this->parameters_.insert(item.key(), item.value());
      }
      return;
    }
    const auto [token_a, token_b] = factor_tokens();
    this->register_module("base_layer", base_layer_);
    const auto all_a = this->register_module(token_a, std::make_shared<detail::Holder>(token_a));
    const auto all_b = this->register_module(token_b, std::make_shared<detail::Holder>(token_b));
    for (const auto& [name, adapter] : adapters_) {
      register_factor(*all_a, name, adapter.a, adapter.initial_a);
      register_factor(*all_b, name, adapter.b, adapter.initial_b);
    }
    this->train(this->is_training());
  }

  void register_factor(detail::Holder& holder, const std::string& name, const torch::Tensor& factor,
                       const torch::Tensor& initial) {
    if constexpr (Derived::kFactorsAreModules) {
      const auto module = holder.register_module(name, std::make_shared<detail::Holder>(name));
      detail::ParameterAccess::of(*module).insert("weight", factor);
      // A file that has the base weight needs what was taken out of it. Only linear layers start so.
      if (initial.defined()) module->register_buffer("initial", initial);
    } else {
      detail::ParameterAccess::of(holder).insert(name, factor);
    }
  }

  /// After a member-wise copy: parameters of its own instead of the original's.
  void make_own(const std::optional<torch::Device>& device) {
    auto base = std::make_shared<BaseImpl>(*base_layer_);
    for (auto& item : detail::ParameterAccess::of(*base)) item.value() = detail::copy_parameter(item.value(), device);
    adopt_parameters(*base);
    base_layer_ = Base(std::move(base));
    for (auto& [name, adapter] : adapters_) {
      for (torch::Tensor* tensor : {&adapter.a, &adapter.b, &adapter.initial_a, &adapter.initial_b}) {
        *tensor = detail::copy_parameter(*tensor, device);
      }
    }
    merged_layer_ = nullptr;
    register_all();
  }

  /// The members of a base layer follow its registered parameters.
  static void adopt_parameters(BaseImpl& base) {
    auto& parameters = detail::ParameterAccess::of(base);
    base.weight = parameters["weight"];
    if constexpr (Derived::kHasBias) base.bias = parameters["bias"];
  }

  Base base_layer_;
  bool merge_wanted_ = false;
  std::shared_ptr<BaseImpl> merged_layer_;
  std::vector<detail::Fingerprint> merged_from_;
};

}  // namespace lora_rite::nn
