#!/usr/bin/env python3
"""`finetune merge` against PEFT: the same weights, bit for bit, as merge_and_unload() makes, in every dtype of the base.

    merge_test.py PROGRAM          # the program finetune

PEFT's own safe_merge=True rounds ΔW to the base's dtype before it adds it: then the last bits differ.
"""

import pathlib
import subprocess
import sys
import tempfile

import interop_test  # finds a Python with torch and peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

CASES = {"plain": dict(r=4, lora_alpha=6, target_modules="all-linear"),
         "patterns": dict(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 7},
                          alpha_pattern={"down_proj": 5}, use_rslora=True)}


def main(program: str) -> int:
    torch.manual_seed(0)
    options = interop_test.DECODER | dict(hidden_size=48, intermediate_size=80, head_dim=12, tie_word_embeddings=False)
    with tempfile.TemporaryDirectory() as work:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for name, adapter in CASES.items():
                folder = pathlib.Path(work) / f"{name} {dtype}"
                interop_test.build("LlamaForCausalLM", options).to(dtype).save_pretrained(folder / "base")
                base = lambda: transformers.LlamaForCausalLM.from_pretrained(folder / "base", dtype=dtype)
                adapted = get_peft_model(base().float(), LoraConfig(**adapter))  # factors in float, as training keeps them
                with torch.no_grad():
                    for parameter in adapted.parameters():
                        if parameter.requires_grad:
                            parameter.normal_(0, 0.2)
                adapted.save_pretrained(folder / "adapter")
                subprocess.run([program, "merge", "--model", folder / "base", "--adapter", folder / "adapter", "--out",
                                folder / "merged"], check=True, stdout=subprocess.DEVNULL)
                found, before = load_file(folder / "merged/model.safetensors"), base().state_dict()
                merged = {safe: PeftModel.from_pretrained(base(), folder / "adapter", autocast_adapter_dtype=True)
                          .merge_and_unload(safe_merge=safe).state_dict() for safe in (False, True)}
                assert set(found) == set(merged[False])
                changed = [key for key in found if not torch.equal(found[key], before[key])]
                assert len(changed) >= 6, changed
                for key, weight in merged[False].items():
                    assert found[key].dtype == dtype, key
                    assert torch.equal(found[key], weight), f"{folder.name}: {key} is not PEFT's"
                share = sum((found[key] != merged[True][key]).sum().item() for key in changed)
                share /= sum(found[key].numel() for key in changed)
                assert (share > 0.05) == (dtype != torch.float32), share
                interop_test.read("LlamaForCausalLM", folder / "merged")  # nothing is missing, nothing too much
                print(f"{folder.name}: {len(changed)} weights are PEFT's; with safe_merge=True {share:.0%} of elements differ")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
