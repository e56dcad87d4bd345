#!/usr/bin/env bash
# OLoRA on GPT-2's square layers begins with another model.
#
# Guess: init_lora_weights="olora" keeps what the model computes, as every start of PEFT's does, also for Conv1D layers
# with fan_in_fan_out; or it refuses them.
# Found (PEFT 0.21.2, transformers 5.24.0, torch 2.13.0, on a CPU): it takes Q R of the weight as it is stored, [in, out],
# for B A of a layer [out, in]. A square layer (attn.c_proj) gives outputs 1.2 times their length away before the first
# step, without a warning; any other fails in its first forward pass. "pissa" and "orthogonal" have it right.
#
# Takes some minutes and 5 GB in a temporary folder. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip --disable-pip-version-check -q install peft==0.21.2 transformers==5.24.0 torch==2.13.0 numpy
cat >check.py <<'PYTHON'
import copy
import sys
import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D

torch.manual_seed(0)
base, inputs = torch.nn.Sequential(Conv1D(32, 32)), torch.randn(4, 32)
as_found = True
for init in (True, "orthogonal", "pissa", "olora"):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=init, fan_in_fan_out=True)
    with warnings.catch_warnings(record=True) as warned, torch.no_grad():
        warnings.simplefilter("always")
        model = get_peft_model(copy.deepcopy(base), config)
        apart = ((model(inputs) - base(inputs)).norm() / base(inputs).norm()).item()
    print(f"{init}: the outputs of the fresh adapter are {apart:.0e} from the base's, {len(warned)} warnings")
    as_found = as_found and not warned and (apart > 0.1 if init == "olora" else apart < 1e-5)
sys.exit(0 if as_found else "another behaviour than in PEFT 0.21.2")
PYTHON
venv/bin/python check.py
