#!/usr/bin/env bash
# PEFT's Riemannian optimizer over AdamW depends on the scale of A as AdamW does.
#
# Guess: the r x r preconditioner of "Riemannian Preconditioned LoRA" makes a step's ΔW independent of how it is split into
# A and B. From (10 A, B = 0) and (A, B = 0), the same model, create_riemannian_optimizer with AdamW goes about as far.
# Found (PEFT 0.21.2, torch 2.13.0, on a CPU): AdamW divides each entry of the preconditioned gradient by its own size, so
# a scalar part of the preconditioner cancels. After 20 steps ΔW is 7.4 times as long from 10 A, with plain AdamW 6.8 times.
# Over SGD, and with the damping reg at 1e-6 in place of the default 1e-2, it is 0.96 times as long.
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
from peft.optimizers import create_riemannian_optimizer


def length(scale, kind, **options):
    torch.manual_seed(1)
    inputs, labels = torch.randn(64, 40), torch.randn(64, 40)
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["0"])
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(40, 40, bias=False)), config)
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.data *= scale
    if kind == "Riemannian":
        optimizer = create_riemannian_optimizer(model, **options)
    else:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **options)
    for _ in range(20):
        optimizer.zero_grad()
        (model(inputs) - labels).square().mean().backward()
        optimizer.step()
    return layer.get_delta_weight("default").norm().item()


ratios = []
for name, kind, options in (
    ("Riemannian over AdamW", "Riemannian", {"optimizer_cls": torch.optim.AdamW, "lr": 1e-3}),
    ("AdamW", "plain", {"lr": 1e-3}),
    ("Riemannian over SGD, reg 1e-6", "Riemannian", {"optimizer_cls": torch.optim.SGD, "lr": 1e-1, "reg": 1e-6}),
):
    usual, tenfold = (length(scale, kind, **options) for scale in (1, 10))
    ratios.append(tenfold / usual)
    print(f"{name}: ‖ΔW‖ after 20 steps {usual:.3f} from A, {tenfold:.3f} from 10 A, {ratios[-1]:.2f} times")
as_found = ratios[0] > 4 and ratios[1] > 4 and 0.8 < ratios[2] < 1.25
sys.exit(0 if as_found else "another behaviour than in PEFT 0.21.2")
PYTHON
venv/bin/python check.py
