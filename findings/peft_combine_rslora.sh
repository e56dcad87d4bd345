#!/usr/bin/env bash
# PEFT's add_weighted_adapter makes rank-stabilised adapters stronger by the root of the rank.
#
# Guess: an adapter that is combined of a single one with weight 1 is that one, whatever its scale is made of.
# Found (PEFT 0.21.2, torch 2.13.0, on a CPU): the new adapter inherits use_rslora and gets lora_alpha = r, so its scale is
# √r where the factors were made for 1. "linear", "cat" and "svd" alike give √r times the change, without a warning: 2, 4
# and 8 times at r = 4, 16, 64.
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
import warnings

import torch
from peft import LoraConfig, get_peft_model

as_found = True
for rank in (4, 16, 64):
    for stabilised in (False, True):
        for kind in ("linear", "cat", "svd"):
            torch.manual_seed(0)
            config = LoraConfig(r=rank, lora_alpha=16, target_modules=["0"], use_rslora=stabilised)
            model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 64)), config, adapter_name="one")
            layer = model.base_model.model[0]
            layer.lora_B["one"].weight.data.normal_()
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                model.add_weighted_adapter(["one"], [1.0], "combined", combination_type=kind)
            one, combined = (layer.get_delta_weight(name) for name in ("one", "combined"))
            ratio = (combined.norm() / one.norm()).item()
            print(f"r = {rank}, use_rslora {stabilised}, {kind}: the change is {ratio:.2f} times as large, "
                  f"{len(warned)} warnings")
            expected = rank**0.5 if stabilised else 1.0
            as_found = as_found and not warned and torch.allclose(combined, expected * one, rtol=1e-3, atol=1e-4)
sys.exit(0 if as_found else "another behaviour than in PEFT 0.21.2")
PYTHON
venv/bin/python check.py
