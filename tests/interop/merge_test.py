#!/usr/bin/env python3
"""`finetune merge` against PEFT: the same weights, bit for bit, as merge_and_unload() makes.

    merge_test.py PROGRAM          # the program finetune

- Of linear layers in every dtype of the base, of embeddings in float32: in halves PEFT rounds ΔW of an embedding to the
  base's dtype before it adds it, and `finetune merge` adds first. Of one matrix for embedding and output PEFT changes
  both uses.
- PEFT's own safe_merge=True rounds ΔW of linear layers first as well: how many weights then differ, over sizes of ΔW.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile
import warnings

import interop_test  # finds a Python with torch and peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

OPTIONS = interop_test.DECODER | dict(hidden_size=48, intermediate_size=80, head_dim=12, tie_word_embeddings=False)
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
CASES = {
    "plain": dict(r=4, lora_alpha=6, target_modules="all-linear"),
    "patterns": dict(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"q_proj": 7},
        alpha_pattern={"down_proj": 5},
        use_rslora=True,
    ),
    "vocabulary": dict(r=4, lora_alpha=6, target_modules=["embed_tokens", "lm_head", "q_proj", "up_proj"]),
    "embedding": dict(r=5, lora_alpha=3, target_modules=["embed_tokens"], use_rslora=True),
}

# ‖ΔW‖ / ‖W‖ of every layer: the share of changed bfloat16 weights in which safe_merge=True differs, from and to. Of
# 60,000 weights it is sharp to 0.2 %; it grows up to twice W's size, and is a quarter where W hardly counts.
SHARES = {1 / 256: (0.008, 0.018), 1 / 16: (0.06, 0.085), 1 / 2: (0.19, 0.27), 2: (0.28, 0.33), 64: (0.23, 0.28)}


def merged_both(program: str, folder: pathlib.Path, dtype: torch.dtype, adapter: dict, change, tied=False) -> tuple:
    """Weights of the base, of `finetune merge`, and of PEFT by safe_merge; `change` gives the adapter its values."""
    model = interop_test.build("LlamaForCausalLM", OPTIONS | dict(tie_word_embeddings=tied))
    model.to(dtype).save_pretrained(folder / "base")
    base = lambda: transformers.LlamaForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    adapted = get_peft_model(base().float(), LoraConfig(**adapter))  # factors in float, as training keeps them
    with torch.no_grad():
        change(adapted)
    adapted.save_pretrained(folder / "adapter")
    subprocess.run(
        [program, "merge", "--model", folder / "base", "--adapter", folder / "adapter", "--out", folder / "merged"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    peft = {
        safe: PeftModel.from_pretrained(base(), folder / "adapter", autocast_adapter_dtype=True)
        .merge_and_unload(safe_merge=safe)
        .state_dict()
        for safe in (False, True)
    }
    interop_test.read("LlamaForCausalLM", folder / "merged")  # nothing is missing, nothing too much
    return base().state_dict(), load_file(folder / "merged/model.safetensors"), peft


def draw(adapted: PeftModel) -> None:
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.normal_(0, 0.2)


def compare(program: str, folder: pathlib.Path, dtype: torch.dtype, adapter: dict) -> None:
    before, found, peft = merged_both(program, folder, dtype, adapter, draw)
    assert set(found) == set(peft[False])
    changed = [key for key in found if not torch.equal(found[key], before[key])]
    assert len(changed) >= (1 if folder.name.startswith("embedding") else 6), changed
    assert (EMBEDDING in changed) == ("embed_tokens" in adapter["target_modules"])
    rounded_first = EMBEDDING in changed and dtype != torch.float32
    for key, weight in peft[False].items():
        assert found[key].dtype == dtype, key
        if key != EMBEDDING or not rounded_first:
            assert torch.equal(found[key], weight), f"{folder.name}: {key} is not PEFT's"
    if rounded_first:
        factors = load_file(folder / "adapter/adapter_model.safetensors")
        a, b = (factors[f"base_model.model.model.embed_tokens.lora_embedding_{name}"] for name in "AB")
        rank, alpha = adapter["r"], adapter["lora_alpha"]
        delta = (b @ a).T * (alpha / rank**0.5 if adapter.get("use_rslora") else alpha / rank)
        assert torch.equal(found[EMBEDDING], (before[EMBEDDING].float() + delta).to(dtype)), "not rounded once"
        assert torch.equal(peft[False][EMBEDDING], before[EMBEDDING] + delta.to(dtype)), "PEFT has changed"
        assert not torch.equal(found[EMBEDDING], peft[False][EMBEDDING])
    print(
        f"{folder.name}: {len(changed)} weights are PEFT's"
        + (", the embedding but for PEFT's rounding of ΔW" if rounded_first else "")
    )


def compare_tied(program: str, folder: pathlib.Path, target: str) -> None:
    """Of a matrix that is embedding and output in one, PEFT changes both uses, `finetune merge` that of the adapter."""
    adapter = dict(r=4, lora_alpha=6, target_modules=[target])
    before, found, peft = merged_both(program, folder, torch.float32, adapter, draw, tied=True)
    own, other = (EMBEDDING, OUTPUT) if target == "embed_tokens" else (OUTPUT, EMBEDDING)
    assert not torch.equal(before[own], peft[False][own])
    assert torch.equal(peft[False][own], peft[False][other]), "PEFT has changed"
    assert torch.equal(found[own], peft[False][own])
    assert torch.equal(found[other], before[other])
    print(f"{folder.name}: its own use is PEFT's, the other the base's")


def compare_several(program: str, folder: pathlib.Path) -> None:
    """Of two adapters PEFT rounds after each, `finetune merge` once. In float32, where sums are made, that is one."""
    for dtype in (torch.float32, torch.bfloat16):
        own = folder / str(dtype)
        before, _, _ = merged_both(program, own / "second", dtype, CASES["plain"], draw)
        shutil.copytree(own / "second/base", own / "base")
        base = transformers.LlamaForCausalLM.from_pretrained(own / "base", dtype=dtype)
        adapted = get_peft_model(base, LoraConfig(**CASES["plain"]))
        with torch.no_grad():
            draw(adapted)
        adapted.save_pretrained(own / "first")
        adapted.load_adapter(own / "second/adapter", "second")
        deltas = [
            {
                f"{name.removeprefix('base_model.model.')}.weight": module.get_delta_weight(adapter)
                for name, module in adapted.named_modules()
                if hasattr(module, "lora_B")
            }
            for adapter in ("default", "second")
        ]
        peft = adapted.merge_and_unload(adapter_names=["default", "second"]).state_dict()
        subprocess.run(
            [
                program,
                "merge",
                "--model",
                own / "base",
                "--adapter",
                own / "first",
                "--adapter",
                own / "second/adapter",
                "--out",
                own / "merged",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        found = load_file(own / "merged/model.safetensors")
        for key, delta in deltas[0].items():
            first = before[key].float() + delta
            assert torch.equal(found[key], (first + deltas[1][key]).to(dtype)), f"{key}: not rounded once"
            assert torch.equal(peft[key], (first.to(dtype).float() + deltas[1][key]).to(dtype)), "PEFT has changed"
            assert torch.equal(found[key], peft[key]) == (dtype == torch.float32), key
        print(f"several {dtype}: {len(deltas[0])} weights of two adapters are rounded once")


def share_of_safe_merge(program: str, folder: pathlib.Path, dtype: torch.dtype, size: float) -> float:
    """The share of changed weights in which safe_merge=True differs, where ‖ΔW‖ is `size` times ‖W‖ in every layer."""

    def change(adapted: PeftModel) -> None:
        draw(adapted)
        for module in adapted.modules():
            if hasattr(module, "lora_B"):
                ratio = module.get_base_layer().weight.norm() / module.get_delta_weight("default").norm()
                module.lora_B["default"].weight.mul_(size * ratio)

    adapter = dict(r=16, lora_alpha=8, target_modules="all-linear")
    before, found, peft = merged_both(program, folder, dtype, adapter, change)
    changed = sum((found[key] != before[key]).sum().item() for key in found)
    different = sum(((found[key] != peft[True][key]) & (found[key] != before[key])).sum().item() for key in found)
    return different / max(changed, 1)


def main(program: str) -> int:
    for message in ("Model (with|has) `tie_word_embeddings=True`", "Setting `save_embedding_layers` to `True`"):
        warnings.filterwarnings("ignore", message=message)  # these are meant
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        work = pathlib.Path(name)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for case, adapter in CASES.items():
                compare(program, work / f"{case} {dtype}", dtype, adapter)
        compare_several(program, work / "several")
        for target in ("embed_tokens", "lm_head"):
            compare_tied(program, work / f"tied {target}", target)
        assert share_of_safe_merge(program, work / "float", torch.float32, 1 / 2) == 0
        for size, (least, most) in SHARES.items():
            share = share_of_safe_merge(program, work / f"size {size}", torch.bfloat16, size)
            print(f"ΔW {size} times as large as W: with safe_merge=True {share:.1%} of the changed weights differ")
            assert least <= share <= most, f"expected {least} to {most}"
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
