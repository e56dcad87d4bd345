#!/usr/bin/env bash
# PEFT's add_weighted_adapter leaves DoRA's magnitudes behind.
#
# Guess: an adapter that is combined of a single DoRA adapter with weight 1 is that one; or DoRA is refused, as other kinds
# that cannot be combined are.
# Found (PEFT 0.21.2, torch 2.13.0, on a CPU): the new adapter is DoRA as well, but its magnitudes are those of the base
# weight, not the trained ones, without a warning. Where the factors were not trained and the magnitudes doubled, the
# combined adapter gives the base model's outputs. Its factors are right.
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
for kind in ("linear", "cat", "svd"):
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["0"], use_dora=True)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False)), config, adapter_name="one")
    magnitudes = model.base_model.model[0].lora_magnitude_vector
    inputs = torch.randn(5, 16)
    with torch.no_grad():
        base = model(inputs)  # B = 0 and the base's magnitudes: nothing is changed yet
        magnitudes["one"].weight *= 2
        one = model(inputs)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            model.add_weighted_adapter(["one"], [1.0], "combined", combination_type=kind)
        model.set_adapter("combined")
        combined = model(inputs)
    to_one, to_base = ((combined - other).norm().item() / other.norm().item() for other in (one, base))
    print(f"{kind}: the combined adapter is {to_one:.0%} from the one it was made of, {to_base:.0e} from no adapter; "
          f"{len(warned)} warnings")
    as_found = as_found and not warned and to_one > 0.4 and to_base < 1e-5
sys.exit(0 if as_found else "another behaviour than in PEFT 0.21.2")
PYTHON
venv/bin/python check.py
