#!/usr/bin/env bash
# PEFT's tied adapters are stepped twice by every optimizer, each time by half of their gradient.
#
# Guess: with ensure_weight_tying=True the adapters of an embedding and of the head that shares its weight have common
# parameters, counted once, whose gradient is the sum over both layers.
# Found (PEFT 0.21.2, transformers 5.24.0, torch 2.13.0, on a CPU): the head's factors are parameters of their own, which
# are transposes of the embedding's and lie in the same memory. model.parameters() has both, the number of trainable
# parameters counts both, and each has the gradient of its own layer alone. AdamW keeps two states, steps the memory
# twice, and so moves entries by up to 2·lr in its first step; with the gradient of the one weight it moves them by lr.
# Weight decay is applied twice as well. Plain SGD does what the sum would do.
#
# Takes some minutes and 5 GB in a temporary folder. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip --disable-pip-version-check -q install peft==0.21.2 transformers==5.24.0 torch==2.13.0 numpy
cat >check.py <<'PYTHON'
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=True, **size))
config = LoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True, init_lora_weights=False)
model = get_peft_model(base, config)
embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
factor, twin = embedding.lora_embedding_B["default"], head.lora_A["default"].weight
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
entries = sum(embedding_factor["default"].numel() for embedding_factor in (embedding.lora_embedding_A, embedding.lora_embedding_B))

learning_rate = 1e-3
optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
before = factor.detach().clone()
text = torch.arange(10)[None]
model(text, labels=text).loss.backward()
agree = (factor.grad * twin.grad.T > 0)
optimizer.step()
moved = (factor.detach() - before).abs() / learning_rate
print(f"{len(trained)} parameters with {sum(p.numel() for p in trained)} entries; the two factors have {entries}")
print(f"one memory: {factor.data_ptr() == twin.data_ptr()}, one parameter: {factor is twin}")
print(f"AdamW moves entries by {moved[agree].mean():.2f} lr where the two gradients agree in sign ({agree.float().mean():.2f} of them), "
      f"by {moved[~agree].mean():.2f} lr elsewhere")
as_found = (
    len(trained) == 4
    and factor.data_ptr() == twin.data_ptr()
    and factor is not twin
    and not torch.equal(factor.grad, twin.grad.T)
    and abs(moved[agree].mean() - 2) < 0.05
    and moved[~agree].mean() < 0.05
)
sys.exit(0 if as_found else "another behaviour than in PEFT 0.21.2")
PYTHON
venv/bin/python check.py
