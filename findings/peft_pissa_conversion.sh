#!/usr/bin/env bash
# PEFT's conversion of PiSSA adapters drops DoRA's magnitudes and the factors of embeddings.
#
# Guess: save_pretrained with path_initial_model_for_weight_conversion writes all that was trained, in the ordinary base's
# terms, or refuses what it cannot convert.
# Found (PEFT 0.21.2, torch 2.13.0, on a CPU): the file holds lora_A and lora_B of linear layers and nothing else, though
# its description still says use_dora or names the embedding. Saving warns of nothing that is left out. Loading warns of
# missing keys, when it is too late: the model is another by a third or more of what was learnt (ordinary layers: 2e-7).
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
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.linear = torch.nn.Embedding(16, 32), torch.nn.Linear(32, 32)

    def forward(self, tokens):
        return self.linear(self.embedding(tokens))


torch.manual_seed(0)
base, tokens, labels = Model(), torch.arange(16), torch.randn(16, 32)
as_found = True
for name, targets, dora in (("linear", ["linear"], False), ("linear, DoRA", ["linear"], True),
                            ("linear and embedding", ["linear", "embedding"], False)):
    config = LoraConfig(r=4, lora_alpha=4, target_modules=targets, use_dora=dora, init_lora_weights="pissa")
    model = get_peft_model(copy.deepcopy(base), config)
    model.peft_config["default"].init_lora_weights = True  # as PEFT's documents say, for the conversion below
    model.save_pretrained("start")
    model.peft_config["default"].init_lora_weights = "pissa"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        (model(tokens) - labels).square().mean().backward()
        optimizer.step()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model.save_pretrained("converted", path_initial_model_for_weight_conversion="start")
    left_out = any("magnitude" in str(w.message) or "embedding" in str(w.message) for w in warned)
    kinds = {key.split(".lora_")[-1] for key in load_file("converted/adapter_model.safetensors")}
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), "converted")
    with torch.no_grad():
        apart = ((loaded(tokens) - model(tokens)).norm() / (model(tokens) - base(tokens)).norm()).item()
    print(f"{name}: the file has {sorted(kinds)}; loaded, the model is off by {apart:.0e} of what was learnt; "
          f"saving said so: {left_out}")
    as_found = as_found and kinds == {"A.weight", "B.weight"} and not left_out
    as_found = as_found and (apart < 1e-5 if name == "linear" else apart > 0.1)
sys.exit(0 if as_found else "another behaviour than in PEFT 0.21.2")
PYTHON
venv/bin/python check.py
