#include <gtest/gtest.h>

#include "support/pairs.hpp"

namespace lora_rite::test {
namespace {

torch::OrderedDict<std::string, torch::Tensor> trained(const std::vector<std::string>& names) {
  torch::OrderedDict<std::string, torch::Tensor> parameters;
  for (const auto& name : names) parameters.insert(name, torch::zeros({2, 2}).requires_grad_());
  return parameters;
}

/// One row of docs/names.md: a factor A, its B, and what the pair is called.
struct Naming {
  const char* source;
  const char* a;
  const char* b;
  const char* name;
};

class KnownNames : public testing::TestWithParam<Naming> {};

TEST_P(KnownNames, ArePaired) {
  const auto& [source, a, b, name] = GetParam();
  const auto parameters = trained({"other.weight", b, a});
  const auto pairs = find_factor_pairs(parameters);
  ASSERT_EQ(pairs.size(), 1u);
  EXPECT_EQ(pairs[0].name, name);
  EXPECT_TRUE(pairs[0].a.is_same(parameters[a]));
  EXPECT_TRUE(pairs[0].b.is_same(parameters[b]));
}

INSTANTIATE_TEST_SUITE_P(
    Libraries, KnownNames,
    testing::Values(
        Naming{"PeftFile", "h.0.q.lora_A.weight", "h.0.q.lora_B.weight", "h.0.q.weight"},
        Naming{"PeftModel", "h.0.q.lora_A.default.weight", "h.0.q.lora_B.default.weight", "h.0.q.default.weight"},
        Naming{"PeftEmbedding", "e.lora_embedding_A.default", "e.lora_embedding_B.default", "e.default"},
        Naming{"PeftSuperTuning", "q.supertuning_lora_A.default.weight", "q.supertuning_lora_B.default.weight",
               "q.supertuning.default.weight"},
        Naming{"Loralib", "h.0.attn.c_attn.lora_A", "h.0.attn.c_attn.lora_B", "h.0.attn.c_attn"},
        Naming{"Torchtune", "layers.0.attn.q_proj.lora_a.weight", "layers.0.attn.q_proj.lora_b.weight",
               "layers.0.attn.q_proj.weight"},
        Naming{"Kohya", "lora_unet_down_blocks_0_proj_in.lora_down.weight",
               "lora_unet_down_blocks_0_proj_in.lora_up.weight", "lora_unet_down_blocks_0_proj_in.weight"},
        Naming{"KohyaTextEncoder", "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
               "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
               "lora_te1_text_model_encoder_layers_0_mlp_fc1.weight"},
        Naming{"KohyaSplit", "lora_unet_double_blocks_0_img_attn_qkv.lora_down.1.weight",
               "lora_unet_double_blocks_0_img_attn_qkv.lora_up.1.weight",
               "lora_unet_double_blocks_0_img_attn_qkv.1.weight"},
        Naming{"LycorisLoCon", "lycoris_conv_in.lora_down.weight", "lycoris_conv_in.lora_up.weight",
               "lycoris_conv_in.weight"},
        Naming{"DiffusersProcessor", "unet.attn1.processor.to_q_lora.down.weight",
               "unet.attn1.processor.to_q_lora.up.weight", "unet.attn1.processor.to_q.weight"},
        Naming{"DiffusersUnet", "unet.attn1.to_q.lora.down.weight", "unet.attn1.to_q.lora.up.weight",
               "unet.attn1.to_q.weight"},
        Naming{"DiffusersLayer", "unet.attn1.to_q.lora_layer.down.weight", "unet.attn1.to_q.lora_layer.up.weight",
               "unet.attn1.to_q.weight"},
        Naming{"DiffusersTextEncoder", "text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight",
               "text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight",
               "text_model.encoder.layers.0.self_attn.q_proj.weight"},
        Naming{"XLabs", "double_blocks.0.processor.proj_lora1.down.weight",
               "double_blocks.0.processor.proj_lora1.up.weight", "double_blocks.0.processor.proj1.weight"},
        Naming{"XLabsText", "double_blocks.0.processor.qkv_lora2.down.weight",
               "double_blocks.0.processor.qkv_lora2.up.weight", "double_blocks.0.processor.qkv2.weight"},
        Naming{"XLabsSingle", "single_blocks.0.processor.qkv_lora.down.weight",
               "single_blocks.0.processor.qkv_lora.up.weight", "single_blocks.0.processor.qkv.weight"}),
    [](const auto& info) { return info.param.source; });

TEST(FactorNames, KeepTheTwoOfOneXLabsLayerApart) {
  const auto pairs = find_factor_pairs(trained(
      {"p.qkv_lora1.down.weight", "p.qkv_lora1.up.weight", "p.qkv_lora2.down.weight", "p.qkv_lora2.up.weight"}));
  ASSERT_EQ(pairs.size(), 2u);
  EXPECT_NE(pairs[0].name, pairs[1].name);
}

/// A parameter beside a pair, and what the refusal says of it; nothing: it is left to AdamW.
struct Beside {
  const char* label;
  const char* name;
  const char* words;
};

class NamesBesideAPair : public testing::TestWithParam<Beside> {};

TEST_P(NamesBesideAPair, AreRefusedByNameOrLeftToAdamW) {
  const auto& [label, name, words] = GetParam();
  const auto parameters = trained({"k.lora_A.default.weight", "k.lora_B.default.weight", name});
  const auto module = std::make_shared<torch::nn::Module>("model");
  for (const auto& item : parameters) {  // a module allows no dots in names
    std::string key = item.key();
    std::shared_ptr<torch::nn::Module> owner = module;
    for (size_t dot = key.find('.'); dot != std::string::npos; dot = key.find('.')) {
      const std::string child = key.substr(0, dot);
      const auto children = owner->named_children();  // a copy, which `find` points into
      const auto* found = children.find(child);
      const auto next = found != nullptr ? *found : std::make_shared<torch::nn::Module>(child);
      if (found == nullptr) owner->register_module(child, next);
      owner = next;
      key.erase(0, dot + 1);
    }
    owner->register_parameter(key, item.value());
  }
  if (words == nullptr) {
    EXPECT_EQ(find_factor_pairs(parameters).size(), 1u);
    const LoraRite<> optimizer(*module);
    ASSERT_EQ(optimizer.param_groups().size(), 2u);
    EXPECT_EQ(optimizer.param_groups()[1].params().size(), 1u);
    return;
  }
  for (const std::string& message :
       {error_of([&] { find_factor_pairs(parameters); }), error_of([&] { LoraRite<> optimizer(*module); })}) {
    EXPECT_TRUE(mentions(message, std::string("'") + name + "'"));
    EXPECT_TRUE(mentions(message, words));
  }
}

constexpr const char* kUnknown = "is none that is known, expected lora_A/lora_B, ";

INSTANTIATE_TEST_SUITE_P(
    Libraries, NamesBesideAPair,
    testing::Values(
        // ΔW is no product of the two
        Beside{"AdaLora", "k.lora_E.default", "AdaLoRA's: ΔW = B diag(E) A"},
        Beside{"Kasa", "k.lora_diag.default", "KaSA's: ΔW = B diag(d) A"},
        Beside{"LoConTucker", "lora_unet_conv.lora_mid.weight", "LoCon's in Tucker form"},
        Beside{"LoraXs", "k.default_lora_latent_mapping.weight", "LoRA-XS's: ΔW = B R A"},
        Beside{"MonteClora", "k.lora_monteclora_sampler.default.std_prior", "MonteCLoRA's"},
        Beside{"Poly", "k.poly_lora_A.default", "Poly's"},
        // names that nobody told us
        Beside{"NeMoExperts", "experts.lora_gate_and_up_A", kUnknown},
        Beside{"TorchtuneExperts", "experts.lora_down_a", kUnknown},
        Beside{"DeepSpeed", "q.lora_right_weight", kUnknown}, Beside{"Arrow", "q.lora_arrow.default.gate", kUnknown},
        Beside{"OtherEnding", "q.lora_Ax.weight", kUnknown}, Beside{"CamelCase", "q.loraDown.weight", kUnknown},
        Beside{"CamelLetter", "q.loraA.weight", kUnknown}, Beside{"Hyphen", "q.lora-a.weight", kUnknown},
        Beside{"Plural", "q.loras.0", kUnknown}, Beside{"OtherNumber", "q.proj_lora9.down.weight", kUnknown},
        Beside{"Capitals", "q.LoRA_left.weight", kUnknown},
        // what belongs to a pair and is trained by AdamW
        Beside{"Dora", "k.lora_magnitude_vector.default.weight", nullptr},
        Beside{"OldDora", "k.lora_magnitude_vector.default", nullptr},
        Beside{"KohyaDora", "lora_unet_q.dora_scale", nullptr}, Beside{"TorchtuneDora", "q.magnitude", nullptr},
        Beside{"LoraBias", "k.lora_B.default.bias", nullptr}, Beside{"KohyaAlpha", "lora_unet_q.alpha", nullptr},
        Beside{"LycorisScalar", "lora_te_q.scalar", nullptr},
        // other methods
        Beside{"LoHa", "lora_unet_q.hada_w1_a", nullptr}, Beside{"LoKr", "lora_te_q.lokr_w1", nullptr},
        Beside{"Vera", "q.vera_lambda_b.default", nullptr}, Beside{"Delora", "q.delora_A.default", nullptr},
        Beside{"Gralora", "q.gralora_A.default", nullptr}, Beside{"Oft", "q.oft_R.default.weight", nullptr},
        Beside{"SuperTuningValues", "q.supertuning_values.default", nullptr},
        Beside{"Hira", "q.hira_A.default", nullptr}, Beside{"Glora", "q.glora_A.default", nullptr},
        Beside{"Lily", "q.lily_A.default", nullptr}, Beside{"VbLora", "q.vblora_logits_A.default", nullptr},
        Beside{"RandLora", "q.randlora_lambda.default", nullptr}, Beside{"C3a", "q.c3a_kernel.default", nullptr},
        Beside{"Miss", "q.miss_block.default", nullptr}, Beside{"Hra", "q.hra_u.default", nullptr},
        Beside{"FourierFt", "q.fourierft_spectrum.default", nullptr},
        // ordinary words, and modules that only stand above
        Beside{"Floral", "floral.weight", nullptr}, Beside{"Colorado", "colorado.head.weight", nullptr},
        Beside{"Lorax", "lorax.weight", nullptr}, Beside{"Alora", "alora_Abc.weight", nullptr},
        Beside{"Above", "lora_blocks.0.attention.norm.weight", nullptr}),
    [](const auto& info) { return info.param.label; });

TEST(FactorNames, AreNotAskedOfFrozenParameters) {
  auto parameters = trained({"k.lora_A.weight", "k.lora_B.weight", "q.lora_right_weight"});
  parameters["q.lora_right_weight"].requires_grad_(false);
  EXPECT_EQ(find_factor_pairs(parameters).size(), 1u);
}

TEST(FactorNames, AreNotAskedOfVectorsInAModuleCalledLora) {
  auto parameters = trained({"lora.q.lora_A.weight", "lora.q.lora_B.weight"});
  parameters.insert("lora.norm.weight", torch::zeros({2}).requires_grad_());
  EXPECT_EQ(find_factor_pairs(parameters).size(), 1u);
}

TEST(FactorNames, TakeARefusedOneBehindATokenForAnAdaptersName) {
  EXPECT_EQ(find_factor_pairs(trained({"k.lora_A.lora_E.weight", "k.lora_B.lora_E.weight"})).size(), 1u);
}

}  // namespace
}  // namespace lora_rite::test
