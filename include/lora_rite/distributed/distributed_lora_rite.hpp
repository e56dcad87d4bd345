#pragma once

#include <ATen/ATen.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "lora_rite/distributed/process_group.hpp"
#include "lora_rite/engine/batch.hpp"
#include "lora_rite/engine/pair_state.hpp"
#include "lora_rite/optimizer.hpp"
#include "lora_rite/optimizer_support.hpp"

namespace lora_rite::detail {

/// As few digits as tell a number from its neighbours.
inline std::string text_of(double value) {
  char text[32];
  for (int digits = 15; digits <= 17; ++digits) {
    std::snprintf(text, sizeof(text), "%.*g", digits, value);
    if (std::strtod(text, nullptr) == value) break;
  }
  return text;
}
inline std::string text_of(bool value) { return value ? "true" : "false"; }
inline std::string text_of(const std::tuple<double, double>& value) {
  return "(" + text_of(std::get<0>(value)) + ", " + text_of(std::get<1>(value)) + ")";
}

/// That a tensor has no gradient, or one of another layout or shape than its own; empty otherwise.
inline std::string describe_gradient(const at::Tensor& tensor) {
  const at::Tensor leaf = leaf_of(tensor);
  const at::Tensor& gradient = leaf.grad();
  if (!gradient.defined()) return " without a gradient (see average_gradients)";
  if (gradient.layout() == at::kStrided && gradient.sizes() == leaf.sizes()) return "";
  return c10::str(" with a gradient ", gradient.layout(), gradient.sizes());
}

/// What `ShardedLoraRite` and `RowShardedLoraRite` share: the processes agree on groups, options, gradients and skipped
/// steps, and what one of them refuses all refuse. Objects may be moved: nothing that is handed out knows their
/// address.
template <class Basis>
class DistributedLoraRite : public LoraRite<Basis> {
 public:
  torch::Tensor step(torch::optim::Optimizer::LossClosure closure = nullptr) override {
    torch::Tensor loss;
    together("step", [&] {
      loss = loss_of(closure);
      at::NoGradGuard no_grad;
      agree_on_groups();
      LoraRite<Basis>::step();
      publish();
    });
    return loss;
  }

  void save(torch::serialize::OutputArchive& archive) const override {
    std::string lines;
    const auto complaint = complaint_of([&] { lines = describe_groups("save"); });
    collectives_->agree(lines, device_, complaint);
    LoraRite<Basis>::save(archive);
  }

  void load(torch::serialize::InputArchive& archive) override {
    together("load", [&] {
      agree_on_groups();
      LoraRite<Basis>::load(archive);
    });
  }

  LoadReport load_matching(torch::serialize::InputArchive& archive, const LoadOptions& options = {}) override {
    LoadReport report;
    together("load_matching", [&] { report = LoraRite<Basis>::load_matching(archive, options); });
    return report;
  }

  /// Bytes that this process handed to collective calls so far.
  int64_t bytes_sent() const { return collectives_->bytes(); }

 protected:
  /// Without groups: `start` adds the first, when the derived object is there, which describes it.
  DistributedLoraRite(ProcessGroup group, const std::vector<FactorPair>& pairs, const LoraRiteOptions& options,
                      bool parts = false)
      : LoraRite<Basis>(options, parts),
        collectives_(std::make_shared<Collectives>(std::move(group))),
        device_(device_of(pairs)) {}

  void start(std::vector<FactorPair> pairs, const LoraRiteOptions& options) {
    together("constructor", [&] {
      this->add_pairs(std::move(pairs), options);
      agree_on_groups();
    });
  }

  bool can_remove_pairs() const override { return false; }

  /// Which dimension of a factor is divided over the processes; −1 if none is.
  virtual PerSide<int64_t> divided_dimensions(const FactorPair& /*pair*/) const { return {-1, -1}; }
  /// Once the processes agree on the groups: who does what.
  virtual void divide() = 0;
  /// After a step.
  virtual void publish() {}

  bool decides_alone() const override { return false; }
  std::optional<at::Tensor> agree_on_step(const std::optional<at::Tensor>& all_finite) override {
    at::Tensor flag = all_finite ? all_finite->to(at::kInt) : at::ones({}, at::TensorOptions(at::kInt).device(device_));
    flag = flag.reshape({1});
    collectives_->reduce(flag, "agreeing on a step", c10d::ReduceOp::MIN);
    return flag.to(at::kBool).squeeze();
  }

