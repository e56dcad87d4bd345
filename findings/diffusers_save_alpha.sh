#!/usr/bin/env bash
# diffusers saves a LoRA without its strength, unless it is given the adapter's description besides.
#
# Guess: save_lora_weights followed by load_lora_weights gives the model that was trained.
# Found (diffusers 0.42.1, PEFT 0.21.2, torch 2.13.0): the file has the factors alone, and loading takes the rank for
# lora_alpha. In a Flux transformer with r = 4 the change comes back at a quarter of its size for lora_alpha = 16, and at
# half of it for rank-stabilised factors. With transformer_lora_adapter_metadata, which is optional, it comes back whole.
#
# Takes some minutes and 5 GB in a temporary folder. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip --disable-pip-version-check -q install diffusers==0.42.1 accelerate==1.15.0 peft==0.21.2 transformers==5.24.0 torch==2.13.0 numpy
cat >check.py <<'PYTHON'
import sys
import tempfile

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict


def transformer():
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8])


def change(model):
    return model.transformer_blocks[0].attn.to_q.get_delta_weight(model.active_adapters()[0]).detach()


as_found = True
for options, expected in (({"lora_alpha": 16}, 1 / 4), ({"lora_alpha": 4, "use_rslora": True}, 1 / 2)):
    trained = transformer()
    lora = LoraConfig(r=4, target_modules=["to_q", "to_k"], **options)
    trained.add_adapter(lora)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    for described in (False, True):
        metadata = {"transformer_lora_adapter_metadata": lora.to_dict()} if described else {}
        with tempfile.TemporaryDirectory() as folder:
            FluxPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(trained), **metadata)
            pipeline = FluxPipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None,
                                    tokenizer_2=None, transformer=transformer())
            pipeline.load_lora_weights(folder)
        ratio = (change(pipeline.transformer).norm() / change(trained).norm()).item()
        print(f"{options}, {'with' if described else 'without'} metadata: {ratio:.3f} of the change comes back")
        as_found = as_found and abs(ratio - (1 if described else expected)) < 1e-3
sys.exit(0 if as_found else "another behaviour than in diffusers 0.42.1")
PYTHON
venv/bin/python check.py
