#!/usr/bin/env bash
# PEFT's convert_to_lora gives each adapter the classification head of the adapter that was added last.
#
# Guess: convert_to_lora(model, adapter_name="first") writes first's modules_to_save beside its converted weights, for it
# is told to convert a single adapter.
# Found (PEFT 0.21.2, torch 2.13.0, on a CPU): it goes through the copies of all adapters and keeps the last, without a
# warning. Two LoHa adapters with heads of ones and of twos: both converted files hold twos.
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
from peft import LoHaConfig, convert_to_lora, get_peft_model


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)

    def forward(self, inputs):
        return self.head(self.body(inputs))


config = LoHaConfig(r=2, target_modules=["body"], modules_to_save=["head"], init_weights=False)
torch.manual_seed(0)
model = get_peft_model(Model(), config, adapter_name="first")
model.add_adapter("second", config)
for name, value in (("first", 1.0), ("second", 2.0)):
    model.base_model.model.head.modules_to_save[name].weight.data.fill_(value)
written = {}
for name in ("first", "second"):
    _, tensors = convert_to_lora(model, rank=4, adapter_name=name)
    head = tensors["base_model.model.head.weight"]
    written[name] = head.flatten()[0].item()
    print(f"{name}: its head holds {model.base_model.model.head.modules_to_save[name].weight[0, 0].item():.0f}, "
          f"the converted one {written[name]:.0f}")
sys.exit(0 if written == {"first": 2.0, "second": 2.0} else "another behaviour than in PEFT 0.21.2")
PYTHON
venv/bin/python check.py
