#!/usr/bin/env python3
"""Regenerates golden/smollm2_expected.safetensors: what Python's transformers makes of a page of text with SmolLM2.

    python3 -m pip install torch transformers safetensors     # written by transformers 5.24, torch 2.13
    python3 make_smollm2_golden.py FOLDER TEXT                # FOLDER as prepare_smollm2.py writes it

tokens [1, 512] of the text, their negative log-probabilities [1, 511] and, with the first 32 tokens as a prompt, what
follows greedily.
"""

import pathlib
import sys
import time

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

LENGTH, PROMPT, NEW_TOKENS = 512, 32, 24


def main(folder: str, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = tokenizer(pathlib.Path(text).read_text(), return_tensors="pt")["input_ids"][:, :LENGTH]
    with torch.no_grad():
        model(tokens)
        start = time.perf_counter()
        logits = model(tokens).logits
        seconds = time.perf_counter() - start
        losses = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none").unsqueeze(0)
        begin = time.perf_counter()
        made = model.generate(tokens[:, :PROMPT], do_sample=False, max_new_tokens=NEW_TOKENS)[:, PROMPT:]
        generating = time.perf_counter() - begin
    print(
        f"{tokens.size(1)} tokens, perplexity {losses.mean().exp():.5f}; read {tokens.size(1) / seconds:.0f} and "
        f"wrote {made.size(1) / generating:.1f} tokens/s\n{tokenizer.decode(tokens[0, :PROMPT])!r} goes on\n"
        f"{tokenizer.decode(made[0])!r}"
    )
    out = pathlib.Path(__file__).parent / "golden" / "smollm2_expected.safetensors"
    save_file({"tokens": tokens, "losses": losses, "generated": made}, out)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
