#!/usr/bin/env python3
"""Our adapters in llama.cpp: its own convert_lora_to_gguf.py takes a folder of ours, and its package gguf reads what
we wrote.

    LLAMA_CPP=CHECKOUT llama_cpp_test.py PROGRAM     # PROGRAM is interop.cpp, compiled

CHECKOUT is a checkout of llama.cpp, or the folder vendor/llama.cpp in the source package of llama-cpp-python; without
it the test is skipped. C++ gives a tiny random Llama or Gemma an adapter and writes it; the script converts that by
the command that docs/merge.md has; each layer's ΔW = alpha / rank · B A, as llama.cpp computes it, is PEFT's.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

checkout = os.environ.get("LLAMA_CPP", "")
if not checkout:
    print("skipped: LLAMA_CPP names no checkout of llama.cpp")
    sys.exit(77)

import interop_test  # noqa: E402  finds a Python with torch and peft

sys.path.insert(1, str(pathlib.Path(checkout) / "gguf-py"))
try:
    import gguf
except ImportError as error:
    print(f"skipped: {checkout}/gguf-py cannot be imported ({error})")
    sys.exit(77)

import torch  # noqa: E402
from peft import LoraConfig  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

# What the file calls the layers that llama.cpp calls otherwise.
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate": "mlp.gate_proj",
}
HEADS = {"attn_q": 4, "attn_k": 2}  # of the Llama: its rotary embedding takes neighbouring pairs of a head's rows there


def as_in_checkpoint(delta: torch.Tensor, heads: int) -> torch.Tensor:
    """Undoes the converter's order of a head's rows: row 2 i + h there is row h · size / 2 + i here."""
    rows = delta.shape[0] // heads
    return delta.view(heads, rows // 2, 2, -1).transpose(1, 2).reshape(delta.shape)


def convert(adapter: pathlib.Path, base: pathlib.Path, out: pathlib.Path) -> None:
    script = pathlib.Path(checkout) / "convert_lora_to_gguf.py"
    command = [sys.executable, str(script), "--base", str(base), "--outfile", str(out), str(adapter)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def check(made: pathlib.Path, converted: pathlib.Path, architecture: str) -> None:
    config = LoraConfig.from_pretrained(made)
    reader = gguf.GGUFReader(converted)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kinds = tuple(fields[name] for name in ("general.architecture", "general.type", "adapter.type"))
    assert kinds == (architecture, "adapter", "lora"), fields
    alpha = fields["adapter.lora.alpha"]
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    ours = load_file(made / "adapter_model.safetensors")
    assert len(tensors) == len(ours) > 0, (sorted(tensors), sorted(ours))
    for name in (name for name in tensors if name.endswith(".lora_a")):
        _, layer, kind = name.removesuffix(".weight.lora_a").split(".")
        a, b = tensors[name], tensors[name.removesuffix("a") + "b"]
        delta = alpha / a.shape[0] * b @ a
        if kind in HEADS and architecture == "llama":
            delta = as_in_checkpoint(delta, HEADS[kind])
        module = f"base_model.model.model.layers.{layer}.{NAMES[kind]}"
        rank = ours[module + ".lora_A.weight"].shape[0]
        scale = config.lora_alpha / (rank**0.5 if config.use_rslora else rank)
        expected = scale * ours[module + ".lora_B.weight"] @ ours[module + ".lora_A.weight"]
        assert expected.abs().max() > 1e-3, module
        assert (delta - expected).abs().max() <= 1e-6 * expected.abs().max(), module


def main(program: str) -> int:
    torch.manual_seed(0)
    everywhere = dict(r=4, lora_alpha=6, target_modules="all-linear")
    adapters = {
        "llama": ("llama", everywhere),
        "gemma": ("gemma", everywhere),
        "two ranks": (
            "llama",
            dict(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}),
        ),
        "pissa": ("llama", dict(r=3, lora_alpha=5, target_modules=["k_proj", "down_proj"], init_lora_weights="pissa")),
        "rslora": ("llama", everywhere | dict(use_rslora=True)),
    }
    with tempfile.TemporaryDirectory() as work:
        for name, (architecture, theirs) in adapters.items():
            kind, options, ours, _ = interop_test.CASES[architecture]
            folder = pathlib.Path(work) / name
            folder.mkdir()
            interop_test.build(kind, options).save_pretrained(folder / "model")
            interop_test.prepare(folder, kind, interop_test.read(kind, folder / "model"), ours, theirs)
            subprocess.run([program, str(folder)], check=True)
            base = folder / "config alone"  # no weights, no tokenizer: what the script's --base needs
            base.mkdir()
            (base / "config.json").write_bytes((folder / "model/config.json").read_bytes())
            given = folder / "made"
            if theirs.get("use_rslora"):  # the script knows lora_alpha alone: docs/merge.md says what to write there
                given = shutil.copytree(given, folder / "given")
                config = json.loads((given / "adapter_config.json").read_text())
                config |= dict(use_rslora=False, lora_alpha=config["lora_alpha"] * config["r"] ** 0.5)
                (given / "adapter_config.json").write_text(json.dumps(config))
            convert(given, base, folder / "adapter.gguf")
            check(folder / "made", folder / "adapter.gguf", architecture)
            print(f"{name}: llama.cpp's ΔW is ours")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
