// The C++ half of interop_test.py: for every case folder named on the command line it
// - loads model/ with the adapter that PEFT wrote into peft/ and writes the logits into loaded.safetensors;
// - gives model/ the adapter that wanted/adapter_config.json describes, with random factors, and writes it into made/,
//   its logits into made.safetensors; then the logits with the product in the weights into merged.safetensors, and what
//   `finetune merge` makes of model/ and made/ into merged/.
// A folder without wanted/ holds a model that Python alone knows: `finetune merge` puts peft/ into model/ and writes
// merged/.

#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <lora_rite/io/peft.hpp>
#include <lora_rite/io/safetensors.hpp>
#include <lora_rite/nn/nn.hpp>
#include <lora_rite/nn/peft.hpp>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>

#include "commands/merge.hpp"
#include "models/bert.hpp"
#include "models/load_model.hpp"
#include "support/torch.hpp"

namespace {

using std::filesystem::path;
using Tensors = std::map<std::string, torch::Tensor>;

nlohmann::json read_json(const path& file) { return nlohmann::json::parse(std::ifstream(file)); }

/// A model with its checkpoint, and what it computes.
struct Model {
  std::shared_ptr<torch::nn::Module> module;
  std::function<torch::Tensor(const Tensors&)> logits;
};

Model read_model(const path& folder) {
  if (read_json(folder / "config.json").at("model_type") == "bert") {
    const auto bert = finetune::load_bert(folder);
    bert->eval();
    return {bert, [bert](const Tensors& inputs) { return bert->forward(inputs.at("tokens"), inputs.at("mask")); }};
  }
  const auto model = finetune::load_model(folder);
  return {
      model, [model](const Tensors& inputs) {
        const auto target = inputs.find("target");
        return model->forward(
            {inputs.at("tokens"), inputs.at("mask"), target == inputs.end() ? torch::Tensor() : target->second, {}});
      }};
}

void load(const path& folder, const Tensors& inputs) {
  const Model model = read_model(folder / "model");
  lora_rite::nn::inject_adapter(*model.module, lora_rite::load_adapter(folder / "peft"));
  lora_rite::save_safetensors(folder / "loaded.safetensors", {{"logits", model.logits(inputs)}});
}

void make(const path& folder, const Tensors& inputs) {
  const Model model = read_model(folder / "model");
  const auto description =
      lora_rite::parse_adapter_config(read_json(folder / "wanted" / "adapter_config.json").dump(), "wanted: ");
  lora_rite::nn::inject_lora(*model.module, lora_rite::nn::lora_config(description), "mine");
  for (const auto& pair : lora_rite::nn::factor_pairs(*model.module, "mine")) {  // away from where they started
    pair.a.add_(torch::randn_like(pair.a), 0.1);
    pair.b.add_(torch::randn_like(pair.b), 0.1);
  }
  lora_rite::save_safetensors(folder / "made.safetensors", {{"logits", model.logits(inputs)}});
  lora_rite::save_adapter(folder / "made", lora_rite::nn::peft_adapter(*model.module, "mine", description));
  lora_rite::nn::merge_and_unload(*model.module);
  lora_rite::save_safetensors(folder / "merged.safetensors", {{"logits", model.logits(inputs)}});
  finetune::MergeOptions options;
  options.model = folder / "model";
  options.adapters = {{folder / "made", 1}};
  options.out = folder / "merged";
  options.dtype = "float32";  // as it was loaded: a base may be in bfloat16
  std::ostringstream ignored;
  finetune::merge_adapters(options, ignored);
}

}  // namespace

int main(int count, char** arguments) {
  torch::manual_seed(1);
  const torch::NoGradGuard no_grad;
  for (int i = 1; i < count; ++i) {
    const path folder = arguments[i];
    try {
      if (!std::filesystem::exists(folder / "wanted")) {
        finetune::MergeOptions options;
        options.model = folder / "model";
        options.adapters = {{folder / "peft", 1}};
        options.out = folder / "merged";
        finetune::merge_adapters(options, std::cout);
        continue;
      }
      const Tensors inputs = lora_rite::load_safetensors(folder / "inputs.safetensors").tensors;
      load(folder, inputs);
      make(folder, inputs);
    } catch (const std::exception& error) {
      std::cerr << "interop: " << folder.string() << ": " << error.what() << '\n';
      return 1;
    }
  }
  return 0;
}
