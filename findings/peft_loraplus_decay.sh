#!/usr/bin/env bash
# PEFT's LoRA+ optimizer ignores weight_decay, and steps norms and magnitudes at B's rate.
#
# Guess: create_loraplus_optimizer(..., weight_decay=0.1) hands it on to AdamW, as its documents say of further arguments.
# Parameters that are no factors have the rate lr.
# Found (PEFT 0.21.2, torch 2.13.0, on a CPU): every group says weight_decay 0, unless loraplus_weight_decay is given, so
# what was asked for has no effect, without a word. With loraplus_lr_ratio 16 the weight and bias of a trained LayerNorm
# (modules_to_save), and DoRA's magnitudes, have 16 lr, as every parameter of one dimension.
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
from peft.optimizers import create_loraplus_optimizer

config = LoraConfig(r=2, target_modules=["0"], use_dora=True, modules_to_save=["1"])
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)), config)
names = {id(parameter): name for name, parameter in model.named_parameters()}
rates, decays = {}, set()
for options in ({"weight_decay": 0.1}, {"loraplus_weight_decay": 0.1}):
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, **options)
    print(options)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)].removeprefix("base_model.model.")
            print(f"  {name}: lr {group['lr']:g}, weight_decay {group['weight_decay']:g}")
            if "weight_decay" in options:
                rates[name] = group["lr"]
                decays.add(group["weight_decay"])
others = [rate for name, rate in rates.items() if "modules_to_save" in name or "magnitude" in name]
as_found = decays == {0.0} and len(others) == 3 and all(abs(rate - 16e-3) < 1e-9 for rate in others)
sys.exit(0 if as_found else "another behaviour than in PEFT 0.21.2")
PYTHON
venv/bin/python check.py
