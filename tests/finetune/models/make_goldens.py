#!/usr/bin/env python3
"""Regenerates golden/: tiny random models and what Python's transformers makes of them.

    python3 -m pip install torch transformers safetensors     # written by transformers 5.24, torch 2.13
    python3 make_goldens.py

One folder a model, with its config.json and model.safetensors, and expected.safetensors: inputs, logits, gradients of
LoRA factors, and the tokens of greedy generation. The LoRA layer is the formula itself, y = W x + s B A x.
"""

import json
import pathlib
import shutil

import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = pathlib.Path(__file__).parent / "golden"
RANK, SCALE, NEW_TOKENS = 2, 1.5, 8

DECODER = dict(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GEMMA = DECODER | dict(head_dim=8, num_key_value_heads=1)
T5 = dict(
    vocab_size=48,
    d_model=16,
    d_kv=4,
    d_ff=24,
    num_layers=2,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
    decoder_start_token_id=0,
    pad_token_id=0,
    eos_token_id=1,
)


def rope(kind: str, **more) -> dict:
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=100.0, **more))


LLAMA3 = rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)

MODELS = {
    "llama": ("Llama", DECODER | dict(tie_word_embeddings=False)),
    "llama_tied_llama3": ("Llama", DECODER | dict(tie_word_embeddings=True, eos_token_id=[2, 21]) | LLAMA3),
    "llama_linear_biases": (
        "Llama",
        DECODER
        | dict(num_key_value_heads=4, head_dim=6, attention_bias=True, mlp_bias=True)
        | rope("linear", factor=3.0),
    ),
    "llama_dynamic": ("Llama", DECODER | dict(max_position_embeddings=7) | rope("dynamic", factor=2.0)),
    "gemma": ("Gemma", GEMMA),
    "gemma2": (
        "Gemma2",
        GEMMA
        | dict(sliding_window=4, query_pre_attn_scalar=12, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    ),
    "gemma2_uncapped": (
        "Gemma2",
        GEMMA
        | dict(
            sliding_window=4,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            layer_types=["full_attention", "sliding_attention"],
        ),
    ),
    "t5": ("T5", T5 | dict(feed_forward_proj="relu", num_decoder_layers=3)),
    "t5_gated": ("T5", T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "mt5": ("MT5", T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, eos_token_id=21)),
}

# A few layers of every kind: attention, feed-forward, cross-attention, first and last.
ADAPTED = {
    "decoder": [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.down_proj",
    ],
    "t5": [
        "encoder.block.0.layer.0.SelfAttention.q",
        "encoder.block.1.layer.1.DenseReluDense.wo",
        "decoder.block.0.layer.0.SelfAttention.k",
        "decoder.block.0.layer.1.EncDecAttention.v",
        "decoder.block.1.layer.1.EncDecAttention.q",
        "decoder.block.1.layer.2.DenseReluDense.wo",
    ],
}


def build(kind: str, options: dict, generator: torch.Generator):
    config = getattr(transformers, kind + "Config")(**options)
    # Softcaps exist in the eager attention only; for the others it is the plainest formula.
    config._attn_implementation = "eager"
    t5 = kind.endswith("T5")
    model = getattr(transformers, kind + ("ForConditionalGeneration" if t5 else "ForCausalLM"))(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(0.2 * noise + (0 if kind.startswith("Gemma") else 1))
            elif "embed" in name or name == "shared.weight":
                parameter.copy_(noise * (0.5 if t5 or not kind.startswith("Gemma") else 0.25))
            else:
                parameter.copy_(0.3 * noise)
    if options.get("tie_word_embeddings") is False and t5:
        # As published: transformers ties whatever the option says, unless the file holds an output matrix of its own.
        model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn(model.shared.weight.shape, generator=generator))
    return model.eval()


def inject(model, names: list[str], generator: torch.Generator) -> dict[str, torch.Tensor]:
    factors = {}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in names:
        layer = model.get_submodule(name)
        a = (0.4 * torch.randn(RANK, layer.in_features, generator=generator)).requires_grad_()
        b = (0.4 * torch.randn(layer.out_features, RANK, generator=generator)).requires_grad_()
        factors[name + ".lora_A.weight"], factors[name + ".lora_B.weight"] = a, b

        def forward(x, layer=layer, a=a, b=b):
            return torch.nn.functional.linear(x, layer.weight, layer.bias) + SCALE * (x @ a.T) @ b.T

        layer.forward = forward
    return factors


def padded(length: int, paddings: list[int], side: str) -> torch.Tensor:
    mask = torch.ones(len(paddings), length, dtype=torch.bool)
    for row, padding in enumerate(paddings):
        if padding:
            mask[row, :padding] = side == "right"
            mask[row, -padding:] = side == "left"
    return mask


def logits_of(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    names = {
        "tokens": "input_ids",
        "mask": "attention_mask",
        "target": "decoder_input_ids",
        "target_mask": "decoder_attention_mask",
    }
    return model(use_cache=False, **{names[name]: value.long() for name, value in inputs.items()}).logits


def make(name: str, kind: str, options: dict) -> None:
    generator = torch.Generator().manual_seed(len(name) * 1000 + ord(name[-1]))
    t5 = kind.endswith("T5")
    model = build(kind, options, generator)
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if kind.endswith("T5") and options.get("tie_word_embeddings") is False:
        config = json.loads((folder / "config.json").read_text())
        # What the published files say; transformers writes its own idea of it.
        config["tie_word_embeddings"] = False
        config.pop("scale_decoder_outputs", None)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        again = type(model).from_pretrained(folder, attn_implementation="eager").eval()
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
        model = again

    result = {}
    tokens = torch.randint(3, 48, (3, 9), generator=generator)
    inputs = {"tokens": tokens}
    if t5:
        inputs["target"] = torch.cat(
            [torch.zeros(3, 1, dtype=torch.long), torch.randint(3, 48, (3, 6), generator=generator)], 1
        )
    with torch.no_grad():
        result |= inputs | {"logits": logits_of(model, inputs)}
        for side in ("left", "right"):
            masks = {"mask": padded(9, [0, 3, 5], side)}
            if t5 and side == "right":
                masks["target_mask"] = padded(7, [2, 0, 3], side)
            result |= {f"{side}.{key}": value for key, value in masks.items()}
            result[f"{side}.logits"] = logits_of(model, inputs | masks)
        mask = result["left.mask"]
        if name != "llama_dynamic":
            # transformers' cache knows no decoder that is deeper than its encoder.
            made = model.generate(
                input_ids=tokens,
                attention_mask=mask.long(),
                do_sample=False,
                num_beams=1,
                max_new_tokens=NEW_TOKENS,
                use_cache=not options.get("num_decoder_layers"),
            )
            result["generated"] = made[:, 1:] if t5 else made[:, tokens.size(1) :]

    factors = inject(model, ADAPTED["t5" if t5 else "decoder"], generator)
    logits = logits_of(model, inputs | {"mask": result["left.mask"]})
    real = torch.ones_like(logits[..., 0]) if t5 else result["left.mask"].float()
    weights = torch.randn(logits.shape, generator=generator) * real.unsqueeze(-1)
    loss = (logits * weights).sum()
    gradients = torch.autograd.grad(loss, list(factors.values()))
    result |= {"lora.logits": logits.detach(), "lora.weights": weights}
    for (key, factor), gradient in zip(factors.items(), gradients):
        result |= {"factor." + key: factor.detach(), "gradient." + key: gradient}
    save_file({key: value.contiguous() for key, value in result.items()}, folder / "expected.safetensors")
    print(
        name,
        f"logits' deviation {result['logits'].std().item():.3f}",
        "generated",
        result.get("generated", torch.zeros(0)).tolist(),
    )


def make_sharded() -> None:
    """The model "llama" in two files."""
    folder = HERE / "llama_sharded"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(HERE / "llama" / "config.json", folder)
    tensors = load_file(HERE / "llama" / "model.safetensors")
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    where = {name: files[index % 2] for index, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({name: tensors[name] for name in where if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}, indent=1) + "\n")


if __name__ == "__main__":
    for model_name, (model_kind, model_options) in MODELS.items():
        make(model_name, model_kind, model_options)
    make_sharded()
