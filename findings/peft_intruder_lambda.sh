#!/usr/bin/env bash
# In reduce_intruder_dimension a higher mitigation_lambda takes less of the intruder dimensions away.
#
# Guess: as its documents say, mitigation_lambda is the share of the intruder dimensions that is subtracted, and the higher
# it is, the more is subtracted. With 1 an intruder is gone, with 0 the adapter stays as it was.
# Found (PEFT 0.21.2, torch 2.13.0, on a CPU): it is the share that is kept. With 1 nothing changes, with 0 the intruder is
# gone, and the default 0.75 takes a quarter. An adapter of one strong direction, ‖ΔW‖ 25: 25.0 with 1, 18.7 with 0.75, 6.2
# with 0.25, 0.6 with 0.
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
from peft.tuners.lora.intruders import reduce_intruder_dimension

torch.manual_seed(0)
size = 32
base = torch.nn.Linear(size, size, bias=False)
left, right = (torch.nn.functional.normalize(torch.randn(size), dim=0) for _ in range(2))
norms = {}
for share in (0.0, 0.25, 0.5, 0.75, 1.0):
    config = LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
    model = get_peft_model(torch.nn.Sequential(base), config)
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.data = 5 * right.reshape(1, size)  # far from the base's singular vectors
    layer.lora_B["default"].weight.data = 5 * left.reshape(size, 1)
    reduce_intruder_dimension(model, top_k=1, threshold_epsilon=0.9, mitigation_lambda=share, logging_sink=None)
    norms[share] = layer.get_delta_weight("intruder_reduced").norm().item()
    before = layer.get_delta_weight("default").norm().item()
    print(f"mitigation_lambda {share}: ‖ΔW‖ {before:.1f} before, {norms[share]:.1f} after")
    base = layer.get_base_layer()
as_found = abs(norms[1.0] - before) < 1e-3 * before and norms[0.0] < 0.1 * before
as_found = as_found and all(norms[a] < norms[b] for a, b in ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0)))
sys.exit(0 if as_found else "another behaviour than in PEFT 0.21.2")
PYTHON
venv/bin/python check.py
