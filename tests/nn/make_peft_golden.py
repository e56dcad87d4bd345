#!/usr/bin/env python3
"""Regenerates peft_golden.json: what Python's PEFT computes, and what it calls things.

    python3 -m pip install torch==2.13.0 transformers==5.24.0 peft==0.21.2
    python3 make_peft_golden.py

- layers: forward, gradients of the factors and merged weight of single layers
- names: which modules of real architectures a configuration means, with ranks and alphas
- model: the parameters' names, what is trained, and the file's names for a small model
"""

import json
import pathlib
import warnings

import torch
from peft import LoraConfig, TaskType, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

HERE = pathlib.Path(__file__).parent
warnings.simplefilter("ignore")


def numbers(tensor: torch.Tensor) -> dict:
    return {"shape": list(tensor.shape), "data": tensor.detach().double().flatten().tolist()}


class One(nn.Module):
    """A model that is one layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def layer_case(make_base, x, adapters, dtype=torch.float64, active=None) -> dict:
    """`adapters`: the arguments of LoraConfig by name; factors are drawn so that no gradient is zero."""
    torch.manual_seed(0)
    base = make_base().to(dtype)
    case = {"base": {k: numbers(v) for k, v in base.state_dict().items()}, "x": numbers(x), "adapters": {}}
    names = list(adapters)
    config = lambda name: LoraConfig(target_modules=["layer"], **adapters[name])
    model = get_peft_model(One(base), config(names[0]), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config(name))
    model.base_model.set_adapter(active or names)
    layer = model.base_model.model.layer
    for name in names:
        embedding = isinstance(base, nn.Embedding)
        a = layer.lora_embedding_A[name] if embedding else layer.lora_A[name].weight
        b = layer.lora_embedding_B[name] if embedding else layer.lora_B[name].weight
        with torch.no_grad():
            for factor in (a, b):
                factor.copy_(0.5 * torch.randn(factor.shape))
        case["adapters"][name] = {
            "rank": layer.r[name],
            "alpha": layer.lora_alpha[name],
            "rslora": layer.use_rslora[name],
            "scale": layer.scaling[name],
            "a": numbers(a),
            "b": numbers(b),
            "factors": (a, b),
            "dtype": str(a.dtype),
        }
    y = model(x)
    weights = torch.randn(y.shape).double()
    (y.double() * weights).sum().backward()
    case |= {"active": active or names, "y": numbers(y), "loss_weights": numbers(weights)}
    for adapter in case["adapters"].values():
        for key, factor in zip("ab", adapter.pop("factors")):
            if factor.grad is not None:
                adapter[f"grad_{key}"] = numbers(factor.grad)
    layer.merge()
    case["merged"] = numbers(base.weight)
    case["merged_y"] = numbers(model(x))
    return case


def pissa_case() -> dict:
    torch.manual_seed(1)
    base = nn.Linear(7, 5)
    case = {"weight": numbers(base.weight)}
    config = LoraConfig(r=3, lora_alpha=6, init_lora_weights="pissa", target_modules=["layer"])
    layer = get_peft_model(One(base), config).base_model.model.layer
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return case | {
        "rank": 3,
        "alpha": 6,
        "residual": numbers(base.weight),
        "product": numbers(b @ a),
        "gram_a": numbers(a @ a.T),
        "gram_b": numbers(b.T @ b),
    }


def make_layers() -> dict:
    torch.manual_seed(2)
    x = torch.randn(4, 6, dtype=torch.float64)
    x3 = torch.randn(2, 3, 6, dtype=torch.float64)
    image = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    ids = torch.tensor([[1, 4, 0], [2, 1, 8]])
    two = {"default": dict(r=2, lora_alpha=3), "other": dict(r=3, lora_alpha=5)}
    one = {"default": dict(r=2, lora_alpha=3)}
    linear = lambda: nn.Linear(6, 5)
    return {
        "linear": layer_case(linear, x, one),
        "linear_no_bias_3d": layer_case(lambda: nn.Linear(6, 5, bias=False), x3, one),
        "linear_rslora": layer_case(linear, x, {"default": dict(r=3, lora_alpha=4, use_rslora=True)}),
        "linear_two_active": layer_case(linear, x, two),
        "linear_one_of_two": layer_case(linear, x, two, active=["other"]),
        "linear_bfloat16_base": layer_case(linear, x.bfloat16(), one, dtype=torch.bfloat16),
        "embedding": layer_case(lambda: nn.Embedding(9, 4), ids, one),
        "embedding_padding": layer_case(lambda: nn.Embedding(9, 4, padding_idx=1), ids, one),
        "conv": layer_case(lambda: nn.Conv2d(3, 4, 3), image, one),
        "conv_stride_padding": layer_case(lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 2)), image, two),
        "conv_1x1_rslora": layer_case(
            lambda: nn.Conv2d(3, 4, 1, bias=False), image, {"default": dict(r=4, lora_alpha=2, use_rslora=True)}
        ),
    }


class Experts(nn.Module):
    """Numbers inside of numbers, and a list that has nothing before it."""

    def __init__(self):
        super().__init__()
        layer = lambda: nn.ModuleDict(
            {"experts": nn.ModuleList(nn.ModuleDict({"up": nn.Linear(2, 2)}) for _ in range(3))}
        )
        self.model = nn.ModuleDict({"layers": nn.ModuleList(layer() for _ in range(3))})
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(2, 2)}) for _ in range(2))
        self.startup = nn.Linear(2, 2)


def make_names() -> dict:
    small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=12, num_attention_heads=2, vocab_size=16)
    models = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**small)),
        "bert": lambda: BertForSequenceClassification(BertConfig(**(small | {"num_hidden_layers": 2}))),
        "t5": lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
        ),
        "experts": Experts,
    }
    cases = [
        ("llama", dict(target_modules=["q_proj", "v_proj"])),
        ("llama", dict(target_modules=["proj"])),
        ("llama", dict(target_modules=["model.layers.3.self_attn.q_proj", "1.mlp.up_proj"])),
        ("llama", dict(target_modules="all-linear")),
        ("llama", dict(target_modules="ALL-Linear", exclude_modules=["down_proj", "layers.2.mlp.up_proj"])),
        ("llama", dict(target_modules=r".*\.(q|k)_proj")),
        ("llama", dict(target_modules=r"model\.layers\.[1-3]\.mlp\.\w+_proj")),
        ("llama", dict(target_modules=r"q_proj")),
        ("llama", dict(target_modules=["q_proj", "lm_head", "embed_tokens"], exclude_modules=r"model\.layers\.\d\..*")),
        ("llama", dict(target_modules=["q_proj"], layers_to_transform=[1, 11])),
        ("llama", dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[1], layers_pattern=["layers"])),
        ("llama", dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern=["blocks", "layers"])),
        ("llama", dict(target_modules=["q_proj", "model.layers.4.mlp.up_proj"], layers_to_transform=[1])),
        (
            "llama",
            dict(
                target_modules=["q_proj", "v_proj"],
                rank_pattern={"q_proj": 3, r"layers\.1\.self_attn\..*": 5},
                alpha_pattern={r"model\.layers\.2\.self_attn\.v_proj": 7, "proj": 9, r"1\.self_attn\.q_proj": 2},
            ),
        ),
        ("bert", dict(target_modules="all-linear", task_type=TaskType.SEQ_CLS)),
        ("bert", dict(target_modules=["query", "dense", "word_embeddings"], exclude_modules=["pooler.dense"])),
        ("bert", dict(target_modules=["attention.self.query", "output.dense"])),
        ("t5", dict(target_modules=["q", "v"])),
        ("t5", dict(target_modules=["o", "shared"], exclude_modules=r"decoder\..*")),
        ("experts", dict(target_modules=["up"])),
        ("experts", dict(target_modules=["up"], layers_to_transform=[1])),
        ("experts", dict(target_modules=["up"], layers_to_transform=[1], layers_pattern=["layers"])),
        ("experts", dict(target_modules=["up"], layers_to_transform=[2], layers_pattern=["experts"])),
        # Expressions that only Python's re reads so.
        ("llama", dict(target_modules=r"\Amodel\.layers\.\d\..*(?<!v)_proj\Z")),
        (
            "llama",
            dict(
                target_modules=r"^(?!.*layers\.[^]1]\.).*(?P<kind>q|k)_proj$",
                rank_pattern={r"(?<=layers\.)1\..*": 5, r"(?<!layers)\.1\..*": 6, r"\060": 7},
                alpha_pattern={r"layers\.\060*1\..*k_proj\Z": 3, r"[^]1]\.self_attn\.q_proj": 9, "Q_proj": 8},
            ),
        ),
        ("llama", dict(target_modules=r"(?i)MODEL\.layers\.\u0031\..*_proj")),
        (
            "llama",
            dict(target_modules=["q_proj"], layers_to_transform=[1, 2], layers_pattern=["blocks", r"model\.lay\w+"]),
        ),
        ("llama", dict(target_modules=["q_proj"], layers_to_transform=[1, 2], layers_pattern=[r"layers$"])),
        ("experts", dict(target_modules=["up"], layers_to_transform=[2], layers_pattern=[r"model\.layers"])),
    ]
    kinds = {"Linear": "linear", "Embedding": "embedding"}
    result = {"trees": {}, "cases": []}
    for name, make in models.items():
        result["trees"][name] = [
            [key, kinds.get(type(module).__name__, "other")] for key, module in make().named_modules() if key
        ]
    for name, arguments in cases:
        case = {"tree": name} | {k: v for k, v in arguments.items() if k != "task_type"} | {"targets": []}
        try:
            tuned = get_peft_model(models[name](), LoraConfig(r=2, lora_alpha=4, **arguments)).base_model.model
        except ValueError as error:
            assert "not found" in str(error) or "No modules were targeted" in str(error), error
        else:
            for key, module in tuned.named_modules():
                if hasattr(module, "lora_alpha"):
                    case["targets"].append([key, module.r["default"], module.lora_alpha["default"]])
        for field in ("rank_pattern", "alpha_pattern"):  # as lists: the order counts
            case[field] = [list(item) for item in arguments.get(field, {}).items()]
        result["cases"].append(case)
    return result


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.conv = nn.Conv2d(1, 3, 2)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4, bias=False))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)


def make_model() -> tuple:
    result = []
    for arguments in (
        dict(),
        dict(bias="all"),
        dict(bias="lora_only"),
        dict(target_modules=["body.0", "head"]),
        dict(target_modules="all-linear", r=5),
    ):
        arguments = dict(r=2, lora_alpha=4, target_modules=["embed", "conv", "0", "2"]) | arguments
        model = get_peft_model(Small(), LoraConfig(**arguments))
        trainable, total = model.get_nb_trainable_parameters()
        text = (
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )  # print_trainable_parameters prints this
        result.append(
            arguments
            | {
                "parameters": {
                    k.removeprefix("base_model.model."): v.requires_grad for k, v in model.named_parameters()
                },
                "file": {
                    k.removeprefix("base_model.model."): list(v.shape)
                    for k, v in get_peft_model_state_dict(model).items()
                },
                "text": text,
            }
        )
    # Two adapters: the second one is there, and not trained.
    model = get_peft_model(Small(), LoraConfig(r=2, target_modules=["0", "embed"]))
    model.add_adapter("second one", LoraConfig(r=3, target_modules=["0", "head"]))
    flags = lambda: {k.removeprefix("base_model.model."): v.requires_grad for k, v in model.named_parameters()}
    before = flags()
    model.set_adapter("second one")
    return result, {"default": before, "second one": flags()}


def main() -> None:
    model, two = make_model()
    golden = {
        "layers": make_layers(),
        "pissa": pissa_case(),
        "names": make_names(),
        "model": model,
        "two_adapters": two,
    }
    (HERE / "peft_golden.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
