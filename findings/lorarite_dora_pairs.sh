#!/usr/bin/env bash
# pytorch_optimizer's LoRARite pairs DoRA's magnitudes with the factors of other layers, without an error.
#
# Guess: given the trained parameters of a DoRA model from PEFT, in their order, LoRARite pairs each A with its B and
# steps the magnitudes alone; or it refuses them, as its documents ask for "LoRA factors in alternating order".
# Found (pytorch_optimizer 4.1.0, PEFT 0.21.2, transformers 5.24.0): PEFT's order is A, B, magnitudes, and LoRARite takes
# every two parameters for a pair: of Llama's q_proj and o_proj (A, B) of q_proj, then (q_proj's magnitudes, o_proj's A)
# and (o_proj's B, o_proj's magnitudes). Where q_proj has as many outputs as o_proj has inputs all shapes fit, so it
# trains, but by a wrong rule: what LoRA-RITE is for, that (A, B) and (A/5, 5B) are trained alike, is lost. Given A and B
# alone it has that. Of target_modules="all-linear" the shapes do not fit, and it raises an error.
#
# Takes some minutes and 5 GB in a temporary folder. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip --disable-pip-version-check -q install \
  pytorch_optimizer==4.1.0 peft==0.21.2 transformers==5.24.0 torch==2.13.0 numpy
cat >check.py <<'PYTHON'
import copy, sys

import torch
from peft import LoraConfig, get_peft_model
from pytorch_optimizer import LoRARite
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=2, vocab_size=64, max_position_embeddings=32)
torch.manual_seed(0)
base = LlamaForCausalLM(config).double()
tokens = torch.randint(64, (4, 16))


def train(targets, use_dora, magnitudes, scale, steps=3):
    """The products B A of a model trained from the factors (A / scale, scale B), and what LoRARite paired."""
    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=4, target_modules=targets, use_dora=use_dora)
    model = get_peft_model(copy.deepcopy(base), lora, autocast_adapter_dtype=False)
    prefix, suffix = "base_model.model.model.layers.0.", ".default.weight"
    trained = {name.removeprefix(prefix).removesuffix(suffix).replace("self_attn.", ""): parameter
               for name, parameter in model.named_parameters() if parameter.requires_grad}
    factors = {name: parameter for name, parameter in trained.items() if name.endswith(("lora_A", "lora_B"))}
    for name, parameter in factors.items():
        parameter.data.normal_().mul_(0.1 * scale if name.endswith("lora_B") else 0.1 / scale)
    given = trained if magnitudes else factors
    optimizers = [LoRARite(list(given.values()), lr=1e-2)]
    if use_dora and not magnitudes:
        optimizers.append(torch.optim.AdamW([trained[name] for name in trained if name not in factors], lr=1e-2))
    for _ in range(steps):
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    names = {id(parameter): name for name, parameter in given.items()}
    pairs = [(names[id(a)], names[id(b)]) for a, b in LoRARite.iter_lora_pairs(optimizers[0].param_groups[0])]
    layers = [name.removesuffix(".lora_A") for name in factors if name.endswith("lora_A")]
    return [(factors[f"{name}.lora_B"] @ factors[f"{name}.lora_A"]).detach() for name in layers], pairs


as_found = True
square = ["q_proj", "o_proj"]
for label, use_dora, magnitudes, wrong in (("LoRA", False, False, False), ("DoRA, A and B given", True, False, False),
                                           ("DoRA, all trained parameters given", True, True, True)):
    start, one, other = (train(square, use_dora, magnitudes, *case) for case in ((1, 0), (1,), (5,)))
    pairs = one[1]
    differences = [((a - b).norm() / (a - before).norm()).item() for before, a, b in zip(start[0], one[0], other[0])]
    print(f"{label}: pairs {pairs}")
    print("  steps from (A, B) and from (A/5, 5B) differ by", [f"{difference:.0e}" for difference in differences], "of a step")
    q, o = [tuple(f"{layer}.lora_{factor}" for factor in "AB") for layer in square]
    mixed = [("q_proj.lora_magnitude_vector", o[0]), (o[1], "o_proj.lora_magnitude_vector")]
    as_found = as_found and pairs == ([q] + mixed if wrong else [q, o])
    as_found = as_found and (min(differences) > 1e-3 if wrong else max(differences) < 1e-9)
try:
    train("all-linear", True, True, 1)
    as_found = False
except RuntimeError as error:
    print("all-linear:", error)
sys.exit(0 if as_found else "another behaviour than in pytorch_optimizer 4.1.0")
PYTHON
venv/bin/python check.py
