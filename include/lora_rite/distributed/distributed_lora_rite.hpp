#pragma once

#include <ATen/ATen.h>

#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/distributed/process_group.hpp"
#include "lora_rite/optimizer.hpp"

namespace lora_rite::detail {

/// What `ShardedLoraRite` and `RowShardedLoraRite` share: the processes agree on groups, gradients and skipped steps.
template <class Basis>
class DistributedLoraRite : public LoraRite<Basis> {
 public:
  torch::Tensor step(torch::optim::Optimizer::LossClosure closure = nullptr) override {
    torch::Tensor loss;
    if (closure) {
      at::AutoGradMode enable_grad(true);
      loss = closure();
    }
    at::NoGradGuard no_grad;
    agree_on_groups();
    check_gradients();
    LoraRite<Basis>::step();
    publish();
    return loss;
  }

  void load(torch::serialize::InputArchive& archive) override {
    agree_on_groups();
    LoraRite<Basis>::load(archive);
  }

  /// Bytes that this process handed to collective calls so far.
  int64_t bytes_sent() const { return collectives_.bytes(); }

 protected:
  DistributedLoraRite(ProcessGroup group, std::vector<FactorPair> pairs, LoraRiteOptions options)
      : LoraRite<Basis>(std::move(pairs), options),
        collectives_(std::move(group)),
        device_(this->pairs_of(0)[0].a.device()) {}

  /// Lines that all processes must have in common, beside the options.
  virtual std::string describe(const FactorPair& pair) const = 0;
  /// Once the processes agree on the groups: who does what.
  virtual void divide() = 0;
  /// After a step.
  virtual void publish() {}

  at::Tensor agree(const at::Tensor& proceed) override {
    at::Tensor flag =
        proceed.defined() ? proceed.to(at::kInt) : at::ones({}, at::TensorOptions(at::kInt).device(device_));
    flag = flag.reshape({1});
    collectives_.reduce(flag, "agreeing on a step", c10d::ReduceOp::MIN);
    return flag.to(at::kBool).squeeze();
  }

  /// Compares groups, pairs and options with those of process 0. Throws in all processes, naming the first difference.
  void agree_on_groups() {
    if (this->group_count() == agreed_groups_) return;
    std::ostringstream text;
    text << "basis " << Basis::name() << "\n" << this->group_count() << " groups\n";
    for (size_t g = 0; g < this->group_count(); ++g) {
      const auto& group = this->param_groups()[g];
      const std::string place = "group " + std::to_string(g) + ": ";
      if (const auto* options = dynamic_cast<const LoraRiteOptions*>(&group.options())) {
        LoraRiteOptions::for_each_saved(*options, [&](const char* name, const auto& value) {
          text << place << name << " " << c10::IValue(value) << "\n";
        });
        text << place << this->pairs_of(g).size() << " pairs\n";
        for (size_t p = 0; p < this->pairs_of(g).size(); ++p)
          text << this->label_of(g, p) << ": " << describe(this->pairs_of(g)[p]) << "\n";
      } else {
        const auto& adamw = static_cast<const torch::optim::AdamWOptions&>(group.options());
        text << place << "betas " << std::get<0>(adamw.betas()) << " " << std::get<1>(adamw.betas()) << "\n"
             << place << "eps " << adamw.eps() << "\n"
             << place << "weight_decay " << adamw.weight_decay() << "\n"
             << place << "amsgrad " << adamw.amsgrad() << "\n";
        for (const auto& parameter : group.params())
          text << place << "a parameter " << parameter.scalar_type() << parameter.sizes() << "\n";
      }
    }
    collectives_.check_same(text.str(), device_);
    divide();
    agreed_groups_ = this->group_count();
  }

  detail::Collectives& collectives() const { return collectives_; }
  at::Device device() const { return device_; }

 private:
  /// Who has a gradient, and each group's rate, must be the same everywhere.
  void check_gradients() {
    std::vector<double> facts;
    std::vector<std::string> names;
    for (size_t g = 0; g < this->group_count(); ++g) {
      const auto& group = this->param_groups()[g];
      facts.push_back(group.options().get_lr());
      names.push_back(c10::str("the learning rate of group ", g));
      const auto add = [&](const at::Tensor& parameter, const std::string& name) {
        facts.push_back(leaf_of(parameter).grad().defined() ? 1 : 0);
        names.push_back("the number of gradients of " + name);
      };
      const auto& pairs = this->pairs_of(g);
      for (size_t p = 0; p < pairs.size(); ++p) {
        add(pairs[p].a, this->label_of(g, p) + ", factor a");
        add(pairs[p].b, this->label_of(g, p) + ", factor b");
      }
      for (size_t i = 0; pairs.empty() && i < group.params().size(); ++i)
        add(group.params()[i], c10::str("parameter ", i, " of group ", g));
    }
    const at::Tensor own = at::tensor(facts, at::kDouble).to(device_);
    const auto all = collectives_.gather(own, "comparing the processes' gradients");
    for (size_t process = 1; process < all.size(); ++process) {
      const at::Tensor first = all[0].cpu(), other = all[process].cpu();
      for (size_t i = 0; i < facts.size(); ++i) {
        const double expected = first.const_data_ptr<double>()[i], found = other.const_data_ptr<double>()[i];
        TORCH_CHECK(found == expected, "distributed: ", names[i], " is ", found, " in process ", process, " and ",
                    expected, " in process 0, expected the same in all processes (see average_gradients)");
      }
    }
  }

  mutable detail::Collectives collectives_;
  at::Device device_;
  size_t agreed_groups_ = 0;
};

}  // namespace lora_rite::detail
