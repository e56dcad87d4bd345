#!/usr/bin/env bash
# PEFT's add_weighted_adapter changes the base weights under PiSSA and OLoRA adapters.
#
# Guess: a combination of adapters is one adapter more. The base weights, and what the other adapters give, stay.
# Found (PEFT 0.21.2, torch 2.13.0, on a CPU): the new adapter inherits init_lora_weights, so it takes the leading part out
# of the base weight as a fresh PiSSA or OLoRA adapter does, and its own factors, which held that part, are overwritten.
# After it every adapter of the model, the old one too, gives other outputs, without a warning: here by 60 % of their
# length. With ordinary LoRA and "orthogonal" nothing changes.
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
for init in (True, "orthogonal", "pissa", "olora"):
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights=init)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(32, 32, bias=False)), config, adapter_name="one")
    weight = model.base_model.model[0].get_base_layer().weight
    inputs = torch.randn(5, 32)
    with torch.no_grad():
        before, outputs = weight.clone(), model(inputs)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            model.add_weighted_adapter(["one"], [1.0], "combined", combination_type="linear")
        model.set_adapter("one")
        changed = ((weight - before).norm() / before.norm()).item()
        moved = ((model(inputs) - outputs).norm() / outputs.norm()).item()
    print(f"{init}: the base weight changed by {changed:.0%}, the outputs of the old adapter by {moved:.0%}; "
          f"{len(warned)} warnings")
    as_found = as_found and not warned
    as_found = as_found and (min(changed, moved) > 0.2 if init in ("pissa", "olora") else changed == moved == 0)
sys.exit(0 if as_found else "another behaviour than in PEFT 0.21.2")
PYTHON
venv/bin/python check.py