  void agree_before_change(const std::string& lines) override {
    const std::string all = describe_groups(call_) + lines;
    is_waited_for_ = false;
    collectives_->agree(all, device_);
  }

  void agree_on_call(const char* call, const std::function<std::string()>& what) override {
    together(call, [&] {
      agree_on_groups();
      agree_before_change(std::string(call) + ": " + what() + "\n");
    });
  }

  /// New groups: are they the same everywhere? Then they are divided.
  void agree_on_groups() override {
    if (this->group_count() == agreed_groups_) return;
    for (size_t g = agreed_groups_; g < this->group_count(); ++g) alternating_factors(this->pairs_of(g));  // no views
    agree_before_change({});
    divide();
    agreed_groups_ = this->group_count();
    is_waited_for_ = true;
  }

  Collectives& collectives() const { return *collectives_; }
  /// For what outlives a move of this object.
  const std::shared_ptr<Collectives>& shared_collectives() const { return collectives_; }
  at::Device device() const { return device_; }

 private:
  /// Runs `function`, in which `agree_before_change` or `agree_on_groups` compares the processes before anything is
  /// sent or changed. What it throws before that is told to the others, which wait there, and they throw as well.
  template <class Function>
  void together(const char* call, const Function& function) {
    call_ = call;
    is_waited_for_ = true;
    const int64_t failures = collectives_->failures();
    const std::exception_ptr complaint = complaint_of(function);
    // A closure's own calls, such as average_gradients, may have told it.
    if (complaint && is_waited_for_ && collectives_->failures() == failures)
      collectives_->agree("", device_, complaint);
    if (complaint) std::rethrow_exception(complaint);
  }

  /// Lines that all processes must have in common: in which call they are, the groups with their options, the tensors,
  /// and in a step who has a gradient.
  std::string describe_groups(const std::string& call) const {
    this->check_groups();
    std::string text =
        "call: " + call + "\nbasis " + Basis::name() + "\n" + std::to_string(this->group_count()) + " groups\n";
    const bool is_step = call == "step";
    Descriptions descriptions;
    const auto append = [&](const at::Tensor& tensor, int64_t divided_dimension) {
      descriptions.append(text, tensor, divided_dimension);
      if (is_step) text += describe_gradient(tensor);
    };
    for (size_t g = 0; g < this->group_count(); ++g) {
      const auto& group = this->param_groups()[g];
      const std::string place = "group " + std::to_string(g) + ": ";
      const auto option = [&](const char* name, const auto& value) {
        text += place + name + " " + text_of(value) + "\n";
      };
      if (const auto* options = dynamic_cast<const LoraRiteOptions*>(&group.options())) {
        LoraRiteOptions::for_each_saved(*options, option);
        option("capturable", options->capturable());  // a little other arithmetic; the engine is each process's own
        const auto& pairs = this->pairs_of(g);
        text += place + std::to_string(pairs.size()) + " pairs\n";
        for (size_t p = 0; p < pairs.size(); ++p) {
          const auto divided = divided_dimensions(pairs[p]);
          text += this->label_of(g, p) + ": factor a ";
          append(pairs[p].a, divided.a);
          text += ", factor b ";
          append(pairs[p].b, divided.b);
          text += '\n';
        }
      } else {
        const auto& adamw = static_cast<const torch::optim::AdamWOptions&>(group.options());
        option("lr", adamw.lr());
        option("betas", adamw.betas());
        option("eps", adamw.eps());
        option("weight_decay", adamw.weight_decay());
        option("amsgrad", adamw.amsgrad());
        option("maximize", this->ascends(g));
        for (size_t i = 0; i < group.params().size(); ++i) {
          text += place + "parameter " + std::to_string(i) + ": ";
          append(group.params()[i], -1);
          text += '\n';
        }
      }
    }
    return text;
  }

  std::shared_ptr<Collectives> collectives_;
  at::Device device_;
  size_t agreed_groups_ = 0;

  // Of the call that is under way.
  const char* call_ = "";
  bool is_waited_for_ = false;  ///< do the other processes wait to hear of an error of this one?
};

}  // namespace lora_rite::detail
