#!/usr/bin/env python3
"""Regenerates golden/peft/: adapters as PEFT writes them, and the logits that PEFT computes with them.

    python3 -m pip install torch==2.13.0 transformers==5.24.0 peft==0.21.2
    python3 make_adapter_goldens.py

The bases are those of models/golden/. Every adapter is read again by PeftModel.from_pretrained before the logits are
computed: what counts is what PEFT makes of its files. Beside adapter_config.json and adapter_model.safetensors stand
the logits (expected.safetensors), and case.json with the base's name.
"""

import json
import os
import pathlib
import shutil
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from peft import LoraConfig, PeftModel, VeloraConfig, get_peft_model
from safetensors.torch import load_file, save_file

HERE = pathlib.Path(__file__).parent
OUT = HERE / "golden" / "peft"
BASES = HERE / "models" / "golden"
KINDS = {
    "llama": "LlamaForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "t5": "T5ForConditionalGeneration",
}
warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# name: (base, LoraConfig's arguments, how much the base's own vocabulary is changed before the adapter is made)
CASES = {
    "llama_both": ("llama", dict(target_modules=["embed_tokens", "lm_head", "q_proj"], use_rslora=True), 0),
    "llama_other_base": ("llama", dict(target_modules=["embed_tokens", "lm_head"]), 0.3),
    "llama_saved": ("llama", dict(target_modules="all-linear", modules_to_save=["embed_tokens", "lm_head"]), 0),
    "llama_saved_below": (
        "llama",
        dict(target_modules=r".*_proj", exclude_modules=r".*k_proj", modules_to_save=["layers.1.mlp", "norm"]),
        0,
    ),
    "llama_velora": ("llama", dict(target_modules=["q_proj"], velora_config=VeloraConfig(num_groups=4)), 0),
    "tied_embedding": ("llama_tied_llama3", dict(target_modules=["embed_tokens", "v_proj"]), 0),
    "tied_output": ("llama_tied_llama3", dict(target_modules=["lm_head", "v_proj"]), 0),
    "tied_both": ("llama_tied_llama3", dict(target_modules=["lm_head", "embed_tokens"]), 0),
    "tied_other_base": ("llama_tied_llama3", dict(target_modules=["lm_head"]), 0.3),
    "tied_saved": ("llama_tied_llama3", dict(target_modules=["v_proj"], modules_to_save=["embed_tokens"]), 0),
    "gemma_embedding": ("gemma", dict(target_modules=["embed_tokens", "q_proj"]), 0),
    "gemma2_both": ("gemma2", dict(target_modules=["embed_tokens", "lm_head", "o_proj"]), 0),
    "t5_embeddings": ("t5", dict(target_modules=["embed_tokens", "q"]), 0),
    "t5_output": ("t5", dict(target_modules=["lm_head", "q"]), 0),
    "t5_untied_output": ("t5_gated", dict(target_modules=["lm_head", "wo"]), 0),
    "t5_shared": ("t5", dict(target_modules=["shared", "q"]), 0),
}


def load(base: str) -> torch.nn.Module:
    kind = KINDS[json.loads((BASES / base / "config.json").read_text())["model_type"]]
    return getattr(transformers, kind).from_pretrained(BASES / base, attn_implementation="eager").eval()


@torch.no_grad()
def logits_of(model: torch.nn.Module, base: str) -> torch.Tensor:
    batch = load_file(BASES / base / "expected.safetensors")
    if "target" in batch:
        return model(input_ids=batch["tokens"], decoder_input_ids=batch["target"], use_cache=False).logits
    return model(input_ids=batch["tokens"], use_cache=False).logits


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    for number, (name, (base, arguments, change)) in enumerate(CASES.items()):
        torch.manual_seed(number)
        model = load(base)
        plain = logits_of(model, base)
        with torch.no_grad():
            for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
                if change:
                    embedding.weight.add_(change * torch.randn(embedding.weight.shape))
        adapted = get_peft_model(model, LoraConfig(r=3, lora_alpha=4, **arguments))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape))
        folder = OUT / name
        adapted.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        description = json.loads((folder / "adapter_config.json").read_text())
        description["base_model_name_or_path"] = base
        for field in ("target_modules", "modules_to_save"):  # sets: their order is by chance
            if isinstance(description[field], list):
                description[field].sort()
        (folder / "adapter_config.json").write_text(json.dumps(description, indent=2) + "\n")
        logits = logits_of(PeftModel.from_pretrained(load(base), folder).eval(), base)
        effect = ((logits - plain).abs().max() / plain.abs().max()).item()
        assert (effect > 1e-2) or name == "t5_shared", name
        save_file({"logits": logits}, folder / "expected.safetensors")
        (folder / "case.json").write_text(json.dumps({"base": base}) + "\n")
        print(
            f"{name}: the logits change by {effect:.2f}; {len(load_file(folder / 'adapter_model.safetensors'))} tensors"
        )


if __name__ == "__main__":
    main()
