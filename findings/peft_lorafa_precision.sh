#!/usr/bin/env bash
# PEFT's LoRA-FA optimizer computes a float32 model's projection in bfloat16.
#
# Guess: the factors are float32 and nothing asks for autocast, so a step is right to float32's precision.
# Found (PEFT 0.21.2, accelerate 1.15.0, torch 2.13.0, on a CPU): wherever the machine knows bfloat16, the gradient of B
# times (A Aᵀ)⁻¹ is computed in an autocast block of its own. The first moment is off by 3e-3 (64 x 64, r = 8), where
# float32 gives 2e-7. What A's condition number adds is 2,000 times larger as well: at r = 64, with (A Aᵀ) of condition
# 7e4, it is off by 40 %, and a tenth of B's entries go the wrong way.
#
# Takes some minutes and 5 GB in a temporary folder. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip --disable-pip-version-check -q install peft==0.21.2 transformers==5.24.0 torch==2.13.0 numpy accelerate==1.15.0
cat >check.py <<'PYTHON'
import sys

import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer

as_found = True
for rank in (8, 32, 64):
    torch.manual_seed(0)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False)),
                           LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"]))
    layer = model.base_model.model[0]
    optimizer = create_lorafa_optimizer(model, r=rank, lora_alpha=rank, lr=1e-3)
    (model(torch.randn(64, 64)) - torch.randn(64, 64)).square().mean().backward()
    a, gradient = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.grad.clone()
    optimizer.step()
    (moment,) = (state["exp_avg_B"] for state in optimizer.state.values() if "exp_avg_B" in state)

    def projected(dtype):
        gram = a.to(dtype) @ a.to(dtype).T
        return gradient.to(dtype) @ torch.linalg.inv(gram + 1e-8 * torch.eye(rank, dtype=dtype))

    exact = projected(torch.double)
    seen, possible = ((m.double() - exact).norm() / exact.norm() for m in (moment / 0.1, projected(torch.float)))
    wrong = (moment.sign() != exact.sign()).double().mean()
    condition = torch.linalg.cond(a.double() @ a.double().T)
    print(f"r = {rank}, condition {condition:.0e}: a {moment.dtype} moment off by {seen:.0e}, computed in float32 by "
          f"{possible:.0e}; wrong signs: {wrong:.1%}")
    as_found = as_found and moment.dtype == torch.float and seen > 1e-3 and seen > 100 * possible
sys.exit(0 if as_found else "another behaviour than in PEFT 0.21.2")
PYTHON
venv/bin/python check.py
