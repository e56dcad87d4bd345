#!/usr/bin/env bash
# PEFT's hotswap_adapter gives layers of a rank pattern another strength.
#
# Guess: after hotswap_adapter a model computes what it computes when the same adapter is loaded afresh; adapters for
# which that cannot be are refused, as those with another alpha_pattern or use_rslora are.
# Found (PEFT 0.21.2, torch 2.13.0, on a CPU): with a rank_pattern in the adapter that is loaded, or in the one that was
# there before, the scale of those layers becomes lora_alpha / r with the r of the other layers. The factors are the
# right ones. So a layer of rank 1 beside r = 4 acts with a quarter of its strength, one of rank 16 with four times of it.
# Nothing is said. Ranks that differ without a pattern are handled.
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
import tempfile
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(32, 32)
        self.second = torch.nn.Linear(32, 32)


def save(folder, seed, **options):
    torch.manual_seed(seed)
    config = LoraConfig(lora_alpha=8, target_modules=["first", "second"], init_lora_weights=False, **options)
    get_peft_model(Net(), config).save_pretrained(folder)


def strengths(model):
    layers = model.base_model.model
    return [layers.get_submodule(name).get_delta_weight("default").norm().item() for name in ("first", "second")]


as_found = True
for before, after, expected in (
    ({"r": 4}, {"r": 2}, 1),  # another rank, no pattern
    ({"r": 4}, {"r": 4, "rank_pattern": {"first": 1}}, 1 / 4),
    ({"r": 4}, {"r": 4, "rank_pattern": {"first": 16}}, 4),
):
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two, warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(rank|scal).*")
        save(one, 1, **before)
        save(two, 2, **after)
        fresh = PeftModel.from_pretrained(Net(), two)
        swapped = PeftModel.from_pretrained(Net(), one)
        hotswap_adapter(swapped, two, "default")
    first, second = (mine / right for mine, right in zip(strengths(swapped), strengths(fresh)))
    print(f"{before} -> {after}: the change of the first layer is {first:.2f} times what it should be, of the second {second:.2f}")
    as_found = as_found and abs(first / expected - 1) < 1e-3 and abs(second - 1) < 1e-3
sys.exit(0 if as_found else "another behaviour than in PEFT 0.21.2")
PYTHON
venv/bin/python check.py
