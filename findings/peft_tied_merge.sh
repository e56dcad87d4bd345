#!/usr/bin/env bash
# PEFT adds the change of tied adapters twice when it merges them.
#
# Guess: with ensure_weight_tying=True the adapters of an embedding and of the head that shares its weight are one change
# of one matrix, so that merge_and_unload leaves the model's outputs as they were.
# Found (PEFT 0.21.2, transformers 5.24.0, torch 2.13.0, on a CPU): both layers have the same ΔW, and merging adds it to
# the one weight once for each layer. The merged weight is W + 2ΔW. A warning says that tied targets "can lead to
# complications", as it does without the option.
#
# Takes some minutes and 5 GB in a temporary folder. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip --disable-pip-version-check -q install peft==0.21.2 transformers==5.24.0 torch==2.13.0 numpy
cat >check.py <<'PYTHON'
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

as_found = True
for targets in (["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=True, **size))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, ensure_weight_tying=True, init_lora_weights=False)
    model = get_peft_model(base, config)
    weight = model.get_input_embeddings().base_layer.weight.detach().clone()
    change = model.get_input_embeddings().get_delta_weight("default").detach()
    same = torch.equal(change, model.get_output_embeddings().get_delta_weight("default").detach())
    text = torch.arange(10)[None]
    with torch.no_grad():
        before = model(text).logits
        merged = model.merge_and_unload()
        after = merged(text).logits
    times = ((merged.get_input_embeddings().weight.detach() - weight) / change).median().item()
    moved = ((after - before).norm() / before.norm()).item()
    print(f"{targets}: one change for both layers: {same}; merged, it is there {times:.2f} times; outputs move by {moved:.2f}")
    as_found = as_found and same and abs(times - 2) < 1e-3 and moved > 0.1
sys.exit(0 if as_found else "another behaviour than in PEFT 0.21.2")
PYTHON
venv/bin/python check.py
