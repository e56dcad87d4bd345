#!/usr/bin/env bash
# PEFT merges an adapter of half-precision weights with one rounding in linear layers, and with two in embeddings.
#
# Guess: merge_and_unload adds ΔW to the weight in the same way for every kind of layer, so that a bfloat16 model's
# merged weights are round(W + ΔW) everywhere (or round(W + round(ΔW)) everywhere).
# Found (PEFT 0.21.2, transformers 5.24.0, torch 2.13.0, on a CPU): of a linear layer every element is round(W + ΔW);
# of an embedding with factors of the same size every element is round(W + round(ΔW)), which is another number for about
# three elements in ten. So it is in bfloat16 and in float16, with safe_merge left at False.
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


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(64, 32)
        self.linear = torch.nn.Linear(32, 64, bias=False)

    def forward(self, x):
        return self.linear(self.embedding(x))


as_found = True
for dtype in (torch.bfloat16, torch.float16):
    torch.manual_seed(0)
    net = Net().to(dtype)
    before = {name: getattr(net, name).weight.detach().double() for name in ("embedding", "linear")}
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["embedding", "linear"], init_lora_weights=False)
    model = get_peft_model(net, config)
    layers = model.base_model.model
    delta = {
        "linear": layers.linear.lora_B["default"].weight.double() @ layers.linear.lora_A["default"].weight.double(),
        "embedding": (
            layers.embedding.lora_embedding_B["default"].double() @ layers.embedding.lora_embedding_A["default"].double()
        ).T,
    }
    merged = model.merge_and_unload()
    for name, roundings in (("linear", "once"), ("embedding", "twice")):
        found = getattr(merged, name).weight.detach()
        share = {
            "once": (found == (before[name] + delta[name]).to(dtype)).double().mean().item(),
            "twice": (found == (before[name] + delta[name].to(dtype).double()).to(dtype)).double().mean().item(),
        }
        print(f"{dtype} {name}: {share['once']:.2f} of the elements are rounded once, {share['twice']:.2f} twice")
        other = "twice" if roundings == "once" else "once"
        as_found = as_found and share[roundings] > 0.999 and share[other] < 0.9
sys.exit(0 if as_found else "another behaviour than in PEFT 0.21.2")
PYTHON
venv/bin/python check.py
