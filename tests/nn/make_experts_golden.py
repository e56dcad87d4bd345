#!/usr/bin/env python3
"""Regenerates experts_golden.json: PEFT's adapters on parameters that hold all experts of a layer (target_parameters).

python3 -m pip install torch==2.13.0 transformers==5.24.0 peft==0.21.2
python3 make_experts_golden.py
"""

import json
import pathlib
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

KEPT = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_parameters")
EXPERTS, HIDDEN, INNER, RANK = 3, 4, 5, 2


class Experts(nn.Module):
    """Every expert on every token, one after the other; `is_transposed`: the parameters are [E, in, out]."""

    def __init__(self, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        shape = (lambda i, o: (EXPERTS, i, o)) if is_transposed else (lambda i, o: (EXPERTS, o, i))
        self.up = nn.Parameter(torch.randn(shape(HIDDEN, INNER)))
        self.down = nn.Parameter(torch.randn(shape(INNER, HIDDEN)))

    def forward(self, x):
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        for e in range(EXPERTS):
            x = torch.tanh(x @ up[e]) @ down[e]
        return x


class Layer(nn.Module):
    def __init__(self, is_transposed):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.experts = Experts(is_transposed)

    def forward(self, x):
        return self.experts(self.gate(x))


def numbers(tensor):
    return {
        "shape": list(tensor.shape),
        "data": [float(f"{v:.9g}") for v in tensor.detach().double().flatten().tolist()],
    }


def wrappers(model):
    return [(n, m) for n, m in model.named_modules() if type(m).__name__ == "ParamWrapper"]


def case(model, inputs, **config):
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=3, init_lora_weights=False, **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter).mul(0.5))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        file = load_file(folder + "/adapter_model.safetensors")
        description = json.loads(pathlib.Path(folder, "adapter_config.json").read_text())
    prefix = "base_model.model."
    result = {
        "config": {k: description[k] for k in KEPT if description.get(k)},
        "file": {name.removeprefix(prefix): list(tensor.shape) for name, tensor in file.items()},
        "parameters": {},  # of the model, with the values of factors and of small bases
        "changes": {},  # by module: the parameter, the scale, and each expert's change [E, out, in]
    }
    for name, parameter in model.named_parameters():
        entry = numbers(parameter) if "lora_" in name or inputs is not None else {"shape": list(parameter.shape)}
        result["parameters"][name.removeprefix(prefix)] = entry
    for name, module in wrappers(model):
        change = module.get_delta_weight("default")
        if change.dim() == 2:
            change = change.unsqueeze(0)
        elif getattr(module.get_base_layer(), "is_transposed", False):
            change = change.mT
        result["changes"][name.removeprefix(prefix)] = {
            "parameter": module.parameter_name,
            "scale": module.scaling["default"],
            "change": numbers(change),
        }
    if inputs is not None:
        result["input"] = numbers(inputs)
        result["output"] = numbers(model(inputs))
    return result


def main():
    torch.manual_seed(0)
    inputs = torch.randn(2, HIDDEN)
    parameters = ["experts.up", "experts.down"]
    mixtral = MixtralConfig(
        vocab_size=8, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=EXPERTS, num_experts_per_tok=2, max_position_embeddings=8,
    )  # fmt: skip
    cases = {
        "plain": case(Layer(False), inputs, target_modules=["gate"], target_parameters=parameters),
        "transposed": case(Layer(True), inputs, target_modules=[], target_parameters=parameters),
        "one": case(
            Layer(False), inputs, target_modules=[], target_parameters=parameters[1:], rank_pattern={"down": 1}
        ),
        "mixtral": case(MixtralForCausalLM(mixtral), None, target_modules="all-linear"),
    }
    path = pathlib.Path(__file__).with_name("experts_golden.json")
    path.write_text(json.dumps(cases, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
